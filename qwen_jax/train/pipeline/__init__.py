# SPDX-License-Identifier: Apache-2.0
"""Training through a pipeline of stages, each with a stretch of the layers."""

from qwen_jax.train.pipeline.batches import (
    gradients,
    on_stages,
    table,
    value_and_grad,
)
from qwen_jax.train.pipeline.chunked import (
    FORWARD_CHUNKS,
    chunk_scorer,
    chunked_value_and_grad,
    forward_parts,
    scorer,
)
from qwen_jax.train.pipeline.share import share_of

__all__ = [
    "FORWARD_CHUNKS",
    "chunk_scorer",
    "chunked_value_and_grad",
    "forward_parts",
    "gradients",
    "on_stages",
    "scorer",
    "share_of",
    "table",
    "value_and_grad",
]
