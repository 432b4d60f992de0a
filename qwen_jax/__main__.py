# SPDX-License-Identifier: Apache-2.0
"""`python -m qwen_jax` is `qwen-jax`."""

import sys

from qwen_jax import cli

if __name__ == "__main__":
    sys.exit(cli.main())
