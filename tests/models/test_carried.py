# SPDX-License-Identifier: Apache-2.0
"""Attention of chunks over one buffer, beside the twin over the whole row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import config
from qwen_jax.models.kernels import blockwise, carried


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([48], id="one", marks=pytest.mark.slow),
        pytest.param([24, 17, 7], id="several"),
    ],
)
@pytest.mark.parametrize("window", [0, 5, 19])
@pytest.mark.parametrize(("chunk", "block"), [(8, 8), (16, 4), (24, 4)])
def test_chunks_are_the_row(chunk, block, window, lengths, monkeypatch):
    """Outputs, and the gradients of queries, keys and values, of several blocks a chunk
    and several documents in a row, too; other layers of the buffers stay as they are.
    The second row has the documents the other way round."""
    monkeypatch.setattr(carried, "BLOCK", block)
    monkeypatch.setattr(carried, "block_for", lambda t: block)
    b, n, h, k, s, layer = 2, 4, 2, 8, 48, 1
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        q, key, v, d = (
            jnp.asarray(rng.normal(size=(b, s, heads, k))) for heads in (n, h, h, n)
        )

        each = lengths, lengths[::-1]
        segments = [np.repeat(1 + np.arange(len(x)), x) for x in each]
        before = jnp.stack([np.concatenate([np.arange(n) for n in x]) for x in each])
        segments = jnp.stack(segments)

        def whole(q, key, v):
            return blockwise.reference(q, key, v, segments, window=window)

        want, pull = jax.vjp(whole, q, key, v)
        wanted = pull(d)
        empty = jnp.zeros((3, b, h, s, k))
        k_buf, v_buf, dk_buf, dv_buf = empty, empty, empty, empty + 0.0
        starts, kept, number = range(0, s, chunk), {}, jnp.int32(layer)
        for start in starts:
            here, at = slice(start, start + chunk), jnp.int32(start)
            k_buf = carried.written(k_buf, key[:, here], number, at)
            v_buf = carried.written(v_buf, v[:, here], number, at)
            kept[start] = carried.forward(
                *(q[:, here], k_buf, v_buf, number, at, before[:, here]),
                window=window,
            )
            np.testing.assert_allclose(kept[start][0], want[:, here], atol=1e-13)
        for start in reversed(starts):
            here, at = slice(start, start + chunk), jnp.int32(start)
            dq, dk_buf, dv_buf = carried.backward(
                *(q[:, here], k_buf, v_buf, number, at, before[:, here]),
                *(*kept[start], d[:, here], dk_buf, dv_buf),
                window=window,
            )
            np.testing.assert_allclose(dq, wanted[0][:, here], atol=1e-12)
            # Nothing that comes before this chunk adds to its own.
            for buffer, cotangent in ((dk_buf, wanted[1]), (dv_buf, wanted[2])):
                own = carried.read(buffer, number, at, chunk)
                np.testing.assert_allclose(own, cotangent[:, here], atol=1e-12)
        for buffer in (k_buf, v_buf, dk_buf, dv_buf):
            assert not np.asarray(buffer)[[0, 2]].any()


def test_sizes_of_blocks():
    assert [carried.block_for(t) for t in (1, 100, 512, 640, 768, 8192)] == [
        *[1, 100, 512, 128, 256, 512],
    ]
    with pytest.raises(config.InputError, match="multiple of 128; set it to 640"):
        carried.block_for(513)
