# SPDX-License-Identifier: Apache-2.0
"""The order of each device of a pipeline -> a table of ticks that all go through.

In a tick a device does one operation or none, then hands on what it made: activations
to the next stage, cotangents to the one before; stages lie round the devices in turn,
so both go round a ring. An operation stands in the first tick that follows those of all
it needs, in the device's order. What has to wait lies in slots, which are given here:
so a device has as many as are ever full at once, however many micro-batches there are.

    x  activations that came in, until the last operation that reads them: the backward
       pass of a micro-batch by itself; of a chunk the forward pass, or the second one
    d  cotangents that came in, until the backward pass
    s  what a chunk's backward pass needs, from the forward pass that stays
    g  keys and values of a group of chunks, from its first operation to its last

Shapes: arrays of the table are int32 [ticks, devices].
Units: ticks. Devices go through them together, so one takes as long as its longest
operation: `Table.seconds` tells how long that is, and `bubbles.simulate` how long it
would be for devices that wait for nothing but what they need.
Raises: RuntimeError, as `bubbles.simulate`, for an order that waits for itself.
"""

import dataclasses
import heapq
from collections.abc import Iterable, Sequence

import numpy as np

from qwen_jax.train import bubbles

KINDS = ("", bubbles.FORWARD_PASS, bubbles.BACKWARD_PASS, bubbles.AGAIN)
IDLE, FORWARD, BACKWARD, AGAIN = range(4)
COLUMNS = ("kind", "micro", "part", "grouped", "number", "ends", "x_from", "x_into")
COLUMNS += ("d_from", "d_into", "s", "g")


@dataclasses.dataclass(frozen=True)
class Table:
    """rows: by name, what happens when; slots: how many there are of "x", "d", "s" and
    "g", besides a last one, for what nobody reads.

    kind: number in `KINDS`; micro, part: of the operation (0 where there is none).
    grouped, number, ends: whether that is a chunk of a group, its number there, and
      whether it is the last of it.
    x_from, d_from: slots of what it reads; x_into, d_into: of what arrives at the end
      of the tick.
    s, g: slots that the operation of a chunk writes to and reads from.
    """

    rows: dict[str, np.ndarray]
    slots: dict[str, int]

    def order(self) -> list[list[bubbles.Op]]:
        """The operations of each device, as the table has them."""
        kind, micro, part = (self.rows[name].T for name in ("kind", "micro", "part"))
        return [
            [
                bubbles.Op(KINDS[k], int(i), int(j))
                for k, i, j in zip(*one, strict=True)
                if k != IDLE
            ]
            for one in zip(kind, micro, part, strict=True)
        ]

    def seconds(self, costs: dict[str, float]) -> float:
        """How long all ticks take, by the cost of an operation of each kind."""
        each = np.array([costs.get(kind, 0.0) for kind in KINDS])
        return float(np.sum(np.max(each[self.rows["kind"]], axis=1)))


def table(
    micros: Sequence[bubbles.Micro],
    order: Sequence[Sequence[bubbles.Op]],
    parts: int = 1,
    turns: bool = False,
) -> Table:
    """The ticks of an order.

    Args:
      micros: as of `bubbles.simulate`; what they cost is not looked at.
      order: the operations of each device.
      parts: stages of a device.
      turns: forward passes in even ticks alone, backward ones in odd.
    """
    devices = len(order)
    # Whole numbers, so that ticks come out whole.
    alike = [dataclasses.replace(one, cost=parts) for one in micros]
    line = bubbles.simulate(alike, order, parts, backward=1)
    ticks = {
        (op.kind, op.micro, op.part * devices + p): int(begin)
        for p, ops in enumerate(line.devices)
        for op, begin, _ in ops
    }
    if turns:
        ticks = _in_turns(ticks)
    shape = max(ticks.values()) + 1, devices
    rows = {name: np.zeros(shape, np.int32) for name in COLUMNS}
    last = {m.group: m.number for m in micros}
    for (kind, i, stage), tick in ticks.items():
        at, one = (tick, stage % devices), micros[i]
        rows["kind"][at] = KINDS.index(kind)
        rows["micro"][at], rows["part"][at] = i, stage // devices
        if one.group is not None:
            rows["grouped"][at], rows["number"][at] = 1, one.number
            rows["ends"][at] = one.number == last[one.group]
    slots = {}
    for name, ups in (("x", True), ("d", False)):
        spans = _handed(micros, ticks, devices, parts, ups)
        placed, slots[name] = _placed(spans, devices)
        rows[f"{name}_into"][:] = slots[name]
        for p, arrives, read, slot in placed:
            rows[f"{name}_into"][arrives, p] = slot
            rows[f"{name}_from"][read, p] = slot
    for name, spans in (("s", _saved), ("g", _groups)):
        placed, slots[name] = _placed(spans(micros, ticks, devices), devices)
        rows[name][:] = slots[name]
        for p, _, used, slot in placed:
            rows[name][used, p] = slot
    return Table(rows, slots)


