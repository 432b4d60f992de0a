# SPDX-License-Identifier: Apache-2.0
"""The preview tells ids, text, mask, borders, shares, fill, in color or not."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.data import packing, preview, tokenizer

TEXTS = ["the cat sat\non the mat", "a dog\tand a cat", "the end of the cat"]


@pytest.fixture(scope="module")
def vocabulary():
    return tokenizer.train(TEXTS * 3, 300)


def rows_of(vocabulary, texts, seq_tokens, prompts=None):
    end = vocabulary.eos_id
    ids = [np.array([end, *vocabulary.encode(text), end], np.int32) for text in texts]
    return packing.pack(
        ids, seq_tokens, pad_id=vocabulary.pad_id, first_targets=prompts
    )


def test_text_ids_borders_and_padding(vocabulary):
    rows = rows_of(vocabulary, TEXTS, 64)
    text = preview.render(rows, vocabulary, num_rows=5)
    assert "\033" not in text
    placed = int((rows["segments_bt"] > 0).sum())
    assert f"{placed} places hold a token, {64 - placed} are padding" in text
    assert f"{placed} targets count in the loss, 0 do not" in text
    assert "row 0: 3 segments" in text and f"padding {placed}..63" in text
    assert text.count("(a document that begins and ends)") == 3
    assert "▏⟦<|endoftext|>⟧the cat sat⏎on the mat<|endoftext|>" in text
    assert "a dog\\tand a cat" in text
    ids = vocabulary.encode(TEXTS[0])
    assert (
        f": {vocabulary.eos_id} {' '.join(map(str, ids))} {vocabulary.eos_id}" in text
    )
    short = preview.render(rows, vocabulary, ids=2)
    ends = f"{vocabulary.eos_id} {ids[0]} ... {ids[-1]} {vocabulary.eos_id}"
    assert f": {ends}\n" in short


def test_cut_documents_and_prompts_are_marked(vocabulary):
    rows = rows_of(vocabulary, TEXTS[:1], 4)
    text = preview.render(rows, vocabulary, num_rows=1)
    assert "(a document that begins and is cut)" in text
    assert f"({len(rows['tokens_bt']) - 1} more rows)" in text
    ids = vocabulary.encode(TEXTS[2])
    rows = rows_of(vocabulary, TEXTS[2:], 64, prompts=[4])
    text = preview.render(rows, vocabulary)
    prompt, rest = vocabulary.decode(ids[:3]), vocabulary.decode(ids[3:])
    assert f"▏⟦<|endoftext|>{prompt}⟧{rest}<|endoftext|>" in text
    assert "3 do not (prompts)" in text


def test_color_adds_nothing_but_color(vocabulary):
    rows = rows_of(vocabulary, TEXTS, 64)
    colored = preview.render(rows, vocabulary, color=True)
    assert {"\033[36m", "\033[33m", "\033[32m"} < set(
        re.findall(r"\033\[\d+m", colored)
    )
    plain = preview.render(rows, vocabulary).replace("⟦", "").replace("⟧", "")
    assert re.sub(r"\033\[\d+m", "", colored) == plain


def test_shares_of_the_sources(vocabulary):
    counters = {
        "tokens/web": 750,
        "tokens/code": 250,
        "documents/web": 7,
        "documents/code": 1,
        "held_out": 3,
        "bad_records": 2,
    }
    text = preview.render(rows_of(vocabulary, TEXTS, 64), vocabulary, counters=counters)
    assert re.search(r"code +25\.0% █+ 1 documents", text)
    assert re.search(r"web +75\.0% █+ 7 documents", text)
    assert "held_out 3, bad_records 2, split_documents 0" in text


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.booleans(), st.text("abcdef", max_size=30)), max_size=5),
    st.integers(1, 60),
)
def test_shortening_keeps_the_ends(pieces, max_letters):
    whole = "".join(text for _, text in pieces)
    told = "".join(text for _, text in preview._shortened(pieces, max_letters))
    half = max(1, max_letters // 2)
    hidden = len(whole) - 2 * half
    if len(whole) <= max_letters or hidden <= 0:
        assert told == whole
    else:
        assert told == f"{whole[:half]} ...[{hidden} letters]... {whole[-half:]}"


def test_a_batch_of_padding(vocabulary):
    text = preview.render(packing.empty(2, 8), vocabulary)
    assert "fill 0.0%" in text and "padding 0..7" in text
