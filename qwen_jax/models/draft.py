# SPDX-License-Identifier: Apache-2.0
"""Text with fewer passes: the MTP head drafts tokens, the model checks several at once.

    draft    d_1 .. d_k from the MTP head, each from the one before: d_i ~ q_i
    check    one pass of the model over the last token and d_1 .. d_k: p_1 .. p_{k+1}
    accept   d_i while u_i q_i(d_i) < p_i(d_i); then one more token, from
             max(p_i - q_i, 0) where d_i was refused, from p_{k+1} where none was

Source: speculative sampling (arXiv 2211.17192, 2302.01318), which leaves the model's
own distribution as it is whatever the drafts are; with temperature 0 the ids are those
of `decode.generate`. Temperature and nucleus cut both p and q. With several MTP layers
the first one drafts.

What a refused token left in the caches is taken back: its slot becomes padding, later
ones are written over, and the linear layers' rule is run again from the state before
over those tokens that stay, from the inputs that the pass had (their projections are
not computed again). Rows keep different numbers of tokens in a step: a row that keeps
fewer than another has padding in between.

Shapes: prompts are lists of ids; the result is a `Drafted`.
Invariants: a row has at least one new token a step, so there are at most max_tokens
steps; a cache has room for the most that rows can differ.
Raises: config.InputError for a model without an MTP head or with windows, draft_tokens
below 1, and what `decode.generate` refuses.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import config, mesh
from qwen_jax.models import cache as cache_lib
from qwen_jax.models import decode, decoder, mtp
from qwen_jax.models import delta as delta_lib
from qwen_jax.models import sampling as sampling_lib
from qwen_jax.models import spec as spec_lib


@dataclasses.dataclass(frozen=True)
class Drafted:
    """New ids of each prompt; how many passes a row took after its prompt; and how
    many tokens each gave on average, the acceptance length (1: no draft was right)."""

    ids: list[list[int]]
    passes: float
    acceptance: float


def generate(
    spec: spec_lib.Spec,
    params: dict[str, Any],
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    draft_tokens: int = 2,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    rules: mesh.Rules | None = None,
) -> Drafted:
    """As `decode.generate`, in fewer passes of the model.

    Args:
      spec: the model, with an MTP head.
      params: its weights, stacked or `decoder.unstacked`.
      prompts: ids of each prompt, at least one each.
      max_tokens: most new tokens.
      draft_tokens: drafted before each pass.
      temperature: 0 is greedy.
      top_p: nucleus share.
      key: random key, wanted when temperature > 0.
      rules: dims -> mesh axes.
    Raises:
      config.InputError: see the module docstring.
    """
    if not spec.mtp_layers:
        raise config.InputError(
            "this model has no MTP head to draft with (mtp_layers=0): use "
            "decode.generate"
        )
    if any(kind.window for kind in spec.kinds):
        raise config.InputError(
            f"window={spec.window} with drafts: the cache of a layer with a window has "
            "lost what refused drafts took the place of; use decode.generate, or set "
            "window=0 if the model is without"
        )
    if draft_tokens < 1:
        raise config.InputError(f"draft_tokens={draft_tokens}: wanted at least 1")
    rules = (rules or mesh.Rules()).whole
    tokens_bt, segments_bt = decode.rows_of(spec, prompts, max_tokens, rules)
    new_bt, counts, passes = _generate(
        params,
        tokens_bt,
        segments_bt,
        jax.random.key(0) if key is None else key,
        jnp.float32(temperature),
        jnp.float32(top_p),
        spec=spec,
        max_tokens=max_tokens,
        drafts=draft_tokens,
        rules=rules,
    )
    real = len(prompts)
    ids = np.asarray(new_bt)[:real, :max_tokens].tolist()
    passes, counts = (np.asarray(x)[:real].sum() for x in (passes, counts))
    return Drafted(
        [decode.until(row, spec.eos_ids) for row in ids],
        float(passes / real),
        float((counts - real) / max(passes, 1)),
    )


def chances(logits_btv: jax.Array, temperature, top_p) -> jax.Array:
    """The distribution that `sampling.draw` draws from, of each position."""
    b, t, v = logits_btv.shape
    zeros, ones = jnp.zeros((b * t,)), jnp.ones((b * t,))
    rows = sampling_lib.Rows(
        temperature_b=ones * temperature,
        top_k_b=zeros.astype(jnp.int32),
        top_p_b=ones * top_p,
        min_p_b=zeros,
        repetition_b=ones,
        presence_b=zeros,
        frequency_b=zeros,
        seed_b2=jnp.zeros((b * t, 2), jnp.uint32),
    )
    cut_bv = sampling_lib.warped(logits_btv.reshape(b * t, v), rows)
    sure_btv = jax.nn.one_hot(jnp.argmax(logits_btv, axis=-1), v)
    return jnp.where(temperature > 0, jax.nn.softmax(cut_bv).reshape(b, t, v), sure_btv)


def draw(p_bv: jax.Array, key: jax.Array) -> jax.Array:
    """One id a row."""
    return jax.random.categorical(key, jnp.log(p_bv), axis=-1).astype(jnp.int32)


def accept(
    p_btv: jax.Array, q_biv: jax.Array, drafts_bi: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(how many drafts each row keeps, the token after them), t = i + 1."""
    coin, dice = jax.random.split(key)
    picked = functools.partial(jnp.take_along_axis, axis=2)
    p_bi1 = picked(p_btv[:, :-1], drafts_bi[..., None])
    q_bi1 = picked(q_biv, drafts_bi[..., None])
    right_bi = (jax.random.uniform(coin, p_bi1.shape) * q_bi1 < p_bi1)[..., 0]
    kept_b = jnp.sum(jnp.cumprod(right_bi, axis=1), axis=1)
    q_btv = jnp.pad(q_biv, [(0, 0), (0, 1), (0, 0)])
    p_bv, q_bv = (_at(x, kept_b) for x in (p_btv, q_btv))
    rest_bv = jnp.maximum(p_bv - q_bv, 0)
    # Equal but for rounding: then no draft is refused but for rounding either.
    some_b1 = jnp.sum(rest_bv, axis=-1, keepdims=True) > 0
    return kept_b, draw(jnp.where(some_b1, rest_bv, p_bv), dice)


