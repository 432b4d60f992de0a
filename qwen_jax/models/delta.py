# SPDX-License-Identifier: Apache-2.0
"""Gated DeltaNet (arXiv 2412.06464), the linear attention of Qwen3-Next and Qwen3.5.

    q, k, v = silu(conv(x Wq | x Wk | x Wv)); q, k normalised to length 1, q / sqrt(k)
    beta = sigmoid(x Wb); g = -exp(a_log) softplus(x Wa + dt_bias)
    o = delta_rule(q, k, v, g, beta); y = (w norm(o) gate(x Wz)) Wo

with silu for the gate, or sigmoid in the preview of Qwen4.

The convolution is causal, one filter of a few taps for each channel, and like the state
it never reaches across a border of documents: packed rows equal separate rows.

Shapes: x_btd -> y_btd. Key heads h of width k, value heads n of width u; a key head
serves n / h neighbouring value heads. Weights q_ldhk, k_ldhk, v_ldnu, z_ldnu, b_ldn,
a_ldn, filters conv_q_ljhk, conv_k_ljhk, conv_v_ljnu, a_log_ln, dt_bias_ln, norm_lu,
o_lnud. Beta, g and the state are float32.
State in, state out: see `mix`; `cache.Cache` keeps it between calls.
Where the tokens of a row are split over devices, states and tails of the convolution
are handed from piece to piece (see context.py): the linear form of the rule, as in
sequence parallelism for linear attention (LASP-2, arXiv 2502.07563).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qwen_jax import mesh
from qwen_jax.models import context, front, norm
from qwen_jax.models import spec as spec_lib
from qwen_jax.models.kernels import delta_rule
from qwen_jax.params import Param, normal, ones

# Weights of the convolution and the rule: what happens to a token once it is projected.
RULE = ("conv_q_ljhk", "conv_k_ljhk", "conv_v_ljnu", "a_log_ln", "dt_bias_ln")
TOKENS = ("q_bthk", "k_bthk", "v_btnu", "b_btn", "a_btn")


def _log_uniform(key, shape, dtype):
    """log A with A uniform in (0, 16), as the source starts."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 0.01, 16.0))


def delta_params(spec: spec_lib.Spec, layers: int) -> dict[str, Param]:
    """Weights of `layers` gated delta blocks, stacked."""
    delta, d = spec.delta, spec.width
    h, n, k, u = (
        delta.key_heads,
        delta.value_heads,
        delta.key_width,
        delta.value_width,
    )
    init, taps = normal(spec.init_std), delta.conv_taps
    keys, values = ("layers", "embed", "kv_heads", None), ("layers", "embed", "heads")
    filters = normal(taps**-0.5)
    return {
        "q_ldhk": Param((layers, d, h, k), keys, init),
        "k_ldhk": Param((layers, d, h, k), keys, init),
        "v_ldnu": Param((layers, d, n, u), (*values, None), init),
        "z_ldnu": Param((layers, d, n, u), (*values, None), init),
        "b_ldn": Param((layers, d, n), values, init),
        "a_ldn": Param((layers, d, n), values, init),
        "conv_q_ljhk": Param(
            (layers, taps, h, k), ("layers", None, "kv_heads", None), filters
        ),
        "conv_k_ljhk": Param(
            (layers, taps, h, k), ("layers", None, "kv_heads", None), filters
        ),
        "conv_v_ljnu": Param(
            (layers, taps, n, u), ("layers", None, "heads", None), filters
        ),
        "a_log_ln": Param((layers, n), ("layers", "heads"), _log_uniform),
        "dt_bias_ln": Param((layers, n), ("layers", "heads"), ones),
        "norm_lu": Param((layers, u), ("layers", None), ones),
        "o_lnud": Param((layers, n, u, d), ("layers", "heads", None, "embed"), init),
    }


