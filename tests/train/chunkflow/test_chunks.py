# SPDX-License-Identifier: Apache-2.0
"""Every token in one chunk, once, in order; and as few chunks as there can be."""

import itertools

import numpy as np
import pytest

from qwen_jax import config
from qwen_jax.data import packing
from qwen_jax.train.chunkflow import chunks


def fewest_by_hand(lengths, capacity):
    """Bins of the best packing: by dynamic programming over sets of items."""
    best = {0: (1, 0)}  # set -> (bins, filled in the last)
    for items in range(1, 1 << len(lengths)):
        best[items] = min(
            (bins, filled + size) if filled + size <= capacity else (bins + 1, size)
            for i, size in enumerate(lengths)
            if items >> i & 1
            for bins, filled in [best[items & ~(1 << i)]]
        )
    return best[(1 << len(lengths)) - 1][0]


@pytest.mark.parametrize("seed", range(60))
def test_bins_are_the_fewest(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(6, 40))
    lengths = rng.integers(1, capacity + 1, rng.integers(1, 11)).tolist()
    bins, fewest = chunks.pack(lengths, capacity)
    assert fewest and len(bins) == fewest_by_hand(lengths, capacity)
    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in one) for one in bins) <= capacity
    assert chunks.lower_bound(lengths, capacity) <= len(bins)


def test_the_search_finds_what_best_fit_does_not():
    lengths = [7, 6, 3, 2, 2]  # best fit: 7+3, 6+2+2; two bins
    assert chunks.pack(lengths, 10) == ([[0, 2], [1, 3, 4]], True)
    lengths = [4, 4, 3, 3, 3, 3]  # best fit: 4+4, 3+3+3, 3; 4+3+3 twice is two
    bins, fewest = chunks.pack(lengths, 10)
    assert len(bins) == 2 and fewest
    # L2: three of 6 cannot share a bin of 10, whatever their sum says.
    assert chunks.lower_bound([6, 6, 6], 10) == 3
    assert chunks.pack([], 10) == ([], True)


