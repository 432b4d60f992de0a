# SPDX-License-Identifier: Apache-2.0
"""Packing against plain lists: nothing lost, nothing twice, rows well filled."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.data import packing
from tests.oracles import packing as oracle

DOCUMENTS = st.lists(st.integers(2, 90), max_size=40)


def documents(lengths):
    """Documents whose ids are all different, so that a lost or doubled one shows."""
    ends = np.cumsum([0, *lengths])
    return [np.arange(a, b, dtype=np.int32) for a, b in itertools.pairwise(ends)]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 16), max_size=40))
def test_best_fit_is_the_textbook_rule(lengths):
    assert packing.best_fit(lengths, 16) == oracle.best_fit(lengths, 16)


@settings(deadline=None, max_examples=200)
@given(DOCUMENTS, st.integers(1, 40))
def test_rows_hold_the_pieces_of_the_documents_and_nothing_else(lengths, seq_tokens):
    given_documents = documents(lengths)
    rows = packing.pack(given_documents, seq_tokens, pad_id=7)
    found = oracle.pairs_of_rows(rows)
    wanted = [p for ids in given_documents for p in oracle.pieces(ids, seq_tokens)]
    assert sorted(found) == sorted(wanted)
    # Every id but a document's first is a target exactly once.
    counted = rows["targets_bt"][rows["mask_bt"] == 1]
    assert sorted(counted) == sorted(i for ids in given_documents for i in ids[1:])
    padding = rows["segments_bt"] == 0
    assert (rows["tokens_bt"][padding] == 7).all()
    assert (rows["targets_bt"][padding] == 7).all()


@settings(deadline=None, max_examples=200)
@given(DOCUMENTS, st.integers(1, 40))
def test_no_two_rows_could_be_joined(lengths, seq_tokens):
    used = (packing.pack(documents(lengths), seq_tokens)["segments_bt"] > 0).sum(1)
    least = np.sort(used)[:2]
    assert len(used) < 2 or least.sum() > seq_tokens
    pairs = sum(lengths) - len(lengths)
    assert len(used) <= max(1, 2 * -(-pairs // seq_tokens))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(2, 50), st.integers(0, 48)), max_size=20))
def test_prompt_ids_are_inputs_and_no_targets(cases):
    lengths = [length for length, _ in cases]
    firsts = [min(prompt, length - 2) + 1 for length, prompt in cases]
    given_documents = documents(lengths)
    rows = packing.pack(given_documents, 8, first_targets=firsts)
    counted = sorted(rows["targets_bt"][rows["mask_bt"] == 1])
    pairs = zip(given_documents, firsts, strict=True)
    assert counted == sorted(i for ids, first in pairs for i in ids[first:])


def test_dtypes_shapes_and_bad_arguments():
    rows = packing.pack([np.arange(5), np.arange(9), np.arange(1)], 4)
    assert {key: (a.dtype, a.shape) for key, a in rows.items()} == {
        key: (np.dtype(dtype), (3, 4)) for key, dtype in packing.DTYPES.items()
    }
    assert packing.fill(rows) == 1.0
    with pytest.raises(ValueError, match="length of 5 in rows of 4"):
        packing.best_fit([5], 4)
    with pytest.raises(ValueError, match="seq_tokens=0"):
        packing.cut(3, 0)
