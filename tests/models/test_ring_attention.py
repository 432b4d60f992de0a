# SPDX-License-Identifier: Apache-2.0
"""Attention over split tokens against the whole row on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import config, mesh
from qwen_jax.models.kernels import blockwise, ring_attention
from qwen_jax.plan import collectives

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
ROWS, TOKENS, HEADS, KV_HEADS, WIDTH = 2, 48, 4, 2, 8
BLOCK = 3  # of pieces of 12, 6 and 3 tokens on 2, 4 and 8 devices


def inputs(dtype, seed=0):
    """q, k, v and a cotangent, unit scale."""
    draw = np.random.default_rng(seed)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [draw.normal(size=(ROWS, TOKENS, n, WIDTH)).astype(dtype) for n in heads]


def packed():
    """Documents of 1 to 20 tokens, other ones in each row, and padding in the last."""
    out = np.zeros((ROWS, TOKENS), np.int32)
    for row, lengths in zip(out, [(20, 1, 9, 15, 3), (5, 5, 20)], strict=True):
        ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        row[: len(ids)] = ids
    return out


@functools.cache
def alone(dtype, window, segmented):
    """(result, gradients) of the plain twin over whole rows, float64."""
    q, k, v, d_out = inputs(dtype)
    segments = packed() if segmented else None
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x, jnp.float64) for x in (q, k, v)]
        run = functools.partial(
            blockwise.reference, segments_bt=segments, window=window
        )
        out, back = jax.vjp(run, *arrays)
        return [np.asarray(x) for x in (out, *back(jnp.asarray(d_out, jnp.float64)))]


def split(ways, way, window, segmented, block=BLOCK, batch=1):
    """(mesh, jitted (result, gradients) of laid inputs, how those are laid)."""
    sizes = mesh.MeshConfig(data=batch, context=ways)
    devices = mesh.make(sizes, jax.devices()[: ways * batch])
    rules = mesh.Rules()
    with jax.set_mesh(devices):
        lies = rules.pspec("batch", "tokens", None, None)
        rows = rules.pspec("batch", "tokens")
    how = {"axes": ("context",), "way": way, "window": window, "block": block}

    @jax.jit
    def run(q, k, v, d_out, segments):
        kernel = functools.partial(ring_attention.attention, **how)
        inputs = (lies,) * 3 + ((rows,) if segmented else ())
        local = mesh.local(kernel, inputs=inputs, out=lies)
        more = (segments,) if segmented else ()
        out, back = jax.vjp(lambda q, k, v: local(q, k, v, *more), q, k, v)
        return out, *back(d_out)

    return devices, run, (lies, rows)


def laid(devices, specs, ways, arrays, segments):
    order = mesh.zigzag(TOKENS, ways)

    def put(x, spec):
        return jax.device_put(x[:, order], jax.NamedSharding(devices, spec))

    return [put(x, specs[0]) for x in arrays] + [put(segments, specs[1])]


def check(ways, way, window, segmented, dtype="float64", tolerance=1e-12, batch=1):
    with jax.enable_x64(dtype == "float64"):
        devices, run, specs = split(ways, way, window, segmented, batch=batch)
        with jax.set_mesh(devices):
            arrays = laid(devices, specs, ways, inputs(dtype), packed())
            got = [np.asarray(x) for x in run(*arrays)]
    back = np.argsort(mesh.zigzag(TOKENS, ways))
    for name, x, want in zip(
        ("out", "dq", "dk", "dv"), got, alone(dtype, window, segmented), strict=True
    ):
        assert x.dtype == dtype
        # Of a token that sees itself alone queries and keys have no gradient.
        scale = np.max(np.abs(want)) or 1.0
        off = np.max(np.abs(x[:, back] - want)) / scale
        assert off < tolerance, (name, off)


@pytest.mark.parametrize(
    ("ways", "way", "window", "segmented"),
    [(8, "ring", 7, True), (4, "gather", 7, True)],
)
def test_values_and_gradients(ways, way, window, segmented):
    check(ways, way, window, segmented)


@pytest.mark.slow
@pytest.mark.parametrize("way", ring_attention.WAYS)
@pytest.mark.parametrize("ways", [2, 4, 8])
@pytest.mark.parametrize("window", [0, 1, 7, 30])
@pytest.mark.parametrize("segmented", [False, True])
def test_every_pair_of_settings(ways, way, window, segmented):
    check(ways, way, window, segmented)
    check(ways, way, window, segmented, "float32", 1e-5)


@pytest.mark.slow
def test_float32_of_one_segment():
    check(4, "ring", 0, False, "float32", 1e-5)


@pytest.mark.slow
def test_rows_may_lie_on_other_devices_too():
    """Their bounds and masks are their own."""
    check(4, "ring", 0, True, batch=2)


@pytest.mark.parametrize("way", ring_attention.WAYS)
def test_what_travels(way):
    """In a ring nothing is gathered, and what is gathered does not go round."""
    ways = 4
    devices, run, specs = split(ways, way, 0, True)
    with jax.set_mesh(devices):
        arrays = laid(devices, specs, ways, inputs("float32"), packed())
        text = run.lower(*arrays).compile().as_text()
    found = {one.kind: one for one in collectives.traffic(text, ways)[0]}
    each = ROWS * TOKENS // ways * 4  # bytes of one number a token
    keys = KV_HEADS * WIDTH * each
    if way == "ring":
        # Keys, values and segments three times in each pass, of which JAX 0.10 sends
        # the first once for both on a CPU, where it drops barriers. Both gradients four
        # times.
        assert set(found) == {"collective-permute"}
        trips = ways - 1
        each_pass, back = 2 * keys + each, (trips + 1) * 2 * keys
        sent = found["collective-permute"].bytes - back
        assert sent in ((2 * trips - 1) * each_pass, 2 * trips * each_pass)
    else:
        assert set(found) == {"all-gather", "reduce-scatter"}
        once = (ways - 1) * (2 * keys + each)
        assert found["all-gather"].bytes in (once, 2 * once)
        assert found["reduce-scatter"].bytes == (ways - 1) * 2 * keys


def test_work_follows_what_is_seen():
    """Blocks of other documents and beyond the window are left out, and none that is
    seen: from the list of pairs of tokens."""
    block, piece = 3, 12
    for segments in (None, packed()):
        for window in (0, 4):
            for first, second in ((0, 12), (12, 0), (12, 12)):
                parts = (None, None)
                if segments is not None:
                    parts = [segments[:, x : x + piece] for x in (first, second)]
                places = jnp.array([first]), jnp.array([second])
                pair = ring_attention._Pair(places, (0, 0), *parts, window, block)
                got = np.asarray(pair.blocks(piece, piece))
                want = seen(first, second, piece, parts, window)
                want = want.reshape(4, block, 4, block).any(axis=(1, 3))
                ours, theirs = got.astype(int), want.astype(int)
                same = first == second
                # The diagonal of a block of padding is visited for nothing.
                extra = ours - theirs
                assert extra.min() >= 0
                assert (extra - np.eye(4, dtype=int) * same).max() <= 0


def seen(first, second, piece, parts, window):
    query = first + np.arange(piece)[:, None]
    key = second + np.arange(piece)[None]
    out = query >= key
    if window:
        out &= query - key < window
    if parts[0] is None:
        return out
    same = parts[0][:, :, None] == parts[1][:, None, :]
    return out & (same & (parts[0] > 0)[:, :, None]).any(axis=0)


def test_bad_pieces_are_refused():
    with pytest.raises(config.InputError, match="multiple of 8; the nearest is 40"):
        mesh.zigzag(44, 4)
    assert ring_attention.block_for(4096) == 512
    assert ring_attention.block_for(96) == 96
    with pytest.raises(config.InputError, match="pieces of 1031 .* multiple of 128"):
        ring_attention.block_for(1031)
