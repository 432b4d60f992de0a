# SPDX-License-Identifier: Apache-2.0
"""Schedules, the optimizer built from its record, and hyper-parameters derived openly.

`build.OptimConfig` says what a run wants, `derive.derive` fills in what it left open
and gives its reasons line by line, `build.build` makes the optax transformation.
"""
