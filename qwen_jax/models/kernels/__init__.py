# SPDX-License-Identifier: Apache-2.0
"""Array kernels, each beside its plain twin."""
