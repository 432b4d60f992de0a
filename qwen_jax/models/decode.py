# SPDX-License-Identifier: Apache-2.0
"""Text from a model, a few prompts at a time: prefill, then one token a step.

For samples during training, `qwen-jax generate` and tests. Prompts are padded on the
left, so that all rows write the same slot; the loop over new tokens is compiled once
for a (rows, prompt bucket, new tokens) shape. A server is another matter.

Shapes: prompts are lists of ids; the result is a list of lists of new ids, cut after
the first end id. Temperature 0 takes the most likely token; top_p keeps the smallest
set of tokens whose probability reaches it.
Invariants: with temperature 0 the ids do not depend on the other prompts.
Raises: config.InputError for an empty prompt or one that does not fit the model.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import config, mesh
from qwen_jax.models import cache as cache_lib
from qwen_jax.models import decoder, vl
from qwen_jax.models import spec as spec_lib

BUCKET = 64  # prompts are padded to a multiple, so few shapes are compiled


def generate(
    spec: spec_lib.Spec,
    params: dict[str, Any],
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    images: vl.Part | None = None,
    videos: vl.Part | None = None,
    rules: mesh.Rules | None = None,
) -> list[list[int]]:
    """New token ids of each prompt.

    Args:
      spec: the model.
      params: its weights, stacked or `decoder.unstacked`.
      prompts: ids of each prompt, at least one each.
      max_tokens: most new tokens.
      temperature: 0 is greedy.
      top_p: nucleus share.
      key: random key, wanted when temperature > 0.
      images: those of all prompts in order, as in `vl`.
      videos: likewise.
      rules: dims -> mesh axes.
    Raises:
      config.InputError: no prompts, an empty prompt, ids outside the vocabulary, more
        tokens than the model has positions.
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
    bucket = -(-longest // BUCKET) * BUCKET
    ways = mesh.axis_size((rules or mesh.Rules()).batch)
    rows = -(-len(prompts) // ways) * ways
    tokens_bt = np.zeros((rows, bucket), np.int32)
    segments_bt = np.zeros((rows, bucket), np.int32)
    for i in range(rows):
        # Rows that fill up the mesh have one token, and no images that are not there.
        prompt = prompts[i] if i < len(prompts) else [0]
        tokens_bt[i, bucket - len(prompt) :] = prompt
        segments_bt[i, bucket - len(prompt) :] = 1
    see = {"images": images, "videos": videos}
    vl.check(spec, tokens_bt, segments_bt, **see)
    key = jax.random.key(0) if key is None else key
    new_bt = np.asarray(
        _generate(
            params,
            tokens_bt,
            segments_bt,
            key,
            jnp.float32(temperature),
            jnp.float32(top_p),
            see,
            spec=spec,
            max_tokens=max_tokens,
            rules=rules or mesh.Rules(),
        )
    )
    return [_until(list(map(int, row)), spec.eos_ids) for row in new_bt[: len(prompts)]]


def _until(ids: list[int], ends: tuple[int, ...]) -> list[int]:
    """Ids up to and without the first end id."""
    for i, token in enumerate(ids):
        if token in ends:
            return ids[:i]
    return ids


def sample(logits_bv, key, temperature, top_p):
    """One id a row: greedy at temperature 0, else from the nucleus."""
    greedy_b = jnp.argmax(logits_bv, axis=-1)
    scaled_bv = logits_bv / jnp.maximum(temperature, 1e-6)
    order_bv = jnp.sort(scaled_bv, axis=-1, descending=True)
    share_bv = jnp.cumsum(jax.nn.softmax(order_bv, axis=-1), axis=-1)
    # Keep a token if what stands before it has not reached top_p yet.
    before_bv = jnp.pad(share_bv, [(0, 0), (1, 0)])[:, :-1]
    kept_bv = jnp.where(before_bv < top_p, order_bv, jnp.inf)
    floor_b1 = jnp.min(kept_bv, axis=-1, keepdims=True)
    cut_bv = jnp.where(scaled_bv >= floor_b1, scaled_bv, -jnp.inf)
    drawn_b = jax.random.categorical(key, cut_bv, axis=-1)
    return jnp.where(temperature > 0, drawn_b, greedy_b).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("spec", "max_tokens", "rules"))
def _generate(
    params,
    tokens_bt,
    segments_bt,
    key,
    temperature,
    top_p,
    see,
    *,
    spec,
    max_tokens,
    rules,
):
    """Prefill and a scan over new tokens: [b, max_tokens] ids."""
    rows = rules.pspec("batch", None)
    tokens_bt = mesh.reshard(tokens_bt, rows)
    segments_bt = mesh.reshard(segments_bt, rows)
    b, t = tokens_bt.shape
    cache = cache_lib.init(spec, b, t + max_tokens, rules)
    hidden_btd, cache = decoder.hidden_cached(
        spec, params, tokens_bt, cache, segments=segments_bt, rules=rules, **see
    )

    def pick(hidden_btd, i):
        logits_btv = decoder.logits(spec, params, hidden_btd, rules)
        logits_bv = mesh.reshard(logits_btv[:, -1], jax.P(None, None))
        return sample(logits_bv, jax.random.fold_in(key, i), temperature, top_p)

    def step(carry, i):
        token_b, cache = carry
        token_bt = mesh.reshard(token_b[:, None], rows)
        hidden_btd, cache = decoder.hidden_cached(
            spec, params, token_bt, cache, rules=rules
        )
        next_b = pick(hidden_btd, i)
        return (next_b, cache), next_b

    first_b = pick(hidden_btd[:, -1:], 0)
    if max_tokens == 1:
        return first_b[:, None]
    _, rest_tb = jax.lax.scan(step, (first_b, cache), jnp.arange(1, max_tokens))
    return jnp.concatenate([first_b[:, None], rest_tb.T], axis=1)
