# SPDX-License-Identifier: Apache-2.0
"""Packing with plain lists and dicts: slow, obvious, and independent of the product.

`best_fit` is the textbook rule, all rows looked at for every item. `pairs_of_rows`
reads packed rows back into the (input, target) pairs of each segment.
"""

import itertools
from collections.abc import Sequence

import numpy as np


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Longest first, each into the row that it leaves the least space in."""
    rows: list[list[int]] = []
    left: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [r for r in range(len(rows)) if left[r] >= lengths[item]]
        if not fitting:
            rows.append([])
            left.append(capacity)
            fitting = [len(rows) - 1]
        row = min(fitting, key=lambda r: (left[r], r))
        rows[row].append(item)
        left[row] -= lengths[item]
    return rows


def pieces(ids: Sequence[int], seq_tokens: int) -> list[list[tuple[int, int]]]:
    """The (input, target) pairs of a document, cut in pieces."""
    pairs = [(int(a), int(b)) for a, b in itertools.pairwise(ids)]
    return [pairs[i : i + seq_tokens] for i in range(0, len(pairs), seq_tokens)]


def pairs_of_rows(rows: dict[str, np.ndarray]) -> list[list[tuple[int, int]]]:
    """The pairs of every segment, row by row; checks the layout on the way."""
    found = []
    for r in range(len(rows["tokens_bt"])):
        segments = rows["segments_bt"][r].tolist()
        positions = rows["positions_bt"][r].tolist()
        by_segment: dict[int, list[tuple[int, int]]] = {}
        for t, segment in enumerate(segments):
            if segment == 0:
                # Padding stands at the end, counts for nothing and has position 0.
                assert all(s == 0 for s in segments[t:])
                assert positions[t] == 0 and rows["mask_bt"][r, t] == 0
                continue
            here = by_segment.setdefault(segment, [])
            assert positions[t] == len(here)
            assert t == 0 or segment in (segments[t - 1], segments[t - 1] + 1)
            pair = (int(rows["tokens_bt"][r, t]), int(rows["targets_bt"][r, t]))
            here.append(pair)
        assert sorted(by_segment) == list(range(1, len(by_segment) + 1))
        found += list(by_segment.values())
    return found
