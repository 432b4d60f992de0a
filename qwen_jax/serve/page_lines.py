# SPDX-License-Identifier: Apache-2.0
"""Which line of a slab's bitmap a page's bit lies on, and how soon lines come again.

Source: NVAlloc (ASPLOS'22), interleaved mapping. A line is `line_bits` bits (64 bytes).
Laid out in order, pages given out one after another change the same line again and
again; dealt out over `banks` lines like cards, the same line comes back only after all
others. On memory that must flush a line before it can change it again, the first is
slow. Deviations: there is no such memory here. The lines are *modelled*: `Meter` counts
what would be flushed, and nothing is said about speed.
Units: a distance is the number of flushes from one of a line to its next; 1 is "again
at once". A re-flush is one nearer than the number of banks.
Invariant: `bit_of` is a bijection of the pages [0, n) onto the bits [0, n) for every
multiple n of banks x line_bits; with one bank it is the identity.
Raises nothing.
"""

import collections

LINE_BITS = 512
BANKS = 6


def bit_of(page: int, banks: int = BANKS, line_bits: int = LINE_BITS) -> int:
    """The bit of a slab's page p: (p // nn) nn + (p % banks) n + (p % nn) // banks,
    where n = line_bits and nn = n banks."""
    group = line_bits * banks
    whole = page // group * group
    return whole + page % banks * line_bits + page % group // banks


def page_of(bit: int, banks: int = BANKS, line_bits: int = LINE_BITS) -> int:
    """The page of a bit: the inverse of `bit_of`."""
    group = line_bits * banks
    inside = bit % group
    return bit // group * group + inside % line_bits * banks + inside // line_bits


class Meter:
    """Counts flushes of modelled lines and how far apart those of one line are.

    flushes: all. again: of these, flushes of a line nearer than `near` to its last.
    distances: how often each distance occurred; `FAR` stands for it and above.
    """

    FAR = 64

    def __init__(self, near: int = BANKS):
        self.near = near
        self.flushes = 0
        self.again = 0
        self.distances: collections.Counter[int] = collections.Counter()
        self._last: dict[tuple[int, int], int] = {}

    def flush(self, slab: int, line: int) -> None:
        """One line of one slab's bitmap is written back."""
        self.flushes += 1
        last = self._last.get((slab, line))
        self._last[slab, line] = self.flushes
        if last is not None:
            distance = self.flushes - last
            self.again += distance < self.near
            self.distances[min(distance, self.FAR)] += 1
