# SPDX-License-Identifier: Apache-2.0
"""Tokens in, logits out: the one decoder of every Qwen.

x = embed(tokens); for each layer: x += mixer(norm(x)); x += feed_forward(norm(x)); then
a final norm and the head (the embedding again when tied). A mixer is attention or the
gated delta rule, a feed-forward one SwiGLU or a mixture of experts: `spec.kinds`. What
stands around a block, the norm and the sum, is `streams.py`.

Shapes: tokens_bt int32 -> hidden_btd -> logits_btv float32. Parameters are a dict:
`embed_vd`, `layers`, `norm_d`, and `head_vd` when untied (rows are words, as in the
embedding: with columns for words the product runs at half the rate on a CPU, each
stride of a power of two landing in the same cache set).
`layers` has a stack for each thing that layers are made of: both norms, `attention`,
`delta`, `mlp`, `moe`, `ngram`; every leaf has those layers in front that have the
thing, in order, so uniform and hybrid models are stored alike.
Invariants: weights are always stored stacked. `loop="scan"` (one compiled layer) or
"unroll" (all of them; faster on a CPU) is a choice of the run and gives the same
numbers; `unstacked` gives a list of layers for decoding, where slices would be copied.
Layers that differ by a repeating pattern are one loop over the pattern. `remat`
says which activations of a layer stay for the backward pass: "none" leaves it to
autodiff, "full" keeps only the layer's input, "dots" keeps the outputs of the matrix
products, and a comma-separated list keeps those names (see `SAVED`).
Where a mesh splits the tokens of a row (`mesh.Rules.tokens`), whole rows come, and
their results go, in the order of `mesh.zigzag`; see context.py for what that refuses.
Raises: config.InputError for a bad `remat`, ValueError for shapes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax import config, mesh
from qwen_jax.models import attention as attn
from qwen_jax.models import cache as cache_lib
from qwen_jax.models import context, places, streams, stretches, vision, vl
from qwen_jax.models import delta as delta_lib
from qwen_jax.models import mlp as mlp_lib
from qwen_jax.models import moe as moe_lib
from qwen_jax.models import ngram as ngram_lib
from qwen_jax.models import ring as ring_lib
from qwen_jax.models import spec as spec_lib
from qwen_jax.params import Param, normal, zeros

SAVED = (
    *("q", "k", "v", "attention", "attention_lse", "gate", "z", "b", "a"),
    *("mlp_gate", "mlp_up", "experts", "mix", "inject"),
)


def decoder_params(spec: spec_lib.Spec) -> dict[str, Any]:
    """The declaration tree of the whole model."""
    d, v, init = spec.width, spec.vocab_size, normal(spec.init_std)
    tree = {
        "embed_vd": Param((v, d), ("vocab", "embed"), init),
        "layers": _layers_params(spec, spec.kinds),
        **streams.end_params(spec),
    }
    if spec.mtp_layers:
        tree["mtp"] = mtp_params(spec)
    if spec.head == "tokens" and not spec.tie_embedding:
        tree["head_vd"] = Param((v, d), ("vocab", "embed"), init)
    if spec.vision is not None:
        tree["vision"] = vision.vision_params(spec)
    return tree | score_params(spec)


def _layers_params(
    spec: spec_lib.Spec, kinds: tuple[spec_lib.Kind, ...]
) -> dict[str, Any]:
    """The stacks of layers of these kinds."""
    declare = {
        "attention": attn.attention_params,
        "delta": delta_lib.delta_params,
        "mlp": mlp_lib.mlp_params,
        "moe": moe_lib.moe_params,
        "ngram": ngram_lib.ngram_params,
    }
    counts = {
        stack: sum(stack in spec_lib.stacks(kind) for kind in kinds)
        for stack in declare
    }
    return {
        **streams.layer_params(spec, len(kinds)),
        **{k: declare[k](spec, count) for k, count in counts.items() if count},
    }


def mtp_params(spec: spec_lib.Spec) -> dict[str, Any]:
    """Weights of the head that predicts further tokens: see mtp.py."""
    d, init = spec.width, normal(spec.init_std)
    norm_d = streams.end_params(spec)["norm_d"]
    return {
        "embedding_norm_d": norm_d,
        "hidden_norm_d": norm_d,
        "embedding_dd": Param((d, d), ("embed", None), init),
        "hidden_dd": Param((d, d), ("embed", None), init),
        "layers": _layers_params(spec, spec.mtp_kinds),
        "norm_d": norm_d,
    }


def score_params(spec: spec_lib.Spec) -> dict[str, Param]:
    """Weights of a head that scores classes; nothing for the other heads."""
    if spec.head in ("tokens", "none"):
        return {}
    y, d, init = spec.num_classes, spec.width, normal(spec.init_std)
    tree = {"score_yd": Param((y, d), (None, "embed"), init)}
    if spec.head == "reward":
        tree["score_in_dd"] = Param((d, d), ("embed", None), init)
        tree["score_in_bias_d"] = Param((d,), (None,), zeros)
    if spec.head == "reward" or spec.head_bias:
        tree["score_bias_y"] = Param((y,), (None,), zeros)
    return tree


def unstacked(spec: spec_lib.Spec, params: dict[str, Any]) -> dict[str, Any]:
    """The same weights with `layers` as a list, for decoding on a CPU."""
    layers = params["layers"]
    if isinstance(layers, list):
        return params
    parts = [{} for _ in range(spec.num_layers)]
    owned = stretches.owners(spec, len(layers.get(stretches.DEEP, ())))
    for stack, owners in owned.items():
        for i, part in zip(
            owners, stretches.layers_of(layers[stack], len(owners)), strict=True
        ):
            parts[i][stack] = part
    return params | {"layers": parts}


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


def _layer(p, x, cos_btk, sin_btk, segments_bt, *, spec, rules, kind, chunked=None):
    """One block: x + mixer(norm(x)), then + feed_forward(norm(x)); and what the router
    of a sparse layer counted."""
    if kind.ngram:
        x, _ = ngram_lib.add(p["ngram"], x, segments_bt, spec=spec, rules=rules)
    with jax.named_scope(kind.mixer):
        y_btd, inject = streams.enter(p[streams.names(spec)[0]], x, spec, rules)
        if kind.mixer == "delta":
            y_btd, _ = delta_lib.mix(
                p["delta"], y_btd, segments_bt, spec=spec, rules=rules
            )
        else:
            y_btd = attn.attention(
                p["attention"],
                y_btd,
                cos_btk,
                sin_btk,
                segments_bt,
                spec=spec,
                rules=rules,
                window=kind.window,
                chunked=chunked,
            )
        x = streams.leave(x, y_btd, inject)
    x, stats = feed_forward(p, x, segments_bt, spec, rules, kind)
    return _deepened(p, x, kind), stats


def _deepened(p, x, kind):
    return x + p[stretches.DEEP] if kind.deep else x


def block(
    spec: spec_lib.Spec,
    rules: mesh.Rules,
    kind: spec_lib.Kind,
    *,
    remat: str,
    scanned: bool,
    chunked: jax.Array | None = None,
) -> Callable:
    """`layer(p, x_btd, cos_btk, sin_btk, segments_bt) -> (x_btd, router stats)`; x_btrd
    with several streams."""
    layer = functools.partial(
        _layer, spec=spec, rules=rules, kind=kind, chunked=chunked
    )
    saved = saved_names(remat)
    if saved is None:
        return layer
    policy = jax.checkpoint_policies.save_only_these_names(*saved)
    # Under a scan the barriers against CSE are not needed (and cost).
    return jax.checkpoint(layer, policy=policy, prevent_cse=not scanned)


def feed_forward(p, x, segments_bt, spec, rules, kind):
    """x + feed_forward(norm(x)), and what the router of a sparse layer counted."""
    with jax.named_scope("moe" if kind.sparse else "mlp"):
        y_btd, inject = streams.enter(p[streams.names(spec)[1]], x, spec, rules)
        stats = None
        if kind.sparse:
            y_btd, stats = moe_lib.moe(p["moe"], y_btd, segments_bt, spec, rules)
        else:
            y_btd = mlp_lib.mlp(p["mlp"], y_btd, spec, rules)
        return streams.leave(x, y_btd, inject), stats


def hidden(
    spec: spec_lib.Spec,
    params: dict[str, Any],
    tokens_bt: jax.Array,
    *,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    images: vl.Part | None = None,
    videos: vl.Part | None = None,
    rules: mesh.Rules | None = None,
    loop: str = "scan",
    remat: str = "none",
) -> tuple[jax.Array, dict[str, jax.Array] | None]:
    """(final hidden states after the last norm, in the compute dtype: [b, t, d]; what
    the routers counted, stacked over sparse layers, or None: see `moe`)."""
    rules = rules or mesh.Rules()
    b, t = tokens_bt.shape
    if rules.split:
        see = images is not None or videos is not None
        context.check(spec, t, mesh.axis_size(rules.split), see=see)
    see = {"images": images, "videos": videos, "rules": rules}
    x, deep_lbtd = embed_tokens(
        spec, params, tokens_bt, segments, saved=saved_names(remat), **see
    )
    if positions is None and (images is not None or videos is not None):
        positions = vl.placed_positions(
            spec, tokens_bt, segments, images, videos, None, rules
        )
    (cos_btk, sin_btk), chunked = places.of_rows(spec, b, t, positions, segments, rules)
    deep = 0 if deep_lbtd is None else len(deep_lbtd)
    params = params | {"layers": stretches.with_deep(params["layers"], deep_lbtd)}
    x, stats = through(
        *(spec, params, x, tokens_bt, (cos_btk, sin_btk), chunked),
        segments=segments,
        rules=rules,
        loop=loop,
        remat=remat,
        deep=deep,
    )
    return streams.end(params, x, spec, rules), stats


def through(
    spec, params, x, tokens_bt, angles, chunked, *, segments, rules, loop, remat, deep=0
):
    """The residual through `params["layers"]`: (what stands behind them, what routers
    counted or None); the rest as of `hidden`, `places.of_rows`."""
    kinds = stretches.kinds(spec, deep)
    layer_for = functools.partial(
        block, spec, rules, remat=remat, scanned=loop == "scan", chunked=chunked
    )
    if loop == "unroll":
        params = unstacked(spec, params)
    layers, counted = params["layers"], []
    layers = ngram_lib.attach(spec, layers, tokens_bt, segments, None, rules)
    if isinstance(layers, list):
        for kind, p in zip(kinds, layers, strict=True):
            x, stats = layer_for(kind)(p, x, *angles, segments)
            counted += [] if stats is None else [jax.tree.map(lambda x: x[None], stats)]
    else:
        owners = stretches.owners(spec, deep)
        for stretch in stretches.stretches(kinds):

            def body(x, part, stretch=stretch):
                counted = []
                for kind, p in zip(
                    stretch.kinds, stretches.layers_in(part, stretch), strict=True
                ):
                    x, stats = layer_for(kind)(p, x, *angles, segments)
                    counted += [] if stats is None else [stats]
                return x, stretches.stacked(counted)

            part = stretches.repeats_of(layers, stretch, owners)
            x, stats = jax.lax.scan(body, x, part)
            if stats is not None:
                counted.append(jax.tree.map(mesh.join_first, stats))
    stats = jax.tree.map(lambda *xs: jnp.concatenate(xs), *counted) if counted else None
    return x, stats


def embed_tokens(spec, params, tokens_bt, segments, *, images, videos, rules, saved):
    """(the residual before the first layer, images and videos in their places; what
    DeepStack adds behind the first layers, or None)."""
    vl.check(spec, tokens_bt, segments, images=images, videos=videos)
    x_btd = mesh.take(params["embed_vd"], tokens_bt, rules).astype(spec.compute_dtype)
    if images is None and videos is None:
        return streams.start(x_btd, spec), None
    see = {"images": images, "videos": videos, "rules": rules, "saved": saved}
    return vl.embed(spec, params["vision"], x_btd, tokens_bt, segments, **see)


def head_vd(spec: spec_lib.Spec, params: dict[str, Any]) -> jax.Array:
    """The output matrix [v, d]: its own weight, or the embedding."""
    if spec.head != "tokens":
        raise config.InputError(
            f"this model has no logits of tokens (head={spec.head!r}): use "
            + ("models.embed" if spec.head == "none" else "models.score")
        )
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
    wide = jnp.promote_types(hidden_btd.dtype, jnp.float32)
    b, t, d = hidden_btd.shape
    if b * t <= 64 and not mesh.active():  # the faster order on a CPU
        flat_md = hidden_btd.reshape(b * t, d)
        y_vm = jnp.einsum("vd,md->vm", w_vd, flat_md, preferred_element_type=wide)
        return y_vm.T.reshape(b, t, -1)
    return mesh.einsum(
        "btd,vd->btv",
        hidden_btd,
        w_vd,
        out=rules.pspec("batch", "tokens", "vocab"),
        preferred_element_type=wide,
    )


def forward(
    spec: spec_lib.Spec,
    params: dict[str, Any],
    tokens_bt: jax.Array,
    *,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    images: vl.Part | None = None,
    videos: vl.Part | None = None,
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
      positions: int32 [b, t], or [3, b, t] for images and videos; default 0..t-1, or
        with a cache the count of real tokens before each, or with images what
        `vl.positions` gives.
      segments: int32 [b, t]; a token attends only inside its segment; 0 = padding.
      images: {"pixels": [p, y], "grid_thw": [i, 3]} of the placeholders: see `vl`.
      videos: likewise.
      cache: decoding state from `cache.init` or an earlier call.
      rules: dims -> mesh axes.
      loop: "scan" or "unroll" over the layers.
      remat: see the module docstring.
    Returns:
      float32 [b, t, v], or that and the new cache.
    """
    rules = rules or mesh.Rules()
    if cache is None:
        x_btd, _ = hidden(
            spec,
            params,
            tokens_bt,
            positions=positions,
            segments=segments,
            images=images,
            videos=videos,
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
        images=images,
        videos=videos,
        rules=rules,
    )
    return logits(spec, params, x_btd, rules.whole), cache