def _at(x_btv, index_b):
    """x[b, index[b]]."""
    return jnp.take_along_axis(x_btv, index_b[:, None, None], axis=1)[:, 0]


def keep(
    spec: spec_lib.Spec,
    params: dict[str, Any],
    before: cache_lib.Cache,
    after: cache_lib.Cache,
    real_bt: jax.Array,
    advance: jax.Array,
    rules: mesh.Rules,
) -> cache_lib.Cache:
    """The cache with only some of the tokens in that a pass with `keep` put into it.

    Args:
      spec: the model.
      params: its weights.
      before: the cache that the pass began with.
      after: the one that it gave.
      real_bt: int32, 1 for tokens that stay; the first ones of each row.
      advance: slots that stay, at least the tokens of every row.
      rules: dims -> mesh axes.
    """
    rows, delta, tail_bj = rules.pspec("batch", None), None, before.tail_segments_bj
    if before.delta is not None:

        def again(_, now):
            p, inputs, state = now
            state = state | {"segments_bj": tail_bj}
            return None, delta_lib.run(p, inputs, real_bt, state, rules)[1]

        held = after.delta["inputs"], before.delta
        _, delta = jax.lax.scan(again, None, (_delta_weights(spec, params), *held))
        tail = mesh.local(delta_lib.tail_segments, inputs=(rows, rows), out=rows)
        tail_bj = tail(tail_bj, real_bt)
    return cache_lib.Cache(
        after.attention,
        delta,
        cache_lib.put(before.segments_bs, real_bt, before.length, rules),
        tail_bj,
        before.length + advance,
        before.offset_b,
    )


def _delta_weights(spec, params):
    """Stacked weights of linear layers, from either form of the parameters."""
    layers = params["layers"]
    if not isinstance(layers, list):
        return layers["delta"]
    mine = [layers[i]["delta"] for i in spec.layers_with("delta")]
    return {name: jnp.stack([p[name] for p in mine]) for name in delta_lib.RULE}


