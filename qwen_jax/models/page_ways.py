# SPDX-License-Identifier: Apache-2.0
"""Attention of new tokens over the pages of their rows: four ways, one result.

"loop": one page of one row at a time, in place, for CPUs, where gathering pages costs
more than reading them. "blocks": some pages of all rows at a time, as far as the
longest row goes, for accelerators: work follows what is there, not how long a row may
become, and little is in memory at a time. "kernel": for GPUs, one token of each row by
a kernel of its own (`kernels.paged_rows`), more tokens by "blocks". "gather": all pages
of the tables, in the open, the plain twin of the three.

Source: online softmax (arXiv 1805.02867), PagedAttention (arXiv 2309.06180).
Shapes: q_btnk of new tokens, whose keys and values are in the pools already (`held`:
k_nhkc, v_nhck); real_bt, places and window as in `paged.py`; -> [b, t, n, k].
Invariants: sums in float32 or wider; what is behind a row's end counts for nothing.
Raises: nothing.
"""

import jax
import jax.numpy as jnp

from qwen_jax import mesh
from qwen_jax.models import attention as attn
from qwen_jax.models.kernels import blockwise, paged_rows

BLOCK_TOKENS = 1024  # of each row, gathered at a time


def gathered(q_btnk, held, real_bt, places, window):
    """The plain twin: attention over all pages of the tables, in the open."""
    (b, t), p = real_bt.shape, places.table_bp.shape[1]
    k_bphkc = held["k_nhkc"][places.table_bp]
    v_bphck = held["v_nhck"][places.table_bp]
    _, _, h, k, c = k_bphkc.shape
    k_bhks = k_bphkc.transpose(0, 2, 3, 1, 4).reshape(b, h, k, p * c)
    v_bhsk = v_bphck.transpose(0, 2, 1, 3, 4).reshape(b, h, p * c, k)
    at_1s = jnp.arange(p * c)[None]
    count_b = places.length_b + jnp.sum(real_bt, axis=1)
    there_bs = (at_1s < count_b[:, None]).astype(jnp.int32)
    at_bt = places.length_b[:, None] + jnp.arange(t)[None]
    return attn.over(
        q_btnk, k_bhks, v_bhsk, real_bt, there_bs, at_bt, at_1s, window=window
    )


