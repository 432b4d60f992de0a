# SPDX-License-Identifier: Apache-2.0
"""Attention of a chunk of queries over the keys of all chunks up to it, both passes.

Keys and values of every layer lie in one buffer, those of the chunk itself included;
queries stand at `start`, so work follows what stands before them and not how long the
buffer is. The backward pass adds to cotangents of the whole buffer where they lie: what
a later chunk owes an earlier one is never an array of its own.

Source: online softmax (arXiv 2205.14135), in plain XLA, as `blockwise`; the twin is
`blockwise.reference` over the row that the chunks are cut from.
Shapes: q_btnk; k_lbhsk, v_lbhsk with s slots a multiple of t; layer and start int32
scalars, start a multiple of t; -> out_btnk in q's dtype and lse_bhgt, which the
backward pass takes back. Cotangents dk_lbhsk, dv_lbhsk are float32 or wider, or what
the caller made them.
positions_bt tells how many tokens of its document stand before a query, so documents
may follow each other in a row: a query sees its own place and so many before it, within
`window` of them when that is above 0. Padding has the position 0 and sees itself.
Raises: config.InputError from `block_for`.
"""

import jax
import jax.numpy as jnp

from qwen_jax import config, mesh
from qwen_jax.models.kernels import blockwise

BLOCK = 512


