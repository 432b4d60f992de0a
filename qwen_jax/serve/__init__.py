# SPDX-License-Identifier: Apache-2.0
"""Answers for many at once: an engine with paged memory, and servers in front of it."""
