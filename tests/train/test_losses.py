# SPDX-License-Identifier: Apache-2.0
"""Chunked cross-entropy against NumPy in float64: values, gradients, meshes, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import mesh
from qwen_jax.train import losses
from tests.oracles import losses as oracle

Z = 1e-2  # large, so that a wrong z-loss shows
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def inputs(rows=2, t=13, d=8, v=24, seed=0):
    """hidden, output matrix, targets, mask; logits spread over several nats."""
    draw = np.random.default_rng(seed)
    hidden = draw.normal(size=(rows, t, d)).astype(np.float32)
    w = draw.normal(size=(v, d)).astype(np.float32)
    targets = draw.integers(0, v, size=(rows, t)).astype(np.int32)
    mask = draw.choice([0.0, 1.0, 0.5], size=(rows, t)).astype(np.float32)
    return hidden, w, targets, mask


@functools.partial(jax.jit, static_argnames=("chunk", "rules"))
def ours(hidden, w, targets, mask, *, chunk, rules):
    """((total, parts), (d hidden, d w))."""

    def total(hidden, w):
        return losses.cross_entropy(
            hidden, w, targets, mask, z_coef=Z, rules=rules, chunk=chunk
        )

    return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, w)


def check(got, arrays):
    (total, parts), (dx, dw) = jax.device_get(got)
    wanted = oracle.cross_entropy(*arrays, Z)
    for value, want in zip((total, parts["nll"], parts["z"]), wanted, strict=False):
        np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(dx, wanted[3], **CLOSE)
    np.testing.assert_allclose(dw, wanted[4], **CLOSE)


# 13 tokens a row: one at a time, chunks that do not divide, one chunk, one that is
# wider than the row, and the size chosen by itself.
@pytest.mark.parametrize("chunk", [1, 4, 13, 16, None])
def test_values_and_gradients(chunk):
    arrays = inputs()
    check(ours(*arrays, chunk=chunk, rules=mesh.Rules()), arrays)


OFF = mesh.Rules(batch="data")  # the width lies on an axis that the rows do not


# (data, fsdp, tensor): the vocabulary split, the table split both ways, all axes.
@pytest.mark.parametrize(
    "sizes, rules",
    [
        ((1, 1, 4), mesh.Rules()),
        ((1, 4, 1), mesh.Rules()),
        ((2, 2, 2), mesh.Rules()),
        ((2, 2, 2), OFF),
        ((1, 4, 1), OFF),
    ],
)
def test_on_a_mesh(sizes, rules):
    arrays = inputs(rows=4)
    devices = jax.devices()[: np.prod(sizes)]
    on = mesh.make(mesh.MeshConfig(*sizes), devices)
    layout = (
        rules.pspec("batch", None, None),
        rules.pspec("vocab", "embed"),
        rules.pspec("batch", None),
        rules.pspec("batch", None),
    )
    with jax.set_mesh(on):
        placed = [
            jax.device_put(a, mesh.sharding(on, spec))
            for a, spec in zip(arrays, layout, strict=True)
        ]
        got = ours(*placed, chunk=4, rules=rules)
        assert got[1][1].sharding.spec == rules.pspec("vocab", "embed")
        check(got, arrays)


def test_a_masked_target_may_be_any_number():
    hidden, w, targets, mask = inputs()
    mask[0] = 0
    (total, _), (dx, _) = ours(hidden, w, targets, mask, chunk=4, rules=mesh.Rules())
    targets[0] = -100
    (total2, _), (dx2, _) = ours(hidden, w, targets, mask, chunk=4, rules=mesh.Rules())
    assert total == total2 and not np.asarray(dx[0]).any()
    np.testing.assert_array_equal(dx, dx2)


def test_logits_of_thousands_do_not_overflow():
    hidden, w, targets, mask = inputs(t=3)
    hidden = hidden * 1000
    (total, _), grads = ours(hidden, w, targets, mask, chunk=2, rules=mesh.Rules())
    want = oracle.cross_entropy(hidden, w, targets, mask, Z)
    np.testing.assert_allclose(total, want[0], rtol=1e-5)
    np.testing.assert_allclose(grads[1], want[4], rtol=1e-4)


def test_bfloat16_hidden_states_sum_in_float32():
    hidden, w, targets, _ = inputs(rows=8, t=64)
    mask = np.ones((8, 64), np.float32)
    low = jnp.asarray(hidden, jnp.bfloat16)
    rounded = np.asarray(jnp.asarray(w, jnp.bfloat16), np.float64)
    want = oracle.cross_entropy(np.asarray(low, np.float64), rounded, targets, mask, Z)
    (total, _), (dx, dw) = ours(low, w, targets, mask, chunk=16, rules=mesh.Rules())
    assert total.dtype == jnp.float32 and dw.dtype == jnp.float32
    assert dx.dtype == jnp.bfloat16
    # Products of bfloat16 are exact in float32: only the sums round.
    np.testing.assert_allclose(total, want[0], rtol=1e-5)
    np.testing.assert_allclose(dw, want[4], rtol=0.02, atol=0.02 * abs(want[4]).max())


def test_the_plain_twin_is_the_same_function():
    hidden, w, targets, mask = inputs()
    nll, z = losses.reference(hidden, w, targets, mask)
    _, want_nll, want_z, _, _ = oracle.cross_entropy(hidden, w, targets, mask, Z)
    np.testing.assert_allclose([nll, z], [want_nll, want_z], rtol=1e-5)


def temporary_bytes(t, v, d=8):
    """What the compiler sets aside for value and gradient of one row."""
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    lowered = ours.lower(
        float32((1, t, d)),
        float32((v, d)),
        jax.ShapeDtypeStruct((1, t), jnp.int32),
        float32((1, t)),
        chunk=None,
        rules=mesh.Rules(),
    )
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_vocabulary_times_tokens(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 1 << 20)
    small = temporary_bytes(1024, 1024)
    # Four times each: sixteen times the logits. What may grow is the gradient of the
    # table (v x d) and of the hidden states (t x d), a few copies of either.
    large = temporary_bytes(4096, 4096)
    logits = 4 * 4096 * 4096
    assert large - small < 8 * (4096 + 4096) * 8 * 4
    assert large < logits / 4
