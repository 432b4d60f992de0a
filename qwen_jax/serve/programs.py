# SPDX-License-Identifier: Apache-2.0
"""The compiled programs of an engine: one step of many rows, one piece of a prompt.

`decode`: the next id of b rows that have one token to go in each; `several`: the next
few of each, one after the other without the host; `verify`: the next
ids of b rows for which ids were drafted; `draft`: such ids from the MTP head;
`prefill`: a piece of one prompt, with the scores after its last token; `first`: the id
that is drawn from them; `prompt_scores`: as `prefill`, with what the model gave each
next id; `look`: an image's features, which pieces of prompts take from where it keeps
them. b is one of a few buckets, so few programs are compiled: see `device.Settings`.

A row's wishes beyond temperature and cuts, its `Extras`, cost memory traffic for all
rows, so each program that draws has a second form with them (`full`). Extras that stay
(counts of ids, biases) lie on the device, one row a slot; the mask of a grammar comes
with each step.

A step can be given to the device before the ids of the last one are known to the host:
the newest id of every slot stays on the device, in last_s.

Shapes: `Feed` has what the host tells of b rows; logits float32 [b, v]; counts_sv int32
for s slots, ids of the prompt as PROMPT, those of the answer as 1 each; bias_sv
float32; mask_bw uint32, bit i % 32 of word i // 32 for id i.
Raises: nothing.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from qwen_jax import mesh
from qwen_jax.models import decoder, heads, paged, paged_mtp, vision
from qwen_jax.models import sampling as sampling_lib
from qwen_jax.serve import request as request_lib

PROMPT = 1 << 20  # above any count of ids in an answer
TOP = request_lib.MAX_LOGPROBS


@struct.dataclass
class Feed:
    """What the host tells of the rows of a step.

    token_b: the newest id of each, or -1 for the one in last_s. real_b: 1, or 0 for a
    row that only fills the bucket. step_b: number of the id that is drawn, within its
    answer. known_b: as `paged_mtp` wants it. wishes: sampling.
    """

    token_b: jax.Array
    real_b: jax.Array
    step_b: jax.Array
    known_b: jax.Array
    places: paged.Places
    wishes: sampling_lib.Rows


@struct.dataclass
class Extras:
    """Counts of ids and biases, by slot."""

    counts_sv: jax.Array
    bias_sv: jax.Array


@struct.dataclass
class Told:
    """Log-probabilities of the drawn id and of the likeliest, before anything cuts."""

    chosen_b: jax.Array
    top_bk: jax.Array
    ids_bk: jax.Array


@struct.dataclass
class Features:
    """What the vision tower made of images: for the tokens, and for DeepStack."""

    token_fd: jax.Array
    deep_lfd: jax.Array | None


def features(spec, rows: int) -> Features:
    """Of no image yet; the last row is nobody's."""
    dtype, deep = jnp.dtype(spec.compute_dtype), len(spec.vision.deepstack)
    shape = (rows + 1, spec.width)
    deep_lfd = jnp.zeros((deep, *shape), dtype) if deep else None
    return Features(jnp.zeros(shape, dtype), deep_lfd)


def extras(slots: int, vocab_size: int) -> Extras:
    """Of no answers yet; the last slot is nobody's."""
    shape = (slots + 1, vocab_size)
    return Extras(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))


@functools.partial(jax.jit, donate_argnums=0)
def begin(kept: Extras, slot, counts_v, bias_v) -> Extras:
    """A slot's counts and biases."""
    return Extras(
        kept.counts_sv.at[slot].set(counts_v), kept.bias_sv.at[slot].set(bias_v)
    )


