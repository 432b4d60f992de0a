# SPDX-License-Identifier: Apache-2.0
"""Tokens in, logits out: the one decoder of every dense Qwen.

x = embed(tokens); for each layer: x += attention(norm(x)); x += mlp(norm(x)); then a
final norm and the head (the embedding again when tied).

Shapes: tokens_bt int32 -> hidden_btd -> logits_btv float32. Parameters are a dict:
`embed_vd`, `layers` (every leaf stacked, layer dim first), `norm_d`, and `head_vd` when
untied (rows are words, as in the embedding: with columns for words the product runs at
half the rate on a CPU, each stride of a power of two landing in the same cache set).
Invariants: weights are always stored stacked. `loop="scan"` (one compiled layer) or
"unroll" (all of them; faster on a CPU) is a choice of the run and gives the same
numbers; `unstacked` gives a list of layers for decoding, where slices would be copied.
Layers with different windows run as consecutive stretches of the same loop. `remat`
says which activations of a layer stay for the backward pass: "none" leaves it to
autodiff, "full" keeps only the layer's input, "dots" keeps the outputs of the matrix
products, and a comma-separated list keeps those names (see `SAVED`).
Raises: config.InputError for a bad `remat`, ValueError for shapes.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax import config, mesh
from qwen_jax.models import attention as attn
from qwen_jax.models import cache as cache_lib
from qwen_jax.models import mlp as mlp_lib
from qwen_jax.models import norm, rope
from qwen_jax.models import spec as spec_lib
from qwen_jax.params import Param, normal, ones

SAVED = ("q", "k", "v", "attention", "attention_lse", "mlp_gate", "mlp_up")


def decoder_params(spec: spec_lib.Spec) -> dict[str, Any]:
    """The declaration tree of the whole model."""
    layers, d, v = spec.num_layers, spec.width, spec.vocab_size
    init = normal(spec.init_std)
    tree = {
        "embed_vd": Param((v, d), ("vocab", "embed"), init),
        "layers": {
            "attention_norm_ld": Param((layers, d), ("layers", None), ones),
            "attention": attn.attention_params(spec),
            "mlp_norm_ld": Param((layers, d), ("layers", None), ones),
            "mlp": mlp_lib.mlp_params(spec),
        },
        "norm_d": Param((d,), (None,), ones),
    }
    if not spec.tie_embedding:
        tree["head_vd"] = Param((v, d), ("vocab", "embed"), init)
    return tree


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _layers_of(stacked, count):
    """Stacked leaves -> list of layers. The backward pass stacks the cotangents once;
    autodiff of slices would add `count` full-size arrays."""
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count)]


_layers_of.defvjp(
    lambda stacked, count: (_layers_of(stacked, count), None),
    lambda count, _, parts: (jax.tree.map(lambda *xs: jnp.stack(xs), *parts),),
)


def unstacked(params: dict[str, Any]) -> dict[str, Any]:
    """The same weights with `layers` as a list, for decoding on a CPU."""
    layers = params["layers"]
    if isinstance(layers, list):
        return params
    count = jax.tree.leaves(layers)[0].shape[0]
    return params | {"layers": _layers_of(layers, count)}


def saved_names(remat: str) -> tuple[str, ...] | None:
    """Activations that a `remat` setting keeps; None when autodiff decides.

    Raises:
      config.InputError: a name that is not in `SAVED`.
    """
    if remat in ("none", ""):
        return None
    if remat == "full":
        return ()
    names = SAVED if remat == "dots" else tuple(remat.split(","))
    for name in names:
        if name not in SAVED:
            raise config.InputError(
                f"remat={remat!r}: {name!r} is not an activation"
                f"{config.nearest(name, SAVED)}; or use none, full, dots"
            )
    return names


def _layer(p, x_btd, cos_btk, sin_btk, segments_bt, *, spec, rules, window):
    """One block: x + attention(norm(x)), then + mlp(norm(x))."""
    with jax.named_scope("attention"):
        y_btd = norm.rms_norm(x_btd, p["attention_norm_ld"], spec.norm_eps)
        x_btd = x_btd + attn.attention(
            p["attention"],
            y_btd,
            cos_btk,
            sin_btk,
            segments_bt,
            spec=spec,
            rules=rules,
            window=window,
        )
    return _feed_forward(p, x_btd, spec, rules)


def _feed_forward(p, x_btd, spec, rules):
    with jax.named_scope("mlp"):
        y_btd = norm.rms_norm(x_btd, p["mlp_norm_ld"], spec.norm_eps)
        return x_btd + mlp_lib.mlp(p["mlp"], y_btd, spec, rules)


def _stretches(spec: spec_lib.Spec) -> list[tuple[int, int, int]]:
    """(first layer, one past the last, window) of each run of equal windows."""
    runs, start = [], 0
    for window, group in itertools.groupby(spec.windows):
        count = len(list(group))
        runs.append((start, start + count, window))
        start += count
    return runs


def hidden(
    spec: spec_lib.Spec,
    params: dict[str, Any],
    tokens_bt: jax.Array,
    *,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    rules: mesh.Rules | None = None,
    loop: str = "scan",
    remat: str = "none",
) -> jax.Array:
    """Final hidden states after the last norm, in the compute dtype: [b, t, d]."""
    rules = rules or mesh.Rules()
    b, t = tokens_bt.shape
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t))
        positions = mesh.reshard(positions, rules.pspec("batch", None))
    cos_btk, sin_btk = rope.angles(spec, positions)
    x_btd = mesh.take(params["embed_vd"], tokens_bt, rules).astype(spec.compute_dtype)
    saved = saved_names(remat)

    def layer_for(window):
        layer = functools.partial(_layer, spec=spec, rules=rules, window=window)
        if saved is not None:
            policy = jax.checkpoint_policies.save_only_these_names(*saved)
            # Under a scan the barriers against CSE are not needed (and cost).
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=loop != "scan")
        return layer

    layers = params["layers"]
    if loop == "unroll" and not isinstance(layers, list):
        layers = _layers_of(layers, spec.num_layers)
    for start, stop, window in _stretches(spec):
        layer = layer_for(window)
        if isinstance(layers, list):
            for p in layers[start:stop]:
                x_btd = layer(p, x_btd, cos_btk, sin_btk, segments)
            continue
        part = layers
        if (start, stop) != (0, spec.num_layers):
            part = jax.tree.map(lambda x, a=start, z=stop: x[a:z], layers)

        def body(x, p, layer=layer):
            return layer(p, x, cos_btk, sin_btk, segments), None

        x_btd, _ = jax.lax.scan(body, x_btd, part)
    return norm.rms_norm(x_btd, params["norm_d"], spec.norm_eps)


def head_vd(spec: spec_lib.Spec, params: dict[str, Any]) -> jax.Array:
    """The output matrix [v, d]: its own weight, or the embedding."""
    return params["embed_vd"] if spec.tie_embedding else params["head_vd"]


def logits(
    spec: spec_lib.Spec,
    params: dict[str, Any],
    hidden_btd: jax.Array,
    rules: mesh.Rules | None = None,
) -> jax.Array:
    """float32 logits [b, t, v] (training never calls this: see train/losses.py)."""
    rules = rules or mesh.Rules()
    w_vd = head_vd(spec, params).astype(hidden_btd.dtype)
    w_vd = mesh.reshard(w_vd, rules.gathered("vocab", "embed"))
    return mesh.einsum(
        "btd,vd->btv",
        hidden_btd,
        w_vd,
        out=rules.pspec("batch", None, "vocab"),
        preferred_element_type=jnp.promote_types(hidden_btd.dtype, jnp.float32),
    )


def forward(
    spec: spec_lib.Spec,
    params: dict[str, Any],
    tokens_bt: jax.Array,
    *,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    cache: cache_lib.Cache | None = None,
    rules: mesh.Rules | None = None,
    loop: str = "scan",
    remat: str = "none",
) -> Any:
    """Logits of every position; with a cache, (logits, cache with the tokens in).

    Args:
      spec: what the model is.
      params: its weights (stacked, or `unstacked`).
      tokens_bt: int32 [b, t].
      positions: int32 [b, t]; default 0..t-1, or with a cache the count of real tokens
        before each.
      segments: int32 [b, t]; a token attends only inside its segment; 0 = padding.
      cache: decoding state from `cache.init` or an earlier call.
      rules: dims -> mesh axes.
      loop: "scan" or "unroll" over the layers.
      remat: see the module docstring.
    Returns:
      float32 [b, t, v], or that and the new cache.
    """
    rules = rules or mesh.Rules()
    if cache is None:
        x_btd = hidden(
            spec,
            params,
            tokens_bt,
            positions=positions,
            segments=segments,
            rules=rules,
            loop=loop,
            remat=remat,
        )
        return logits(spec, params, x_btd, rules)
    x_btd, cache = hidden_cached(
        spec,
        params,
        tokens_bt,
        cache,
        positions=positions,
        segments=segments,
        rules=rules,
    )
    return logits(spec, params, x_btd, rules), cache


def hidden_cached(
    spec: spec_lib.Spec,
    params: dict[str, Any],
    tokens_bt: jax.Array,
    cache: cache_lib.Cache,
    *,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    rules: mesh.Rules | None = None,
) -> tuple[jax.Array, cache_lib.Cache]:
    """Hidden states of new tokens against a cache, and the cache with them in."""
    rules = rules or mesh.Rules()
    b, t = tokens_bt.shape
    if t > cache.slots:
        raise ValueError(f"{t} new tokens do not fit a cache of {cache.slots} slots")
    rows = rules.pspec("batch", None)
    if segments is None:
        segments = mesh.reshard(jnp.ones((b, t), jnp.int32), rows)
    if positions is None:
        before = jnp.sum(cache.segments_bs > 0, axis=1, keepdims=True)
        count = jnp.cumsum(segments > 0, axis=1)
        positions = jnp.maximum(jnp.broadcast_to(before, (b, t)) + count - 1, 0)
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
    put = mesh.local(put, inputs=(rows, rows, jax.P()), out=rows)
    slots_bs = put(cache.segments_bs, segments, cache.length)
    cos_btk, sin_btk = rope.angles(spec, positions)
    x_btd = mesh.take(params["embed_vd"], tokens_bt, rules).astype(spec.compute_dtype)

    def one(p, x, keys, values, window):
        y = norm.rms_norm(x, p["attention_norm_ld"], spec.norm_eps)
        y, keys, values = attn.cached(
            p["attention"],
            y,
            cos_btk,
            sin_btk,
            keys,
            values,
            segments,
            slots_bs,
            cache.length,
            spec=spec,
            rules=rules,
            window=window,
        )
        return _feed_forward(p, x + y, spec, rules), keys, values

    keys, values = [], []
    for start, stop, window in _stretches(spec):
        if isinstance(params["layers"], list):
            for i in range(start, stop):
                x_btd, k, v = one(
                    params["layers"][i],
                    x_btd,
                    cache.k_lbshk[i],
                    cache.v_lbshk[i],
                    window,
                )
                keys.append(k[None])
                values.append(v[None])
            continue
        tree = (params["layers"], cache.k_lbshk, cache.v_lbshk)
        if (start, stop) != (0, spec.num_layers):
            tree = jax.tree.map(lambda x, a=start, z=stop: x[a:z], tree)

        def body(x, layer, window=window):
            p, k, v = layer
            x, k, v = one(p, x, k, v, window)
            return x, (k, v)

        x_btd, (k, v) = jax.lax.scan(body, x_btd, tree)
        keys.append(k)
        values.append(v)
    k_lbshk, v_lbshk = (
        x[0] if len(x) == 1 else jnp.concatenate(x) for x in (keys, values)
    )
    cache = cache_lib.Cache(k_lbshk, v_lbshk, slots_bs, cache.length + t)
    return norm.rms_norm(x_btd, params["norm_d"], spec.norm_eps), cache