def mix(
    p: dict[str, jax.Array],
    x_btd: jax.Array,
    segments_bt: jax.Array | None,
    state: dict[str, Any] | None = None,
    *,
    spec: spec_lib.Spec,
    rules: mesh.Rules,
    keep: bool = False,
) -> tuple[jax.Array, dict[str, Any]]:
    """One layer over new tokens: (y_btd, what the next call needs).

    Args:
      p: one layer's weights.
      x_btd: normed input.
      segments_bt: int32, 0 for padding; None for one segment and no padding.
      state: None at the beginning, else {"s_bnku", "q_bjhk", "k_bjhk", "v_bjnu",
        "segments_bj"}: the matrices, and inputs of the convolution and segments of the
        last taps - 1 real tokens of each row. What comes back has all but the segments,
        which are the same for all layers: see `tail_segments`.
      spec: the model.
      rules: dims -> mesh axes.
      keep: what comes back has "inputs", too: with them `run` tells what the state is
        when only some of these tokens turn out to be real.
    """
    if segments_bt is None:
        ones_bt = jnp.ones(x_btd.shape[:2], jnp.int32)
        segments_bt = mesh.reshard(ones_bt, rules.pspec("batch", "tokens"))
    keys = rules.pspec("batch", "tokens", "kv_heads", None)
    values = rules.pspec("batch", "tokens", "heads", None)

    def project(name, heads, out):
        how = {"dtype": x_btd.dtype, "reduce_dtype": spec.reduce_dtype}
        rest = (None,) * (p[name].ndim - 2)
        w = mesh.gather(p[name], rules, "embed", heads, *rest, **how)
        return checkpoint_name(mesh.product(x_btd, w, out=out), name.split("_")[0])

    scalar = rules.pspec("batch", "tokens", "heads")
    inputs = {
        "q_bthk": project("q_ldhk", "kv_heads", keys),
        "k_bthk": project("k_ldhk", "kv_heads", keys),
        "v_btnu": project("v_ldnu", "heads", values),
        "b_btn": project("b_ldn", "heads", scalar),
        "a_btn": project("a_ldn", "heads", scalar),
    }
    if state is None and rules.split:
        out_btnu, state = _run_split(p, inputs, segments_bt, rules), {}
    else:
        state = state or fresh(spec, x_btd.shape[0], x_btd.dtype, rules)
        out_btnu, state = run(p, inputs, segments_bt, state, rules)
    if keep:
        state = state | {"inputs": inputs}
    out_btnu = norm.rms_norm(out_btnu, p["norm_lu"], spec.norm_eps)
    z_btnu = project("z_ldnu", "heads", values)
    wide = jnp.promote_types(z_btnu.dtype, jnp.float32)
    gate = jax.nn.silu if spec.delta.gate == "silu" else jax.nn.sigmoid
    out_btnu = (out_btnu * gate(z_btnu.astype(wide))).astype(x_btd.dtype)
    how = {"dtype": x_btd.dtype, "reduce_dtype": spec.reduce_dtype}
    o_nud = mesh.gather(p["o_lnud"], rules, "heads", None, "embed", **how)
    out = rules.pspec("batch", "tokens", None)
    return mesh.product(out_btnu, o_nud, inner=2, out=out), state


