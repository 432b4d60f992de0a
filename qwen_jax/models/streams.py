# SPDX-License-Identifier: Apache-2.0
"""What a block reads of the residual and how its output gets back: one stream, or many.

One stream, every Qwen up to 3.6: a block reads norm(x), and x <- x + block(norm(x)).
Several (`spec.streams`, the preview of Qwen4), all starting as the embedding:

    n = norm(X), each stream by itself;  u = mean over streams of w * n
    w = sigmoid(silu(n Wdown / r) Wup), a number for each stream and dim, of a low rank
    X <- X + i outer block(u),  i = 2 sigmoid(n Winject / r), a number for each stream

before the head the streams are mixed once more, which stands for the final norm.
Source: `qwen4_exp` of transformers 5.23; the idea of several streams is that of
hyper-connections (arXiv 2409.19606).

The decoder calls `start`, then `enter` and `leave` around each block, then `end`; all
four are the plain rule when the spec has one stream.
Shapes: x_btd with one stream, x_btrd with r of them; weights of a stack of layers
norm_lrd, down_lrdq, up_lqrd, inject_lrdo; q is the low rank, o the streams that are
injected into. The rank lies on the mesh axis of `ffn`: `up` is reduced over it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qwen_jax import mesh
from qwen_jax.models import norm
from qwen_jax.models import spec as spec_lib
from qwen_jax.params import Param, normal, ones, zeros


def names(spec: spec_lib.Spec) -> tuple[str, str]:
    """The weights that stand before the mixer and before the feed-forward."""
    if spec.streams is None:
        return "attention_norm_ld", "mlp_norm_ld"
    return "attention_streams", "mlp_streams"


def layer_params(spec: spec_lib.Spec, layers: int) -> dict[str, Any]:
    """Weights of the residual rule around both blocks of `layers` layers, stacked."""
    if spec.streams is not None:
        return {name: _mixer_params(spec, layers) for name in names(spec)}
    plain = zeros if spec.norm_offset else ones
    shape, dims = (layers, spec.width), ("layers", None)
    return {name: Param(shape, dims, plain) for name in names(spec)}


def end_params(spec: spec_lib.Spec) -> dict[str, Any]:
    """Weights between the last layer and the head; streams as a stack of one."""
    if spec.streams is not None:
        tree = _mixer_params(spec, 1)
        del tree["inject_lrdo"]
        return {"streams": tree}
    plain = zeros if spec.norm_offset else ones
    return {"norm_d": Param((spec.width,), (None,), plain)}


def _mixer_params(spec: spec_lib.Spec, layers: int) -> dict[str, Param]:
    r, q, d = spec.streams.count, spec.streams.rank, spec.width
    init, plain = normal(spec.init_std), zeros if spec.norm_offset else ones
    into, back = ("layers", None, "embed"), ("layers", "ffn", None, "embed")
    return {
        "norm_lrd": Param((layers, r, d), ("layers", None, None), plain),
        "down_lrdq": Param((layers, r, d, q), (*into, "ffn"), init),
        "up_lqrd": Param((layers, q, r, d), back, init),
        "inject_lrdo": Param((layers, r, d, r), (*into, None), init),
    }


def start(x_btd: jax.Array, spec: spec_lib.Spec) -> jax.Array:
    """The residual that the first layer meets: the embedding, once for each stream."""
    if spec.streams is None:
        return x_btd
    return jnp.repeat(x_btd[:, :, None], spec.streams.count, axis=2)


def enter(
    p: Any, x: jax.Array, spec: spec_lib.Spec, rules: mesh.Rules
) -> tuple[jax.Array, jax.Array | None]:
    """(what a block reads [b, t, d], how its output is injected [b, t, r] or None).

    `p` is one layer's part of the weight that `names` tells.
    """
    if spec.streams is None:
        return norm.rms_norm(x, p, spec.norm_eps, spec.norm_offset), None
    y_btd, normed_btrd = _mix(p, x, spec, rules)
    how = {"dtype": x.dtype, "reduce_dtype": spec.reduce_dtype}
    inject_rdo = mesh.gather(p["inject_lrdo"], rules, None, "embed", None, **how)
    out = rules.pspec("batch", "tokens", None)
    logit_bto = mesh.product(normed_btrd, inject_rdo, inner=2, out=out)
    logit_bto = checkpoint_name(logit_bto, "inject")
    return y_btd, 2 * jax.nn.sigmoid(logit_bto / spec.streams.count)


def leave(x: jax.Array, y_btd: jax.Array, inject_bto: jax.Array | None) -> jax.Array:
    """The residual with a block's output in."""
    if inject_bto is None:
        return x + y_btd
    return x + inject_bto[..., None] * y_btd[:, :, None, :]


def end(
    params: dict[str, Any], x: jax.Array, spec: spec_lib.Spec, rules: mesh.Rules
) -> jax.Array:
    """What the head reads: [b, t, d]."""
    if spec.streams is None:
        return norm.rms_norm(x, params["norm_d"], spec.norm_eps, spec.norm_offset)
    return _mix({k: w[0] for k, w in params["streams"].items()}, x, spec, rules)[0]


def _mix(p, x_btrd, spec, rules):
    """(the mean of the gated streams, the normed streams)."""
    r = spec.streams.count
    how = {"dtype": x_btrd.dtype, "reduce_dtype": spec.reduce_dtype}
    normed_btrd = norm.rms_norm(x_btrd, p["norm_lrd"], spec.norm_eps, spec.norm_offset)
    down_rdq = mesh.gather(p["down_lrdq"], rules, None, "embed", "ffn", **how)
    up_qrd = mesh.gather(p["up_lqrd"], rules, "ffn", None, "embed", **how)
    inner = rules.pspec("batch", "tokens", "ffn")
    low_btq = mesh.product(normed_btrd, down_rdq, inner=2, out=inner)
    low_btq = checkpoint_name(low_btq, "mix")
    out = rules.pspec("batch", "tokens", None, None)
    gate_btrd = mesh.product(jax.nn.silu(low_btq / r), up_qrd, out=out)
    return jnp.mean(jax.nn.sigmoid(gate_btrd) * normed_btrd, axis=2), normed_btrd
