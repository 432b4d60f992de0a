# SPDX-License-Identifier: Apache-2.0
"""Documents of any length -> chunks of at most C tokens (ChunkFlow, algorithm 1).

A document longer than C becomes a group of dependent chunks, in order, of which the
last may be short; shorter ones are packed into standalone chunks, as few as there can
be. So every step of a model is about C tokens, however long the longest document is.

Source: arXiv 2503.02356, section 4.1. The paper tries numbers of bins upward until a
heuristic fits all; here best fit decreasing gives a packing. Where that has more than
a lower bound (L2 of Martello and Toth) each bin is filled as well as can be, one after
another (minimum bin slack, Gupta and Ho 1999), and then a search looks for a packing
with fewer, for `SEARCH_NODES` steps at most. Deviation: a document of n tokens takes n
places although its last token predicts nothing, so that counts are those of the paper.

Shapes: arrays of a chunk are [rows, C], as those of `data.packing`: tokens_bt,
targets_bt int32, segments_bt int32 (0 for padding), positions_bt int32, mask_bt float32
(1 where the target counts: every token of a document but its last).
Invariants: every token is in one chunk, once; the tokens of a document are in order; no
chunk holds more than C.
Raises: config.InputError for C < 1, a document without tokens, or one that is no row of
integers.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qwen_jax import config
from qwen_jax.data import packing

SEARCH_NODES = 20_000
FILL_NODES = 100  # for one bin


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """A document, or a stretch of one that sees no other: its tokens, the next token of
    each, and 1 where that counts, each [tokens]."""

    tokens: np.ndarray
    targets: np.ndarray
    mask: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class Group:
    """Dependent chunks: number of a document, and how many chunks it is."""

    document: int
    chunks: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """groups: of long documents, the longest first; bins: numbers of the short ones in
    each standalone chunk, in their order; fewest: whether fewer bins are impossible."""

    chunk_tokens: int
    groups: tuple[Group, ...]
    bins: tuple[tuple[int, ...], ...]
    fewest: bool

    @property
    def chunks(self) -> int:
        """All chunks of the step."""
        return len(self.bins) + sum(group.chunks for group in self.groups)


def build(lengths: Sequence[int], chunk_tokens: int) -> Plan:
    """The chunks of documents of these lengths."""
    if chunk_tokens < 1:
        raise config.InputError(f"chunk_tokens={chunk_tokens}: wanted at least 1")
    for i, length in enumerate(lengths):
        if length < 1:
            raise config.InputError(
                f"documents[{i}] has {length} tokens: wanted at least 1; leave it out"
            )
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups = [
        Group(i, -(-lengths[i] // chunk_tokens))
        for i in order
        if lengths[i] > chunk_tokens
    ]
    short = [i for i in range(len(lengths)) if lengths[i] <= chunk_tokens]
    bins, fewest = pack([lengths[i] for i in short], chunk_tokens)
    named = sorted(tuple(sorted(short[i] for i in one)) for one in bins)
    return Plan(chunk_tokens, tuple(groups), tuple(named), fewest)


def pack(lengths: Sequence[int], capacity: int) -> tuple[list[list[int]], bool]:
    """(items of each bin, whether no packing has fewer bins)."""
    bins = packing.best_fit(lengths, capacity)
    least = lower_bound(lengths, capacity)
    if len(bins) > least:
        bins = min(bins, _filled(lengths, capacity), key=len)
    while len(bins) > least:
        found, whole = _search(lengths, capacity, len(bins) - 1)
        if found is None:
            return bins, whole
        bins = found
    return bins, True


def lower_bound(lengths: Sequence[int], capacity: int) -> int:
    """Bins that any packing has (L2 of Martello and Toth, 1990)."""
    sizes, best = np.sort(np.asarray(lengths, np.int64)), 0
    if not len(sizes):
        return 0
    for limit in np.unique([0, *sizes[2 * sizes <= capacity]]):
        large = sizes[sizes > capacity - limit]
        middle = sizes[(sizes <= capacity - limit) & (2 * sizes > capacity)]
        small = sizes[(2 * sizes <= capacity) & (sizes >= limit)]
        free = capacity * len(middle) - middle.sum()
        more = max(0, -(-int(small.sum() - free) // capacity))
        best = max(best, len(large) + len(middle) + more)
    return best


def _filled(lengths, capacity):
    """Bins one after another: the largest item left, and of the others those that fill
    it best, as far as a few steps find them."""
    items: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        items.setdefault(length, []).append(i)
    sizes, bins = sorted(items, reverse=True), []
    while sizes:
        chosen = [sizes[0], *_fill(sizes, items, capacity - sizes[0])]
        bins.append([items[size].pop() for size in chosen])
        sizes = [size for size in sizes if items[size]]
    return bins


def _fill(sizes, items, space):
    """Sizes, besides the first one once, that leave the least of `space`."""
    left = {size: len(items[size]) for size in sizes}
    left[sizes[0]] -= 1
    best, least, nodes = [], space, 0
    stack = [([], space, 0)]
    while stack and least and nodes < FILL_NODES:
        chosen, space, at = stack.pop()
        nodes += 1
        if space < least:
            best, least = chosen, space
        fits = [
            (chosen + [sizes[j]], space - sizes[j], j)
            for j in range(at, len(sizes))
            if sizes[j] <= space and chosen.count(sizes[j]) < left[sizes[j]]
        ]
        stack += fits[::-1]  # the largest is looked at first
    return best


def _search(lengths, capacity, most):
    """(a packing of at most `most` bins or None, whether the search was complete)."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    left = sum(lengths)
    spaces, bins, nodes = [capacity] * most, [[] for _ in range(most)], 0

    # Depth first, with a stack of its own: a step has thousands of documents.
    tried: list[set[int]] = [set()]  # spaces that an item was put into
    put: list[int] = []
    while True:
        depth = len(put)
        if depth == len(order):
            return [one for one in bins if one], True
        size = lengths[order[depth]]
        nodes += 1
        if nodes > SEARCH_NODES:
            return None, False
        # What is too small for the smallest item is lost.
        usable = sum(space for space in spaces if space >= lengths[order[-1]])
        choices = [
            (space, b)
            for b, space in enumerate(spaces)
            if space >= size and space not in tried[depth]
        ]
        if choices and usable >= left:
            space, b = min(choices)
            tried[depth].add(space)
            spaces[b] -= size
            left -= size
            bins[b].append(order[depth])
            put.append(b)
            tried.append(set())
            continue
        tried.pop()
        if not put:
            return None, True
        b = put.pop()
        item = bins[b].pop()
        spaces[b] += lengths[item]
        left += lengths[item]