def test_a_step_of_many_documents_is_packed_quickly_and_says_whether_at_best():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5, 1.2, 20_000).astype(int) + 1, 4096).tolist()
    plan = chunks.build(lengths, 2048)
    least = -(-sum(n for n in lengths if n <= 2048) // 2048)
    assert len(plan.bins) == least and plan.fewest
    # Two to five in a bin: best fit has 5 % more than the bound, these 1 %.
    hard = rng.integers(200, 400, 1000).tolist()
    bins, fewest = chunks.pack(hard, 1000)
    assert sorted(itertools.chain(*bins)) == list(range(1000))
    assert len(bins) <= 1.02 * chunks.lower_bound(hard, 1000)
    assert len(bins) < 0.98 * len(packing.best_fit(hard, 1000))
    assert fewest == (len(bins) == chunks.lower_bound(hard, 1000))


def test_tokens_are_there_once_and_in_order():
    rng = np.random.default_rng(1)
    lengths = [3, 41, 8, 1, 17, 2, 7, 9, 5, 16, 8]
    documents = [rng.integers(1, 1000, n) for n in lengths]
    plan = chunks.build(lengths, 8)
    assert [(g.document, g.chunks) for g in plan.groups] == [
        *[(1, 6), (4, 3), (9, 2), (7, 2)],
    ]
    assert plan.chunks == 13 + len(plan.bins) and plan.fewest
    told = {i: [] for i in range(len(lengths))}
    targets = {i: [] for i in range(len(lengths))}
    pieces = [chunks.whole(one) for one in documents]
    packed = chunks.standalone(pieces, plan.bins, 8)
    for items, row in zip(plan.bins, range(len(plan.bins)), strict=True):
        segment = packed["segments_bt"][row]
        for number, i in enumerate(items, 1):
            here = segment == number
            told[i] += packed["tokens_bt"][row][here].tolist()
            want = np.arange(lengths[i])
            np.testing.assert_array_equal(packed["positions_bt"][row][here], want)
            counts = here & (packed["mask_bt"][row] > 0)
            targets[i] += packed["targets_bt"][row][counts].tolist()
        assert not packed["mask_bt"][row][segment == 0].any()
    alone = [[[g.document]] for g in plan.groups]
    beside = chunks.dependent(pieces, [*alone, []], 8, 8)
    assert beside["tokens_bt"].shape == (8, 5, 8)
    for row, group in enumerate(plan.groups):
        flat = {k: x[:, row].reshape(-1) for k, x in beside.items()}
        here, counts = flat["segments_bt"] == 1, flat["mask_bt"] > 0
        told[group.document] = flat["tokens_bt"][here].tolist()
        targets[group.document] = flat["targets_bt"][counts].tolist()
        want = np.arange(lengths[group.document])
        np.testing.assert_array_equal(flat["positions_bt"][here], want)
    assert not beside["segments_bt"][:, 4].any()
    for i, ids in enumerate(documents):
        assert told[i] == ids.tolist() and targets[i] == ids[1:].tolist()


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_rows_are_filled_and_nothing_is_lost(rows):
    """Groups lie beside and behind the longest, no row waits while a chunk is left, and
    every token stands where its neighbours are those of its document."""
    rng = np.random.default_rng(rows)
    lengths = [*rng.integers(17, 120, 12), *rng.integers(1, 17, 40)]
    pieces = [chunks.whole(rng.integers(1, 1000, n)) for n in lengths]
    dealt = chunks.deal(pieces, 16, rows)
    found = []
    for part, count in dealt.groups:
        assert part["tokens_bt"].shape == (chunks.rounded(count), rows, 16)
        assert not part["segments_bt"][count:].any()
        used = (part["segments_bt"][:count] > 0).any(axis=2)
        assert used[:, 0].all() and (not dealt.packed or used.all())
        for r in range(rows):
            flat = {k: x[:, r].reshape(-1) for k, x in part.items()}
            for number in range(1, flat["segments_bt"].max() + 1):
                here = np.flatnonzero(flat["segments_bt"] == number)
                assert (np.diff(here) == 1).all() and len(here)
                assert len(here) <= 16 or here[0] % 16 == 0
                np.testing.assert_array_equal(
                    flat["positions_bt"][here], np.arange(len(here))
                )
                found.append(tuple(flat["tokens_bt"][here]))
                np.testing.assert_array_equal(
                    flat["targets_bt"][here][:-1], flat["tokens_bt"][here][1:]
                )
                assert flat["mask_bt"][here].sum() == len(here) - 1
    for part in dealt.packed:
        found += [tuple(one.tokens) for one in chunks.of_rows(part)]
    assert sorted(found) == sorted(tuple(one.tokens) for one in pieces)
    longest = sum(len(part["tokens_bt"]) > 0 for part, _ in dealt.groups)
    assert longest <= (12 if rows == 1 else 1 + 12 // rows)


def test_processes_get_arrays_of_one_shape():
    """Each as many as the one that has most, with padding in the rest."""
    long, short = [np.arange(1, 50)] * 3, [np.arange(1, 9)] * 5
    pieces = [[chunks.whole(x) for x in documents] for documents in (long, short)]
    told = []
    for each in pieces:
        chunks.deal(each, 8, 1, lambda mine: told.append(mine) or [mine])
    assert told == [[0, [7, 7, 7]], [5, []]]
    made = [chunks.deal(each, 8, 1, lambda mine: told) for each in pieces]
    for one in made:
        assert [len(x["tokens_bt"]) for x in one.packed] == [1] * 5
        shapes = [(x["tokens_bt"].shape, count) for x, count in one.groups]
        assert shapes == [((8, 1, 8), 7)] * 3
    assert not made[1].groups[0][0]["segments_bt"].any()
    assert not made[0].packed[4]["segments_bt"].any()


def test_programs_are_for_two_numbers_of_chunks_in_each_doubling():
    sizes = sorted({chunks.rounded(n) for n in range(1, 100)})
    assert sizes == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
    assert all(n <= chunks.rounded(n) < 1.5 * n + 1 for n in range(1, 5000))


def test_bad_lengths_and_sizes_are_refused():
    with pytest.raises(config.InputError, match="chunk_tokens=0: wanted at least 1"):
        chunks.build([3], 0)
    with pytest.raises(config.InputError, match=r"documents\[1\] has 0 tokens"):
        chunks.build([3, 0], 4)
