# SPDX-License-Identifier: Apache-2.0
"""The Qwen system as one JAX codebase: data, training, checkpoints, export.

`from qwen_jax import models` is the way in for notebooks; `qwen-jax --help` for the
command line. Importing this package alone imports nothing heavy.
"""

__version__ = "0.1.0"
