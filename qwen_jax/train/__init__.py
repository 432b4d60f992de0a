# SPDX-License-Identifier: Apache-2.0
"""Training: the state, the losses, one step, one loop."""
