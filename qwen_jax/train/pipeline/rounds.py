# SPDX-License-Identifier: Apache-2.0
"""The chunks of a run's steps in rounds that fit programs compiled before the first.

What a pipeline's program holds (slots, see `ticks`) depends on which chunks it is of,
and no two steps are alike. So programs are made for what a step may well have: one for
chunks by themselves, and one for groups of up to 2, 3, 4, 6, 8, ... chunks, each with
the room that a full step of such groups needs, or one of them among other chunks.
Between rounds the pipeline empties.

Invariants: a group by itself always fits; every chunk is in one round.
Raises: nothing.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.train.chunkflow import chunks as chunks_lib
from qwen_jax.train.chunkflow import gradients as chunk_gradients
from qwen_jax.train.pipeline import chunked, ticks


@dataclasses.dataclass(frozen=True)
class Round:
    """A pass through the pipeline: its program, by chunks of the longest group; numbers
    of its groups and of the chunks by themselves, among those of the step; its ticks.
    """

    program: int
    packed: range
    groups: tuple[int, ...]
    plan: chunked.Plan


@dataclasses.dataclass(frozen=True)
class Programs:
    """sizes: of each program, by chunks of the longest group."""

    live: int
    stages: int
    sizes: dict[int, chunked.Sizes]

    def parts_of(self, dealt: chunks_lib.Dealt) -> list[chunk_gradients.Part]:
        """As `chunkflow.gradients.parts_of`, a round each."""
        made = []
        for one in self.deal(len(dealt.packed), [n for _, n in dealt.groups]):
            sizes = self.sizes[one.program]
            mine = chunks_lib.Dealt(
                [dealt.packed[i] for i in one.packed],
                [dealt.groups[i] for i in one.groups],
            )
            operands = chunked.arrays(mine, sizes.micros), *one.plan.padded(sizes)
            made.append((f"round/{one.program}", operands))
        return made

    def shapes(self, chunk: Callable[..., Any]) -> dict[str, tuple[Any, ...]]:
        """As `chunkflow.step.shapes`."""
        count, made = jax.ShapeDtypeStruct((), jnp.int32), {}
        for n, sizes in self.sizes.items():
            row = jax.ShapeDtypeStruct((sizes.ticks, self.stages), jnp.int32)
            rows = dict.fromkeys(ticks.COLUMNS, row)
            made[f"round/{n}"] = chunk(sizes.micros), rows, count
        return made

    def jitted(self, spec: Any, settings: Any, rules: Any) -> dict[str, Any]:
        """As `chunked.jitted`, of all programs."""
        sizes = {f"round/{n}": one for n, one in self.sizes.items()}
        return chunked.jitted(spec, settings, rules, sizes)

    def deal(self, packed: int, groups: Sequence[int]) -> list[Round]:
        """The rounds of so many chunks by themselves and of groups of so many.

        A group of more chunks than there are stages fills the pipeline, and another
        would wait for it; shorter ones go together, as many as fit.
        """
        order = sorted(range(len(groups)), key=lambda i: -groups[i])
        long = [i for i in order if groups[i] > self.stages]
        made = [([i], self._plan(0, (groups[i],))) for i in long]
        made += self._together(order[len(long) :], groups)
        full = self.sizes[0].micros
        counts = [packed % full] * bool(packed % full) + [full] * (packed // full)
        for n, count in enumerate(counts):
            alone = self._plan(count, ())
            if made and n == 0:  # with the last groups, where that is sooner
                mine, before = made[-1]
                plan = self._plan(count, before.groups)
                if plan and plan.seconds < before.seconds + alone.seconds:
                    made[-1] = mine, plan
                    continue
            made.append(([], alone))
        rounds, first = [], 0
        for mine, plan in made:
            some = range(first, first + plan.packed)
            rounds.append(Round(self._program(plan.groups), some, tuple(mine), plan))
            first += plan.packed
        return rounds

    def _together(self, mine, groups):
        """(numbers of groups, plan) of rounds of several: of all that are left, a half,
        a quarter of them, ... as many as are done in the least time a chunk."""
        made = []
        while mine:
            best, count = None, len(mine)
            while count:
                counts = tuple(groups[i] for i in mine[:count])
                if plan := self._plan(0, counts):
                    each = plan.seconds / sum(counts)
                    if best and each >= best[0]:
                        break
                    best = each, count, plan
                count //= 2
            _, count, plan = best
            made.append((mine[:count], plan))
            mine = mine[count:]
        return made

    def stretch(self, packed: int, groups: Sequence[int]) -> float:
        """How long a step's ticks take, over what one stage computes in them."""
        whole = work = 0.0
        for one in self.deal(packed, groups):
            kinds = one.plan.table.rows["kind"]
            whole += one.plan.seconds
            work += sum(
                cost * np.sum(kinds == ticks.KINDS.index(kind))
                for kind, cost in chunked.COSTS.items()
            )
        return whole * self.stages / work

    def _program(self, groups):
        return chunks_lib.rounded(max(groups)) if groups else 0

    def _plan(self, packed, groups):
        """The fastest way that fits the program of such groups, or None."""
        there = self.sizes[self._program(groups)]
        if packed + sum(groups) > there.micros:
            return None  # without a look at its ticks
        ways = chunked.plans(packed, groups, self.live, self.stages)
        return next((one for one in ways if there.hold(one.sizes)), None)


def programs(live: int, stages: int, groups: Sequence[int], chunks: int) -> Programs:
    """What is compiled for a run.

    Args:
      live: K.
      stages: of the pipeline.
      groups: chunks that programs of groups are for, ascending.
      chunks: of a step whose rows are full.
    """

    def sizes(n, plans):
        every = [one.sizes for one in plans]
        micros = chunks + max(n, stages)
        # A chunk of a group goes forward, and again, each followed by a turn backward.
        ticks = 4 * (micros + 2 * stages)
        every.append(dataclasses.replace(every[0], micros=micros, ticks=ticks))
        return chunked.Sizes.of_all(every)

    # Slots are those of what is under way at once: more of the same needs no more.
    some = 4 * stages
    made = {0: sizes(0, [chunked.plan_of(some, (), live, stages)])}
    for n in groups:
        cases = [chunked.plan_of(p, (n,), live, stages) for p in (0, some)]
        if n <= stages:  # which go together, whatever that takes: they are short
            several = [n - i % (n - 1) for i in range(max(some // n, 2))]
            for some_groups in ((n,) * len(several), tuple(sorted(several)[::-1])):
                cases.append(chunked.plans(some, some_groups, live, stages)[0])
        made[n] = sizes(n, cases)
    return Programs(live, stages, made)
