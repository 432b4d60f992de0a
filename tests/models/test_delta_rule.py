# SPDX-License-Identifier: Apache-2.0
"""The delta rule, by steps and in chunks, against loops written from its paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.models.kernels import delta_rule
from tests.oracles import delta_rule as oracle

B, T, H, K, U = 2, 50, 3, 8, 6
FORMS = ["recurrent", "chunk 1", "chunk 4", "chunk 16", "chunk 64"]


def draw(seed=0, t=T):
    rng = np.random.default_rng(seed)
    q, k = (rng.normal(size=(B, t, H, K)) for _ in range(2))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    q *= K**-0.5 / np.linalg.norm(q, axis=-1, keepdims=True)
    v = rng.normal(size=(B, t, H, U))
    g = -rng.exponential(0.3, size=(B, t, H))
    beta = rng.uniform(size=(B, t, H))
    return q, k, v, g, beta


def form(name):
    if name == "recurrent":
        return delta_rule.recurrent
    chunk = int(name.split()[1])
    return lambda *args: delta_rule.chunked(*args, chunk=chunk)


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", FORMS)
def test_a_row_is_the_papers_loop(name):
    inputs = draw()
    start = np.random.default_rng(1).normal(size=(B, H, K, U))
    state = delta_rule.State(jnp.asarray(start), jnp.ones((B,), jnp.int32))
    out, state = form(name)(
        *map(jnp.asarray, inputs), jnp.ones((B, T), jnp.int32), state
    )
    for b in range(B):
        wanted, s = oracle.one_row(*(x[b] for x in inputs), start[b])
        np.testing.assert_allclose(out[b], wanted, atol=1e-12)
        np.testing.assert_allclose(state.s_bhku[b], s, atol=1e-12)


# Padding on both sides and between, documents that begin and end inside chunks.
ROWS = np.array(
    [
        [0] * 3 + [1] * 20 + [2] * 1 + [3] * 18 + [0] * 8,
        [5] * 16 + [0] * 2 + [6] * 32,
    ],
    np.int32,
)


@pytest.mark.parametrize("name", FORMS)
def test_documents_of_a_packed_row_are_alone(name):
    inputs = draw(2)
    out, state = form(name)(*map(jnp.asarray, inputs), jnp.asarray(ROWS), None)
    for b in range(B):
        for segment in np.unique(ROWS[b]):
            here = ROWS[b] == segment
            if segment == 0:
                assert not np.any(out[b][here])
                continue
            wanted, s = oracle.one_row(*(x[b][here] for x in inputs))
            np.testing.assert_allclose(out[b][here], wanted, atol=1e-12)
        np.testing.assert_allclose(state.s_bhku[b], s, atol=1e-12)
        assert state.segment_b[b] == segment


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("at", [1, 17, 40])
def test_a_row_in_two_parts_is_the_row(name, at):
    inputs = [jnp.asarray(x) for x in (*draw(3), ROWS)]
    whole, end = form(name)(*inputs, None)
    first, state = form(name)(*(x[:, :at] for x in inputs), None)
    second, state = form(name)(*(x[:, at:] for x in inputs), state)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=1e-12)
    np.testing.assert_allclose(state.s_bhku, end.s_bhku, atol=1e-12)
    np.testing.assert_array_equal(state.segment_b, end.segment_b)


@pytest.mark.parametrize("segments", [None, ROWS], ids=["one document", "packed"])
@pytest.mark.parametrize("chunk", [4, 16, 64])
def test_gradients_of_chunks_are_those_of_steps(segments, chunk):
    inputs = [jnp.asarray(x) for x in draw(4)]
    start = jnp.asarray(np.random.default_rng(5).normal(size=(B, H, K, U)))
    owner = jnp.asarray([1, 5], jnp.int32)
    ids = None if segments is None else jnp.asarray(segments)
    weight = jnp.asarray(np.random.default_rng(6).normal(size=(B, T, H, U)))

    def total(run, inputs, start):
        out, state = run(*inputs, ids, delta_rule.State(start, owner))
        return jnp.sum(out * weight) + jnp.sum(jnp.sin(state.s_bhku))

    def chunks(*args):
        return delta_rule.chunked(*args, chunk=chunk)

    wanted = jax.grad(total, argnums=(1, 2))(delta_rule.recurrent, inputs, start)
    found = jax.grad(total, argnums=(1, 2))(chunks, inputs, start)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), found, wanted
    )


def test_strong_decay_overflows_nothing():
    q, k, v, g, beta = map(jnp.asarray, draw(7))
    g = g * 400  # e^(G_i - G_j) for i < j would be infinite

    def total(g):
        return jnp.sum(delta_rule.chunked(q, k, v, g, beta)[0])

    value, slope = jax.value_and_grad(total)(g)
    assert np.isfinite(value) and np.all(np.isfinite(slope))


def test_shapes_that_do_not_fit():
    q, k, v, g, beta = map(jnp.asarray, draw(8))
    with pytest.raises(ValueError, match="delta rule shapes do not fit"):
        delta_rule.chunked(q[:, 1:], k, v, g, beta)
