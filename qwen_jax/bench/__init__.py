# SPDX-License-Identifier: Apache-2.0
"""Measurements: how fast and how large, side by side with other libraries.

One file a question: `train` is the command `qwen-jax bench train`, `shape` says
what is computed and counts it, `rounds` runs candidates in turns, `venvs` makes the
peers' environments, `table` turns records into text. `peers/` holds one standalone
script a candidate; they run in their own interpreters and speak JSON lines.
Nothing heavy is imported here.
"""