def looped(q_btnk, held, real_bt, places, window):
    """Attention of new tokens over the pages that their rows have, one page at a time,
    with a running maximum (arXiv 1805.02867)."""
    b, t, n, k = q_btnk.shape
    k_nhkc, v_nhck = held["k_nhkc"], held["v_nhck"]
    _, h, c, _ = v_nhck.shape
    g = n // h
    wide = jnp.promote_types(q_btnk.dtype, jnp.float32)
    q_bthgk = (q_btnk * k**-0.5).reshape(b, t, h, g, k)
    q_bhgtk = q_bthgk.transpose(0, 2, 3, 1, 4)
    near = mesh.varying(q_btnk)

    def row(i, out_bhgtk):
        q_hgtk, start = q_bhgtk[i], places.length_b[i]
        end = start + jnp.sum(real_bt[i])
        at_t = start + jnp.arange(t)
        first_t = jnp.maximum(at_t - window + 1, 0) if window else jnp.zeros_like(at_t)

        def page(j, carry):
            top_hgt, sum_hgt, out_hgtk = carry
            here = places.table_bp[i, j]
            k_hkc = jax.lax.dynamic_index_in_dim(k_nhkc, here, keepdims=False)
            v_hck = jax.lax.dynamic_index_in_dim(v_nhck, here, keepdims=False)
            s_hgtc = jnp.einsum(
                "hgtk,hkc->hgtc", q_hgtk, k_hkc, preferred_element_type=wide
            )
            at_1c = (j * c + jnp.arange(c))[None]
            seen_tc = (at_1c >= first_t[:, None]) & (at_1c <= at_t[:, None])
            s_hgtc = jnp.where(seen_tc[None, None], s_hgtc, blockwise.NEG)
            new_hgt = jnp.maximum(top_hgt, jnp.max(s_hgtc, axis=-1))
            # While a row has seen nothing its maximum is NEG, and exp gives ones.
            p_hgtc = jnp.where(
                seen_tc[None, None], jnp.exp(s_hgtc - new_hgt[..., None]), 0.0
            )
            less_hgt = jnp.exp(top_hgt - new_hgt)
            sum_hgt = sum_hgt * less_hgt + jnp.sum(p_hgtc, axis=-1)
            more_hgtk = jnp.einsum(
                "hgtc,hck->hgtk",
                p_hgtc.astype(v_hck.dtype),
                v_hck,
                preferred_element_type=wide,
            )
            return new_hgt, sum_hgt, out_hgtk * less_hgt[..., None] + more_hgtk

        empty = (
            jnp.full((h, g, t), blockwise.NEG, wide),
            jnp.zeros((h, g, t), wide),
            jnp.zeros((h, g, t, k), wide),
        )
        empty = jax.tree.map(lambda x: mesh.vary(x, near), empty)
        last = jnp.where(end > start, (end - 1) // c + 1, 0)
        _, sum_hgt, out_hgtk = jax.lax.fori_loop(first_t[0] // c, last, page, empty)
        out_hgtk = out_hgtk / jnp.maximum(sum_hgt, jnp.finfo(wide).tiny)[..., None]
        return jax.lax.dynamic_update_index_in_dim(
            out_bhgtk, out_hgtk.astype(out_bhgtk.dtype), i, 0
        )

    out_bhgtk = mesh.vary(jnp.zeros((b, h, g, t, k), q_btnk.dtype), near)
    out_bhgtk = jax.lax.fori_loop(0, b, row, out_bhgtk)
    return out_bhgtk.transpose(0, 3, 1, 2, 4).reshape(b, t, n, k)


def blocked(q_btnk, held, real_bt, places, window):
    """Attention over a block of pages of every row at a time, gathered, as far as the
    longest row goes, with a running maximum."""
    b, t, n, k = q_btnk.shape
    k_nhkc, v_nhck = held["k_nhkc"], held["v_nhck"]
    _, h, c, _ = v_nhck.shape
    g, wide = n // h, jnp.promote_types(q_btnk.dtype, jnp.float32)
    size = max(1, min(BLOCK_TOKENS // c, places.table_bp.shape[1]))
    pad = -places.table_bp.shape[1] % size
    table_bp = jnp.pad(places.table_bp, ((0, 0), (0, pad)))
    q_bthgk = (q_btnk * k**-0.5).reshape(b, t, h, g, k)
    q_bhgtk = q_bthgk.transpose(0, 2, 3, 1, 4)
    at_bt = places.length_b[:, None] + jnp.arange(t)[None]
    end_b = places.length_b + jnp.sum(real_bt, axis=1)
    first_bt = jnp.maximum(at_bt - window + 1, 0) if window else jnp.zeros_like(at_bt)
    near = mesh.varying(q_btnk)

    def block(i, carry):
        top_bhgt, sum_bhgt, out_bhgtk = carry
        here_bj = jax.lax.dynamic_slice_in_dim(table_bp, i * size, size, axis=1)
        k_bjhkc, v_bjhck = k_nhkc[here_bj], v_nhck[here_bj]
        s_bhgtjc = jnp.einsum(
            "bhgtk,bjhkc->bhgtjc", q_bhgtk, k_bjhkc, preferred_element_type=wide
        )
        s_bhgts = s_bhgtjc.reshape(b, h, g, t, size * c)
        at_11s = (i * size * c + jnp.arange(size * c))[None, None]
        seen_bts = (at_11s >= first_bt[..., None]) & (at_11s <= at_bt[..., None])
        seen_b11ts = (seen_bts & (at_11s < end_b[:, None, None]))[:, None, None]
        s_bhgts = jnp.where(seen_b11ts, s_bhgts, blockwise.NEG)
        new_bhgt = jnp.maximum(top_bhgt, jnp.max(s_bhgts, axis=-1))
        # While a row has seen nothing its maximum is NEG, and exp gives ones.
        p_bhgts = jnp.where(seen_b11ts, jnp.exp(s_bhgts - new_bhgt[..., None]), 0.0)
        less_bhgt = jnp.exp(top_bhgt - new_bhgt)
        more_bhgtk = jnp.einsum(
            "bhgtjc,bjhck->bhgtk",
            p_bhgts.reshape(b, h, g, t, size, c).astype(v_bjhck.dtype),
            v_bjhck,
            preferred_element_type=wide,
        )
        sum_bhgt = sum_bhgt * less_bhgt + jnp.sum(p_bhgts, axis=-1)
        return new_bhgt, sum_bhgt, out_bhgtk * less_bhgt[..., None] + more_bhgtk

    empty = (
        jnp.full((b, h, g, t), blockwise.NEG, wide),
        jnp.zeros((b, h, g, t), wide),
        jnp.zeros((b, h, g, t, k), wide),
    )
    empty = jax.tree.map(lambda x: mesh.vary(x, near), empty)
    first, last = jnp.min(first_bt) // (size * c), -(-jnp.max(end_b) // (size * c))
    _, sum_bhgt, out_bhgtk = jax.lax.fori_loop(first, last, block, empty)
    out_bhgtk = out_bhgtk / jnp.maximum(sum_bhgt, jnp.finfo(wide).tiny)[..., None]
    out_btnk = out_bhgtk.transpose(0, 3, 1, 2, 4).reshape(b, t, n, k)
    return out_btnk.astype(q_btnk.dtype)


def kernel(q_btnk, held, real_bt, places, window):
    """One token of each row by a kernel for GPUs, where it takes these shapes."""
    v_nhck = held["v_nhck"]
    sizes = v_nhck.shape[3], v_nhck.shape[2], q_btnk.dtype
    if q_btnk.shape[1] != 1 or not paged_rows.fits(*sizes):
        return blocked(q_btnk, held, real_bt, places, window)
    end_b = places.length_b + real_bt[:, 0]
    first_b = jnp.maximum(end_b - window, 0) if window else jnp.zeros_like(end_b)
    out_bnk = paged_rows.attention(
        *(q_btnk[:, 0], held["k_nhkc"], v_nhck),
        *(places.table_bp, first_b, end_b),
        interpret=mesh.platform() == "cpu",
    )
    return out_bnk[:, None]


WAYS = {"loop": looped, "blocks": blocked, "kernel": kernel, "gather": gathered}


def here() -> str:
    """The way of the platform."""
    return {"cpu": "loop", "gpu": "kernel"}.get(mesh.platform(), "blocks")
