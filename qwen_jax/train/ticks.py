# SPDX-License-Identifier: Apache-2.0
"""The order of each device of a pipeline -> a table of ticks that all go through.

In a tick a device does one operation or none, then hands on what it made: activations
to the next stage, cotangents to the one before; stages lie round the devices in turn,
so both go round a ring. An operation stands in the first tick that follows those of all
it needs, in the device's order. What arrives waits in a slot until the last operation
that reads it; slots are given on the host, so a device has as many as are ever full at
once, whatever the number of micro-batches.

Shapes: arrays of the table are int32 [ticks, devices].
Units: ticks. Devices go through them together, so one takes as long as its longest
operation: `seconds` tells how long that is, beside what `bubbles.simulate` has for
devices that wait for nothing but what they need.
Raises: RuntimeError, as `bubbles.simulate`, for an order that waits for itself.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from qwen_jax.train import bubbles

IDLE = 0
KINDS = ("", bubbles.FORWARD_PASS, bubbles.BACKWARD_PASS, bubbles.AGAIN)


@dataclasses.dataclass(frozen=True)
class Table:
    """What happens when.

    kind: number in `KINDS`; micro, part: of the operation (0 where there is none).
    x_from, d_from: slots of the activations and of the cotangents that it reads.
    x_into, d_into: where those go that arrive at the end of the tick.
    x_slots, d_slots: how many there are; one more, the last, is for what nobody reads.
    """

    kind: np.ndarray
    micro: np.ndarray
    part: np.ndarray
    x_from: np.ndarray
    d_from: np.ndarray
    x_into: np.ndarray
    d_into: np.ndarray
    x_slots: int
    d_slots: int

    @property
    def rows(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        every = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: x for k, x in every.items() if isinstance(x, np.ndarray)}

    def order(self) -> list[list[bubbles.Op]]:
        """The operations of each device, as the table has them."""
        out = []
        for kinds, micros, parts in zip(
            self.kind.T, self.micro.T, self.part.T, strict=True
        ):
            every = zip(kinds, micros, parts, strict=True)
            out.append([bubbles.Op(KINDS[k], int(i), int(j)) for k, i, j in every if k])
        return out

    def seconds(self, costs: dict[str, float]) -> float:
        """How long all ticks take, by the cost of an operation of each kind."""
        each = np.array([costs.get(kind, 0.0) for kind in KINDS])
        return float(np.sum(np.max(each[self.kind], axis=1)))


def table(
    micros: Sequence[bubbles.Micro],
    order: Sequence[Sequence[bubbles.Op]],
    parts: int = 1,
    again: bool = False,
) -> Table:
    """The ticks of an order.

    Args:
      micros: as of `bubbles.simulate`; what they cost is not looked at.
      order: the operations of each device.
      parts: stages of a device.
      again: whether a backward pass reads its stage's activations (it computes the
        stage again from them); else what `bubbles.AGAIN` reads is the last of it.
    """
    devices, stages = len(order), len(order) * parts
    # Whole numbers, so that ticks come out whole.
    alike = [dataclasses.replace(one, cost=parts) for one in micros]
    line = bubbles.simulate(alike, order, parts, backward=1)
    ticks = {}
    for p, ops in enumerate(line.devices):
        for op, begin, _ in ops:
            ticks[op.kind, op.micro, op.part * devices + p] = int(begin)
    shape = (int(line.makespan), devices)
    names = ("kind", "micro", "part", "x_from", "d_from", "x_into", "d_into")
    made = {name: np.zeros(shape, np.int32) for name in names}
    for (kind, i, stage), tick in ticks.items():
        at = tick, stage % devices
        made["kind"][at] = KINDS.index(kind)
        made["micro"][at], made["part"][at] = i, stage // devices
    last = {"x": [], "d": []}
    for (kind, i, stage), tick in ticks.items():
        up = kind == bubbles.FORWARD_PASS
        there = stage + (1 if up else -1)
        if kind == bubbles.AGAIN or not 0 <= there < stages:
            continue
        readers = [bubbles.BACKWARD_PASS]
        if up:
            more = [bubbles.BACKWARD_PASS] if again else []
            readers = [bubbles.FORWARD_PASS, bubbles.AGAIN, *more]
        read = [ticks[k, i, there] for k in readers if (k, i, there) in ticks]
        last["x" if up else "d"].append((there % devices, tick, read))
    slots = {}
    for name, spans in last.items():
        slots[name] = _slots(spans, name, made, devices)
    return Table(**made, x_slots=slots["x"], d_slots=slots["d"])


def _slots(spans, name, made, devices) -> int:
    """A slot for each (device, tick at whose end it arrives, ticks that read it),
    written into the table; how many there are."""
    placed, most = [], 0
    for p in range(devices):
        free_from: list[int] = []  # the tick of the last reader of each slot
        for _, arrives, read in sorted(one for one in spans if one[0] == p):
            for slot, until in enumerate(free_from):
                if until <= arrives:
                    break
            else:
                slot = len(free_from)
                free_from.append(0)
            free_from[slot] = max(read)
            placed.append((p, arrives, read, slot))
        most = max(most, len(free_from))
    made[f"{name}_into"][:] = most
    for p, arrives, read, slot in placed:
        made[f"{name}_into"][arrives, p] = slot
        made[f"{name}_from"][read, p] = slot
    return most
