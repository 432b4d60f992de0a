# SPDX-License-Identifier: Apache-2.0
"""What runs where, and what it costs: facts of chips, micro-batches, dry runs."""
