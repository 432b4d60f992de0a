# SPDX-License-Identifier: Apache-2.0
"""Memory of a step is set by the chunk: beside keys and values, not by the context."""

import functools

import jax
import jax.numpy as jnp
import pytest

from qwen_jax import mesh, models
from qwen_jax.models import spec as spec_lib
from qwen_jax.train.chunkflow import chunks, gradients, group

C = 128
SPEC = spec_lib.Spec(
    vocab_size=256,
    width=64,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    head_width=32,
    ffn_width=192,
    max_positions=1 << 17,
)


@functools.cache
def temporary_bytes(n, live):
    """Of the compiled step of a document of n chunks."""
    params = jax.eval_shape(lambda: models.init(SPEC, 0))
    assert chunks.rounded(n) == n  # else what is compiled is for more
    operands = (
        params,
        jax.eval_shape(functools.partial(group.no_sums, SPEC), params),
        jax.eval_shape(lambda: jax.tree.map(jnp.asarray, chunks.empty(1, C, n))),
        *(jnp.int32(n), jnp.float32(1), None),
    )
    how = {"spec": SPEC, "rules": mesh.Rules(), "live": live}
    step = jax.jit(functools.partial(group.gradients, **how), donate_argnums=1)
    return step.lower(*operands).compile().memory_analysis().temp_size_in_bytes


def keys_and_values(n):
    """Bytes of those of n chunks and of their cotangents, all float32."""
    return 2 * 2 * SPEC.num_layers * SPEC.num_kv_heads * SPEC.head_width * n * C * 4


@pytest.mark.parametrize("live", [1, 2])
def test_beside_keys_and_values_it_does_not_grow_with_the_context(live):
    rest = [temporary_bytes(n, live) - keys_and_values(n) for n in (6, 24)]
    assert 0 < rest[0] and abs(rest[1] - rest[0]) < 0.01 * rest[0]


def test_it_grows_by_what_waits_for_each_chunk_that_waits():
    two, four, eight = (temporary_bytes(8, live) for live in (2, 4, 8))
    inputs = SPEC.num_layers * C * SPEC.width
    heads = SPEC.num_layers * C * SPEC.num_heads * SPEC.head_width
    sums = SPEC.num_layers * C * SPEC.num_heads
    waits = 4 * (inputs + heads + sums + C * SPEC.width)
    assert four - two == pytest.approx(2 * waits, rel=0.05)
    assert eight - four == pytest.approx(4 * waits, rel=0.05)


@functools.cache
def held_out_bytes(n):
    """Of the compiled evaluation of a document of n chunks."""
    params = jax.eval_shape(lambda: models.init(SPEC, 0))
    part = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, chunks.empty(1, C, n)))
    lowered = gradients.group_nll.lower(
        params, part, jnp.int32(n), spec=SPEC, rules=mesh.Rules()
    )
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_held_out_text_takes_keys_and_values_and_one_chunk():
    few, many = (held_out_bytes(n) - keys_and_values(n) // 2 for n in (6, 24))
    assert 0 < few and abs(many - few) < 0.01 * few
    assert few < temporary_bytes(6, 1) - keys_and_values(6)