def checked(documents: Sequence[np.ndarray], vocab_size: int) -> list[np.ndarray]:
    """Documents as rows of int32.

    Raises:
      config.InputError: one is no row of integers, or has ids outside the vocabulary.
    """
    made = []
    for i, document in enumerate(documents):
        ids = np.asarray(document)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise config.InputError(
                f"documents[{i}] is {ids.dtype}{list(ids.shape)}: wanted one row of "
                "integers"
            )
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise config.InputError(
                f"documents[{i}] has ids {ids.min()} to {ids.max()}: wanted 0 to "
                f"{vocab_size - 1}"
            )
        made.append(ids.astype(np.int32))
    return made


def whole(document: np.ndarray) -> Piece:
    """A document as a piece: its last token predicts nothing."""
    mask = np.ones(len(document), np.float32)
    mask[-1:] = 0
    return Piece(document, np.append(document[1:], document[:1] * 0), mask)


def of_rows(rows: packing.Rows) -> list[Piece]:
    """The pieces of packed rows, in their order; padding is left behind."""
    made = []
    for tokens, targets, segments, mask in zip(
        *(rows[name] for name in ("tokens_bt", "targets_bt", "segments_bt", "mask_bt")),
        strict=True,
    ):
        first = 0
        for stop in [*np.flatnonzero(np.diff(segments)) + 1, len(segments)]:
            if segments[first]:
                here = slice(first, stop)
                made.append(Piece(tokens[here], targets[here], mask[here]))
            first = stop
    return made


def rounded(count: int) -> int:
    """The number that a program is compiled for which takes up to `count` of something:
    1, 2, 3, 4, 6, 8, 12, ..., a power of two or one and a half of it."""
    size = 1
    while size < count:
        size = (
            size * 3 // 2 if size > 1 and size & (size - 1) == 0 else -(-size * 4 // 3)
        )
    return size


def empty(rows: int, chunk_tokens: int, *lead: int) -> packing.Rows:
    """Arrays of chunks without tokens."""
    shape = (*lead, rows, chunk_tokens)
    return {name: np.zeros(shape, dtype) for name, dtype in packing.DTYPES.items()}