def block_for(t: int) -> int:
    """Tokens of a block of chunks of t tokens.

    Raises:
      config.InputError: t cannot be cut in blocks of a good size.
    """
    if t <= BLOCK:
        return t
    for block in (BLOCK, BLOCK // 2, BLOCK // 4):
        if t % block == 0:
            return block
    least = BLOCK // 4
    raise config.InputError(
        f"chunk_tokens={t}: above {BLOCK} wanted a multiple of {least}; "
        f"set it to {-(-t // least) * least}"
    )


def forward(q_btnk, k_lbhsk, v_lbhsk, layer, start, positions_bt, *, window: int = 0):
    """(out_btnk, lse_bhgt); see the module docstring."""
    (b, t, n, k), h = q_btnk.shape, k_lbhsk.shape[2]
    size = block_for(t)
    wide, near = jnp.promote_types(q_btnk.dtype, jnp.float32), mesh.varying(q_btnk)

    def query_block(_, part):
        i, q_bhqk, before_bq = part
        at_q, low, high = _places(i, start, size, q_bhqk.shape[2], window)

        def key_block(j, carry):
            out_bhqk, top_bhq, sum_bhq = carry
            k_bhsk, v_bhsk = _at(k_lbhsk, layer, j, size), _at(v_lbhsk, layer, j, size)
            s_bhqs = _scores(q_bhqk, k_bhsk, at_q, before_bq, j, window, wide)
            new_bhq = jnp.maximum(top_bhq, jnp.max(s_bhqs, axis=-1))
            p_bhqs = jnp.exp(s_bhqs - new_bhq[..., None])
            less_bhq = jnp.exp(top_bhq - new_bhq)
            more_bhqk = jnp.einsum(
                "bhqs,bhsk->bhqk",
                p_bhqs.astype(v_bhsk.dtype),
                v_bhsk,
                preferred_element_type=wide,
            )
            sum_bhq = sum_bhq * less_bhq + jnp.sum(p_bhqs, axis=-1)
            return out_bhqk * less_bhq[..., None] + more_bhqk, new_bhq, sum_bhq

        # From half of NEG on: exp of what is masked is then zero without a mask.
        rows = q_bhqk.shape[:3]
        empty = jnp.zeros(q_bhqk.shape, wide), jnp.full(rows, blockwise.NEG / 2, wide)
        empty = [mesh.vary(x, near) for x in (*empty, jnp.zeros(rows, wide))]
        out, top, total = jax.lax.fori_loop(low, high, key_block, tuple(empty))
        return None, (
            (out / total[..., None]).astype(q_btnk.dtype),
            top + jnp.log(total),
        )

    parts = (
        jnp.arange(t // size),
        _in_blocks(q_btnk * k**-0.5, h, size),
        _of_queries(positions_bt, n // h, size),
    )
    _, (out_ibhqk, lse_ibhq) = jax.lax.scan(query_block, None, parts)
    lse_ibhgq = lse_ibhq.reshape(-1, b, h, n // h, size)
    lse_bhgt = jnp.moveaxis(lse_ibhgq, 0, 3).reshape(b, h, n // h, t)
    return _out_of_blocks(out_ibhqk, t, n), lse_bhgt


def backward(
    q_btnk,
    k_lbhsk,
    v_lbhsk,
    layer,
    start,
    positions_bt,
    out_btnk,
    lse_bhgt,
    d_btnk,
    dk_lbhsk,
    dv_lbhsk,
    *,
    window: int = 0,
):
    """(dq_btnk, the cotangents of all keys and values with this chunk's added)."""
    (b, t, n, k), h = q_btnk.shape, k_lbhsk.shape[2]
    size = block_for(t)
    wide = lse_bhgt.dtype
    # delta = rowsum(dO * O) = sum_s P dP, so dS = P (dP - delta).
    delta_btn = jnp.sum(d_btnk.astype(wide) * out_btnk.astype(wide), axis=-1)
    delta_ibhq = _in_blocks(delta_btn[..., None], h, size)[..., 0]
    lse_bhgiq = lse_bhgt.reshape(b, h, n // h, t // size, size)
    lse_ibhq = jnp.moveaxis(lse_bhgiq, 3, 0).reshape(delta_ibhq.shape)

    def query_block(carry, part):
        i, q_bhqk, d_bhqk, lse_bhq, delta_bhq, before_bq = part
        at_q, low, high = _places(i, start, size, q_bhqk.shape[2], window)

        def key_block(j, carry):
            dq_bhqk, dk_lbhsk, dv_lbhsk = carry
            k_bhsk, v_bhsk = _at(k_lbhsk, layer, j, size), _at(v_lbhsk, layer, j, size)
            s_bhqs = _scores(q_bhqk, k_bhsk, at_q, before_bq, j, window, wide)
            p_bhqs = jnp.exp(s_bhqs - lse_bhq[..., None])
            how = {"preferred_element_type": wide}
            dp_bhqs = jnp.einsum("bhqk,bhsk->bhqs", d_bhqk, v_bhsk, **how)
            ds_bhqs = (p_bhqs * (dp_bhqs - delta_bhq[..., None])).astype(q_bhqk.dtype)
            p_bhqs = p_bhqs.astype(q_bhqk.dtype)
            dk_bhsk = jnp.einsum("bhqs,bhqk->bhsk", ds_bhqs, q_bhqk, **how)
            dv_bhsk = jnp.einsum("bhqs,bhqk->bhsk", p_bhqs, d_bhqk, **how)
            dq_bhqk = dq_bhqk + jnp.einsum("bhqs,bhsk->bhqk", ds_bhqs, k_bhsk, **how)
            return (
                dq_bhqk,
                _added(dk_lbhsk, layer, j, dk_bhsk),
                _added(dv_lbhsk, layer, j, dv_bhsk),
            )

        dk_lbhsk, dv_lbhsk = carry
        zero = mesh.vary(jnp.zeros(q_bhqk.shape, wide), mesh.varying(q_btnk))
        carry = zero, dk_lbhsk, dv_lbhsk
        dq_bhqk, *carry = jax.lax.fori_loop(low, high, key_block, carry)
        return tuple(carry), dq_bhqk

    parts = (
        jnp.arange(t // size),
        _in_blocks(q_btnk * k**-0.5, h, size),
        _in_blocks(d_btnk.astype(q_btnk.dtype), h, size),
        lse_ibhq,
        delta_ibhq,
        _of_queries(positions_bt, n // h, size),
    )
    carry, dq_ibhqk = jax.lax.scan(query_block, (dk_lbhsk, dv_lbhsk), parts)
    dq_btnk = (_out_of_blocks(dq_ibhqk, t, n) * k**-0.5).astype(q_btnk.dtype)
    return dq_btnk, *carry


def written(held_lbhsk, new_bthk, layer, start):
    """The buffer with keys or values of a chunk in."""
    new_bhtk = new_bthk.transpose(0, 2, 1, 3).astype(held_lbhsk.dtype)
    zero = jnp.zeros_like(start)
    at = (jnp.asarray(layer, start.dtype), zero, zero, start, zero)
    return jax.lax.dynamic_update_slice(held_lbhsk, new_bhtk[None], at)


def read(held_lbhsk, layer, start, t: int):
    """That of t tokens of a layer: [b, t, h, k]."""
    zero = jnp.zeros_like(start)
    at = (jnp.asarray(layer, start.dtype), zero, zero, start, zero)
    _, b, h, _, k = held_lbhsk.shape
    part_bhtk = jax.lax.dynamic_slice(held_lbhsk, at, (1, b, h, t, k))[0]
    return part_bhtk.transpose(0, 2, 1, 3)


def _places(i, start, size, rows, window):
    """(places of the rows of a block of queries, its key blocks: first, past last)."""
    first = start + i * size
    at_q = first + jnp.arange(rows) % size
    low = (
        jnp.maximum(first - window + 1, 0) // size if window else jnp.zeros_like(first)
    )
    return at_q, low, first // size + 1


def _scores(q_bhqk, k_bhsk, at_q, before_bq, j, window, wide):
    size = k_bhsk.shape[2]
    s_bhqs = jnp.einsum("bhqk,bhsk->bhqs", q_bhqk, k_bhsk, preferred_element_type=wide)
    at_s = j * size + jnp.arange(size)
    back_qs = at_q[:, None] - at_s[None]
    seen_bqs = (back_qs >= 0)[None] & (back_qs[None] <= before_bq[..., None])
    if window:
        seen_bqs &= (back_qs < window)[None]
    return jnp.where(seen_bqs[:, None], s_bhqs, blockwise.NEG)


def _of_queries(positions_bt, g, size):
    """[blocks, b, g * size]: positions of the rows of a block of queries."""
    b = len(positions_bt)
    blocks = positions_bt.reshape(b, -1, size).transpose(1, 0, 2)
    return jnp.tile(blocks, (1, 1, g))


def _corner(layer, j, size):
    at = j * size
    zero = jnp.zeros_like(at)
    return jnp.asarray(layer, at.dtype), zero, zero, at, zero


def _at(x_lbhsk, layer, j, size):
    _, b, h, _, k = x_lbhsk.shape
    corner = _corner(layer, j, size)
    return jax.lax.dynamic_slice(x_lbhsk, corner, (1, b, h, size, k))[0]


def _added(x_lbhsk, layer, j, more_bhsk):
    size = more_bhsk.shape[2]
    sum_bhsk = _at(x_lbhsk, layer, j, size) + more_bhsk.astype(x_lbhsk.dtype)
    corner = _corner(layer, j, size)
    return jax.lax.dynamic_update_slice(x_lbhsk, sum_bhsk[None], corner)


def _in_blocks(x_btnk, h, size):
    """[blocks, b, h, g * size, k]: the heads of a key head side by side."""
    b, t, n, k = x_btnk.shape
    x_biqhgk = x_btnk.reshape(b, t // size, size, h, n // h, k)
    return x_biqhgk.transpose(1, 0, 3, 4, 2, 5).reshape(t // size, b, h, -1, k)


def _out_of_blocks(x_ibhqk, t, n):
    i, b, h, _, k = x_ibhqk.shape
    x_ibhgqk = x_ibhqk.reshape(i, b, h, n // h, t // i, k)
    return x_ibhgqk.transpose(1, 0, 4, 2, 3, 5).reshape(b, t, n, k)
