# SPDX-License-Identifier: Apache-2.0
"""The communication of a compiled program: collectives by kind, how often, how much.

Read from the optimized HLO text, which is what runs. A collective inside a loop is
counted as often as the loop turns: as XLA notes (`known_trip_count`), or as the loop's
condition says (a scan's counter starts at 0 and is compared with the one constant
there). One inside a loop of unknown length is counted once and makes the result a lower
bound.

Units: bytes are what one device receives in a step over a ring of n devices: all-gather
and reduce-scatter (n - 1) / n of the whole array, all-reduce twice that, all-to-all
(n - 1) / n of its array, collective-permute its array. A group of one device, and an
asynchronous `-done`, count nothing. "between slices" is what comes from other TPU
slices over the data center's network, after a collective inside the slice.
Formats: TPU writes a reduce-scatter as a fusion that holds an all-reduce and a slice;
it is counted as what it is.
Raises: ValueError for a text without an ENTRY computation.
"""

import collections
import dataclasses
import math
import re

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
)
BETWEEN = "between slices"
_ITEM_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_OPERATION = re.compile(
    rf"^(?:ROOT )?%?([\w.\-]+) = (.+?) ({'|'.join(KINDS)}|ragged-all-to-all)"
    r"(-start)?\("
)
# The part of a collective that leaves the slice is a transfer through the host.
_RECEIVED = re.compile(
    r"^(?:ROOT )?%?[\w.\-]+ = \((\w+)\[([\d,]*)\].* recv\(.*"
    r"_xla_host_transfer_handler_name=\"xla_megascale_runtime\""
)
_CALLED = re.compile(
    r"(?:body|calls|to_apply|condition|true_computation|false_computation)="
    r"%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CONSTANT = re.compile(r" = s32\[\]\S* constant\((\d+)\)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """How often one kind of collective runs in a step, and what a device receives."""

    kind: str
    count: int
    bytes: int
    largest_bytes: int  # of one collective
    largest: str  # its array, such as bf16[4096,12288]


@dataclasses.dataclass(frozen=True)
class _Collective:
    kind: str
    bytes: int
    shape: str


def traffic(hlo: str, num_devices: int) -> tuple[tuple[Traffic, ...], bool]:
    """(traffic by kind, in the order of KINDS and BETWEEN; is it a lower bound).

    Args:
      hlo: `compiled.as_text()`.
      num_devices: of the program, for collectives whose group is everybody.
    """
    entry, collectives_in, calls = _parse(hlo, num_devices)
    times, unknown = _times(entry, calls)
    found = collections.defaultdict(list)
    for name, inside in collectives_in.items():
        for one in inside:
            found[one.kind].append((times[name], one))
    at_least = any(unknown[name] for name, inside in collectives_in.items() if inside)
    result = []
    for kind in (*KINDS, BETWEEN):
        if kind not in found:
            continue
        largest = max((one for _, one in found[kind]), key=lambda one: one.bytes)
        result.append(
            Traffic(
                kind,
                count=sum(n for n, _ in found[kind]),
                bytes=sum(n * one.bytes for n, one in found[kind]),
                largest_bytes=largest.bytes,
                largest=largest.shape,
            )
        )
    return tuple(result), at_least


def _parse(hlo: str, num_devices: int):
    """Entry's name; collectives of each computation; (callee, trips) of each, trips
    None where the length of the loop is unknown."""
    entry, here = "", ""
    inside: dict[str, list[_Collective]] = {}
    calls: dict[str, list[tuple[str, int | str | None]]] = {}
    constants: dict[str, list[int]] = collections.defaultdict(list)
    slices: set[str] = set()
    for raw in hlo.splitlines():
        header = _HEADER.match(raw)
        if header:
            here = header[2]
            inside[here], calls[here] = [], []
            entry = here if header[1] else entry
            continue
        line = raw.strip()
        if not here or " = " not in line:
            continue
        if " dynamic-slice(" in line:
            slices.add(here)
        constants[here] += [int(n) for n in _CONSTANT.findall(line)]
        operation = _OPERATION.match(line)
        if operation:
            one = _collective(operation, line, num_devices)
            inside[here] += [one] if one else []
            continue  # its to_apply is an addition
        received = _RECEIVED.match(line)
        if received:
            dtype, dims = received.groups()
            size = int(_bytes(dtype, dims))
            inside[here].append(_Collective(BETWEEN, size, f"{dtype}[{dims}]"))
            continue
        trips = 1
        if " while(" in line:
            known = _TRIPS.search(line)
            trips = int(known[1]) if known else _CONDITION.search(line)[1]
        called = _CALLED.findall(line)
        for group in _BRANCHES.findall(line):
            called += [name.strip().lstrip("%") for name in group.split(",")]
        calls[here] += [(name, trips) for name in called]
    if not entry:
        raise ValueError("no ENTRY computation in the HLO text")
    calls = {
        name: [(callee, _trips(trips, constants)) for callee, trips in made]
        for name, made in calls.items()
    }
    fused = {name for name in inside if name.startswith("all-reduce-scatter")}
    for name in fused & slices:
        inside[name] = [_as_scatter(one) for one in inside[name]]
    return entry, inside, calls


def _trips(trips: int | str, constants: dict[str, list[int]]) -> int | None:
    """A known number, or the one constant of the condition that `trips` names."""
    if isinstance(trips, int):
        return trips
    known = set(constants[trips])
    return known.pop() if len(known) == 1 else None


def _times(entry, calls):
    """How often each computation runs, and whether that is only a lower bound."""
    times, unknown = collections.Counter(), collections.defaultdict(bool)

    def visit(name: str, count: int, unsure: bool) -> None:
        times[name] += count
        unknown[name] |= unsure
        for callee, trips in calls.get(name, ()):
            visit(callee, count * (trips or 1), unsure or trips is None)

    visit(entry, 1, False)
    return times, unknown


def _collective(operation: re.Match, line: str, num_devices: int) -> _Collective | None:
    _, shape, kind, start = operation.groups()
    kind = kind.removeprefix("ragged-")
    arrays = _ARRAY.findall(shape.partition("{")[0] if shape[0] != "(" else shape)
    sizes = [_bytes(dtype, dims) for dtype, dims in arrays]
    names = [f"{dtype}[{dims}]" for dtype, dims in arrays]
    if start and shape.startswith("("):
        # (operand, result, context...) of an asynchronous pair.
        keep = (
            1 if kind in ("all-gather", "reduce-scatter", "collective-permute") else 0
        )
        sizes, names = sizes[keep : keep + 1], names[keep : keep + 1]
    ways = _group_size(line, num_devices)
    if kind == "collective-permute":
        moved = sum(sizes)
    elif ways < 2:
        return None
    else:
        whole = sum(sizes) * (ways if kind == "reduce-scatter" else 1)
        moved = whole * (ways - 1) / ways * (2 if kind == "all-reduce" else 1)
    largest = names[max(range(len(sizes)), key=sizes.__getitem__)] if sizes else ""
    return _Collective(kind, int(moved), largest)


def _as_scatter(one: _Collective) -> _Collective:
    return _Collective("reduce-scatter", one.bytes // 2, one.shape)


def _bytes(dtype: str, dims: str) -> float:
    item = _ITEM_BYTES.get(dtype)
    if item is None:
        bits = re.search(r"\d+", dtype)
        item = int(bits[0]) / 8 if bits else 0
    return item * math.prod(int(n) for n in dims.split(",") if n)


def _group_size(line: str, num_devices: int) -> int:
    """Devices that take part together, from any of XLA's ways to write groups."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'([^']+)'", mesh[2]))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]<=", line)
    if iota:
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return len(listed[1].split(","))
    return num_devices