def _in_turns(ticks) -> dict:
    """The same operations in the same order, each where its kind has its turn; of
    devices with one stage each."""
    placed, free = {}, {}
    for (kind, i, stage), _ in sorted(ticks.items(), key=lambda one: one[1]):
        needs = {bubbles.FORWARD_PASS: stage - 1, bubbles.BACKWARD_PASS: stage + 1}
        before = placed.get((kind, i, needs.get(kind)), -1)
        tick = max(before + 1, free.get(stage, 0))
        tick += tick % 2 != (kind == bubbles.BACKWARD_PASS)
        placed[kind, i, stage] = tick
        free[stage] = tick + 1
    return placed


def _handed(micros, ticks, devices, parts, ups: bool) -> Iterable:
    """(device, tick at whose end something arrives there, ticks that read it)."""
    kind = bubbles.FORWARD_PASS if ups else bubbles.BACKWARD_PASS
    for (made, i, stage), tick in ticks.items():
        there = stage + (1 if ups else -1)
        if made != kind or not 0 <= there < devices * parts:
            continue
        readers = [kind]
        if ups:
            alone = micros[i].group is None
            readers.append(bubbles.BACKWARD_PASS if alone else bubbles.AGAIN)
        read = [ticks[k, i, there] for k in readers if (k, i, there) in ticks]
        yield there % devices, tick, read


def _saved(micros, ticks, devices) -> Iterable:
    """(device, tick before which the slot is free, ticks that use it) of chunks."""
    for (kind, i, stage), tick in ticks.items():
        if kind == bubbles.BACKWARD_PASS and micros[i].group is not None:
            stays = micros[i].stays
            from_ = bubbles.FORWARD_PASS if stays else bubbles.AGAIN
            first = ticks[from_, i, stage]
            yield stage % devices, first - 1, [first, tick]


def _groups(micros, ticks, devices) -> Iterable:
    """Likewise of groups."""
    used: dict[tuple[int, int], list[int]] = {}
    for (_, i, stage), tick in ticks.items():
        if micros[i].group is not None:
            used.setdefault((micros[i].group, stage), []).append(tick)
    for (_, stage), every in used.items():
        yield stage % devices, min(every) - 1, every


def _placed(spans: Iterable, devices: int) -> tuple[list, int]:
    """((device, first, ticks, slot) of each span, slots): a slot is taken again by what
    comes at the end of the tick that used it last, or later."""
    placed, most = [], 0
    of: list[list] = [[] for _ in range(devices)]
    for p, first, used in sorted(spans):
        of[p].append((first, used))
    for p, mine in enumerate(of):
        free: list[int] = []
        taken: list[tuple[int, int]] = []  # (until when, slot)
        count = 0
        for first, used in mine:
            while taken and taken[0][0] <= first:
                heapq.heappush(free, heapq.heappop(taken)[1])
            if not free:
                free, count = [count], count + 1
            slot = heapq.heappop(free)
            heapq.heappush(taken, (max(used), slot))
            placed.append((p, first, used, slot))
        most = max(most, count)
    return placed, most