def hidden_cached(
    spec: spec_lib.Spec,
    params: dict[str, Any],
    tokens_bt: jax.Array,
    cache: cache_lib.Cache,
    *,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    images: vl.Part | None = None,
    videos: vl.Part | None = None,
    rules: mesh.Rules | None = None,
    keep: bool = False,
) -> tuple[jax.Array, cache_lib.Cache]:
    """Hidden states of new tokens against a cache, and the cache with them in; with
    `keep` linear layers' part of it has "inputs", too (see `delta.mix`)."""
    rules = (rules or mesh.Rules()).whole
    b, t = tokens_bt.shape
    if t > cache.slots:
        raise ValueError(f"{t} new tokens do not fit a cache of {cache.slots} slots")
    rows = rules.pspec("batch", None)
    if segments is None:
        segments = mesh.reshard(jnp.ones((b, t), jnp.int32), rows)
    see = {"images": images, "videos": videos, "rules": rules}
    x, deep_lbtd = embed_tokens(spec, params, tokens_bt, segments, saved=None, **see)
    if positions is None and (images is not None or videos is not None):
        before_b = cache_lib.next_positions(cache)
        positions = vl.placed_positions(
            spec, tokens_bt, segments, images, videos, before_b, rules
        )
    slots_bs = cache_lib.put(cache.segments_bs, segments, cache.length, rules)
    angles, chunked = places.of_cache(spec, cache, positions, segments, slots_bs, rules)
    positions_bs, turned = places.of_slots(spec, cache, positions, segments, rules)
    ring = None
    if cache.ring is not None:
        old = cache.ring_segments_bw, cache.segments_bs
        ring = ring_lib.places(*old, segments, rules)
    layer = functools.partial(
        cached_layer,
        angles=angles,
        turned=turned,
        segments=segments,
        slots_bs=slots_bs,
        cache=cache,
        spec=spec,
        rules=rules,
        chunked=chunked,
        ring=ring,
        keep=keep,
    )
    deep = 0 if deep_lbtd is None else len(deep_lbtd)
    every = stretches.with_deep(params["layers"], deep_lbtd)
    every = ngram_lib.attach(spec, every, tokens_bt, segments, cache.recent, rules)
    if isinstance(every, list):
        x, held = _each_cached(layer, every, stretches.kinds(spec, deep), x, cache)
    else:
        x, held = _scan_cached(layer, every, spec, deep, x, cache)
    tail_bj = cache.tail_segments_bj
    if "delta" in held:
        run = mesh.local(delta_lib.tail_segments, inputs=(rows, rows), out=rows)
        tail_bj = run(tail_bj, segments)
    cache = cache_lib.Cache(
        held.get("attention"),
        held.get("delta"),
        slots_bs,
        tail_bj,
        cache.length + t,
        cache_lib.offsets(cache, positions, segments),
        positions_bs,
        held.get("ngram"),
        ngram_lib.recent_after(cache.recent, tokens_bt, segments, rules),
        held.get("ring"),
        None if ring is None else ring.segments_bw,
    )
    return streams.end(params, x, spec, rules), cache


