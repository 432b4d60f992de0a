# SPDX-License-Identifier: Apache-2.0
"""What a step in chunks holds and does, as the method says it (what the compiler makes
of it: tests/test_planning.py)."""

import dataclasses

import jax.numpy as jnp
import pytest

from qwen_jax import mesh
from qwen_jax.models import flops
from qwen_jax.models import spec as spec_lib
from qwen_jax.plan import chunks as costs

SPEC = spec_lib.Spec(
    vocab_size=8000,
    width=256,
    num_layers=6,
    num_heads=8,
    num_kv_heads=2,
    head_width=32,
    ffn_width=1024,
    max_positions=1 << 17,
)
ALONE = dict.fromkeys(mesh.AXES, 1)


def estimate(c, k, n, **more):
    how = {"optimizer": "adamw", "remat": "dots"} | more
    sizes = {"chunk_tokens": c, "live_chunks": k, "chunks": n}
    return costs.estimate(SPEC, mesh.Rules(), ALONE, **how, **sizes)


def test_it_grows_as_the_method_says():
    """With the context by keys and values alone, with what waits by that alone."""
    short, long = estimate(256, 2, 8), estimate(256, 2, 64)
    slots = (64 - 8) * 256
    keys = 2 * SPEC.num_layers * SPEC.num_kv_heads * SPEC.head_width
    size = jnp.dtype(SPEC.compute_dtype).itemsize
    assert long.group - short.group == keys * slots * (size + 4)
    one, three = estimate(256, 1, 64), estimate(256, 3, 64)
    assert three.group - one.group == 2 * one.waiting
    alone = estimate(256, 1, 1)
    assert alone.keys == alone.waiting == alone.working == 0
    half = estimate(256, 2, 64, kv_grad_bytes=size)
    assert half.key_grads == keys * 64 * 256 * size


def test_work_is_that_of_the_passes_that_are_made():
    how = {"remat": "dots", "length": 0.0, "weight_bytes": 10}

    def work(c, k, packed, groups):
        sizes = {"chunk_tokens": c, "live_chunks": k}
        return costs.work(SPEC, packed=packed, groups=groups, **sizes, **how)

    head = 2 * SPEC.vocab_size * SPEC.width
    plain = flops.forward_per_token(SPEC, 0) - head
    flat = work(256, 1, 3, [])
    assert flat.flops == pytest.approx(3 * 256 * 3 * (plain + head), rel=1e-3)
    assert flat.bytes == 10 * (3 * 3 + 3 * 3) and flat.batches == 3
    # Of 4 chunks of which one waits three go forward twice.
    groups = [work(256, k, 0, [4]) for k in (1, 4)]
    again = groups[0].flops - groups[1].flops
    seen = sum(
        flops.forward_per_token(SPEC, (2 * i + 1) * 256, causal=True) - head
        for i in range(3)
    )
    assert again == pytest.approx(256 * seen)
    wide = dataclasses.replace(SPEC, num_layers=12)
    assert costs.work(
        wide, packed=1, groups=[], chunk_tokens=256, live_chunks=1, **how
    ).flops == pytest.approx(256 * 3 * (2 * plain + head), rel=1e-3)
