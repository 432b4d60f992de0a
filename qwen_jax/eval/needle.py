# SPDX-License-Identifier: Apache-2.0
"""Needle in a haystack: how often a model finds a fact, by length and by depth.

A cell of the grid is one length and one depth: the share of `count` haystacks whose
question greedy decoding answers exactly, all ids of the answer. Greedy decoding gives
an answer exactly when each of its ids is the likeliest after the prompt and the ids
before it, so a cell takes forward passes over prompt and answer, and no decoding.

Source: "needle in a haystack" (Kamradt, 2023); see `haystack` for the texts.

Shapes: rows [b, t] of one length, the last ids being the answers. Depths are shares of
the haystack, 0 its begin; lengths are tokens with question and answer.
Invariants: a cell depends on seed, length and depth, not on the other cells.
Raises: config.InputError for lengths and depths that cannot be.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import config, rng
from qwen_jax.data import tokenizer
from qwen_jax.eval import haystack
from qwen_jax.models import decoder
from qwen_jax.models import spec as spec_lib

ROW_TOKENS = 32_768  # of one forward pass


@dataclasses.dataclass(frozen=True)
class Settings:
    """The grid: `count` haystacks of each length and depth, each with `others` facts
    beside the one that is asked for."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    count: int = 20
    others: int = 3
    seed: int = 0

    def __post_init__(self):
        for name in ("lengths", "depths"):
            if not getattr(self, name):
                raise config.InputError(f"{name}: wanted at least one number")
        if min(self.lengths) < 1 or self.count < 1 or self.others < 0:
            raise config.InputError(
                f"lengths={self.lengths}, count={self.count}, others={self.others}: "
                "wanted lengths and a count of at least 1, and others not negative"
            )
        wrong = [depth for depth in self.depths if not 0 <= depth <= 1]
        if wrong:
            raise config.InputError(
                f"depth {wrong[0]}: wanted shares of the length, from 0 to 1"
            )


@dataclasses.dataclass(frozen=True)
class Grid:
    """found[i][j]: share of answers that were exact at lengths[i], depths[j]."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    found: tuple[tuple[float, ...], ...]
    count: int
    language: str

    @property
    def mean(self) -> float:
        """Over all cells."""
        return float(np.mean(self.found))

    @property
    def least(self) -> float:
        """Of the worst cell."""
        return float(np.min(self.found))


def measure(
    spec: spec_lib.Spec,
    params: dict[str, Any],
    known: tokenizer.Tokenizer,
    settings: Settings,
    language: haystack.Language | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Grid:
    """The whole grid.

    Args:
      spec: the model; what is longer than its max_positions is measured all the same.
      params: its weights.
      known: its vocabulary.
      settings: lengths, depths, how many.
      language: of the texts; None takes what suits the vocabulary.
      say: called with a line after each length.
    """
    writer = haystack.Writer(language or haystack.language_of(known), known)
    rows = []
    for length in settings.lengths:
        cells = [
            found(spec, params, _needles(writer, settings, length, depth))
            for depth in settings.depths
        ]
        rows.append(tuple(float(np.mean(cell)) for cell in cells))
        say(f"{length:,} tokens: {np.mean(rows[-1]):.1%} found")
    where = settings.lengths, settings.depths
    return Grid(*where, tuple(rows), settings.count, writer.language.name)


def _needles(
    writer: haystack.Writer, settings: Settings, length: int, depth: float
) -> list[haystack.Needle]:
    seed = rng.seed_for(settings.seed, f"needle/{length}/{depth:.6f}")
    made = np.random.default_rng(seed)
    return [
        writer.hide(length=length, depth=depth, others=settings.others, rng=made)
        for _ in range(settings.count)
    ]


def found(
    spec: spec_lib.Spec, params: dict[str, Any], needles: Sequence[haystack.Needle]
) -> np.ndarray:
    """bool [needles]: which of these, all of one length, are answered exactly."""
    rows = [needle.prompt + needle.answer for needle in needles]
    tokens_bt = np.array(rows, np.int32)
    answers = [len(needle.answer) for needle in needles]
    most = max(answers)
    each = max(1, ROW_TOKENS // tokens_bt.shape[1])
    likeliest = []
    for start in range(0, len(rows), each):
        part_bt = tokens_bt[start : start + each]
        likeliest.append(np.asarray(_likeliest(params, part_bt, spec=spec, most=most)))
    right_ba = np.concatenate(likeliest) == tokens_bt[:, -most:]
    asked_ba = np.arange(most)[None] >= most - np.array(answers)[:, None]
    return (right_ba | ~asked_ba).all(axis=1)


@functools.partial(jax.jit, static_argnames=("spec", "most"))
def _likeliest(params, tokens_bt, *, spec, most):
    """The likeliest id at each of the last `most` places, given those before."""
    hidden_btd, _ = decoder.hidden(spec, params, tokens_bt[:, :-1])
    return jnp.argmax(decoder.logits(spec, params, hidden_btd[:, -most:]), axis=-1)