def run(
    p: dict[str, jax.Array],
    inputs: dict[str, jax.Array],
    segments_bt: jax.Array,
    state: dict[str, jax.Array],
    rules: mesh.Rules,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The convolution and the rule of one layer over projected tokens: (out_btnu, state
    without segments); arguments as in `mix`."""
    keys = rules.pspec("batch", None, "kv_heads", None)
    values = rules.pspec("batch", None, "heads", None)
    scalar = rules.pspec("batch", None, "heads")
    rows = rules.pspec("batch", None)
    tails = {"q_bjhk": keys, "k_bjhk": keys, "v_bjnu": values, "segments_bj": rows}
    layout = tails | {"s_bnku": rules.pspec("batch", "heads", None, None)}
    kept = {k: lies for k, lies in layout.items() if k != "segments_bj"}

    def here(q, k, v, b, a, segments, state, *weights):
        weights = [mesh.vary(w, mesh.varying(q)) for w in weights]
        return _local(q, k, v, b, a, segments, state, *weights)

    here = mesh.local(
        here,
        inputs=(keys, keys, values, scalar, scalar, rows, layout, *_weights_lie(rules)),
        out=(values, kept),
    )
    return here(
        *(inputs[name] for name in TOKENS),
        segments_bt,
        {name: state[name] for name in layout},
        *(p[name] for name in RULE),
    )


def _run_split(p, inputs, segments_bt, rules):
    """As `run` from the first token on, where the tokens of a row are split."""
    keys = rules.pspec("batch", "tokens", "kv_heads", None)
    values = rules.pspec("batch", "tokens", "heads", None)
    scalar = rules.pspec("batch", "tokens", "heads")
    rows = rules.pspec("batch", "tokens")

    def here(q, k, v, b, a, segments, *weights):
        weights = [mesh.vary(w, mesh.varying(q)) for w in weights]
        return _split(q, k, v, b, a, segments, *weights, axes=rules.split)

    here = mesh.local(
        here,
        inputs=(keys, keys, values, scalar, scalar, rows, *_weights_lie(rules)),
        out=values,
    )
    tokens = (inputs[name] for name in TOKENS)
    return here(*tokens, segments_bt, *(p[name] for name in RULE))


def _weights_lie(rules):
    filters = rules.pspec(None, "kv_heads", None)
    return (
        *(filters, filters, rules.pspec(None, "heads", None)),
        *(rules.pspec("heads"),) * 2,
    )


def fresh(
    spec: spec_lib.Spec, b: int, dtype: Any, rules: mesh.Rules, *layers: int
) -> dict[str, jax.Array]:
    """The state before the first token of `b` rows (with `layers` in front)."""
    delta = spec.delta
    h, n, taps = delta.key_heads, delta.value_heads, delta.conv_taps - 1
    wide = jnp.promote_types(dtype, jnp.float32)
    stack = tuple("layers" for _ in layers)

    def zeros(*shape, dims, dtype=dtype):
        x = jnp.zeros((*layers, *shape), dtype)
        return mesh.reshard(x, rules.pspec(*stack, *dims))

    tail = ("batch", None)
    return {
        "s_bnku": zeros(
            b,
            n,
            delta.key_width,
            delta.value_width,
            dims=("batch", "heads", None, None),
            dtype=wide,
        ),
        "q_bjhk": zeros(b, taps, h, delta.key_width, dims=(*tail, "kv_heads", None)),
        "k_bjhk": zeros(b, taps, h, delta.key_width, dims=(*tail, "kv_heads", None)),
        "v_bjnu": zeros(b, taps, n, delta.value_width, dims=(*tail, "heads", None)),
        "segments_bj": zeros(b, taps, dims=tail, dtype=jnp.int32),
    }


def _local(q, k, v, b, a, segments, state, *weights):
    """The convolution and the rule for one device's rows and heads."""
    order, back = front.order(segments)
    q, k, v, b, a, segments = (front.take(x, order) for x in (q, k, v, b, a, segments))
    inputs, tails = _rule_inputs(q, k, v, b, a, segments, state, *weights)
    before = delta_rule.State(state["s_bnku"], state["segments_bj"][:, -1])
    rule = delta_rule.recurrent if segments.shape[1] == 1 else delta_rule.chunked
    out, after = rule(*inputs, segments, before)
    return front.take(out, back), {"s_bnku": after.s_bhku, **tails}


def _split(q, k, v, b, a, segments, *weights, axes):
    """As `_local`, where this device has two pieces of each row.

    A piece hands on the last inputs of the convolution, then, for the rule, what it
    makes of any state: a S + b. With the state that comes to it, it goes through its
    tokens as ever.
    """
    taps = weights[0].shape[0] - 1
    tokens = [context.cut(x) for x in (q, k, v, b, a, segments)]
    order, back = front.order(tokens[-1])
    *tokens, segments = (front.take(x, order) for x in tokens)
    tails = [_tail(x, segments, taps) for x in (*tokens[:3], segments)]

    def handed(held, tail):
        both = (jnp.concatenate(pair, axis=1) for pair in zip(held, tail, strict=True))
        return [front.last(x, tail[-1], taps) for x in both]

    none = [jnp.zeros((len(x) // 2, *x.shape[1:]), x.dtype) for x in tails]
    tails = context.before(handed, none, tails, axes)
    names = ("q_bjhk", "k_bjhk", "v_bjnu", "segments_bj")
    tails = dict(zip(names, tails, strict=True))
    inputs, _ = _rule_inputs(*tokens, segments, tails, *weights)
    first_b, out_dtype, t = tails["segments_bj"][:, -1], inputs[2].dtype, back.shape[1]
    *inputs, _, _ = delta_rule.prepared(*inputs, segments, None)
    chunks = delta_rule.cut(*inputs, segments, first_b)
    parts = delta_rule.transition(chunks, first_b)

    def state_after(s_bhku, part):
        a_bhkk, b_bhku = part
        return jnp.einsum("bhkj,bhju->bhku", a_bhkk, s_bhku) + b_bhku

    start = jnp.zeros((len(back) // 2, *parts[1].shape[1:]), parts[1].dtype)
    s_bhku = context.before(state_after, start, parts, axes)
    out, _ = delta_rule.through(chunks, delta_rule.State(s_bhku, first_b), t)
    out = jnp.where((segments > 0)[:, :, None, None], out, 0.0).astype(out_dtype)
    return context.join(front.take(out, back))


def _tail(x, segments, taps):
    """The last `taps` real of tokens that are ordered, and padding behind fewer."""
    x = jnp.pad(x, [(0, 0), (0, taps)] + [(0, 0)] * (x.ndim - 2))
    real = jnp.sum(segments > 0, axis=1, keepdims=True)
    return front.take(x, jnp.maximum(real - taps, 0) + jnp.arange(taps)[None])


def _rule_inputs(
    q, k, v, b, a, segments, tails, conv_q, conv_k, conv_v, a_log, dt_bias
):
    """((q, k, v, g, beta) of the rule for ordered tokens, the convolution's tails)."""
    t, taps = segments.shape[1], conv_q.shape[0] - 1
    seen = jnp.concatenate([tails["segments_bj"], segments], axis=1)

    def conv(x, filter_jhk, tail):
        """(silu of the causal filter, the last inputs)."""
        x = jnp.concatenate([tail, x], axis=1)
        y = jnp.zeros(
            (x.shape[0], t, *x.shape[2:]), jnp.promote_types(x.dtype, "float32")
        )
        for j in range(taps + 1):
            near = (seen[:, j : j + t] == segments) & (segments > 0)
            part = x[:, j : j + t] * filter_jhk[j][None, None]
            y = y + jnp.where(near[..., None, None], part, 0)
        return jax.nn.silu(y), front.last(x, segments, taps)

    q, q_tail = conv(q, conv_q, tails["q_bjhk"])
    k, k_tail = conv(k, conv_k, tails["k_bjhk"])
    v, v_tail = conv(v, conv_v, tails["v_bjnu"])
    groups = v.shape[2] // k.shape[2]
    q, k = (jnp.repeat(_unit(x), groups, axis=2) for x in (q, k))
    wide = v.dtype
    beta = jax.nn.sigmoid(b.astype(wide))
    fall = jax.nn.softplus(a.astype(wide) + dt_bias.astype(wide)[None, None])
    g = -jnp.exp(a_log.astype(wide))[None, None] * fall
    kept = {"q_bjhk": q_tail, "k_bjhk": k_tail, "v_bjnu": v_tail}
    return (q * q.shape[-1] ** -0.5, k, v, g, beta), kept


def tail_segments(tail_bj: jax.Array, segments_bt: jax.Array) -> jax.Array:
    """Segments of the last real tokens of each row, after new tokens."""
    segments_bt = front.take(segments_bt, front.order(segments_bt)[0])
    seen = jnp.concatenate([tail_bj, segments_bt], axis=1)
    return front.last(seen, segments_bt, tail_bj.shape[1])


def _unit(x):
    """x / |x|, with 1e-6 under the root."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
