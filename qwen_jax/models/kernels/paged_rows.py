# SPDX-License-Identifier: Apache-2.0
"""Attention of one new token of each row over the pages of its row, for GPUs.

Source: PagedAttention (arXiv 2309.06180) with the sequence split between programs
(Flash-Decoding), each with a running maximum (arXiv 1805.02867). A program has the
heads of one row that share keys, and every `splits`-th page; what the programs of a row
found is put together afterwards. A loop over pages in XLA asks the host for each turn
whether there is another; this is one kernel, and each page is read once.

Shapes: q_bnk; pools k_nhkc, v_nhck; table_bp int32; first_b, end_b int32: tokens of a
row from first to before end are seen -> [b, n, k] in q's dtype. A row with nothing to
see gives zeros. k is a power of two of at least 16, and so is c.
Invariants: scores and sums in float32; what a row gives depends on nothing else.
The plain twin: `page_ways.gathered`.
Raises: nothing.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from qwen_jax.models.kernels import blockwise

try:
    from jax.experimental.pallas import triton as pl_triton
except ImportError:  # JAX 0.11.2 announces that it will go
    pl_triton = None

LEAST_HEADS = 16  # rows of a product on the matrix units
PROGRAMS = 528  # wanted at once, four for each of the 132 processors of a Hopper


def fits(width: int, page_tokens: int, dtype: jnp.dtype = jnp.float32) -> bool:
    """Whether the kernel is there, and takes heads of this width, pages of so many
    tokens, and this dtype."""
    if jnp.promote_types(dtype, jnp.float32) != jnp.float32:
        return False
    return pl_triton is not None and all(
        n >= 16 and n & (n - 1) == 0 for n in (width, page_tokens)
    )


def splits_for(rows: int, kv_heads: int, pages: int) -> int:
    """Programs that share a row: as many as fill the chip, not more than 16."""
    wanted = max(1, PROGRAMS // max(rows * kv_heads, 1))
    splits = 1
    while 2 * splits <= min(wanted, pages, 16):
        splits *= 2
    return splits


def attention(
    q_bnk: jax.Array,
    k_nhkc: jax.Array,
    v_nhck: jax.Array,
    table_bp: jax.Array,
    first_b: jax.Array,
    end_b: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """See the module docstring."""
    b, n, k = q_bnk.shape
    h, c = v_nhck.shape[1:3]
    g = n // h
    heads = max(LEAST_HEADS, 1 << (g - 1).bit_length())
    splits = splits_for(b, h, table_bp.shape[1])
    q_bhgk = q_bnk.reshape(b, h, g, k)
    near = jax.typeof(q_bnk).manual_axis_type  # inside of `mesh.local`
    float_ = functools.partial(
        jax.ShapeDtypeStruct, dtype=jnp.float32, manual_axis_type=near
    )
    out_bhsgk, top_bhsg, sum_bhsg = pl.pallas_call(
        functools.partial(_program, splits=splits, heads=heads),
        grid=(h, splits, b),
        in_specs=[
            pl.BlockSpec((None, None, g, k), lambda h, s, b: (b, h, 0, 0)),
            *[pl.BlockSpec(memory_space=pl.ANY)] * 5,
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, heads, k), lambda h, s, b: (b, h, s, 0, 0)),
            *[pl.BlockSpec((None, None, None, heads), lambda h, s, b: (b, h, s, 0))]
            * 2,
        ],
        out_shape=[
            float_((b, h, splits, heads, k)),
            *[float_((b, h, splits, heads))] * 2,
        ],
        compiler_params=pl_triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="paged_rows",
    )(q_bhgk, k_nhkc, v_nhck, table_bp, first_b, end_b)
    out_bhgk = pl.pallas_call(
        _together,
        grid=(h, g, b),
        in_specs=[
            pl.BlockSpec(
                (None, None, splits, None, k), lambda h, g, b: (b, h, 0, g, 0)
            ),
            *[pl.BlockSpec((None, None, splits, None), lambda h, g, b: (b, h, 0, g))]
            * 2,
        ],
        out_specs=pl.BlockSpec((None, None, None, k), lambda h, g, b: (b, h, g, 0)),
        out_shape=jax.ShapeDtypeStruct(
            (b, h, g, k), q_bnk.dtype, manual_axis_type=near
        ),
        compiler_params=pl_triton.CompilerParams(num_warps=1),
        interpret=interpret,
        name="paged_rows_together",
    )(out_bhsgk, top_bhsg, sum_bhsg)
    return out_bhgk.reshape(b, n, k)


def _together(out_ref, top_ref, sum_ref, y_ref):
    """One head's output of what its programs found."""
    top_s = top_ref[...]
    less_s = jnp.exp(top_s - jnp.max(top_s))
    out_k = jnp.sum(out_ref[...] * less_s[:, None], axis=0)
    whole = jnp.maximum(jnp.sum(sum_ref[...] * less_s), jnp.finfo(jnp.float32).tiny)
    y_ref[...] = (out_k / whole).astype(y_ref.dtype)


def _program(q_ref, k_ref, v_ref, table_ref, first_ref, end_ref, *out, splits, heads):
    """One row's heads of one kv head over every `splits`-th of its pages."""
    head, split, row = (pl.program_id(i) for i in range(3))
    (some, k), c, g = q_ref.shape, v_ref.shape[2], heads
    first, end = first_ref[row], end_ref[row]
    # The last head again where there are fewer than the matrix units take.
    q_gk = q_ref[jnp.minimum(jnp.arange(g), some - 1)]

    def page(i, carry):
        top_g, sum_g, out_gk = carry
        j = first // c + split + i * splits
        here = table_ref[row, j]
        s_gc = pl_triton.dot(q_gk, k_ref[here, head], allow_tf32=False) * k**-0.5
        at_c = j * c + jnp.arange(c)
        seen_gc = jnp.broadcast_to(((at_c >= first) & (at_c < end))[None], (g, c))
        s_gc = jnp.where(seen_gc, s_gc, blockwise.NEG)
        new_g = jnp.maximum(top_g, jnp.max(s_gc, axis=1))
        # While a row has seen nothing its maximum is NEG, and exp gives ones.
        p_gc = jnp.where(seen_gc, jnp.exp(s_gc - new_g[:, None]), 0.0)
        less_g = jnp.exp(top_g - new_g)
        more_gk = pl_triton.dot(
            p_gc.astype(v_ref.dtype), v_ref[here, head], allow_tf32=False
        )
        sum_g = sum_g * less_g + jnp.sum(p_gc, axis=1)
        return new_g, sum_g, out_gk * less_g[:, None] + more_gk

    empty = (
        jnp.full((g,), blockwise.NEG, jnp.float32),
        jnp.zeros((g,), jnp.float32),
        jnp.zeros((g, k), jnp.float32),
    )
    pages = (end + c - 1) // c - first // c
    count = jnp.where(end > first, (pages - split + splits - 1) // splits, 0)
    top_g, sum_g, out_gk = jax.lax.fori_loop(0, count, page, empty)
    out_ref, top_ref, sum_ref = out
    out_ref[...], top_ref[...], sum_ref[...] = out_gk, top_g, sum_g
