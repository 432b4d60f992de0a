# SPDX-License-Identifier: Apache-2.0
"""A layer over one new token of one row, in as few kernels as there are, for GPUs.

One row leaves a GPU waiting between kernels more than in them: a layer of Qwen3-0.6B
is 10 us of reading weights, and each kernel 2 us of beginning and ending. So what
stands around a product is done by its kernel (`one_row.py`).

Shapes: x_11d of the residual -> x_11d behind the layer, and the layer's pools.
Invariants: the same as the layer in the open (`paged.hidden`), up to the order of sums
and the rounding between the steps of SwiGLU.
Raises: nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax import mesh, one_row
from qwen_jax.models import attention as attn
from qwen_jax.models import spec as spec_lib
from qwen_jax.models import streams


def fits(spec: spec_lib.Spec, kind: Any, p: dict[str, Any], rows: int, way: str):
    """Whether `layer` takes it: plain attention and SwiGLU, weights turned."""
    plain = spec.streams is None and kind.mixer == "attention" and not kind.sparse
    if rows != 1 or way != "kernel" or not plain or mesh.active():
        return False
    if not one_row.there(jnp.dtype(spec.compute_dtype)):
        return False
    return isinstance(p["mlp"]["gate_ldf"], mesh.Turned)


def layer(
    spec: spec_lib.Spec,
    p: dict[str, Any],
    x_11d: jax.Array,
    angles: tuple[jax.Array, jax.Array],
    attend,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The layer; `attend(q_btnk, k_bthk, v_bthk)` gives what attention makes of the new
    token and its row's pages, and the pools with it in."""
    a, m, (before, behind) = p["attention"], p["mlp"], streams.names(spec)
    interpret = mesh.platform() == "cpu"

    def product(weights, x_i, *, norm=None, **how):
        ws = [w.astype(x_i.dtype).x for w in weights]
        ws = [w.reshape(-1, len(x_i)) for w in ws]
        if norm is not None:
            norm = one_row.Norm(norm, spec.norm_eps, spec.norm_offset)
        return one_row.product(ws, x_i, norm=norm, interpret=interpret, **how)

    x_d = x_11d.reshape(-1)
    names = ["q_ldnk", "k_ldhk", "v_ldhk"] + ["gate_ldnk"] * spec.output_gate
    all_o, parts, at = product([a[n] for n in names], x_d, norm=p[before]), [], 0
    for name in names:
        heads = spec.num_kv_heads if "h" in name.split("_")[1] else spec.num_heads
        size = heads * spec.head_width
        part = jax.lax.slice_in_dim(all_o, at, at + size)
        parts.append(part.reshape(1, 1, heads, spec.head_width))
        at += size
    q, k, v = (
        attn.turned(a, one, parts["qkv".index(one)], *angles, spec) for one in "qkv"
    )
    out_11nk, held = attend(q, k, v)
    if spec.output_gate:
        out_11nk = out_11nk * jax.nn.sigmoid(parts[3])
    x_d = product([a["o_lnkd"]], out_11nk.reshape(-1), add_o=x_d)
    pair = m["gate_ldf"], m["up_ldf"]
    hidden_f = product(pair, x_d, norm=p[behind], gated=True)
    x_d = product([m["down_lfd"]], hidden_f, add_o=x_d)
    return x_d.reshape(x_11d.shape), held
