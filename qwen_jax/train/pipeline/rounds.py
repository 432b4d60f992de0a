# SPDX-License-Identifier: Apache-2.0
"""The chunks of a run's steps in rounds that fit programs compiled before the first.

What a pipeline's program holds (slots, see `ticks`) depends on which chunks it is of,
and no two steps are alike. So programs are made for what a step may well have: one for
chunks by themselves, and one for groups of up to 2, 3, 4, 6, 8, ... chunks, each with
the room that a full step of such groups needs, or one of them among other chunks. Of
a step those chunks go through one together that fit it and are done sooner so than one
after another, the longest groups first; between rounds the pipeline empties.

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
        """The rounds of so many chunks by themselves and of groups of so many: what
        goes through the pipeline together does so where that is faster."""
        order = sorted(range(len(groups)), key=lambda i: -groups[i])
        made: list[tuple[list[int], int, chunked.Plan]] = []
        for i in order:
            alone = self._plan(groups[i], 0, (groups[i],))
            if made:
                mine, _, before = made[-1]
                plan = self._plan(before.sizes.chunks, 0, (*before.groups, groups[i]))
                if plan and plan.seconds < before.seconds + alone.seconds:
                    made[-1] = [*mine, i], 0, plan
                    continue
            made.append(([i], 0, alone))
        full = self.sizes[0].micros
        rest = [min(full, packed - first) for first in range(0, packed, full)]
        if made and rest:
            mine, _, before = made[-1]
            plan = self._plan(before.sizes.chunks, rest[-1], before.groups)
            if plan and plan.seconds < before.seconds + self._alone(rest[-1]).seconds:
                made[-1] = mine, rest.pop(), plan
        made += [([], count, self._alone(count)) for count in rest]
        rounds, first = [], 0
        for mine, count, plan in made:
            program = chunks_lib.rounded(plan.sizes.chunks) if mine else 0
            some = range(first, first + count)
            rounds.append(Round(program, some, tuple(mine), plan))
            first += count
        return rounds

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

    def _alone(self, packed):
        return self._plan(0, packed, ())

    def _plan(self, longest, packed, groups):
        """The fastest way that fits the program of so long groups, or None."""
        there = self.sizes[chunks_lib.rounded(longest) if longest else 0]
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

    def room(cases):
        every = [chunked.plan_of(*one, live, stages).sizes for one in cases]
        return chunked.Sizes.of_all(every)

    sizes = {0: room([(1, ()), (chunks, ())])}
    for n in groups:
        many = max(chunks // n, 1)
        beside = max(chunks - n * many, 1)
        cases = [(0, (n,)), (max(chunks - n, 1), (n,)), (beside, (n,) * many)]
        sizes[n] = room(cases)
    return Programs(live, stages, sizes)