def _draw(logits_bv, feed, kept, mask_bw, uncut):
    """Ids of all rows, with extras where `kept` is there: (ids, told, kept)."""
    wishes, how = feed.wishes, {"uncut": uncut}
    if kept is None:
        return sampling_lib.draw(logits_bv, wishes, feed.step_b, **how), None, None
    told_bv = jax.nn.log_softmax(logits_bv, axis=-1)
    slot_b = feed.places.slot_b
    counts_bv = kept.counts_sv[slot_b]
    scores_bv = sampling_lib.penalized(logits_bv, counts_bv > 0, wishes)
    scores_bv = sampling_lib.counted(counts_bv % PROMPT, scores_bv, wishes)
    scores_bv = scores_bv + kept.bias_sv[slot_b]
    index_1v = jnp.arange(logits_bv.shape[1], dtype=jnp.uint32)[None]
    word_bv = mask_bw[:, index_1v[0] // 32]
    allowed_bv = (word_bv >> (index_1v % 32)) & 1 > 0
    scores_bv = jnp.where(allowed_bv, scores_bv, -jnp.inf)
    token_b = sampling_lib.draw(scores_bv, wishes, feed.step_b, **how)
    top_bk, ids_bk = jax.lax.top_k(told_bv, min(TOP, told_bv.shape[1]))
    chosen_b = jnp.take_along_axis(told_bv, token_b[:, None], axis=1)[:, 0]
    counts_sv = kept.counts_sv.at[slot_b, token_b].add(feed.real_b)
    kept = kept.replace(counts_sv=counts_sv)
    return token_b, Told(chosen_b, top_bk, ids_bk), kept


@functools.partial(
    jax.jit,
    static_argnames=("spec", "rules", "uncut"),
    donate_argnames=("pages", "kept", "last_s"),
)
def decode(
    params, pages, kept, last_s, feed: Feed, mask_bw, *, spec, rules, uncut=False
):
    """One step of b rows: (ids [b], told or None, pages, kept, last_s)."""
    operands = params, pages, kept, last_s, feed, mask_bw
    return _decode(*operands, spec, rules, uncut)


@functools.partial(
    jax.jit,
    static_argnames=("spec", "rules", "uncut", "count"),
    donate_argnames=("pages", "last_s"),
)
def several(params, pages, last_s, feed: Feed, *, spec, rules, uncut, count):
    """`count` steps of b rows, each as `decode`: (ids [b, count], pages, last_s)."""

    def one(now, i):
        pages, last_s = now
        token_b = jnp.where(i == 0, feed.token_b, -1)
        length_b = feed.places.length_b + i
        fed = feed.replace(
            token_b=token_b,
            step_b=feed.step_b + i,
            places=feed.places.replace(length_b=length_b),
        )
        token_b, _, pages, _, last_s = _decode(
            *(params, pages, None, last_s, fed, None), spec, rules, uncut
        )
        return (pages, last_s), token_b

    index_i = jnp.arange(count, dtype=jnp.int32)
    (pages, last_s), token_ib = jax.lax.scan(one, (pages, last_s), index_i)
    return token_ib.T, pages, last_s


def _decode(params, pages, kept, last_s, feed, mask_bw, spec, rules, uncut):
    """As `decode` says."""
    token_b = jnp.where(feed.token_b < 0, last_s[feed.places.slot_b], feed.token_b)
    new = token_b[:, None], feed.real_b[:, None]
    hidden_btd, pages = paged.hidden(
        spec, params, *new, pages, feed.places, rules=rules
    )
    pages = paged_mtp.followed(
        *(spec, params, pages, new[0], hidden_btd, new[1]),
        *(feed.known_b, feed.places),
        rules=rules,
    )
    logits_bv = _logits(spec, params, hidden_btd, rules)
    token_b, told, kept = _draw(logits_bv, feed, kept, mask_bw, uncut)
    last_s = last_s.at[feed.places.slot_b].set(token_b)
    return token_b, told, pages, kept, last_s


@functools.partial(
    jax.jit, static_argnames=("spec", "rules", "most"), donate_argnames="pages"
)
def draft(params, pages, feed: Feed, count_b, *, spec, rules, most):
    """Ids that the MTP head expects next in b rows, `count_b` of the [b, most] in each
    meant to be checked: (ids, pages).

    They are drawn with the noise that the model's own draws of the same numbers will
    have: the nearer the two distributions, the more often both draw the same.
    """
    take, _ = paged.by_slot()
    hidden_b1d = take(pages.hidden_rd, feed.places.slot_b)[:, None]
    length_b = feed.places.length_b

    def one(now, i):
        token_b, hidden_b1d, held = now
        m_b1d, held = paged_mtp.expected(
            *(spec, params, held, token_b, hidden_b1d, feed.real_b * (i < count_b)),
            feed.places.replace(length_b=length_b + i),
            rules=rules,
        )
        logits_bv = _logits(spec, params, m_b1d, rules)
        token_b = sampling_lib.draw(logits_bv, feed.wishes, feed.step_b + i)
        return (token_b, m_b1d, held), token_b

    now = feed.token_b, hidden_b1d, pages.mtp
    (_, _, held), drafts_ib = jax.lax.scan(one, now, jnp.arange(most, dtype=jnp.int32))
    return drafts_ib.T, pages.replace(mtp=held)


@functools.partial(
    jax.jit, static_argnames=("spec", "rules"), donate_argnames=("pages", "last_s")
)
def verify(params, pages, last_s, feed: Feed, drafts_bi, count_b, *, spec, rules):
    """A step of b rows of which each has `count_b` ids drafted: (ids [b, i + 1], how
    many of them are the row's next ones, pages, last_s).

    Each id is drawn as a step by itself would draw it, after the ids before it, so a
    row's ids are those it would have without drafts; they count up to and with the
    first that is not as drafted.
    """
    tokens_bt = jnp.concatenate([feed.token_b[:, None], drafts_bi], axis=1)
    (b, t), index_1t = tokens_bt.shape, jnp.arange(tokens_bt.shape[1])[None]
    real_bt = feed.real_b[:, None] * (index_1t <= count_b[:, None])
    hidden_btd, pages, inputs = paged.hidden(
        spec, params, tokens_bt, real_bt, pages, feed.places, rules=rules, trial=True
    )
    logits_btv = decoder.logits(spec, params, hidden_btd, rules)
    logits_btv = mesh.reshard(logits_btv, jax.P(None, None, None))
    wishes = jax.tree.map(lambda x: jnp.repeat(x, t, axis=0), feed.wishes)
    step_bt = feed.step_b[:, None] + index_1t
    token_bt = sampling_lib.draw(
        logits_btv.reshape(b * t, -1), wishes, step_bt.reshape(-1)
    ).reshape(b, t)
    right_bi = (token_bt[:, :-1] == drafts_bi) & (index_1t[:, 1:] <= count_b[:, None])
    kept_b = jnp.sum(jnp.cumprod(right_bi, axis=1), axis=1).astype(jnp.int32)
    real_bt = real_bt * (index_1t <= kept_b[:, None])
    pages = paged.settled(spec, params, pages, inputs, real_bt, feed.places, rules)
    pages = paged_mtp.followed(
        *(spec, params, pages, tokens_bt, hidden_btd, real_bt),
        *(feed.known_b, feed.places),
        rules=rules,
        trial=True,
    )
    newest_b = jnp.take_along_axis(token_bt, kept_b[:, None], axis=1)[:, 0]
    last_s = last_s.at[feed.places.slot_b].set(newest_b)
    return token_bt, kept_b + 1, pages, last_s


@functools.partial(jax.jit, static_argnames=("spec", "rules"), donate_argnames="pages")
def prefill(params, pages, tokens_1t, count, known_1, places, shown, *, spec, rules):
    """A piece of one prompt, `count` tokens of it real: (logits after them, pages).
    shown: images among the tokens, for models that see."""
    operands = params, pages, tokens_1t, count, known_1, places, shown
    hidden_1td, pages = _piece(*operands, spec, rules)
    hidden_11d = jax.lax.dynamic_slice_in_dim(hidden_1td, count - 1, 1, axis=1)
    return _logits(spec, params, hidden_11d, rules), pages


@functools.partial(jax.jit, static_argnames=("spec", "rules"), donate_argnames="pages")
def prompt_scores(
    params, pages, tokens_1t, count, known_1, places, shown, next_t, *, spec, rules
):
    """As `prefill`, with what the model gave the id after each token: (logits after the
    last, told of each, pages)."""
    t = tokens_1t.shape[1]
    operands = params, pages, tokens_1t, count, known_1, places, shown
    hidden_1td, pages = _piece(*operands, spec, rules)
    size = math.gcd(t, 16)  # rows of the vocabulary in memory at a time

    def one(part):
        hidden_qd, next_q = part
        logits_qv = decoder.logits(spec, params, hidden_qd[None], rules)[0]
        told_qv = jax.nn.log_softmax(mesh.reshard(logits_qv, jax.P(None, None)))
        chosen_q = jnp.take_along_axis(told_qv, next_q[:, None], axis=1)[:, 0]
        return Told(chosen_q, *jax.lax.top_k(told_qv, min(TOP, told_qv.shape[1])))

    parts = hidden_1td.reshape(-1, size, hidden_1td.shape[-1])
    told = jax.lax.map(one, (parts, next_t.reshape(-1, size)))
    told = jax.tree.map(lambda x: x.reshape(t, *x.shape[2:]), told)
    hidden_11d = jax.lax.dynamic_slice_in_dim(hidden_1td, count - 1, 1, axis=1)
    return _logits(spec, params, hidden_11d, rules), told, pages


@functools.partial(jax.jit, static_argnames="uncut", donate_argnames=("kept", "last_s"))
def first(logits_1v, kept, last_s, feed: Feed, mask_1w, *, uncut=False) -> Any:
    """The first id of an answer: (ids [1], told or None, kept, last_s)."""
    token_1, told, kept = _draw(logits_1v, feed, kept, mask_1w, uncut)
    return token_1, told, kept, last_s.at[feed.places.slot_b].set(token_1)


@functools.partial(jax.jit, static_argnames=("spec", "rules"), donate_argnames="kept")
def look(params, kept: Features, pixels_py, grid_3, at_m, *, spec, rules) -> Features:
    """One image through the vision tower, its features kept in rows `at_m`; patches
    behind its grid are padding, and their rows nobody's."""
    pixels_1py = mesh.reshard(pixels_py[None], rules.pspec(None, None, None))
    grid_113 = mesh.reshard(grid_3[None, None], rules.pspec(None, None, None))
    pack = [(pixels_1py, grid_113)]
    ((new_1md, deep_l1md),) = vision.tower(
        spec, params["vision"], pack, rules=rules, rows=None
    )
    token_fd = kept.token_fd.at[at_m].set(mesh.reshard(new_1md[0], jax.P(None, None)))
    deep_lfd = kept.deep_lfd
    if deep_lfd is not None:
        new_lmd = mesh.reshard(deep_l1md[:, 0], jax.P(None, None, None))
        deep_lfd = deep_lfd.at[:, at_m].set(new_lmd)
    return Features(token_fd, deep_lfd)


@functools.partial(jax.jit, static_argnames=("spec", "rules"))
def embedding(params, tokens_1t, count, *, spec, rules):
    """The vector of one document, `count` tokens of the row: [d], of length 1."""
    real_1t = (jnp.arange(tokens_1t.shape[1])[None] < count).astype(jnp.int32)
    return heads.embed(spec, params, tokens_1t, real_1t, rules=rules)[0]


@functools.partial(jax.jit, static_argnames="units", donate_argnums=0)
def save(pages, slot, first, *, units):
    """A slot's states into pages from `first` on."""
    return paged.saved(pages, slot, first, units)


@functools.partial(jax.jit, static_argnames="units", donate_argnums=0)
def restore(pages, slot, first, *, units):
    """A slot's states from pages from `first` on."""
    return paged.restored(pages, slot, first, units)


def _piece(params, pages, tokens_1t, count, known_1, places, shown, spec, rules):
    """(hidden states of a piece of one prompt, the pages with it in)."""
    real_1t = (jnp.arange(tokens_1t.shape[1])[None] < count).astype(jnp.int32)
    hidden_1td, pages = paged.hidden(
        spec, params, tokens_1t, real_1t, pages, places, shown=shown, rules=rules
    )
    operands = spec, params, pages, tokens_1t, hidden_1td, real_1t, known_1, places
    return hidden_1td, paged_mtp.followed(*operands, rules=rules)


def _logits(spec, params, hidden_btd, rules):
    logits_btv = decoder.logits(spec, params, hidden_btd, rules)
    return mesh.reshard(logits_btv[:, -1], jax.P(None, None))
