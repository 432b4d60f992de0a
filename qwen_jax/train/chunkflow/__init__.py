# SPDX-License-Identifier: Apache-2.0
"""ChunkFlow (arXiv 2503.02356): long and short documents in chunks of one size."""

from qwen_jax.train.chunkflow.gradients import (
    Settings,
    jitted,
    parts_of,
    run,
    value_and_grad,
)

__all__ = ["Settings", "jitted", "parts_of", "run", "value_and_grad"]