@functools.partial(jax.jit, static_argnames=("spec", "max_tokens", "drafts", "rules"))
def _generate(
    params,
    tokens_bt,
    segments_bt,
    key,
    temperature,
    top_p,
    *,
    spec,
    max_tokens,
    drafts,
    rules,
):
    """(new ids [b, max_tokens + drafts], how many, passes) of each row."""
    rows, (b, t) = rules.pspec("batch", None), tokens_bt.shape
    tokens_bt, segments_bt = (mesh.reshard(x, rows) for x in (tokens_bt, segments_bt))
    most = min((max_tokens - 1) * (drafts + 1), b * (max_tokens - 1 + drafts))
    slots = t + most + drafts + 1
    do = _Passes(spec, params, rules, temperature, top_p)

    cache = cache_lib.init(spec, b, slots, rules)
    own = cache_lib.init(mtp.alone(spec), b, slots, rules)
    hidden_btd, cache = decoder.hidden_cached(
        spec, params, tokens_bt, cache, segments=segments_bt, rules=rules
    )
    token_b = draw(do.chances(hidden_btd[:, -1:])[:, 0], jax.random.fold_in(key, 0))
    next_bt = jnp.concatenate([tokens_bt[:, 1:], do.laid(token_b[:, None])], axis=1)
    m_btd, own = do.further(next_bt, hidden_btd, own, segments_bt)
    out_bt = jnp.zeros((b, max_tokens + drafts), jnp.int32).at[:, 0].set(token_b)
    going_b = ~do.ends(token_b[:, None])[:, 0] & (max_tokens > 1)
    ones_b = jnp.ones((b,), jnp.int32)
    start = (
        *(cache, own, m_btd[:, -1:], token_b),
        *(out_bt, ones_b, ones_b - 1, going_b, jnp.int32(1)),
    )

    def step(now):
        cache, own, m_b1d, token_b, out_bt, count_b, passes_b, going_b, number = now
        draft_key, accept_key = jax.random.split(jax.random.fold_in(key, number))
        drafts_bi, q_biv = do.draft(m_b1d, own, going_b, draft_key, drafts)
        input_bt = do.laid(jnp.concatenate([token_b[:, None], drafts_bi], axis=1))
        checked_bt = jnp.broadcast_to(going_b[:, None], input_bt.shape)
        hidden_btd, after = decoder.hidden_cached(
            *(spec, params, input_bt, cache),
            segments=do.laid(checked_bt.astype(jnp.int32)),
            rules=rules,
            keep=True,
        )
        kept_b, new_b = accept(do.chances(hidden_btd), q_biv, drafts_bi, accept_key)
        index_t = jnp.arange(drafts + 1)
        real_bt = (index_t[None] <= kept_b[:, None]) & going_b[:, None]
        advance = jnp.max(jnp.where(going_b, kept_b + 1, 0)).astype(jnp.int32)
        known_bt = jnp.pad(drafts_bi, [(0, 0), (0, 1)])
        next_bt = jnp.where(index_t[None] < kept_b[:, None], known_bt, new_b[:, None])
        real = do.laid(real_bt.astype(jnp.int32))
        cache = keep(spec, params, cache, after, real, advance, rules)
        m_btd, grown = do.further(do.laid(next_bt), hidden_btd, own, real)
        m_b1d = do.laid(_at(do.whole(m_btd), kept_b)[:, None])
        own = grown.replace(length=own.length + advance)

        place_bt = jnp.where(real_bt, count_b[:, None] + index_t[None], out_bt.shape[1])
        out_bt = out_bt.at[jnp.arange(b)[:, None], place_bt].set(next_bt, mode="drop")
        count_b += jnp.sum(real_bt, axis=1)
        passes_b += going_b
        ended_b = jnp.any(do.ends(next_bt) & real_bt, axis=1)
        going_b = going_b & ~ended_b & (count_b < max_tokens)
        number += 1
        return cache, own, m_b1d, new_b, out_bt, count_b, passes_b, going_b, number

    now = jax.lax.while_loop(lambda now: jnp.any(now[7]), step, start)
    return now[4], now[5], now[6]


@dataclasses.dataclass(frozen=True)
class _Passes:
    """What is the same in every step."""

    spec: spec_lib.Spec
    params: dict[str, Any]
    rules: mesh.Rules
    temperature: jax.Array
    top_p: jax.Array

    def laid(self, x):
        """Rows where the model wants them."""
        dims = ("batch", *(None for _ in x.shape[1:]))
        return mesh.reshard(x, self.rules.pspec(*dims))

    def whole(self, x):
        """The same on every device, for choices."""
        return mesh.reshard(x, jax.P(*(None for _ in x.shape)))

    def chances(self, hidden_btd):
        logits_btv = decoder.logits(self.spec, self.params, hidden_btd, self.rules)
        return chances(self.whole(logits_btv), self.temperature, self.top_p)

    def ends(self, ids_bt):
        found_bt = jnp.zeros(ids_bt.shape, bool)
        for end in self.spec.eos_ids:
            found_bt |= ids_bt == end
        return found_bt

    def further(self, next_bt, hidden_btd, own, segments_bt):
        return mtp.hidden_cached(
            *(self.spec, self.params, next_bt, hidden_btd, own),
            segments=segments_bt,
            rules=self.rules,
        )

    def draft(self, m_b1d, own, going_b, key, drafts):
        """(drafts [b, i], their distributions [b, i, v]); the cache stays as it was."""
        segments_b1 = self.laid(going_b[:, None].astype(jnp.int32))

        def pick(m_b1d, i):
            q_bv = self.chances(m_b1d)[:, 0]
            return draw(q_bv, jax.random.fold_in(key, i)), q_bv

        def one(now, i):
            token_b, q_bv = pick(now[0], i)
            next_b1 = self.laid(token_b[:, None])
            return self.further(next_b1, *now, segments_b1), (token_b, q_bv)

        (m_b1d, _), found = jax.lax.scan(one, (m_b1d, own), jnp.arange(drafts - 1))
        last = pick(m_b1d, drafts - 1)
        return tuple(
            jnp.moveaxis(jnp.concatenate([x, y[None]]), 0, 1)
            for x, y in zip(found, last, strict=True)
        )
