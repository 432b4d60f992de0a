# SPDX-License-Identifier: Apache-2.0
"""Logits -> one id a row: greedy, or drawn after penalty, temperature and cuts.

Source: the order and the meaning of transformers' logits processors: repetition penalty
(arXiv 1909.05858) over the ids of prompt and answer, temperature, top-k, top-p (arXiv
1904.09751), min-p (arXiv 2407.01082). Presence and frequency penalties, over the ids of
the answer, come after the first, as in vLLM, which cuts by min-p before top-k and top-p
and so keeps another set where top-p is below 1. Deviations: temperature 0 is greedy,
also after a penalty; equal scores at the edge of top-p are kept in order of their ids.

Shapes: logits_bv float32; each row has its own settings (`Rows`), so requests of a
batch need not agree; seen_bv bool, the ids that the penalty is for.
Invariants: a row's draw is a function of its logits, its settings, its seed (64 bits)
and its step, whatever stands in the other rows: Gumbel noise is drawn for each id of
the vocabulary and the largest sum wins. Nothing is sorted when all rows are greedy, and
the whole vocabulary only when a row cuts and not all have a top_k of at most SHORT.
Raises: config.InputError naming the setting.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from qwen_jax import config

SHORT = 64  # the largest top_k for which no more than that many are looked at
COLDEST = 1e-5  # below it, scores of 100 and more overflow float32

BOUNDS = {
    "temperature": ((int, float), lambda x: 0 <= x <= 100, "a number from 0 to 100"),
    "top_k": (int, lambda x: 0 <= x < 2**31, "a whole number, 0 for all ids"),
    "top_p": ((int, float), lambda x: 0 < x <= 1, "a number above 0, at most 1"),
    "min_p": ((int, float), lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    "repetition_penalty": (
        (int, float),
        lambda x: 0 < x <= 100,
        "a number above 0, at most 100; 1 changes nothing",
    ),
    "presence_penalty": ((int, float), lambda x: -2 <= x <= 2, "a number from -2 to 2"),
    "frequency_penalty": (
        (int, float),
        lambda x: -2 <= x <= 2,
        "a number from -2 to 2",
    ),
    "seed": (int, lambda x: 0 <= x < 2**64, "a whole number from 0 to 2**64 - 1"),
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What one request asks for.

    temperature: 0 takes the likeliest id. top_k: ids to choose from, 0 for all. top_p:
    share that the chosen set reaches. min_p: least probability, as a share of the
    likeliest id's. repetition_penalty: scores of ids that were there are divided by it
    (multiplied, where negative). presence_penalty, frequency_penalty: taken from scores
    of ids of the answer, once and for each time they came. seed: of 64 bits.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0

    @property
    def cuts(self) -> bool:
        """Whether a draw leaves ids out."""
        some = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        return self.temperature > 0 and some

    def __post_init__(self):
        for name, (kinds, fits, wanted) in BOUNDS.items():
            value = getattr(self, name)
            right = isinstance(value, kinds) and not isinstance(value, bool)
            if not right or not fits(value):  # NaN fits nothing
                raise config.InputError(f"{name}={value!r}: wanted {wanted}")


@struct.dataclass
class Rows:
    """Settings of a batch, one entry a row; seed_b2 holds the halves of each seed."""

    temperature_b: jax.Array
    top_k_b: jax.Array
    top_p_b: jax.Array
    min_p_b: jax.Array
    repetition_b: jax.Array
    presence_b: jax.Array
    frequency_b: jax.Array
    seed_b2: jax.Array


def stack(requests: Sequence[Sampling]) -> Rows:
    """Settings of several requests as arrays."""

    def column(name, dtype):
        return np.array([getattr(one, name) for one in requests], dtype)

    halves = [(one.seed >> 32, one.seed & 0xFFFFFFFF) for one in requests]
    return Rows(
        temperature_b=column("temperature", np.float32),
        top_k_b=column("top_k", np.int32),
        top_p_b=column("top_p", np.float32),
        min_p_b=column("min_p", np.float32),
        repetition_b=column("repetition_penalty", np.float32),
        presence_b=column("presence_penalty", np.float32),
        frequency_b=column("frequency_penalty", np.float32),
        seed_b2=np.array(halves, np.uint32).reshape(len(requests), 2),
    )


def seen_ids(rows: Sequence[Sequence[int]], vocab_size: int) -> np.ndarray:
    """seen_bv of ids per row."""
    seen_bv = np.zeros((len(rows), vocab_size), bool)
    for row, ids in zip(seen_bv, rows, strict=True):
        row[np.asarray(ids, np.int64)] = True
    return seen_bv


def add_seen(seen_bv: jax.Array, token_b: jax.Array) -> jax.Array:
    """seen_bv with one more id in each row."""
    return seen_bv | (jnp.arange(seen_bv.shape[1])[None, :] == token_b[:, None])


def penalized(logits_bv: jax.Array, seen_bv: jax.Array, rows: Rows) -> jax.Array:
    """Scores of seen ids divided by the penalty where positive, else multiplied."""
    by_b1 = rows.repetition_b[:, None]
    less_bv = jnp.where(logits_bv < 0, logits_bv * by_b1, logits_bv / by_b1)
    return jnp.where(seen_bv, less_bv, logits_bv)


def counted(counts_bv: jax.Array, logits_bv: jax.Array, rows: Rows) -> jax.Array:
    """Scores less both penalties of ids that came `counts_bv` times in the answer, as
    OpenAI's API describes them."""
    less_bv = counts_bv * rows.frequency_b[:, None]
    less_bv += (counts_bv > 0) * rows.presence_b[:, None]
    return logits_bv - less_bv.astype(logits_bv.dtype)


