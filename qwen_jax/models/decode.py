# SPDX-License-Identifier: Apache-2.0
"""Text from a model: a few prompts at once, or one answer token by token.

For samples during training, `qwen-jax generate` and `chat`, and tests; a server is
another matter. `generate` pads prompts on the left, so that all rows write the same
slot, and compiles one loop for a (rows, prompt bucket, new tokens) shape. `stream`
gives ids of one row as they come: prefill in pieces of PIECES tokens, then a compiled
loop over a few tokens at a time. `Kept` holds the cache between answers, so that a
prompt that goes on from the last one costs only what is new.

Shapes: prompts are lists of ids; the result is a list of lists of new ids, cut before
the first stop id. How a token is chosen: `sampling`.
Invariants: a row's ids do not depend on the other rows; `stream` gives `generate`'s ids
(both up to rounding of the logits). A `Kept` lists exactly the ids its cache holds.
Raises: config.InputError for an empty prompt or one that does not fit the model.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import config, mesh
from qwen_jax.models import cache as cache_lib
from qwen_jax.models import decoder, vl
from qwen_jax.models import sampling as sampling_lib
from qwen_jax.models import spec as spec_lib

BUCKET = 64  # prompts are padded to a multiple, so few shapes are compiled
PIECES = (256, 64, 16)  # a prompt in `stream`: whole pieces, then one that is padded
FIRST_SLOTS = 256  # of a `Kept`; doubled when they are full
INNER = {  # weights of `mesh.product`: how many of their dims are summed over
    "attention": {"q_ldnk": 1, "k_ldhk": 1, "v_ldhk": 1, "gate_ldnk": 1, "o_lnkd": 2},
    "delta": {"q_ldhk": 1, "k_ldhk": 1, "v_ldnu": 1, "z_ldnu": 1, "o_lnud": 2},
    "mlp": {"gate_ldf": 1, "up_ldf": 1, "down_lfd": 1},
}
CHUNK = 8  # most tokens of one compiled call in `stream`


def generate(
    spec: spec_lib.Spec,
    params: dict[str, Any],
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: sampling_lib.Sampling | Sequence[sampling_lib.Sampling] | None = None,
    stop_ids: Sequence[int] | None = None,
    images: vl.Part | None = None,
    videos: vl.Part | None = None,
    rules: mesh.Rules | None = None,
) -> list[list[int]]:
    """New token ids of each prompt.

    Args:
      spec: the model.
      params: its weights, stacked, or as `laid_out` gives them.
      prompts: ids of each prompt, at least one each.
      max_tokens: most new tokens.
      sampling: for all prompts or for each; None is greedy.
      stop_ids: ids that end an answer; None for the model's `eos_ids`.
      images: those of all prompts in order, as in `vl`.
      videos: likewise.
      rules: dims -> mesh axes.
    Raises:
      config.InputError: no prompts, an empty prompt, ids outside the vocabulary, more
        tokens than the model has positions.
    """
    rules = (rules or mesh.Rules()).whole
    tokens_bt, segments_bt = rows_of(spec, prompts, max_tokens, rules)
    see = {"images": images, "videos": videos}
    vl.check(spec, tokens_bt, segments_bt, **see)
    wishes = _each(sampling, len(prompts))
    stop_ids = tuple(spec.eos_ids if stop_ids is None else stop_ids)
    filled = [i % len(prompts) for i in range(len(tokens_bt))]
    seen_bv = None
    if any(one.repetition_penalty != 1 for one in wishes):
        seen_bv = sampling_lib.seen_ids([prompts[i] for i in filled], spec.vocab_size)
    new_bt = np.asarray(
        _generate(
            params,
            tokens_bt,
            segments_bt,
            seen_bv,
            sampling_lib.stack([wishes[i] for i in filled]),
            see,
            len(prompts),
            spec=spec,
            max_tokens=max_tokens,
            stop_ids=stop_ids,
            rules=rules,
        )
    )
    return [until(list(map(int, row)), stop_ids) for row in new_bt[: len(prompts)]]


def rows_of(
    spec: spec_lib.Spec,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    rules: mesh.Rules,
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens_bt, segments_bt) of prompts padded on the left, as many rows as the mesh
    divides; refuses what `generate` refuses."""
    check(spec, prompts, max_tokens)
    longest = max(len(p) for p in prompts)
    bucket = -(-longest // BUCKET) * BUCKET
    ways = mesh.axis_size(rules.batch)
    rows = -(-len(prompts) // ways) * ways
    tokens_bt = np.zeros((rows, bucket), np.int32)
    segments_bt = np.zeros((rows, bucket), np.int32)
    for i in range(rows):
        # Rows that fill up the mesh have one token, and no images that are not there.
        prompt = prompts[i] if i < len(prompts) else [0]
        tokens_bt[i, bucket - len(prompt) :] = prompt
        segments_bt[i, bucket - len(prompt) :] = 1
    return tokens_bt, segments_bt


def check(
    spec: spec_lib.Spec, prompts: Sequence[Sequence[int]], max_tokens: int
) -> None:
    """Refuse prompts that the model cannot take.

    Raises:
      config.InputError: see `generate`.
    """
    longest = max((len(p) for p in prompts), default=0)
    if not prompts or min(len(p) for p in prompts) == 0:
        raise config.InputError("a prompt is empty: give at least one token")
    if max_tokens < 1:
        raise config.InputError(f"max_tokens={max_tokens}: wanted at least 1")
    if longest + max_tokens > spec.max_positions:
        raise config.InputError(
            f"a prompt of {longest} tokens and max_tokens={max_tokens} pass the "
            f"model's {spec.max_positions} positions; shorten one of them"
        )
    ids = [token for prompt in prompts for token in (min(prompt), max(prompt))]
    wrong = [token for token in ids if not 0 <= token < spec.vocab_size]
    if wrong:
        raise config.InputError(
            f"a prompt holds id {wrong[0]}, the model's ids are 0 to "
            f"{spec.vocab_size - 1}: the tokenizer is not this model's"
        )


def laid_out(spec: spec_lib.Spec, params: dict[str, Any]) -> dict[str, Any]:
    """The weights with layers apart and, on CPUs and GPUs, matrices as they decode
    fastest.

    Costs a copy of the weights, the first time; for the functions here, with no mesh
    set.
    """
    apart = decoder.unstacked(spec, params)
    if mesh.active() or mesh.platform() not in ("cpu", "gpu"):
        return apart

    def turned(tree, counts):
        return tree | {
            k: mesh.turned(tree[k], inner)
            for k, inner in counts.items()
            if k in tree and not isinstance(tree[k], mesh.Turned)
        }

    def layer(p):
        new = {k: turned(p[k], counts) for k, counts in INNER.items() if k in p}
        if "shared" in p.get("moe", {}):
            new["moe"] = p["moe"] | {"shared": turned(p["moe"]["shared"], INNER["mlp"])}
        return p | new

    return apart | {"layers": [layer(p) for p in apart["layers"]]}


def _empty(spec, params, rows, slots, rules=None):
    """A cache whose layers are stacked or apart as those of the weights are."""
    cache = cache_lib.init(spec, rows, slots, rules)
    return cache_lib.apart(cache) if isinstance(params["layers"], list) else cache


def _each(sampling: Any, count: int) -> list[sampling_lib.Sampling]:
    """Settings of each of `count` rows."""
    if sampling is None or isinstance(sampling, sampling_lib.Sampling):
        sampling = [sampling or sampling_lib.Sampling()] * count
    if len(sampling) != count:
        raise config.InputError(
            f"{len(sampling)} settings of sampling for {count} prompts: give one, or "
            "one for each"
        )
    for one in sampling:
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(one, name):
                raise config.InputError(
                    f"{name}={getattr(one, name)}: only `serve.Engine` counts the ids "
                    "of an answer; leave it 0"
                )
    return list(sampling)


def until(ids: list[int], ends: tuple[int, ...]) -> list[int]:
    """Ids up to and without the first end id."""
    for i, token in enumerate(ids):
        if token in ends:
            return ids[:i]
    return ids


def _stops(token_b, stop_ids):
    """Which rows' tokens end them."""
    stops_b = jnp.zeros(token_b.shape, bool)
    for stop in stop_ids:
        stops_b |= token_b == stop
    return stops_b


@functools.partial(jax.jit, static_argnames=("spec", "max_tokens", "stop_ids", "rules"))
def _generate(
    params,
    tokens_bt,
    segments_bt,
    seen_bv,
    wishes,
    see,
    asked,
    *,
    spec,
    max_tokens,
    stop_ids,
    rules,
):
    """Prefill and a loop over new tokens, until the first `asked` rows have ended (the
    others fill up the mesh): [b, max_tokens] ids, of which those after a row's first
    stop id mean nothing."""
    rows = rules.pspec("batch", None)
    tokens_bt = mesh.reshard(tokens_bt, rows)
    segments_bt = mesh.reshard(segments_bt, rows)
    b, t = tokens_bt.shape
    cache = _empty(spec, params, b, t + max_tokens, rules)
    hidden_btd, cache = decoder.hidden_cached(
        spec, params, tokens_bt, cache, segments=segments_bt, rules=rules, **see
    )

    def pick(hidden_btd, seen_bv, i):
        logits_btv = decoder.logits(spec, params, hidden_btd, rules)
        logits_bv = mesh.reshard(logits_btv[:, -1], jax.P(None, None))
        return _choose(logits_bv, seen_bv, wishes, i)

    def goes_on(carry):
        i, _, ended_b, *_ = carry
        return (i < max_tokens) & ~jnp.all(ended_b)

    def step(carry):
        i, token_b, ended_b, new_tb, seen_bv, cache = carry
        token_bt = mesh.reshard(token_b[:, None], rows)
        hidden_btd, cache = decoder.hidden_cached(
            spec, params, token_bt, cache, rules=rules
        )
        token_b, seen_bv = pick(hidden_btd, seen_bv, i)
        ended_b = ended_b | _stops(token_b, stop_ids)
        return i + 1, token_b, ended_b, new_tb.at[i].set(token_b), seen_bv, cache

    first_b, seen_bv = pick(hidden_btd[:, -1:], seen_bv, 0)
    new_tb = jnp.zeros((max_tokens, b), jnp.int32).at[0].set(first_b)
    ended_b = _stops(first_b, stop_ids) | (jnp.arange(b) >= asked)
    carry = (jnp.int32(1), first_b, ended_b, new_tb, seen_bv, cache)
    return _while(goes_on, step, carry)[3].T


def _while(goes_on, step, carry):
    """`jax.lax.while_loop` that carries arrays without their dims of one.

    XLA drops such dims from products only: what one row's cache becomes then has one
    shape for the product and another for the next step, which on a CPU makes two
    writes of it and two copies of all its slots, an eighth of the time of a step.
    """
    if mesh.active():  # arrays that lie on several devices keep their dims
        return jax.lax.while_loop(goes_on, step, carry)
    leaves, tree = jax.tree.flatten(carry)
    shapes = [x.shape for x in leaves]

    def pack(carry):
        return [jnp.squeeze(x) for x in jax.tree.leaves(carry)]

    def unpack(leaves):
        whole = [x.reshape(shape) for x, shape in zip(leaves, shapes, strict=True)]
        return jax.tree.unflatten(tree, whole)

    end = jax.lax.while_loop(
        lambda leaves: goes_on(unpack(leaves)),
        lambda leaves: pack(step(unpack(leaves))),
        pack(carry),
    )
    return unpack(end)


@dataclasses.dataclass
class Kept:
    """A handle on the cache of one row between calls of `stream`.

    ids: what the cache holds, slot by slot; None where a slot is padding.
    """

    ids: list[int | None] = dataclasses.field(default_factory=list)
    cache: cache_lib.Cache | None = None
    reused: int = 0  # ids of the last prompt that were there already

    def close(self) -> None:
        """Let the cache go."""
        self.ids, self.cache = [], None


def stream(
    spec: spec_lib.Spec,
    params: dict[str, Any],
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampling: sampling_lib.Sampling | None = None,
    stop_ids: Sequence[int] | None = None,
    kept: Kept | None = None,
) -> Iterator[int]:
    """New ids of one prompt as they come, without the stop id that ends them.

    Args:
      spec: the model.
      params: its weights, stacked, or as `laid_out` gives them.
      prompt: ids, at least one.
      max_tokens: most new tokens.
      sampling: None is greedy.
      stop_ids: ids that end the answer; None for the model's `eos_ids`.
      kept: cache of earlier calls with the same model; holds this one's afterwards,
        also when the caller stops in between.
    Raises:
      config.InputError: see `generate`; at the first id that is asked for.
    """
    check(spec, [prompt], max_tokens)
    kept = Kept() if kept is None else kept
    (wish,) = _each(sampling, 1)
    wishes = sampling_lib.stack([wish])
    stop_ids = tuple(spec.eos_ids if stop_ids is None else stop_ids)
    seen_bv = None
    if wish.repetition_penalty != 1:
        seen_bv = jnp.asarray(sampling_lib.seen_ids([prompt], spec.vocab_size))
    logits_bv = _prefill(spec, params, list(map(int, prompt)), kept)
    token_b, seen_bv = _pick(logits_bv, seen_bv, wishes, 0)
    new, done, count = [int(token_b[0])], 0, 1
    while True:
        last, ended = new[-1], new[-1] in stop_ids
        yield from new[:-1] if ended else new
        done += len(new)
        if ended or done == max_tokens:
            return
        count = min(count, max_tokens - done)
        _make_room(spec, params, kept, count)
        cache, kept.cache = kept.cache, None  # given away until the call is back
        number, new_t, seen_bv, cache = _several(
            params,
            np.array([last], np.int32),
            seen_bv,
            wishes,
            cache,
            done,
            count,
            spec=spec,
            stop_ids=stop_ids,
        )
        new = [int(token) for token in np.asarray(new_t)[: int(number)]]
        kept.ids += [last, *new[:-1]]  # the newest is told and not computed with yet
        kept.cache = cache
        count = min(2 * count, CHUNK)


def _prefill(spec, params, prompt, kept):
    """The prompt in the cache, what is there already left alone; logits of its end."""
    _go_back(spec, kept, prompt)
    kept.reused = sum(token is not None for token in kept.ids)
    rest, logits_bv = prompt[kept.reused :], None
    while rest:
        if len(rest) >= PIECES[1]:
            size = max(s for s in PIECES if s <= len(rest))
        else:
            size = min(s for s in PIECES if s >= len(rest))
        now, rest = rest[:size], rest[size:]
        _make_room(spec, params, kept, size)
        pad = size - len(now)
        cache, kept.cache = kept.cache, None
        logits_bv, kept.cache = _piece(
            params,
            np.array([[0] * pad + now], np.int32),
            np.array([[0] * pad + [1] * len(now)], np.int32),
            cache,
            spec=spec,
        )
        kept.ids += [None] * pad + now
    return logits_bv


def _go_back(spec, kept, prompt):
    """Cut what is kept to where it agrees with the prompt, or drop it all.

    One token of the prompt is always computed anew, for its logits.
    """
    agree, slots = 0, 0
    for slot, token in enumerate(kept.ids):
        if token is not None:
            if agree == len(prompt) - 1 or token != prompt[agree]:
                break
            agree, slots = agree + 1, slot + 1
    if kept.cache is None or not agree:
        kept.close()
        return
    if slots < len(kept.ids):
        kept.cache = _cut(kept.cache, slots)
        if kept.cache is None:
            kept.close()
        del kept.ids[slots:]


def _cut(cache, slots):
    """The cache with its first slots alone; None where more than slots remembers: a
    recurrent state, a ring that has been full, anything that is not known here."""
    fields = {field.name for field in dataclasses.fields(cache)}
    known = {"attention", "delta", "segments_bs", "tail_segments_bj", "length"}
    known |= {"ring", "ring_segments_bw"}
    known |= {"offset_b"}  # nothing without images, which `stream` does not take
    more = {"positions_bs", "ngram", "recent"}
    stacked = not cache_lib.is_apart(cache)
    whole = all(
        leaf.ndim - stacked == 4 and cache.slots in leaf.shape[2 + stacked :]
        for leaf in jax.tree.leaves(cache.attention)
    )
    whole = whole and all(getattr(cache, name) is None for name in (*more, "delta"))
    if fields != known | more or not whole:
        return None
    left_bs = jnp.where(
        jnp.arange(cache.slots)[None] < slots, cache.segments_bs, jnp.int32(0)
    )
    ring_bw = cache.ring_segments_bw
    if ring_bw is not None:
        # Until it is full, a ring has the tokens of a row in order from slot 0 on.
        w = ring_bw.shape[1]
        if int(jnp.max(jnp.sum(cache.segments_bs > 0, axis=1))) >= w:
            return None
        count_b1 = jnp.sum(left_bs > 0, axis=1, keepdims=True)
        ring_bw = jnp.where(jnp.arange(w)[None] < count_b1, ring_bw, jnp.int32(0))
    return cache.replace(
        segments_bs=left_bs, length=jnp.int32(slots), ring_segments_bw=ring_bw
    )


def _make_room(spec, params, kept, count):
    """At least `count` free slots in what is kept."""
    wanted = len(kept.ids) + count
    slots = FIRST_SLOTS if kept.cache is None else kept.cache.slots
    if kept.cache is not None and wanted <= slots:
        return
    while slots < wanted:
        slots *= 2
    # Copied: parts of an empty cache may be one array, to be given away only once.
    fresh = jax.tree.map(jnp.copy, _empty(spec, params, 1, slots))
    old, kept.cache = kept.cache, None
    kept.cache = fresh if old is None else _moved(old, fresh)


@functools.partial(jax.jit, donate_argnums=1)
def _moved(old, fresh):
    """`fresh`, which has more slots, with the content of `old`; what has as many as it
    had (a ring as wide as its window) goes over as it is."""

    def one(old, new):
        if old.shape == new.shape:
            return old
        return jax.lax.dynamic_update_slice(new, old, (0,) * old.ndim)

    return jax.tree.map(one, old, fresh)


@functools.partial(jax.jit, static_argnames="spec", donate_argnums=3)
def _piece(params, tokens_bt, segments_bt, cache, *, spec):
    """A piece of a prompt, padded on the left: (logits of its end, cache)."""
    hidden_btd, cache = decoder.hidden_cached(
        spec, params, tokens_bt, cache, segments=segments_bt
    )
    return decoder.logits(spec, params, hidden_btd[:, -1:])[:, -1], cache


def _choose(logits_bv, seen_bv, wishes, i):
    """Token number i of each row, and the ids that were there with it."""
    if seen_bv is not None:
        logits_bv = sampling_lib.penalized(logits_bv, seen_bv, wishes)
    token_b = sampling_lib.draw(logits_bv, wishes, jnp.full(logits_bv.shape[:1], i))
    if seen_bv is not None:
        seen_bv = sampling_lib.add_seen(seen_bv, token_b)
    return token_b, seen_bv


_pick = jax.jit(_choose)


@functools.partial(
    jax.jit, static_argnames=("spec", "stop_ids"), donate_argnames=("seen_bv", "cache")
)
def _several(params, token_b, seen_bv, wishes, cache, done, count, *, spec, stop_ids):
    """The next `count` (at most CHUNK) tokens of one row, or up to its first stop id:
    (how many, their ids, seen_bv, the cache with all but the newest in)."""

    def goes_on(carry):
        i, token_b, *_ = carry
        return (i < count) & ~_stops(token_b, stop_ids)[0]

    def step(carry):
        i, token_b, new_t, seen_bv, cache = carry
        hidden_btd, cache = decoder.hidden_cached(spec, params, token_b[:, None], cache)
        logits_bv = decoder.logits(spec, params, hidden_btd)[:, -1]
        token_b, seen_bv = _choose(logits_bv, seen_bv, wishes, done + i)
        return i + 1, token_b, new_t.at[i].set(token_b[0]), seen_bv, cache

    new_t = jnp.zeros((CHUNK,), jnp.int32)
    carry = (jnp.int32(0), token_b, new_t, seen_bv, cache)
    number, _, *rest = _while(goes_on, step, carry)
    return number, *rest
