# SPDX-License-Identifier: Apache-2.0
"""What each device of a pipeline does in which order, and how long it waits.

Orders are 1F1B (PipeDream-flush; a device that is P - p - 1 stages before the last has
as many forward passes ahead of its backward ones) and interleaved 1F1B (Megatron-LM,
arXiv 2104.04473: each device has several stages, so the pipeline fills in smaller
steps). Micro-batches may be chunks of a document (ChunkFlow, arXiv 2503.02356, section
4.3): within a group forward passes go up and backward passes down, chunks that did not
stay are computed forward again just before their backward pass, and a device that is
to go backward through a chunk it has not seen goes forward first.

`simulate` takes any order: an operation begins when its device is free and what it
needs is there, and nothing is sent in no time.
Units: any unit of time; a backward pass is `BACKWARD` times a forward one.
Raises: config.InputError for orders that cannot be, RuntimeError for one that waits for
itself.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from qwen_jax import config

BACKWARD = 2
FORWARD_PASS, BACKWARD_PASS, AGAIN = "F", "B", "R"


@dataclasses.dataclass(frozen=True)
class Micro:
    """A micro-batch: the time of its forward pass through a device's whole share of the
    model; the group it is a chunk of and its number there, or None; whether what its
    backward pass needs stays."""

    cost: float
    group: int | None = None
    number: int = 0
    stays: bool = True


@dataclasses.dataclass(frozen=True)
class Op:
    """One pass of a micro-batch through one of a device's stages."""

    kind: str
    micro: int
    part: int = 0  # of the device's stages


@dataclasses.dataclass(frozen=True)
class Timeline:
    """When each operation of each device began and ended: [device][i] = (Op, begin,
    end)."""

    devices: list[list[tuple[Op, float, float]]]
    micros: tuple[Micro, ...]

    @property
    def makespan(self) -> float:
        """From the first operation to the last."""
        return max(end for ops in self.devices for _, _, end in ops)

    @property
    def bubble(self) -> float:
        """Share of the time in which a device does nothing that training needs; forward
        passes that are made again are no such thing."""
        work = sum((1 + BACKWARD) * micro.cost for micro in self.micros)
        return 1 - work / self.makespan


def chunks(groups: Sequence[Sequence[float]], live: int) -> list[Micro]:
    """Micro-batches of groups of dependent chunks, a group of one being by itself; of
    each group the last `live` stay."""
    made = []
    for group, costs in enumerate(groups):
        alone = len(costs) == 1
        for number, cost in enumerate(costs):
            stays = number >= len(costs) - live
            made.append(Micro(cost, None if alone else group, number, stays))
    return made


def backward_order(micros: Sequence[Micro], forward: Sequence[int]) -> list[int]:
    """First in, first out, with each group's chunks turned round where they stand."""
    order, places = list(forward), {}
    for at, i in enumerate(forward):
        if micros[i].group is not None:
            places.setdefault(micros[i].group, []).append(at)
    for at in places.values():
        for there, i in zip(at, [forward[j] for j in reversed(at)], strict=True):
            order[there] = i
    return order


def one_f_one_b(
    micros: Sequence[Micro],
    devices: int,
    forward: Sequence[int] | None = None,
    backward: Sequence[int] | None = None,
    ahead: int = 1,
) -> list[list[Op]]:
    """The operations of each device, one stage each.

    Args:
      micros: what goes through.
      devices: stages of the pipeline.
      forward: order of forward passes; None as they are given.
      backward: of backward passes; None for `backward_order`.
      ahead: passes forward before the first one backward, for each stage behind: 2 is
        eager 1F1B (arXiv 2211.05322). In ticks that devices go through together it
        waits no longer than 1F1B does without: all go forward in one, backward in the
        next.
    """
    forward = list(range(len(micros)) if forward is None else forward)
    _check(micros, forward, "forward", 1)
    backward = backward_order(micros, forward) if backward is None else list(backward)
    _check(micros, backward, "backward", -1)
    place = {i: at for at, i in enumerate(forward)}
    out = []
    for p in range(devices):
        ops, done = [], 0
        for k, i in enumerate(backward):
            wanted = max(ahead * (devices - p - 1) + k + 1, place[i] + 1)
            while done < min(wanted, len(forward)):
                ops.append(Op(FORWARD_PASS, forward[done]))
                done += 1
            if not micros[i].stays:
                ops.append(Op(AGAIN, i))
            ops.append(Op(BACKWARD_PASS, i))
        out.append(ops)
    return out


