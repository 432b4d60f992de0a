# SPDX-License-Identifier: Apache-2.0
"""The chunks of a run's steps in rounds that fit programs compiled before the first.

What a pipeline's program holds (slots, see `ticks`) depends on which chunks it is of,
and no two steps are alike. So programs are made for what a step may well have: one for
chunks by themselves, and one for groups of up to 2, 3, 4, 6, 8, ... chunks, each with
the room that a full step of such groups needs, or one of them among other chunks. A
step whose chunks fit into one program goes through it in one round; else its groups are
dealt to several, the longest first, and the pipeline empties between rounds.

Invariants: a group by itself always fits; every chunk is in one round.
Raises: nothing.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.train import bubbles
from qwen_jax.train.chunkflow import chunks as chunks_lib
from qwen_jax.train.chunkflow import gradients as chunk_gradients
from qwen_jax.train.pipeline import chunked, ticks

# Of an operation's time; a backward pass computes its stretch again.
COSTS = {bubbles.FORWARD_PASS: 1.0, bubbles.AGAIN: 1.0, bubbles.BACKWARD_PASS: 3.0}


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
        """The rounds of so many chunks by themselves and of groups of so many."""
        left = sorted(range(len(groups)), key=lambda i: -groups[i])
        made, first = [], 0
        while left or first < packed:
            most = chunks_lib.rounded(groups[left[0]]) if left else 0
            taken = self._groups(most, [groups[i] for i in left])
            mine = tuple(left[i] for i in taken)
            left = [i for i in left if i not in mine]
            counts = tuple(groups[i] for i in mine)
            count = packed - first
            while count and not self._fits(most, count, counts):
                count //= 2
            alone = range(first, first + count)
            first += count
            made.append(Round(most, alone, mine, self._plan(count, counts)))
        return made

    def stretch(self, packed: int, groups: Sequence[int]) -> float:
        """How long a step's ticks take, over what one stage computes in them."""
        whole = work = 0.0
        for one in self.deal(packed, groups):
            kinds = one.plan.table.rows["kind"]
            whole += one.plan.table.seconds(COSTS)
            work += sum(
                cost * np.sum(kinds == ticks.KINDS.index(kind))
                for kind, cost in COSTS.items()
            )
        return whole * self.stages / work

    def _groups(self, program: int, counts: list[int]) -> list[int]:
        """Numbers of the groups that go through a program together, the first among
        them."""
        if not counts or self._fits(program, 0, tuple(counts)):
            return list(range(len(counts)))
        taken = [0]
        for i in range(1, len(counts)):
            more = [*taken, i]
            if self._fits(program, 0, tuple(counts[j] for j in more)):
                taken = more
        return taken

    def _fits(self, program, packed, counts):
        there = self.sizes[program]
        if packed + sum(counts) > there.micros:
            return False  # without a look at its ticks
        return there.hold(self._plan(packed, counts).sizes)

    def _plan(self, packed, counts):
        return chunked.plan_of(packed, counts, self.live, self.stages)


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
