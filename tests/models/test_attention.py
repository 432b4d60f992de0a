# SPDX-License-Identifier: Apache-2.0
"""Every attention backend against the same loops; those that cannot are refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import config, mesh
from qwen_jax.models import attention, ring, sizes
from tests.oracles import attention as oracle

T = 128


def inputs(b=2, t=T, n=4, h=2, k=64, seed=0):
    draw = np.random.default_rng(seed)
    shapes = [(b, t, n, k), (b, t, h, k), (b, t, h, k), (b, t, n, k)]
    return [jnp.asarray(draw.normal(size=s), jnp.float32) for s in shapes]


def segments(*lengths):
    """Rows of documents of these lengths; what is left is padding."""
    rows = np.zeros((len(lengths), T), np.int32)
    for row, parts in zip(rows, lengths, strict=True):
        row[: sum(parts)] = np.repeat(np.arange(len(parts)) + 1, parts)
    return rows


@pytest.mark.parametrize("window", [0, 24])
def test_splash_is_attention_within_documents(window):
    q, k, v, d_out = inputs()
    rows = segments([40, 50, 30], [128])
    # What a padding query would get is set to zero and has no gradient.
    run = functools.partial(attention._splash, window=window, interpret=True)
    out, pull = jax.vjp(lambda *x: run(*x, jnp.asarray(rows)), q, k, v)
    want = oracle.attention(q, k, v, rows, window)
    np.testing.assert_allclose(out, want, atol=2e-5)
    for got, wanted in zip(
        pull(d_out), oracle.gradients(q, k, v, rows, d_out, window), strict=True
    ):
        np.testing.assert_allclose(got, wanted, atol=5e-5)


def test_splash_without_segments_is_causal():
    q, k, v, _ = inputs(b=1)
    out = attention._splash(q, k, v, window=0, interpret=True)
    want = oracle.attention(q, k, v, segments([T]))
    np.testing.assert_allclose(out, want, atol=2e-5)


def test_splash_names_the_rows_it_can_take():
    q, k, v, _ = inputs(b=1, t=96)
    with pytest.raises(config.InputError, match=r"multiple of 128 tokens, got 96"):
        attention._splash(q, k, v, window=0, interpret=True)


@pytest.mark.parametrize("block", [32, 512])
def test_new_queries_over_a_cache(block):
    """The last 70 tokens of a row against a cache with slots to spare."""
    q, k, v, _ = inputs(k=16)
    rows = segments([128], [30, 98])
    want = oracle.attention(q, k, v, rows)[:, -70:]
    spare = [(0, 0), (0, 20), (0, 0), (0, 0)]
    keys, values = (jnp.pad(x, spare, constant_values=7.0) for x in (k, v))
    keys, values = keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3)
    slots = jnp.pad(jnp.asarray(rows), [(0, 0), (0, 20)])
    got = attention.over_cache(
        q[:, -70:],
        keys,
        values,
        jnp.asarray(rows)[:, -70:],
        slots,
        jnp.int32(T - 70),
        block=block,
    )
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("window", [24, 58])
@pytest.mark.parametrize("block", [32, 512])
def test_new_queries_over_a_ring(window, block):
    """The last 70 tokens of a row against the `window` tokens before them."""
    q, k, v, _ = inputs(k=16)
    rows = jnp.asarray(segments([128], [30, 98]))
    want = oracle.attention(q, k, v, rows, window)
    start = T - 70
    lead = (len(rows), k.shape[2])
    held = {
        "k_bhks": jnp.zeros((*lead, 16, window)),
        "v_bhsk": jnp.zeros((*lead, window, 16)),
    }
    over = functools.partial(attention.over_ring, window=window, block=block)
    found, segments_bw = [], jnp.zeros((len(rows), window), jnp.int32)
    for part in (slice(0, start), slice(start, T)):
        at = ring.places(
            segments_bw, rows[:, : part.start], rows[:, part], mesh.Rules()
        )
        new = {"k_bhks": k[:, part], "v_bhsk": v[:, part]}
        out, held = over(q[:, part], new, held, rows[:, part], at)
        segments_bw = at.segments_bw
        found.append(out)
    np.testing.assert_allclose(np.concatenate(found, axis=1), want, atol=2e-5)


@pytest.mark.parametrize(
    ("fields", "platform", "packed", "told"),
    [
        ({"attention": "cudnn"}, "cpu", False, "'cudnn' needs a GPU, this is cpu"),
        ({"attention": "cudnn"}, "gpu", True, "packed documents would see each other"),
        (
            {"attention": "cudnn", "compute_dtype": "float32"},
            "gpu",
            False,
            "needs bfloat16 or float16, compute_dtype is float32",
        ),
        ({"attention": "splash"}, "gpu", False, "'splash' needs a TPU, this is gpu"),
        (
            {"attention": "splash", "head_width": 96},
            "tpu",
            True,
            "multiple of 64, this model has 96",
        ),
    ],
)
def test_a_backend_that_cannot_is_refused(fields, platform, packed, told):
    spec = sizes.get("qwen3-0.6b", **{"compute_dtype": "bfloat16"} | fields)
    with pytest.raises(config.InputError, match=told) as error:
        attention.check_backend(spec, platform, packed=packed)
    assert "--config.model.attention=blockwise" in str(error.value)


@pytest.mark.parametrize(
    ("name", "platform", "packed"),
    [("cudnn", "gpu", False), ("splash", "tpu", True), ("blockwise", "cpu", True)],
)
def test_a_backend_that_can_is_not(name, platform, packed):
    spec = sizes.get("qwen3-0.6b", attention=name, compute_dtype="bfloat16")
    attention.check_backend(spec, platform, packed=packed)


def test_cudnn_never_takes_segments():
    q, k, v, _ = inputs(k=16)
    with pytest.raises(config.InputError, match="takes no segment ids"):
        attention._cudnn(q, k, v, jnp.ones((2, T), jnp.int32), window=0)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 24])
def test_cudnn_is_causal_attention(window):
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")
    q, k, v, _ = (x.astype(jnp.bfloat16) for x in inputs())
    out = attention._cudnn(q, k, v, window=window)
    want = oracle.attention(q, k, v, segments([T], [T]), window)
    np.testing.assert_allclose(out.astype(jnp.float32), want, atol=2e-2)