def interleaved(count: int, devices: int, parts: int) -> list[list[Op]]:
    """The operations of each device with `parts` stages each, for `count` micro-batches
    alike, a multiple of `devices`.

    Raises:
      config.InputError: it is none.
    """
    if count % devices:
        raise config.InputError(
            f"{count} micro-batches on {devices} devices: interleaved stages want a "
            "multiple"
        )

    def order(turned):
        every = range(parts)[::-1] if turned else range(parts)
        for first in range(0, count, devices):
            for part, i in itertools.product(every, range(devices)):
                yield first + i, part

    forward, backward = list(order(False)), list(order(True))
    out = []
    for p in range(devices):
        ahead = min((devices - p - 1) * 2 + (parts - 1) * devices, len(forward))
        ops = [Op(FORWARD_PASS, *one) for one in forward[:ahead]]
        for k, one in enumerate(backward):
            if ahead + k < len(forward):
                ops.append(Op(FORWARD_PASS, *forward[ahead + k]))
            ops.append(Op(BACKWARD_PASS, *one))
        out.append(ops)
    return out


def simulate(
    micros: Sequence[Micro],
    ops: Sequence[Sequence[Op]],
    parts: int = 1,
    backward: float = BACKWARD,
) -> Timeline:
    """When everything happens. Stage s = part * devices + device; a backward pass is
    `backward` times a forward one.

    Raises:
      RuntimeError: the devices wait for each other.
    """
    devices = len(ops)
    stages = devices * parts
    ended: dict[tuple[str, int, int], float] = {}  # (kind, micro, stage)
    chunk = {(m.group, m.number): i for i, m in enumerate(micros)}

    def needs(op, stage):
        here = micros[op.micro]
        step = 1 if op.kind == BACKWARD_PASS else -1
        if op.kind != AGAIN:
            if 0 <= stage + step < stages:
                yield op.kind, op.micro, stage + step
            other = chunk.get((here.group, here.number + step))
            if here.group is not None and other is not None:
                yield op.kind, other, stage
        if op.kind != FORWARD_PASS:
            yield FORWARD_PASS, op.micro, stage
        if op.kind == BACKWARD_PASS and not here.stays:
            yield AGAIN, op.micro, stage

    at, free, made = [0] * devices, [0.0] * devices, [[] for _ in ops]
    while any(i < len(one) for i, one in zip(at, ops, strict=True)):
        moved = False
        for p in range(devices):
            while at[p] < len(ops[p]):
                op = ops[p][at[p]]
                stage = op.part * devices + p
                times = [ended.get(need) for need in needs(op, stage)]
                if None in times:
                    break
                begin = max([free[p], *times])
                share = micros[op.micro].cost / parts
                end = begin + share * (backward if op.kind == BACKWARD_PASS else 1)
                ended[op.kind, op.micro, stage] = free[p] = end
                made[p].append((op, begin, end))
                at[p] += 1
                moved = True
        if not moved:
            stuck = [ops[p][i] for p, i in enumerate(at) if i < len(ops[p])]
            raise RuntimeError(f"the devices wait for each other: {stuck}")
    return Timeline(made, tuple(micros))


def _check(micros, order, name, step):
    if sorted(order) != list(range(len(micros))):
        raise config.InputError(
            f"{name} order {order}: wanted each of 0 to {len(micros) - 1} once"
        )
    seen: dict[int, int] = {}
    for i in order[::step]:
        group = micros[i].group
        if group is None:
            continue
        if micros[i].number < seen.get(group, -1):
            raise config.InputError(
                f"{name} order {order}: chunks of group {group} go "
                + ("up" if step == 1 else "down")
            )
        seen[group] = micros[i].number
