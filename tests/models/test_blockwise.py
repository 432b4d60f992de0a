# SPDX-License-Identifier: Apache-2.0
"""Blockwise attention against NumPy loops in float64: values, gradients, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.models.kernels import blockwise
from tests.oracles import attention as oracle

# float32 against float64 on unit-scale inputs: rounding is a few times 1e-7.
CLOSE = {"rtol": 2e-5, "atol": 5e-6}


def inputs(rows, t, heads, kv_heads, width, seed=0):
    """q, k, v and a cotangent, unit scale."""
    draw = np.random.default_rng(seed)
    shapes = [(rows, t, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    return [draw.normal(size=shape).astype(np.float32) for shape in shapes]


def packed(rows, t, seed, empty=True):
    """Segment ids of random pieces, padding (0) at the end of most rows."""
    draw = np.random.default_rng(seed)
    out = np.zeros((rows, t), np.int32)
    for row in out:
        end = t - (draw.integers(0, t // 3) if empty else 0)
        cuts = np.sort(draw.integers(0, end, size=3))
        row[:end] = 1 + np.searchsorted(cuts, np.arange(end), side="right")
    return out


@functools.partial(jax.jit, static_argnames=("window", "block", "causal"))
def ours(q, k, v, d_out, segments, *, window, block, causal=True):
    """(result, gradients) of the kernel."""
    run = functools.partial(
        blockwise.attention, window=window, block=block, causal=causal
    )
    out, back = jax.vjp(lambda q, k, v: run(q, k, v, segments), q, k, v)
    return out, back(d_out)


def check(q, k, v, d_out, segments, *, window, block, causal=True):
    out, grads = ours(
        q, k, v, d_out, segments, window=window, block=block, causal=causal
    )
    known = np.ones(q.shape[:2], np.int32) if segments is None else segments
    want = oracle.attention(q, k, v, known, window, causal)
    np.testing.assert_allclose(out, want, **CLOSE)
    wanted = oracle.gradients(q, k, v, known, d_out, window, causal)
    for name, got, want in zip("qkv", grads, wanted, strict=True):
        np.testing.assert_allclose(got, want, err_msg=f"d{name}", **CLOSE)


# Up to 8 blocks a row are written out, longer rows loop: LOOP and OUT are block sizes
# that make 40 tokens the one and the other. Most tests share these compiled programs.
LOOP, OUT, SHAPE = 4, 16, (2, 40, 4, 2, 8)


@pytest.mark.parametrize("block", [LOOP, OUT])
@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("segmented", [False, True])
def test_values_and_gradients(block, window, segmented):
    q, k, v, d_out = inputs(*SHAPE)
    segments = packed(2, 40, seed=block + window) if segmented else None
    check(q, k, v, d_out, segments, window=window, block=block)


@pytest.mark.parametrize(
    "t, block, window", [(43, LOOP, 0), (43, LOOP, 9), (32, OUT, 0), (32, OUT, 17)]
)
def test_rows_that_fill_their_last_block_or_not(t, block, window):
    q, k, v, d_out = inputs(2, t, 2, 2, 4, seed=t)
    check(q, k, v, d_out, None, window=window, block=block)


@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (6, 2), (4, 1)])
def test_head_groups(heads, kv_heads):
    q, k, v, d_out = inputs(1, 36, heads, kv_heads, 6, seed=1)
    check(q, k, v, d_out, packed(1, 36, seed=4), window=0, block=LOOP)


@pytest.mark.parametrize("t", [1, 7, 130])
def test_the_block_that_is_chosen_by_itself(t):
    q, k, v, d_out = inputs(1, t, 2, 1, 4, seed=2)
    check(q, k, v, d_out, None, window=0, block=None)


@st.composite
def layouts(draw):
    """Two rows of 40 segment ids: contiguous pieces, padding before, between, after.

    Numbers need not rise, as long as equal ones stand together.
    """
    rows = []
    for _ in range(2):
        lengths = draw(st.lists(st.integers(1, 15), min_size=1, max_size=12))
        names = draw(st.permutations(range(1, len(lengths) + 1)))
        real = draw(st.lists(st.booleans(), min_size=12, max_size=12))
        ids = []
        for length, name, kept in zip(lengths, names, real, strict=False):
            ids += [name if kept else 0] * length
        rows.append((ids + [0] * 40)[:40])
    return np.array(rows, np.int32)


@settings(max_examples=25, deadline=None)
@given(layouts(), st.sampled_from([0, 6]), st.sampled_from([LOOP, OUT]))
def test_any_segment_layout(segments, window, block):
    q, k, v, d_out = inputs(*SHAPE, seed=5)
    check(q, k, v, d_out, segments, window=window, block=block)


@settings(max_examples=20, deadline=None)
@given(layouts(), st.sampled_from([LOOP, OUT]))
def test_any_segment_layout_without_the_causal_mask(segments, block):
    """Every token sees all of its segment: what comes after it, too."""
    q, k, v, d_out = inputs(*SHAPE, seed=9)
    check(q, k, v, d_out, segments, window=0, block=block, causal=False)


@pytest.mark.parametrize("t, block", [(43, LOOP), (32, OUT)])
def test_whole_rows_without_the_causal_mask(t, block):
    q, k, v, d_out = inputs(2, t, 2, 2, 4, seed=t)
    check(q, k, v, d_out, None, window=0, block=block, causal=False)
    with pytest.raises(ValueError, match="window=3 goes with causal"):
        blockwise.attention(q, k, v, window=3, causal=False)


@settings(max_examples=15, deadline=None)
@given(layouts(), st.sampled_from([LOOP, OUT]))
def test_other_segments_cannot_be_felt(segments, block):
    """Changing everything outside of a segment changes nothing in it, bit for bit."""
    mine, other = inputs(*SHAPE, seed=6), inputs(*SHAPE, seed=7)
    inside = (segments == segments[0, 20])[:, :, None, None]
    inside[1] = False
    mixed = [np.where(inside, a, b) for a, b in zip(mine, other, strict=True)]
    out, grads = ours(*mine, segments, window=0, block=block)
    out2, grads2 = ours(*mixed, segments, window=0, block=block)
    for a, b in zip([out, *grads], [out2, *grads2], strict=True):
        np.testing.assert_array_equal(np.where(inside, a, 0), np.where(inside, b, 0))


def test_padding_gets_zeros_and_gives_no_gradient():
    q, k, v, d_out = inputs(*SHAPE)
    segments = np.zeros((2, 40), np.int32)
    segments[0, 10:30] = 1
    for block in (LOOP, OUT):
        out, grads = ours(q, k, v, d_out, segments, window=0, block=block)
        for x in (out, *grads):
            assert not np.asarray(x)[segments == 0].any()
            assert np.isfinite(x).all()


def test_bfloat16_stays_close_and_keeps_its_dtype():
    q, k, v, d_out = (x.astype(jnp.bfloat16) for x in inputs(1, 40, 2, 1, 16))
    for block in (LOOP, OUT):
        out, grads = ours(q, k, v, d_out, None, window=0, block=block)
        assert {x.dtype for x in (out, *grads)} == {jnp.dtype(jnp.bfloat16)}
        wide = [np.asarray(x, np.float64) for x in (q, k, v)]
        want = oracle.attention(*wide, np.ones((1, 40), np.int32))
        # One bfloat16 rounding of weights and result is 2^-8 of their size.
        np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=0.03)


def test_the_plain_twin_is_the_same_function():
    q, k, v, _ = inputs(2, 37, 4, 2, 8, seed=8)
    segments = packed(2, 37, seed=3)
    for window in (0, 7):
        want = oracle.attention(q, k, v, segments, window)
        got = blockwise.reference(q, k, v, segments, window=window)
        np.testing.assert_allclose(got, want, **CLOSE)
    want = oracle.attention(q, k, v, segments, causal=False)
    got = blockwise.reference(q, k, v, segments, causal=False)
    np.testing.assert_allclose(got, want, **CLOSE)


def test_shapes_that_do_not_fit_are_named():
    q, k, v, _ = inputs(1, 8, 4, 3, 8)
    with pytest.raises(ValueError, match=r"do not fit: q \(1, 8, 4, 8\)"):
        blockwise.attention(q, k, v)


def temporary_bytes(t, *, backward, segmented):
    """What the compiler sets aside for one row of t tokens."""
    shape = jax.ShapeDtypeStruct((1, t, 1, 8), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, t), jnp.int32) if segmented else None

    def forward(q, k, v, segments):
        return blockwise.attention(q, k, v, segments, block=128).sum()

    fn = jax.grad(forward, argnums=(0, 1, 2)) if backward else forward
    analysis = jax.jit(fn).lower(shape, shape, shape, ids).compile().memory_analysis()
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("segmented", [False, True])
def test_memory_is_linear_in_length(backward, segmented):
    half, whole = (
        temporary_bytes(t, backward=backward, segmented=segmented) for t in (2048, 4096)
    )
    assert whole <= 2.2 * half
    assert whole < 4096 * 4096 * 4 / 8, "a [t, s] matrix is held"
