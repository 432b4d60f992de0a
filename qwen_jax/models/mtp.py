# SPDX-License-Identifier: Apache-2.0
"""Multi-token prediction: a layer that sees the next token and predicts the one after.

    h'_t = layer(We norm_e(embed(x_{t+1})) + Wh norm_h(h_t));  m_t = norm(h'_t)
    logits of x_{t+2} = head(m_t), with the model's own embedding and head

Source: DeepSeek-V3 (arXiv 2412.19437, section 2.2), with the names and the order of the
published Qwen3-Next and Qwen3.5: h_t is the model's hidden state after its last norm,
[We | Wh] one matrix there, the layer has full attention (and experts where the model
has). Layer i of several takes m of layer i - 1 for h and predicts x_{t+2+i}; they share
all but the layer itself.

Shapes: hidden_btd -> [hidden_btd of each layer]; weights embedding_dd and hidden_dd
(input first), embedding_norm_d, hidden_norm_d, norm_d and `layers` as in the decoder.
Invariants: a token's further target is of its own document: where the document ends
before it there is none (`targets` gives mask 0), so packed rows equal separate rows.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax import mesh
from qwen_jax.models import cache as cache_lib
from qwen_jax.models import context, decoder, norm, places
from qwen_jax.models import spec as spec_lib


def hidden(
    spec: spec_lib.Spec,
    params: dict[str, Any],
    hidden_btd: jax.Array,
    tokens_bt: jax.Array,
    *,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    rules: mesh.Rules | None = None,
    remat: str = "none",
) -> tuple[list[jax.Array], dict[str, jax.Array] | None]:
    """(m_t of each layer [b, t, d], what the routers counted or None).

    Args:
      spec: the model.
      params: its weights.
      hidden_btd: of the same tokens, from `decoder.hidden`.
      tokens_bt: int32 [b, t].
      positions: int32 [b, t]; default 0..t-1.
      segments: int32 [b, t]; 0 = padding.
      rules: dims -> mesh axes.
      remat: as in `decoder`.
    """
    rules = rules or mesh.Rules()
    if rules.split:
        ways = mesh.axis_size(rules.split)
        context.check(spec, tokens_bt.shape[1], ways, depths=spec.mtp_layers)
    angles, chunked = places.of_rows(spec, *tokens_bt.shape, positions, segments, rules)
    out, counted = [], []
    for i, kind in enumerate(spec.mtp_kinds):
        x_btd = enter(spec, params, shifted(tokens_bt, i + 1), hidden_btd, rules)
        layer = decoder.block(
            spec, rules, kind, remat=remat, scanned=False, chunked=chunked
        )
        p = jax.tree.map(lambda x, i=i: x[i], params["mtp"]["layers"])
        x_btd, stats = layer(p, x_btd, *angles, segments)
        hidden_btd = leave(spec, params, x_btd)
        out.append(hidden_btd)
        counted.append(stats)
    if spec.moe is None:
        return out, None
    return out, jax.tree.map(lambda *xs: jnp.stack(xs), *counted)


def hidden_cached(
    spec: spec_lib.Spec,
    params: dict[str, Any],
    next_bt: jax.Array,
    hidden_btd: jax.Array,
    cache: cache_lib.Cache,
    *,
    segments: jax.Array,
    rules: mesh.Rules,
) -> tuple[jax.Array, cache_lib.Cache]:
    """m_t of the first layer for new tokens, from the next tokens and hidden states of
    these, and the cache (of `cache.init(alone(spec), ...)`) with them in."""
    slots_bs = cache_lib.put(cache.segments_bs, segments, cache.length, rules)
    angles, chunked = places.of_cache(spec, cache, None, segments, slots_bs, rules)
    x_btd, held = decoder.cached_layer(
        jax.tree.map(lambda x: x[0], params["mtp"]["layers"]),
        enter(spec, params, next_bt, hidden_btd, rules),
        {"attention": jax.tree.map(lambda x: x[0], cache.attention)},
        spec.mtp_kinds[0],
        angles=angles,
        segments=segments,
        slots_bs=slots_bs,
        cache=cache,
        spec=spec,
        rules=rules,
        chunked=chunked,
    )
    cache = cache.replace(
        attention=jax.tree.map(lambda x: x[None], held["attention"]),
        segments_bs=slots_bs,
        length=cache.length + next_bt.shape[1],
    )
    return leave(spec, params, x_btd), cache


def alone(spec: spec_lib.Spec) -> spec_lib.Spec:
    """A model of one layer like the head's: its cache is that of the head."""
    return dataclasses.replace(spec, num_layers=1, mixers=("attention",), window=0)


def enter(
    spec: spec_lib.Spec,
    params: dict[str, Any],
    next_bt: jax.Array,
    hidden_btd: jax.Array,
    rules: mesh.Rules,
) -> jax.Array:
    """We norm_e(embed(next)) + Wh norm_h(hidden)."""
    p, dtype = params["mtp"], hidden_btd.dtype
    out = rules.pspec("batch", None, None)

    def part(scale, w, x_btd):
        x_btd = norm.rms_norm(x_btd, p[scale], spec.norm_eps, spec.norm_offset)
        how = {"dtype": dtype, "reduce_dtype": spec.reduce_dtype}
        w_dd = mesh.gather(p[w], rules, "embed", None, **how)
        return mesh.product(x_btd, w_dd, out=out)

    e_btd = mesh.take(params["embed_vd"], next_bt, rules).astype(dtype)
    from_embedding = part("embedding_norm_d", "embedding_dd", e_btd)
    return from_embedding + part("hidden_norm_d", "hidden_dd", hidden_btd)


def leave(spec: spec_lib.Spec, params: dict[str, Any], x_btd: jax.Array) -> jax.Array:
    """The norm that the head, and the next layer, take their input from."""
    scale_d = params["mtp"]["norm_d"]
    return norm.rms_norm(x_btd, scale_d, spec.norm_eps, spec.norm_offset)


def targets(batch: dict[str, jax.Array], depth: int) -> tuple[jax.Array, jax.Array]:
    """(x_{t+2+depth}, its weight) for each t; arrays [..., t] as in training."""
    segments, by = batch["segments_bt"], depth + 1
    same = (shifted(segments, by) == segments) & (segments > 0)
    weight = jnp.where(same, shifted(batch["mask_bt"], by), 0)
    return shifted(batch["targets_bt"], by), weight


def shifted(x: jax.Array, by: int) -> jax.Array:
    """x[..., t + by] at t, zeros at the end."""
    return jnp.pad(x[..., by:], [(0, 0)] * (x.ndim - 1) + [(0, by)])
