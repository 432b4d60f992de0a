# SPDX-License-Identifier: Apache-2.0
"""Best-fit packing: documents of any length -> rows of `seq_tokens` with segment ids.

Source: best-fit-decreasing bin packing as used for language models in "Fewer
Truncations Improve Language Modeling" (Ding et al., 2024, section 3): documents longer
than a row are cut in full rows and a rest, and only the rests are packed. Deviation:
ties go to the row opened first, so that the result is one function of the lengths.

Shapes: a document of n ids (its end marks included) has n - 1 (input, target) pairs;
pairs are cut in pieces of at most `seq_tokens`; rows are
  tokens_bt, targets_bt  int32, the pad id where nothing stands
  positions_bt           int32, 0, 1, ... inside a piece, 0 in padding
  segments_bt            int32, 1, 2, ... along a row, 0 in padding
  mask_bt                float32, 1 where the target counts
Invariants: every id but the first of a document is a target exactly once; pairs of a
piece stand in order; a segment is one piece; no two rows could be joined into one (any
two hold more than seq_tokens pairs together).
Raises: ValueError for seq_tokens < 1 or a length outside of a row.
"""

import bisect
from collections.abc import Sequence

import numpy as np

Rows = dict[str, np.ndarray]
DTYPES = {
    "tokens_bt": np.int32,
    "targets_bt": np.int32,
    "positions_bt": np.int32,
    "segments_bt": np.int32,
    "mask_bt": np.float32,
}


def cut(num_pairs: int, seq_tokens: int) -> list[tuple[int, int]]:
    """[start, stop) of the pieces of a document of num_pairs (input, target) pairs."""
    if seq_tokens < 1:
        raise ValueError(f"seq_tokens={seq_tokens}: wanted at least 1")
    return [
        (start, min(start + seq_tokens, num_pairs))
        for start in range(0, num_pairs, seq_tokens)
    ]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows as lists of item numbers: longest first, each into the fullest row it fits.

    O(n log n + n * distinct free spaces): rows are kept by the space left in them.
    """
    rows: list[list[int]] = []
    free_rows: dict[int, list[int]] = {}  # space left -> rows, the oldest last
    spaces: list[int] = []  # the keys of free_rows, sorted
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for item in order:
        length = lengths[item]
        if not 0 < length <= capacity:
            raise ValueError(f"a length of {length} in rows of {capacity}")
        at = bisect.bisect_left(spaces, length)
        if at == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[at]
            row = free_rows[space].pop()
            if not free_rows[space]:
                del free_rows[space], spaces[at]
        rows[row].append(item)
        left = space - length
        if left and left not in free_rows:
            free_rows[left] = []
            bisect.insort(spaces, left)
        if left:
            bisect.insort(free_rows[left], row, key=lambda r: -r)
    return rows


def pack(
    documents: Sequence[np.ndarray],
    seq_tokens: int,
    *,
    pad_id: int = 0,
    first_targets: Sequence[int] | None = None,
) -> Rows:
    """Documents of ids -> packed rows.

    Args:
      documents: 1-d int arrays of ids, end marks included; shorter than 2 give nothing.
      seq_tokens: width of a row.
      pad_id: id that fills inputs and targets where no document stands.
      first_targets: for each document the index of the first id whose prediction counts
        (default 1: all); earlier ones (a prompt) have mask 0.
    """
    pieces = [
        (document, start, stop)
        for document, ids in enumerate(documents)
        for start, stop in cut(len(ids) - 1, seq_tokens)
    ]
    rows = best_fit([stop - start for _, start, stop in pieces], seq_tokens)
    out = empty(len(rows), seq_tokens, pad_id)
    tokens, targets, positions, segments, mask = out.values()
    counting = np.arange(seq_tokens, dtype=np.int32)
    for r, items in enumerate(rows):
        at = 0
        for segment, item in enumerate(items, 1):
            document, start, stop = pieces[item]
            ids, here = documents[document], slice(at, at + stop - start)
            tokens[r, here] = ids[start:stop]
            targets[r, here] = ids[start + 1 : stop + 1]
            positions[r, here] = counting[: stop - start]
            segments[r, here] = segment
            first = 1 if first_targets is None else first_targets[document]
            mask[r, at + max(0, first - 1 - start) : at + stop - start] = 1
            at += stop - start
    return out


def empty(num_rows: int, seq_tokens: int, pad_id: int = 0) -> Rows:
    """Rows that hold padding only."""
    out = {key: np.zeros((num_rows, seq_tokens), t) for key, t in DTYPES.items()}
    out["tokens_bt"][:] = pad_id
    out["targets_bt"][:] = pad_id
    return out


def take(rows: Rows, index: slice | np.ndarray) -> Rows:
    """Some rows, by number."""
    return {key: array[index] for key, array in rows.items()}


def join(parts: Sequence[Rows]) -> Rows:
    """Rows one after another."""
    return {key: np.concatenate([part[key] for part in parts]) for key in DTYPES}


def fill(rows: Rows) -> float:
    """Share of places that hold a token of a document."""
    return float(np.mean(rows["segments_bt"] > 0)) if rows["segments_bt"].size else 0.0