def warped(logits_bv: jax.Array, rows: Rows) -> jax.Array:
    """Scores over temperature, -inf where top-k, top-p or min-p cuts."""
    scaled_bv = _scaled(logits_bv, rows)
    ids_bv = jnp.broadcast_to(jnp.arange(logits_bv.shape[1])[None], logits_bv.shape)
    # One sort carries the ids along; equal scores stay in the order of their ids.
    down_bv, ids_bv = jax.lax.sort((-scaled_bv, ids_bv), num_keys=1, is_stable=True)
    kept_bv = _kept(-down_bv, rows)
    back = jax.vmap(lambda ids, kept: jnp.zeros_like(kept).at[ids].set(kept))
    return jnp.where(back(ids_bv, kept_bv), scaled_bv, -jnp.inf)


def _scaled(logits_bv, rows):
    return logits_bv / jnp.maximum(rows.temperature_b, COLDEST)[:, None]


def _kept(down_bk, rows):
    """Which of scores in falling order stay, when none that are left out matter."""
    k = down_bk.shape[1]
    last_b = jnp.where(rows.top_k_b > 0, jnp.minimum(rows.top_k_b, k), k) - 1
    edge_b1 = jnp.take_along_axis(down_bk, last_b[:, None], axis=1)
    kept_bk = down_bk >= edge_b1
    share_bk = jax.nn.softmax(jnp.where(kept_bk, down_bk, -jnp.inf), axis=1)
    # Summed from the smallest, as transformers does: small shares are not lost.
    upto_bk = jnp.flip(jnp.cumsum(jnp.flip(share_bk, 1), axis=1), 1)
    top_p_b1 = rows.top_p_b[:, None]
    kept_bk &= (upto_bk > 1 - top_p_b1) | (top_p_b1 >= 1)
    kept_bk &= share_bk >= rows.min_p_b[:, None] * share_bk[:, :1]
    return kept_bk.at[:, 0].set(True)


def noise(rows: Rows, step_b: jax.Array, vocab_size: int) -> jax.Array:
    """Gumbel noise of each row's seed and step: [b, v]."""

    def one(seed_2, step):
        key = jax.random.wrap_key_data(seed_2, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, step), (vocab_size,))

    return jax.vmap(one)(rows.seed_b2, step_b)


def draw(
    logits_bv: jax.Array, rows: Rows, step_b: jax.Array, *, uncut: bool = False
) -> jax.Array:
    """One id a row, int32 [b].

    Args:
      logits_bv: float32, after `penalized` where rows have a penalty.
      rows: settings.
      step_b: int32, the number of the token within its row's answer.
      uncut: the caller knows that no row has a cut. (A GPU asks the host which branch
        to take, and the host waits for all before it.)
    """
    greedy_b = jnp.argmax(logits_bv, axis=1).astype(jnp.int32)
    warm_b = rows.temperature_b > 0
    cuts_b = (rows.top_k_b > 0) | (rows.top_p_b < 1) | (rows.min_p_b > 0)
    short_b = (rows.top_k_b > 0) & (rows.top_k_b <= SHORT)

    def whole(logits_bv):
        scores_bv = _scaled(logits_bv, rows) + gumbel(logits_bv)
        return jnp.argmax(scores_bv, axis=1).astype(jnp.int32)

    def among_few(logits_bv):
        # Of equal scores at the edge of top-k all must be here: hence twice as many.
        few = min(2 * SHORT, logits_bv.shape[1])
        down_bk, ids_bk = jax.lax.top_k(_scaled(logits_bv, rows), few)
        kept_bk = _kept(down_bk, rows)
        sum_bk = down_bk + jnp.take_along_axis(gumbel(logits_bv), ids_bk, axis=1)
        best_b1 = jnp.argmax(jnp.where(kept_bk, sum_bk, -jnp.inf), 1)[:, None]
        return jnp.take_along_axis(ids_bk, best_b1, axis=1)[:, 0]

    def among_all(logits_bv):
        scores_bv = warped(logits_bv, rows) + gumbel(logits_bv)
        return jnp.argmax(scores_bv, axis=1).astype(jnp.int32)

    def gumbel(logits_bv):
        return noise(rows, step_b, logits_bv.shape[1])

    def drawn(logits_bv):
        way = jnp.where(jnp.any(cuts_b & warm_b), 2, 0)
        way = jnp.where(jnp.all(short_b | ~warm_b), 1, way)
        ways = (whole, among_few, among_all)
        return jax.lax.switch(way, ways, logits_bv)

    if uncut:
        return jnp.where(warm_b, whole(logits_bv), greedy_b)
    drawn_b = jax.lax.cond(jnp.any(warm_b), drawn, lambda _: greedy_b, logits_bv)
    return jnp.where(warm_b, drawn_b, greedy_b)
