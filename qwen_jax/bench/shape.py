# SPDX-License-Identifier: Apache-2.0
"""The work a benchmark asks for, and one count of it used for every candidate.

Source: the matmul count is the usual one (2 m k n per product, backward = 2 x
forward); no deviation. Norms, softmax, rotary embedding, element-wise products and
the optimizer are not counted, recomputation is not counted: it is *model* FLOPs, so
a candidate that recomputes or computes masked scores gets no credit for it.
Formats: `Shape.record()` is the JSON object that peers receive.
Units: FLOPs of one step (forward + backward) over `rows x tokens` tokens.
Raises config.InputError for a shape that no candidate could build.
"""

from __future__ import annotations

import dataclasses

from qwen_jax import config


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder of the Qwen3 kind and the batch it is trained on."""

    layers: int = 8
    width: int = 512
    heads: int = 8
    kv_heads: int = 4
    head_width: int = 64
    ffn: int = 1536
    vocab: int = 8192
    tied: bool = True
    rows: int = 4
    tokens: int = 512
    rope_theta: float = 1e6
    norm_eps: float = 1e-6

    def record(self) -> dict:
        """The shape as a JSON-able dict, as peers receive it."""
        return dataclasses.asdict(self)

    def describe(self) -> str:
        """One line for titles and logs."""
        tied = "tied" if self.tied else "untied"
        return (
            f"{self.layers} layers, d {self.width}, {self.heads} heads, "
            f"{self.kv_heads} kv heads, head width {self.head_width}, f {self.ffn}, "
            f"vocabulary {self.vocab} ({tied}), {self.rows} x {self.tokens} tokens"
        )


def check(shape: Shape) -> Shape:
    """Return `shape`, or raise InputError naming the field that cannot be built."""
    for field in dataclasses.fields(shape):
        value = getattr(shape, field.name)
        if not isinstance(value, bool) and value <= 0:
            raise config.InputError(
                f"--{field.name} is {value}, wanted a positive number"
            )
    if shape.heads % shape.kv_heads:
        raise config.InputError(
            f"--heads {shape.heads} is not a multiple of --kv_heads {shape.kv_heads}; "
            f"try --kv_heads {shape.heads}"
        )
    if shape.head_width % 2:
        raise config.InputError(
            f"--head_width {shape.head_width} is odd; rotary embedding pairs channels, "
            f"try {shape.head_width + 1}"
        )
    return shape


def num_params(shape: Shape) -> int:
    """Parameters of the Qwen3 decoder: projections, norms, QK-norms, embedding(s)."""
    s = shape
    projections = s.width * s.head_width * (2 * s.heads + 2 * s.kv_heads)
    layer = projections + 3 * s.width * s.ffn + 2 * s.width + 2 * s.head_width
    embeddings = s.vocab * s.width * (1 if s.tied else 2)
    return s.layers * layer + embeddings + s.width


def dense_flops(shape: Shape) -> int:
    """Forward FLOPs of every product with a weight (the embedding look-up is free)."""
    s = shape
    projections = s.width * s.head_width * (2 * s.heads + 2 * s.kv_heads)
    weights = s.layers * (projections + 3 * s.width * s.ffn) + s.vocab * s.width
    return 2 * s.rows * s.tokens * weights


def attention_flops(shape: Shape, *, causal: bool) -> int:
    """Forward FLOPs of scores and weighted values; `causal` counts visible pairs."""
    s = shape
    pairs = s.tokens * (s.tokens + 1) // 2 if causal else s.tokens * s.tokens
    return 4 * s.layers * s.rows * s.heads * s.head_width * pairs


def step_flops(shape: Shape, *, causal: bool) -> int:
    """FLOPs of forward + backward: 3 x (dense + attention).

    causal=False counts all t x t scores, the custom of most published tables;
    causal=True counts only the pairs a causal model must compute.
    """
    return 3 * (dense_flops(shape) + attention_flops(shape, causal=causal))