def put(rows: packing.Rows, at: tuple, start: int, piece: Piece, segment: int):
    """A piece, or a part of one that stands at `start` in it, into row `at` of the
    arrays; `at` = (..., row, first place, places)."""
    *where, first, count = at
    where, part = (*where, slice(first, first + count)), slice(start, start + count)
    rows["tokens_bt"][where] = piece.tokens[part]
    rows["targets_bt"][where] = piece.targets[part]
    rows["mask_bt"][where] = piece.mask[part]
    rows["segments_bt"][where] = segment
    rows["positions_bt"][where] = np.arange(start, start + count)


def standalone(
    pieces: Sequence[Piece], bins: Sequence[Sequence[int]], chunk_tokens: int
) -> packing.Rows:
    """Arrays [bins, C] of standalone chunks."""
    rows = empty(len(bins), chunk_tokens)
    for row, items in enumerate(bins):
        first = 0
        for segment, i in enumerate(items, 1):
            put(rows, (row, first, len(pieces[i])), 0, pieces[i], segment)
            first += len(pieces[i])
    return rows


def dependent(
    pieces: Sequence[Piece],
    beside: Sequence[Sequence[Sequence[int]]],
    chunk_tokens: int,
    chunks: int,
) -> packing.Rows:
    """Arrays [chunks, rows, C]: in each row its items, one after another, each from a
    new chunk on; the rest is padding. An item is a long piece, or short ones that fit
    in a chunk, by number."""
    made = empty(len(beside), chunk_tokens, chunks)
    for row, items in enumerate(beside):
        chunk = segment = 0
        for item in items:
            first = 0
            for i in item:
                segment += 1
                for start in range(0, len(pieces[i]), chunk_tokens):
                    count = min(chunk_tokens, len(pieces[i]) - start)
                    at = (chunk + start // chunk_tokens, row, first, count)
                    put(made, at, start, pieces[i], segment)
                first += len(pieces[i])
            chunk += max(1, -(-first // chunk_tokens))
    return made


def beside(plan: Plan, rows: int) -> tuple[list[list[list]], list[tuple[int, ...]]]:
    """(of each batch of groups the items of its rows, standalone chunks that are left).

    The longest group comes first in its batch, and the others are put beside it and
    behind each other where there is room, in the fullest row that has it; then
    standalone chunks where a row would wait.
    """
    groups, bins, batches = list(plan.groups), list(plan.bins), []
    while groups:
        most, left = groups[0].chunks, []
        spaces, items = [most] * rows, [[] for _ in range(rows)]
        for group in groups:
            fits = [
                (space, r) for r, space in enumerate(spaces) if space >= group.chunks
            ]
            if not fits:
                left.append(group)
                continue
            _, r = min(fits)
            spaces[r] -= group.chunks
            items[r].append((group.document,))
        for r in range(rows):
            items[r] += bins[: spaces[r]]
            del bins[: spaces[r]]
        batches.append(items)
        groups = left
    return batches, bins


@dataclasses.dataclass(frozen=True)
class Dealt:
    """The chunks of a step on the rows of a process: standalone ones [rows, C], and
    (arrays [n, rows, C] of groups in rows beside each other, chunks of the longest)."""

    packed: list[packing.Rows]
    groups: list[tuple[packing.Rows, int]]


def deal(
    pieces: Sequence[Piece],
    chunk_tokens: int,
    rows: int,
    gather: Callable[[Any], list[Any]] = lambda mine: [mine],
) -> Dealt:
    """The chunks of pieces, dealt to so many rows.

    Processes that hold different rows of the same arrays get arrays of the same shapes:
    each has padding where another has more.

    Args:
      pieces: those of this process.
      chunk_tokens: C.
      rows: of this process.
      gather: gives what every process said (JSON), for one of this process.
    """
    plan = build([len(one) for one in pieces], chunk_tokens)
    some, bins = beside(plan, rows)
    longest = [len(pieces[items[0][0][0]]) for items in some]
    mine = [-(-len(bins) // rows), [-(-n // chunk_tokens) for n in longest]]
    said = gather(mine)
    each = itertools.zip_longest(*(one[1] for one in said), fillvalue=0)
    packed = []
    for first in range(0, max(one[0] for one in said) * rows, rows):
        part = [*bins[first : first + rows], *[()] * rows][:rows]
        packed.append(standalone(pieces, part, chunk_tokens))
    groups = []
    for i, count in enumerate(map(max, each)):
        items = some[i] if i < len(some) else [[]] * rows
        arrays = dependent(pieces, items, chunk_tokens, rounded(count))
        groups.append((arrays, count))
    return Dealt(packed, groups)
