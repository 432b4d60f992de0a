# SPDX-License-Identifier: Apache-2.0
"""Pages of memory given out and taken back: slabs, size classes, slabs turned over.

An arena of `units` (the smallest pages) is cut into slabs of `slab_units`. A page of
class k is k consecutive units of one slab, k = 1, 2, 4, ... slab_units, at a multiple
of k. A slab serves one class. When a class has no free page it takes an empty slab of
any class, and when there is none it *morphs* one that is mostly empty: pages that still
live there stay where they are, a page of the new class that overlaps one of them is
held back until it is freed, and with the last of them the slab is like any other.

Source: NVAlloc (ASPLOS'22): slab morphing and its thresholds (at most 20 % used, idle
for 1,000 ticks, more than 10 % of the slabs that little used), bitmap interleaved over
6 lines, one stack of free pages per line, taken in turns. Deviations: classes are
powers of two; what is known of a slab lies outside of it, so no header has to fit
beside its live pages; empty slabs come before morphing, as the arena does not grow; the
next slab of a class is the first by address; at most `scan` slabs are looked at for a
morph; a tick is one call of `alloc` or `free`; one arena, one thread.

Formats: `Pages.state()` is all that outlives the process: classes of the slabs, live
pages with their owners' tags. Orders (which page next, how idle) are not in it.
Units: units; a class is named by its size in units. Invariants: live pages never
overlap; used + free = units; only `free` ends a page. alloc and free take O(1), O(log
slabs) where a slab fills up, O(slab_units) where one changes its class.
Raises: config.InputError for settings, a class, a unit or a state that cannot be.
"""

import collections
import dataclasses
import heapq
from typing import Protocol

from qwen_jax import config
from qwen_jax.serve import page_lines

NEVER, EMPTY, MORPH = "never", "empty", "morph"
MAX_UNITS = 2**32
MAX_SLAB_UNITS = 2**15
MAX_TAG = 2**40


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an arena is cut and when slabs change their class.

    turnover: "morph"; "empty", where only empty slabs do; "never", once they have one.
    max_used, idle_ticks, low_share: a slab may morph when at most this share of it is
    used, it was last touched more than so many ticks ago, and more than this share of
    the slabs is that little used. banks: lines the bitmap is dealt over; 1 for none.
    """

    slab_units: int = 64
    turnover: str = MORPH
    max_used: float = 0.20
    idle_ticks: int = 1000
    low_share: float = 0.10
    scan: int = 16
    banks: int = page_lines.BANKS

    def __post_init__(self):
        size = self.slab_units
        if not 1 <= size <= MAX_SLAB_UNITS or size & (size - 1):
            raise config.InputError(
                f"slab_units={size}: wanted a power of two, at most {MAX_SLAB_UNITS}"
            )
        if self.turnover not in (NEVER, EMPTY, MORPH):
            near = config.nearest(str(self.turnover), (NEVER, EMPTY, MORPH))
            raise config.InputError(f"turnover={self.turnover!r}{near}")
        for name in ("max_used", "low_share"):
            if not 0 <= getattr(self, name) < 1:
                raise config.InputError(
                    f"{name}={getattr(self, name)}: wanted a share, 0 to below 1"
                )
        for name, least in (("idle_ticks", 0), ("scan", 1), ("banks", 1)):
            if getattr(self, name) < least:
                raise config.InputError(
                    f"{name}={getattr(self, name)}: wanted at least {least}"
                )


@dataclasses.dataclass(frozen=True, order=True)
class Page:
    """A live page: its first unit, its size in units, its owner's tag (0: none)."""

    unit: int
    size: int
    tag: int = 0


@dataclasses.dataclass(frozen=True)
class State:
    """What an arena holds: the class of each slab (0 before its first), live pages in
    order. A page of another class than its slab's was there before the slab morphed."""

    units: int
    slab_units: int
    classes: tuple[int, ...]
    pages: tuple[Page, ...]


@dataclasses.dataclass
class Counts:
    """Since the start: pages given, taken back, refused; slabs that changed class when
    empty and by morphing; stragglers that morphs left in place."""

    allocs: int = 0
    frees: int = 0
    refused: int = 0
    emptied: int = 0
    morphs: int = 0
    stragglers: int = 0


class Log(Protocol):
    """Where changes are written down; `page_log.Log` is one."""

    def alloc(self, unit: int, size: int, tag: int) -> None:
        """A page was given out."""

    def free(self, unit: int) -> None:
        """The page that begins here was taken back."""

    def slab(self, index: int, size: int) -> None:
        """A slab serves this class from now on."""


