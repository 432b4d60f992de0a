# SPDX-License-Identifier: Apache-2.0
"""Matrices times one vector, for GPUs: y = W x, each weight read once, in order.

Decoding one row moves every weight for two operations with it, so nothing but the
memory's bandwidth and the number of kernels matters. A program has a few rows of one
W, which lies [outputs, inputs], and adds up in float32. What stands around a product in
a layer is done on the way: RMSNorm of x before (by every program again: x is small),
SwiGLU of two products or the residual after.

Shapes: each w_oi, x_i -> y_o in x's dtype, of several matrices one behind the other.
Dims that are no multiple of a block are masked.
Invariants: the sum's order depends on the shapes alone; rounding to x's dtype is where
the functions in the open (`norm.rms_norm`, a product, a sum) round, but between the
steps of SwiGLU, which are in float32.
The plain twin: `w_oi @ x_i`.
Raises: nothing.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

try:
    from jax.experimental.pallas import triton as pl_triton
except ImportError:  # JAX 0.11.2 announces that it will go
    pl_triton = None

INPUTS = 512  # of a block
PROGRAMS = 1056  # wanted at least, eight for each of the 132 processors of a Hopper


@dataclasses.dataclass(frozen=True)
class Norm:
    """RMSNorm of x before the product: see `norm.rms_norm`."""

    weight_i: jax.Array
    eps: float
    offset: bool


def there(dtype: jnp.dtype) -> bool:
    """Whether this JAX has what the kernel is written in, and float32 is enough."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return pl_triton is not None and wide == jnp.float32


def outputs_for(outputs: int) -> int:
    """Rows of W that a program has: 1 to 8, fewer where there would be few programs."""
    rows = 8
    while rows > 1 and outputs // rows < PROGRAMS:
        rows //= 2
    return rows


def product(
    w_oi: jax.Array | Sequence[jax.Array],
    x_i: jax.Array,
    *,
    norm: Norm | None = None,
    add_o: jax.Array | None = None,
    gated: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """See the module docstring.

    Args:
      w_oi: a matrix, or several with the same inputs.
      x_i: the vector.
      norm: of x, before.
      add_o: added to the product.
      gated: of two matrices, silu(W_0 x) * (W_1 x).
      interpret: without a GPU.
    """
    ws = [w_oi] if isinstance(w_oi, jax.Array) else list(w_oi)
    i = len(x_i)
    outputs = [len(w) for w in (ws[:1] if gated else ws)]
    rows = outputs_for(sum(outputs))
    size = min(INPUTS, 1 << (i - 1).bit_length())
    more = [] if norm is None else [norm.weight_i]
    more += [] if add_o is None else [add_o]
    how = {
        "matrices": len(ws),
        "rows": rows,
        "size": size,
        "norm": None if norm is None else (norm.eps, norm.offset),
        "adds": add_o is not None,
        "gated": gated,
    }
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(_program, **how),
        grid=(sum(pl.cdiv(o, rows) for o in outputs),),
        in_specs=[anywhere] * (len(ws) + 1 + len(more)),
        out_specs=anywhere,
        out_shape=jax.ShapeDtypeStruct((sum(outputs),), x_i.dtype),
        compiler_params=pl_triton.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="one_row",
    )(*ws, x_i, *more)


def _program(*refs, matrices, rows, size, norm, adds, gated):
    *w_refs, x_ref = refs[: matrices + 1]
    more, y_ref = list(refs[matrices + 1 : -1]), refs[-1]
    scaled = _scaled(x_ref, norm and more.pop(0), norm, size)
    add_ref = more.pop(0) if adds else None

    def store(y_r, first, at, there_r):
        """Rows `first` on of a matrix whose outputs begin at `at`."""
        y_r = y_r.astype(y_ref.dtype)
        where = pl.ds(at + first, rows)
        if adds:
            add_r = pl_triton.load(add_ref.at[where], mask=there_r, other=0.0)
            y_r = add_r.astype(jnp.float32) + y_r.astype(jnp.float32)
            y_r = y_r.astype(y_ref.dtype)
        pl_triton.store(y_ref.at[where], y_r, mask=there_r)

    number, at = pl.program_id(0), 0
    if gated:
        first = number * rows
        (gate_r, there_r), (up_r, _) = (
            _rows(w_ref, scaled, first, rows, size) for w_ref in w_refs
        )
        gate_r, up_r = (
            x.astype(y_ref.dtype).astype(jnp.float32) for x in (gate_r, up_r)
        )
        store(gate_r * jax.nn.sigmoid(gate_r) * up_r, first, 0, there_r)
        return
    begins = 0
    for w_ref in w_refs:
        ends = begins + pl.cdiv(w_ref.shape[0], rows)

        def mine(w_ref=w_ref, begins=begins, at=at):
            first = (number - begins) * rows
            y_r, there_r = _rows(w_ref, scaled, first, rows, size)
            store(y_r, first, at, there_r)

        if matrices == 1:
            mine()
        else:
            pl.when((number >= begins) & (number < ends))(mine)
        begins, at = ends, at + w_ref.shape[0]


def _scaled(x_ref, weight_ref, norm, size):
    """A function of a block's number: that block of x, float32, after the norm."""
    (i,) = x_ref.shape

    def block(ref, j):
        mask = {} if i % size == 0 else {"mask": _at(j, size) < i, "other": 0.0}
        return pl_triton.load(ref.at[pl.ds(j * size, size)], **mask)

    if norm is None:
        return lambda j: block(x_ref, j).astype(jnp.float32)
    eps, offset = norm

    def add(j, sum_s):
        return sum_s + jnp.square(block(x_ref, j).astype(jnp.float32))

    zero_s = jnp.zeros((size,), jnp.float32)
    square = jnp.sum(jax.lax.fori_loop(0, pl.cdiv(i, size), add, zero_s))
    scale = jax.lax.rsqrt(square / i + eps)

    def scaled(j):
        x_s = block(x_ref, j).astype(jnp.float32) * scale
        weight_s = block(weight_ref, j).astype(jnp.float32)
        if offset:
            x_s = x_s * (1 + weight_s)
        else:
            x_s = x_s.astype(x_ref.dtype).astype(jnp.float32) * weight_s
        return x_s.astype(x_ref.dtype).astype(jnp.float32)

    return scaled


def _rows(w_ref, scaled, first, rows, size):
    """(W x for some rows of W, float32; which of these there are)."""
    o, i = w_ref.shape
    there_r = first + jnp.arange(rows) < o

    def block(j, sum_rs):
        mask = {}
        if o % rows or i % size:
            there_rs = there_r[:, None] & (_at(j, size) < i)[None]
            mask = {"mask": there_rs, "other": 0.0}
        where = pl.ds(first, rows), pl.ds(j * size, size)
        w_rs = pl_triton.load(w_ref.at[where], **mask)
        return sum_rs + w_rs.astype(jnp.float32) * scaled(j)[None]

    sum_rs = jnp.zeros((rows, size), jnp.float32)
    sum_rs = jax.lax.fori_loop(0, pl.cdiv(i, size), block, sum_rs)
    return jnp.sum(sum_rs, axis=1), there_r


def _at(j, size):
    return j * size + jnp.arange(size)
