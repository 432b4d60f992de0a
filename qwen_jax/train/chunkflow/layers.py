# SPDX-License-Identifier: Apache-2.0
"""One chunk of a long row through all layers, forward and backward, by hand.

What autodiff of a loop over layers would do, with two differences that memory wants:
keys and values of all chunks lie in buffers that both passes work in where they are,
and the cotangents of those buffers are added to, never made anew. Of a chunk that waits
for its backward pass the input of each layer stays, and of attention layers the output;
what stands between them is computed again, a layer at a time.

Linear layers carry a state in place of keys: what stood before the chunk is an input of
its layers, and its cotangent goes to the chunk before.

Shapes: x_btd (or [b, t, r, d] with several streams). saved: x_lbtd, the input of each
layer, and of attention layers out_lbtnk and lse_lbhgt, layers in front. states: a dict
as of `delta.fresh` without segments, linear layers in front, or None.
Raises: config.InputError from `check`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from qwen_jax import config, mesh
from qwen_jax.models import attention as attn
from qwen_jax.models import cache as cache_lib
from qwen_jax.models import decoder, dual_chunk, rope, streams, stretches
from qwen_jax.models import delta as delta_lib
from qwen_jax.models import spec as spec_lib
from qwen_jax.models.kernels import carried


@struct.dataclass
class Held:
    """Keys and values of all chunks of a row: k_lbhsk, v_lbhsk, attention layers in
    front; their cotangents likewise."""

    k_lbhsk: jax.Array
    v_lbhsk: jax.Array


@struct.dataclass
class Chunk:
    """Where a chunk stands: tokens_bt, segments_bt (0 for padding), positions_bt, and
    `start`, the place of its first token in its row."""

    tokens_bt: jax.Array
    segments_bt: jax.Array
    positions_bt: jax.Array
    start: jax.Array


def check(spec: spec_lib.Spec, chunk_tokens: int, longest: int) -> None:
    """Refuse what chunks cannot carry on, in rows of at most `longest` tokens.

    Raises:
      config.InputError: naming the part of the model, or the size.
    """
    carried.block_for(chunk_tokens)
    if spec.dual_chunk is not None and dual_chunk.needed(spec.dual_chunk, longest):
        raise config.InputError(
            f"a document of {longest} tokens needs dual chunk attention in this model, "
            "which chunkflow does not compute; set --config.model.dual_chunk=None (and "
            "--config.model.rope_scaling for YaRN), or take shorter documents"
        )
    parts = {
        "attention that chooses its keys": spec.indexed,
        "layers of n-grams": spec.ngram,
    }
    for name, part in parts.items():
        if part is not None:
            raise config.InputError(
                f"this model has {name}, whose state no chunk carries to the next; "
                "train it on whole rows (without chunkflow)"
            )
    if spec.head != "tokens":
        raise config.InputError(f"head={spec.head!r}: wanted a model of tokens")


def held(
    spec: spec_lib.Spec, rows: int, slots: int, dtype: Any, rules, groups: int = 1
) -> Held:
    """Buffers for so many tokens of each row, zeros; of several groups of rows, the
    layers of one after those of another."""
    layers = groups * sum(kind.mixer == "attention" for kind in spec.kinds)
    shape = (layers, rows, spec.num_kv_heads, slots, spec.head_width)
    lies = rules.pspec(None, "batch", "kv_heads", None, None)
    made = mesh.reshard(jnp.zeros(shape, dtype), lies)
    return Held(made, made)


def embedded(spec, params, chunk: Chunk, rules):
    """The residual before the first layer."""
    see = {"images": None, "videos": None, "rules": rules, "saved": None}
    tokens = chunk.tokens_bt, chunk.segments_bt
    return decoder.embed_tokens(spec, params, *tokens, **see)[0]


def forward(spec, params, chunk: Chunk, held: Held, states, tail_bj, rules, x, at=0):
    """(the residual behind the last layer, the buffers with the chunk in, the states
    behind it, `saved`, what routers counted or None); x: the residual before the first
    layer; at: where that has its keys in the buffers."""
    how = _how(spec, chunk, tail_bj, rules)
    news, saves, counted = [], [], []
    for stretch, first, inputs in _parts(spec, params, states, at):

        def body(carry, part, stretch=stretch, first=first):
            x, held = carry
            r, layers, states = part
            each = _each(stretch, layers, states, first + r * _attention(stretch))
            new, saved, stats = [], [], []
            for kind, p, state, number in each:
                saved.append({"x_lbtd": x})
                if kind.mixer == "attention":
                    x, counts, held, more = _attend(p, x, held, number, kind, **how)
                    saved[-1] |= more
                else:
                    (x, counts), state = _delta(p, x, state, kind, **how)
                    new.append(state)
                stats += [] if counts is None else [counts]
            made = stretches.stacked(new), _by_name(saved), stretches.stacked(stats)
            return (x, held), made

        (x, held), made = jax.lax.scan(body, (x, held), inputs)
        for every, part in zip((news, saves, counted), made, strict=True):
            every.append(jax.tree.map(mesh.join_first, part))
    saved = {
        name: jnp.concatenate([one[name] for one in saves if name in one])
        for name in dict.fromkeys(name for one in saves for name in one)
    }
    return x, held, _joined(news), saved, _joined(counted)


def backward(spec, params, chunk, held, states, tail_bj, saved, d, rules, at=0):
    """The backward pass of a chunk of which `saved` is there.

    Args:
      held: with the chunk and all before it in.
      states, tail_bj: before the chunk.
      at: as of `forward`.
      d: cotangents: "x" behind the last layer, "held" as later chunks left them,
        "states" behind the chunk, "stats" of what routers counted (None without).
    Returns:
      (cotangent of the residual before the first layer, gradients of `layers`, those
      of the buffers with this chunk's added, those of the states before it).
    """
    how = _how(spec, chunk, tail_bj, rules)
    dx, d_held = d["x"], d["held"]
    grads, d_states = [], []
    for stretch, first, inputs in reversed(_parts(spec, params, states, at)):
        mine = _mine(spec, stretch, saved, d["states"], d["stats"])

        def body(carry, part, stretch=stretch, first=first):
            dx, d_held = carry
            (r, layers, states), (saved, d_states, d_stats) = part
            each = list(_each(stretch, layers, states, first + r * _attention(stretch)))
            saved = _of_layers(stretch, saved, d_states, d_stats)
            dps, d_before = [], []
            for (kind, p, state, number), (kept, d_state, d_counts) in zip(
                reversed(each), reversed(saved), strict=True
            ):
                if kind.mixer == "attention":
                    dp, dx, d_held = _attend_back(
                        *(p, kept, held, number, kind, dx, d_counts, d_held), **how
                    )
                else:
                    run = functools.partial(_delta, kind=kind, **how)
                    _, pull = jax.vjp(run, p, kept["x_lbtd"], state)
                    dp, dx, d_state = pull(((dx, d_counts), d_state))
                    d_before.append(d_state)
                dps.append(dp)
            return (dx, d_held), (
                _by_name(dps[::-1]),
                stretches.stacked(d_before[::-1]),
            )

        (dx, d_held), made = jax.lax.scan(
            body, (dx, d_held), (inputs, mine), reverse=True
        )
        for every, part in zip((grads, d_states), made, strict=True):
            every.append(jax.tree.map(mesh.join_first, part))
    layers = {
        name: jax.tree.map(
            lambda *xs: xs[0] if len(xs) == 1 else jnp.concatenate(xs),
            *[one[name] for one in reversed(grads) if name in one],
        )
        for name in params["layers"]
    }
    return dx, layers, d_held, _joined(d_states[::-1])


# ---- what a loop over a stretch takes


def _how(spec, chunk, tail_bj, rules):
    return {
        "angles": rope.angles(spec, chunk.positions_bt),
        "chunk": chunk,
        "tail_bj": tail_bj,
        "spec": spec,
        "rules": rules,
    }


def _attention(stretch: stretches.Stretch) -> int:
    return sum(kind.mixer == "attention" for kind in stretch.kinds)


def _parts(spec, params, states, at):
    """(stretch, `at` and attention layers before it, (number, weights, states) of
    repeats)."""
    out, owners, own = [], stretches.owners(spec), cache_lib.owners(spec)
    own = {k: v for k, v in own.items() if k == "delta"}
    for stretch in stretches.stretches(spec.kinds):
        before = spec.kinds[: stretch.start]
        first = at + sum(kind.mixer == "attention" for kind in before)
        part = stretches.repeats_of({"delta": states}, stretch, own) if own else {}
        layers = stretches.repeats_of(params["layers"], stretch, owners)
        numbers = jnp.arange(stretch.repeats, dtype=jnp.int32)
        out.append((stretch, first, (numbers, layers, part.get("delta"))))
    return out


def _each(stretch, layers, states, number):
    """(kind, weights, state or None, number among attention layers or None) of the
    layers of a repeat."""
    at = 0
    for kind, p in zip(
        stretch.kinds, stretches.layers_in(layers, stretch), strict=True
    ):
        if kind.mixer == "attention":
            yield kind, p, None, number
            number = number + 1
        else:
            yield kind, p, jax.tree.map(lambda x, at=at: x[at], states), None
            at += 1


def _mine(spec, stretch, saved, d_states, d_stats):
    """The stretch's part of what the backward pass takes, repeats in front."""
    layers = range(stretch.start, stretch.stop)
    own = {"x_lbtd": lambda kind: True, "delta": lambda kind: kind.mixer == "delta"}
    for name in ("out_lbtnk", "lse_lbhgt"):
        own[name] = lambda kind: kind.mixer == "attention"
    own["stats"] = lambda kind: kind.sparse

    def cut(x, name):
        count = sum(own[name](spec.kinds[i]) for i in layers)
        if not count:
            return None
        first = sum(own[name](kind) for kind in spec.kinds[: stretch.start])
        x = x if count == x.shape[0] else x[first : first + count]
        return mesh.split_first(x, stretch.repeats, count // stretch.repeats)

    def tree(x, name):
        made = jax.tree.map(lambda x: cut(x, name), x)
        return made if jax.tree.leaves(made) else None

    saved = {name: tree(x, name) for name, x in saved.items()}
    saved = {name: x for name, x in saved.items() if x is not None}
    return saved, tree(d_states, "delta"), tree(d_stats, "stats")


def _of_layers(stretch, saved, d_states, d_stats):
    """(saved, cotangent of the state, of what the router counted) of each layer."""
    used, out = dict.fromkeys((*saved, "states", "stats"), 0), []

    def take(tree, name):
        i, used[name] = used[name], used[name] + 1
        return jax.tree.map(lambda x: x[i], tree)

    for kind in stretch.kinds:
        names = ["x_lbtd"]
        names += ["out_lbtnk", "lse_lbhgt"] if kind.mixer == "attention" else []
        kept = {name: take(saved[name], name) for name in names}
        state = take(d_states, "states") if kind.mixer == "delta" else None
        out.append((kept, state, take(d_stats, "stats") if kind.sparse else None))
    return out


def _by_name(parts: list[dict]) -> dict[str, Any]:
    """What each name has in the layers that have it, stacked."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {
        name: stretches.stacked([part[name] for part in parts if name in part])
        for name in names
    }


def _joined(parts: list[Any]) -> Any:
    parts = [part for part in parts if part is not None]
    if not parts:
        return None
    return jax.tree.map(
        lambda *xs: xs[0] if len(xs) == 1 else jnp.concatenate(xs), *parts
    )


# ---- layers


def _counts(stats):
    """Of what a router counted, what a loss is made of, and what was dropped."""
    names = ("counts_e", "probs_e", "z", "dropped")
    return None if stats is None else {k: stats[k] for k in names}


def _before(p, x, *, angles, spec, rules):
    """Rotated queries and keys, and values of a layer."""
    y_btd, _ = streams.enter(p[streams.names(spec)[0]], x, spec, rules)
    return attn.project(p["attention"], y_btd, *angles, spec, rules)


def _after(p, x, out_btnk, *, kind, chunk, spec, rules):
    """(the residual behind a layer whose heads gave `out_btnk`, counts or None)."""
    y_btd, inject = streams.enter(p[streams.names(spec)[0]], x, spec, rules)
    x = streams.leave(
        x, attn.merge(p["attention"], out_btnk, y_btd, spec, rules), inject
    )
    x, stats = decoder.feed_forward(p, x, chunk.segments_bt, spec, rules, kind)
    return x, _counts(stats)


def _lies(rules):
    heads = rules.pspec("batch", None, "heads", None)
    kv_heads = rules.pspec("batch", None, "kv_heads", None)
    buffer = rules.pspec(None, "batch", "kv_heads", None, None)
    lse = rules.pspec("batch", "kv_heads", None, None)
    return heads, kv_heads, buffer, lse, rules.pspec("batch", None)


def _attend(p, x, held, number, kind, *, angles, chunk, tail_bj, spec, rules):
    del tail_bj
    q_btnk, k_bthk, v_bthk = _before(p, x, angles=angles, spec=spec, rules=rules)
    heads, kv_heads, buffer, lse, rows = _lies(rules)

    def run(q, k, v, k_lbhsk, v_lbhsk, number, start, positions):
        k_lbhsk = carried.written(k_lbhsk, k, number, start)
        v_lbhsk = carried.written(v_lbhsk, v, number, start)
        how = {"window": kind.window}
        made = carried.forward(q, k_lbhsk, v_lbhsk, number, start, positions, **how)
        return *made, k_lbhsk, v_lbhsk

    run = mesh.local(
        run,
        inputs=(heads, kv_heads, kv_heads, buffer, buffer, jax.P(), jax.P(), rows),
        out=(heads, lse, buffer, buffer),
    )
    out, lse, *held = run(
        *(q_btnk, k_bthk, v_bthk, held.k_lbhsk, held.v_lbhsk, number, chunk.start),
        chunk.positions_bt,
    )
    x, counts = _after(p, x, out, kind=kind, chunk=chunk, spec=spec, rules=rules)
    return x, counts, Held(*held), {"out_lbtnk": out, "lse_lbhgt": lse}


def _attend_back(
    p, kept, held, number, kind, dx, d_counts, d_held, *, angles, chunk, tail_bj, **how
):
    """(gradients of the weights, of the residual, and of the buffers)."""
    del tail_bj
    x, out, lse = kept["x_lbtd"], kept["out_lbtnk"], kept["lse_lbhgt"]
    before = functools.partial(_before, angles=angles, **how)
    (q_btnk, *_), pull_before = jax.vjp(before, p, x)
    after = functools.partial(_after, kind=kind, chunk=chunk, **how)
    _, pull_after = jax.vjp(after, p, x, out)
    dp, dx, d_out = pull_after((dx, d_counts))
    heads, kv_heads, buffer, lies, rows = _lies(how["rules"])
    t = q_btnk.shape[1]

    def run(
        q,
        k_lbhsk,
        v_lbhsk,
        out,
        lse,
        d_out,
        dk_lbhsk,
        dv_lbhsk,
        number,
        start,
        positions,
    ):
        dq, dk_lbhsk, dv_lbhsk = carried.backward(
            *(q, k_lbhsk, v_lbhsk, number, start, positions, out, lse, d_out),
            *(dk_lbhsk, dv_lbhsk),
            window=kind.window,
        )
        # Nothing that comes later in the row is to follow: these are whole.
        own = [carried.read(x, number, start, t) for x in (dk_lbhsk, dv_lbhsk)]
        return dq, *(x.astype(q.dtype) for x in own), dk_lbhsk, dv_lbhsk

    run = mesh.local(
        run,
        inputs=(*(heads, buffer, buffer, heads, lies, heads, buffer, buffer),)
        + (jax.P(), jax.P(), rows),
        out=(heads, kv_heads, kv_heads, buffer, buffer),
    )
    dq, dk, dv, *d_held = run(
        *(q_btnk, held.k_lbhsk, held.v_lbhsk, out, lse, d_out),
        *(d_held.k_lbhsk, d_held.v_lbhsk, number, chunk.start, chunk.positions_bt),
    )
    more_dp, more_dx = pull_before((dq, dk, dv))
    dp = jax.tree.map(jnp.add, dp, more_dp)
    return dp, dx + more_dx, Held(*d_held)


def _delta(p, x, state, kind, *, angles, chunk, tail_bj, spec, rules):
    """((the residual behind a linear layer, counts or None), the state behind it)."""
    del angles
    y_btd, inject = streams.enter(p[streams.names(spec)[0]], x, spec, rules)
    state = state | {"segments_bj": tail_bj}
    y_btd, state = delta_lib.mix(
        p["delta"], y_btd, chunk.segments_bt, state, spec=spec, rules=rules
    )
    x = streams.leave(x, y_btd, inject)
    x, stats = decoder.feed_forward(p, x, chunk.segments_bt, spec, rules, kind)
    return (x, _counts(stats)), state