class _Slab:
    """One slab. `live` pages of its class; `old_live` stragglers of `old_size`;
    `overlap[i]`: how many of these its i-th page overlaps; `low`: at how many live
    pages or fewer it is mostly empty, -1 while it has stragglers."""

    __slots__ = ("index", "start", "size", "shift", "banks", "turn", "num_free")
    __slots__ += ("live", "low", "touched", "old_live", "old_size", "overlap")

    def __init__(self, index: int, start: int):
        self.index, self.start = index, start
        self.size = self.shift = 0
        self.banks: list[list[int]] = []
        self.turn = self.num_free = self.live = self.touched = 0
        self.low = -1
        self.old_live = self.old_size = 0
        self.overlap: list[int] = []


class Pages:
    """A handle on an arena's pages; see the module for what holds.

    Args:
      units: of the arena; a multiple of settings.slab_units.
      log: told of every change (after it is made); None for none.
      meter: counts modelled flushes of the bitmaps; None for none.
    """

    def __init__(
        self,
        units: int,
        settings: Settings = Settings(),
        log: Log | None = None,
        meter: page_lines.Meter | None = None,
    ):
        size = settings.slab_units
        if not 0 < units <= MAX_UNITS or units % size:
            fix = min(max(size, units // size * size), MAX_UNITS)
            raise config.InputError(
                f"units={units}: wanted a multiple of slab_units={size}, at most "
                f"{MAX_UNITS}, such as {fix}"
            )
        self.units, self.settings, self.log, self.meter = units, settings, log, meter
        self.used = 0
        self.counts = Counts()
        self._shift, self._mask = size.bit_length() - 1, size - 1
        self._slabs = [_Slab(i, i * size) for i in range(units // size)]
        self._live = bytearray(units)  # at a page's first unit: log2 of its size, + 1
        self._tags: dict[int, int] = {}
        sizes = [1 << k for k in range(self._shift + 1)]
        self._current: dict[int, _Slab | None] = dict.fromkeys(sizes)
        self._partial: dict[int, list[int]] = {k: [] for k in sizes}  # heaps
        order = collections.OrderedDict
        self._empty = order((slab.index, slab) for slab in self._slabs)
        self._low: collections.OrderedDict[int, _Slab] = order()  # least recent first
        self._mixed = 0
        self._tick = 0

    # --- what callers ask ---

    @property
    def free_units(self) -> int:
        """Units in no live page."""
        return self.units - self.used

    def alloc(self, size: int = 1, tag: int = 0) -> int | None:
        """The first unit of a page of `size` units, or None where there is no room."""
        slab = self._current.get(size)
        if slab is None:
            slab = self._next_slab(size)
            if slab is None:
                self._tick += 1
                self.counts.refused += 1
                return None
        if tag:
            self._check_tag(tag)
        banks, turn = slab.banks, slab.turn
        while True:
            turn -= 1  # through -1, the last
            if turn < -len(banks):
                turn = -1
            if banks[turn]:
                break
        slab.turn = turn
        unit = banks[turn].pop()
        slab.num_free -= 1
        if not slab.num_free:
            self._current[size] = None
        slab.live += 1
        self._live[unit] = slab.shift + 1
        self.used += size
        self.counts.allocs += 1
        slab.touched = self._tick = self._tick + 1
        if slab.live <= slab.low + 1:
            self._rank(slab)
        if tag:
            self._tags[unit] = tag
        if self.meter is not None:
            self._flush(slab, unit, slab.shift)
        if self.log is not None:
            self.log.alloc(unit, size, tag)
        return unit

    def free(self, unit: int) -> None:
        """Take back the page that begins at `unit`."""
        code = self._live[unit] if 0 <= unit < self.units else 0
        if not code:
            raise config.InputError(
                f"unit {unit}: no live page begins there (freed twice, or not its "
                f"first unit); wanted what `alloc` gave, 0 to {self.units - 1}"
            )
        self._live[unit] = 0
        slab = self._slabs[unit >> self._shift]
        slab.touched = self._tick = self._tick + 1
        self.used -= 1 << (code - 1)
        self.counts.frees += 1
        if code - 1 == slab.shift:
            slab.live -= 1
            self._give(slab, unit)
            if slab.live <= slab.low:
                self._rank(slab)
        else:
            self._free_straggler(slab, unit)
        if self._tags:
            self._tags.pop(unit, None)
        if self.meter is not None:
            self._flush(slab, unit, code - 1)
        if self.log is not None:
            self.log.free(unit)

    def alloc_many(self, count: int, size: int = 1, tag: int = 0) -> list[int] | None:
        """`count` pages of a class, or None and nothing changed where not all fit."""
        if count * size > self.free_units:
            self.counts.refused += 1
            return None
        units = []
        for _ in range(count):
            unit = self.alloc(size, tag)
            if unit is None:
                for other in reversed(units):
                    self.free(other)
                return None
            units.append(unit)
        return units

    def room(self, size: int) -> int:
        """Pages of a class that are free without morphing; takes O(slabs)."""
        if size not in self._partial:
            self._refuse_class(size)
        whole = self.settings.slab_units // size
        count = sum(slab.num_free for slab in self._slabs if slab.size == size)
        if self.settings.turnover == NEVER:
            return count + whole * sum(not slab.size for slab in self._slabs)
        return count + whole * sum(x.size != size for x in self._empty.values())

    def page(self, unit: int) -> Page | None:
        """The live page that begins at a unit."""
        code = self._live[unit] if 0 <= unit < self.units else 0
        return Page(unit, 1 << (code - 1), self._tags.get(unit, 0)) if code else None

    def state(self) -> State:
        """What is live and which class each slab serves."""
        pages = [
            Page(unit, 1 << (code - 1), self._tags.get(unit, 0))
            for unit, code in enumerate(self._live)
            if code
        ]
        classes = tuple(slab.size for slab in self._slabs)
        return State(self.units, self.settings.slab_units, classes, tuple(pages))

    # --- slabs ---

    def _next_slab(self, size: int) -> _Slab | None:
        """A slab of this class with a free page, made its current one."""
        heap = self._partial.get(size)
        if heap is None:
            self._refuse_class(size)
        while heap:
            slab = self._slabs[heapq.heappop(heap)]
            if slab.size == size and slab.num_free:  # it may have changed since
                self._current[size] = slab
                return slab
        slab = self._take_empty(size) or self._morph(size)
        if slab is not None:
            self._current[size] = slab
            if self.log is not None:
                self.log.slab(slab.index, size)
        return slab

    def _take_empty(self, size: int) -> _Slab | None:
        if not self._empty:
            return None
        slab = next(iter(self._empty.values()))
        if self.settings.turnover == NEVER and slab.size:
            return None  # unserved slabs stand first, and there they are used up
        del self._empty[slab.index]
        self.counts.emptied += slab.size > 0
        self._serve(slab, size)
        return slab

    def _morph(self, size: int) -> _Slab | None:
        """Turn over the least recently touched of the mostly empty slabs."""
        asked = self.settings
        normal = len(self._slabs) - self._mixed
        if asked.turnover != MORPH or len(self._low) <= asked.low_share * normal:
            return None
        for number, slab in enumerate(self._low.values()):
            idle = self._tick - slab.touched > asked.idle_ticks
            if number == asked.scan or not idle:
                return None
            if slab.size == size:
                continue
            overlap = self._overlap(slab, size)
            if not all(overlap):
                break
        else:
            return None
        del self._low[slab.index]
        self.counts.morphs += 1
        self.counts.stragglers += slab.live
        self._serve(slab, size, overlap)
        return slab

    def _overlap(self, slab: _Slab, size: int) -> list[int]:
        """For each page of `size` in a slab: how many of its live pages it overlaps."""
        counts = [0] * (self.settings.slab_units // size)
        for offset in range(0, self.settings.slab_units):
            code = self._live[slab.start + offset]
            if code and code != size.bit_length():
                for i in _range(offset, 1 << (code - 1), size):
                    counts[i] += 1
        return counts

    def _serve(self, slab: _Slab, size: int, overlap: list[int] | None = None) -> None:
        """Give a slab its class; with `overlap`, its live pages become stragglers."""
        if slab.size and self._current[slab.size] is slab:
            self._current[slab.size] = None
        if overlap:
            slab.old_live, slab.old_size, slab.overlap = slab.live, slab.size, overlap
            self._mixed += 1
        slab.size, slab.shift, slab.live = size, size.bit_length() - 1, 0
        slab.low = -1 if overlap else self._low_mark(size)
        slab.banks, slab.num_free, slab.turn = [], 0, 0
        for _ in range(self.settings.banks):
            slab.banks.append([])
        # The last pushed is the first given: the lowest.
        for i in reversed(range(self.settings.slab_units // size)):
            if not overlap or not overlap[i]:
                slab.banks[-1 - i % self.settings.banks].append(slab.start + i * size)
                slab.num_free += 1

    def _low_mark(self, size: int) -> int:
        return int(self.settings.max_used * self.settings.slab_units) // size

    def _give(self, slab: _Slab, unit: int) -> None:
        """A page of a slab can be given out again."""
        page = (unit & self._mask) >> slab.shift
        banks = slab.banks
        banks[-1 - page % len(banks)].append(unit)
        slab.num_free += 1
        if slab.num_free == 1:  # a full slab is in no heap and nobody's current one
            heapq.heappush(self._partial[slab.size], slab.index)

    def _free_straggler(self, slab: _Slab, unit: int) -> None:
        """What it alone held back is free; after the last the slab is normal again."""
        for i in _range(unit & self._mask, slab.old_size, slab.size):
            slab.overlap[i] -= 1
            if not slab.overlap[i]:
                self._give(slab, slab.start + i * slab.size)
        slab.old_live -= 1
        if not slab.old_live:
            slab.old_size, slab.overlap = 0, []
            slab.low = self._low_mark(slab.size)
            self._mixed -= 1
            self._rank(slab)

    def _rank(self, slab: _Slab) -> None:
        """Keep `_low` and `_empty` right about a slab without stragglers."""
        index, live = slab.index, slab.live
        if live and live <= slab.low:
            self._empty.pop(index, None)
            self._low[index] = slab
            self._low.move_to_end(index)
        elif live:
            self._empty.pop(index, None)
            self._low.pop(index, None)
        else:
            self._low.pop(index, None)
            self._empty[index] = slab

    def _flush(self, slab: _Slab, unit: int, shift: int) -> None:
        """The modelled flush of the line with a page's bit."""
        page = (unit & self._mask) >> shift
        line = page_lines.bit_of(page, self.settings.banks) // page_lines.LINE_BITS
        self.meter.flush(slab.index, line)

    def _check_tag(self, tag: int) -> None:
        if not 0 <= tag < MAX_TAG:
            raise config.InputError(f"tag={tag}: wanted 0 to {MAX_TAG - 1} (5 bytes)")

    def _refuse_class(self, size: int) -> None:
        sizes = ", ".join(map(str, self._partial))
        raise config.InputError(f"size={size}: wanted a class, any of {sizes}")

    # --- a state from elsewhere ---

    def restore(self, state: State) -> None:
        """Take over a state; only for an arena as it was made, without log entries.

        Raises config.InputError where the state is no arena's: pages that overlap, lie
        askew or beyond the end, or are of more than two classes in one slab.
        """
        if self._tick or self.used:
            raise config.InputError("restore: wanted an arena that was not used yet")
        size = self.settings.slab_units
        if (state.units, state.slab_units) != (self.units, size):
            raise config.InputError(
                f"a state of {state.units} units in slabs of {state.slab_units}: "
                f"wanted {self.units} in slabs of {size}"
            )
        if len(state.classes) != len(self._slabs):
            raise config.InputError(
                f"a state of {len(state.classes)} slabs: wanted {len(self._slabs)}"
            )
        inside: dict[int, list[Page]] = collections.defaultdict(list)
        end = 0
        for page in sorted(state.pages):
            self._check_page(page, end)
            end = page.unit + page.size
            inside[page.unit >> self._shift].append(page)
        for slab, size in zip(self._slabs, state.classes, strict=True):
            if size or inside[slab.index]:
                self._restore_slab(slab, size, inside[slab.index])

    def _check_page(self, page: Page, end: int) -> None:
        if page.size not in self._partial:
            self._refuse_class(page.size)
        if page.unit % page.size or not 0 <= page.unit < self.units:
            raise config.InputError(
                f"a page of {page.size} units at {page.unit}: wanted a multiple of its "
                f"size below {self.units}"
            )
        if page.unit < end:
            raise config.InputError(
                f"the page at unit {page.unit} overlaps the one before, which ends at "
                f"{end}: the state gives units twice"
            )
        self._check_tag(page.tag)

    def _restore_slab(self, slab: _Slab, size: int, pages: list[Page]) -> None:
        others = {page.size for page in pages} - {size}
        if len(others) > 1 or size not in self._partial:
            raise config.InputError(
                f"slab {slab.index} of class {size} holds pages of "
                f"{sorted(others) or 'no'} units: wanted its class and at most one more"
            )
        for page in pages:
            self._live[page.unit] = page.size.bit_length()
            self.used += page.size
            if page.tag:
                self._tags[page.unit] = page.tag
        overlap = self._overlap(slab, size) if others else None
        if overlap:
            slab.size = others.pop()
            slab.live = sum(page.size != size for page in pages)
        self._serve(slab, size, overlap)
        slab.live = sum(page.size == size for page in pages)
        taken = {page.unit for page in pages}
        slab.banks = [[u for u in bank if u not in taken] for bank in slab.banks]
        slab.num_free = sum(map(len, slab.banks))
        del self._empty[slab.index]
        if not overlap:
            self._rank(slab)
        if slab.num_free:
            heapq.heappush(self._partial[size], slab.index)


def _range(offset: int, length: int, size: int) -> range:
    """The numbers of the pages of `size` that units [offset, offset + length) meet."""
    return range(offset // size, (offset + length - 1) // size + 1)