def cached_layer(
    p,
    x,
    held,
    kind,
    *,
    angles,
    segments,
    slots_bs,
    cache,
    spec,
    rules,
    chunked,
    turned=None,
    ring=None,
    keep=False,
):
    """One block over new tokens: (the residual, what each stack of it holds then)."""
    new = {}
    if kind.ngram:
        state = held["ngram"] | {"segments_bj": cache.recent["segments_bj"]}
        x, new["ngram"] = ngram_lib.add(
            p["ngram"], x, segments, state, spec=spec, rules=rules
        )
    y_btd, inject = streams.enter(p[streams.names(spec)[0]], x, spec, rules)
    if kind.mixer == "delta":
        state = held["delta"] | {"segments_bj": cache.tail_segments_bj}
        y_btd, new["delta"] = delta_lib.mix(
            p["delta"], y_btd, segments, state, spec=spec, rules=rules, keep=keep
        )
    elif kind.window:
        y_btd, new["ring"] = attn.cached_in_window(
            p["attention"],
            y_btd,
            *angles,
            held["ring"],
            segments,
            ring,
            spec=spec,
            rules=rules,
            window=kind.window,
        )
    else:
        y_btd, new["attention"] = attn.cached(
            p["attention"],
            y_btd,
            *angles,
            held["attention"],
            segments,
            slots_bs,
            cache.length,
            spec=spec,
            rules=rules,
            chunked=chunked,
            turned=turned,
        )
    x = streams.leave(x, y_btd, inject)
    x, _ = feed_forward(p, x, segments, spec, rules, kind)
    return _deepened(p, x, kind), new


def _each_cached(layer, layers, kinds, x, cache):
    """Unrolled layers: (residual, what each stack of the cache holds then)."""
    parts = cache_lib.apart(cache)
    new = {k: [] for k in cache_lib.STACKS if getattr(parts, k) is not None}
    for kind, p in zip(kinds, layers, strict=True):
        mine = cache_lib.stacks(kind)
        held = {k: getattr(parts, k)[len(new[k])] for k in mine}
        x, held = layer(p, x, held, kind)
        for k in mine:
            new[k].append(held[k])
    if not cache_lib.is_apart(cache):
        new = {k: stretches.stacked(v) for k, v in new.items()}
    return x, new


def _scan_cached(layer, every, spec, deep, x, cache):
    """Stacked layers in loops, one for each stretch: likewise."""
    stacks = cache_lib.together(cache)
    stacks = {k: getattr(stacks, k) for k in cache_lib.STACKS}
    stacks = {k: v for k, v in stacks.items() if v is not None}
    owners, own = stretches.owners(spec, deep), cache_lib.owners(spec)
    news = {k: [] for k in stacks}
    for stretch in stretches.stretches(stretches.kinds(spec, deep)):
        held = stretches.repeats_of(stacks, stretch, own)
        layers = stretches.repeats_of(every, stretch, owners)
        x, parts = _scan_stretch(layer, stretch, layers, x, held)
        for stack, part in parts.items():
            news[stack].append(jax.tree.map(mesh.join_first, part))
    new = {
        k: jax.tree.map(lambda *xs: xs[0] if len(xs) == 1 else jnp.concatenate(xs), *v)
        for k, v in news.items()
    }
    if cache_lib.is_apart(cache):
        new = {k: stretches.layers_of(v, len(own[k])) for k, v in new.items()}
    return x, new


def _scan_stretch(layer, stretch, layers, x, held):
    """The layers of a stretch: (residual, what they hold, [repeats, layers, ...])."""

    def body(x, now):
        layers, held = now
        used, new = dict.fromkeys(held, 0), {k: [] for k in held}
        for kind, p in zip(
            stretch.kinds, stretches.layers_in(layers, stretch), strict=True
        ):
            mine = {}
            for k in cache_lib.stacks(kind):
                mine[k] = jax.tree.map(lambda x, i=used[k]: x[i], held[k])
                used[k] += 1
            x, mine = layer(p, x, mine, kind)
            for k, part in mine.items():
                new[k].append(part)
        return x, {k: stretches.stacked(v) for k, v in new.items()}

    return jax.lax.scan(body, x, (layers, held))
