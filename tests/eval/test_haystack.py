# SPDX-License-Identifier: Apache-2.0
"""Haystacks hold what they say, where they say, in texts that read back."""

import json
import re

import numpy as np
import pytest

from qwen_jax import config
from qwen_jax.data import tokenizer
from qwen_jax.eval import haystack

MADE_UP = haystack.vocabulary()


@pytest.fixture(scope="module")
def plain():
    """A vocabulary of English words."""
    english = haystack.ENGLISH
    texts = [english.opening, *english.fillers, english.question] * 3
    return tokenizer.train(texts, 400)


def facts_of(text):
    """[(place, key, value)] of the facts "Ba ne Ba" of a text, in words."""
    words = text.removeprefix("<|endoftext|>").split()
    return [
        (i, words[i], words[i + 1])
        for i in range(len(words) - 2)
        if words[i][0].isupper() and words[i] == words[i + 2] and words[i + 1] != "?"
    ]


def test_the_vocabulary_has_one_id_for_each_word_and_tells_the_language(plain):
    words = [*haystack.SYLLABLES.fillers, *haystack.SYLLABLES.keys, " ?"]
    words += haystack.SYLLABLES.values[0]
    ids = [MADE_UP.encode(word) for word in words]
    assert all(len(one) == 1 for one in ids)
    assert len({one[0] for one in ids}) == len(words) == 15 + 30 + 1 + 20
    assert haystack.language_of(MADE_UP) is haystack.SYLLABLES
    assert haystack.language_of(plain) is haystack.ENGLISH


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_needle_lies_at_its_depth_and_has_one_answer(depth):
    writer = haystack.Writer(haystack.SYLLABLES, MADE_UP)
    rng = np.random.default_rng(0)
    for _ in range(10):
        made = writer.hide(length=200, depth=depth, others=5, rng=rng)
        assert len(made.prompt) + len(made.answer) == 200
        text = MADE_UP.decode(made.prompt)
        assert text.endswith(f" ?{made.key}")
        found = facts_of(text)
        assert len(found) == 6 == len({key for _, key, _ in found})
        (place,) = [i for i, key, _ in found if key == made.key.strip()]
        (value,) = [v for _, key, v in found if key == made.key.strip()]
        assert MADE_UP.decode(made.answer) == " " + value
        # 178 words of filler; other facts before it move it by three words each.
        before = sum(i < place for i, *_ in found)
        assert abs(place - 3 * before - depth * 178) <= 1


def test_an_english_needle_reads_as_it_is_tokenized(plain):
    writer = haystack.Writer(haystack.ENGLISH, plain)
    made = writer.hide(length=700, depth=0.5, others=2, rng=np.random.default_rng(1))
    assert len(made.prompt) + len(made.answer) == 700
    text = plain.decode(made.prompt[1:])
    assert text.startswith("Some special magic numbers are hidden")
    told = dict(re.findall(r"special magic numbers for (\w+) is: (\d{7})\.", text))
    assert len(told) == 3
    asked = re.search(r"What is the special magic number for (\w+) mentioned", text)[1]
    assert asked == made.key
    assert plain.decode(made.answer) == " " + told[asked]
    assert plain.encode(text) == made.prompt[1:]


def test_a_seed_decides_and_filler_varies():
    writer = haystack.Writer(haystack.SYLLABLES, MADE_UP)

    def made(seed):
        rng = np.random.default_rng(seed)
        return writer.hide(length=90, depth=0.5, others=3, rng=rng)

    assert made(3) == made(3) and made(3) != made(4)


def test_what_does_not_fit_is_refused():
    writer = haystack.Writer(haystack.SYLLABLES, MADE_UP)
    rng = np.random.default_rng(0)
    with pytest.raises(config.InputError, match=r"10 tokens does .* at least 16$"):
        writer.hide(length=10, depth=0.5, others=3, rng=rng)
    with pytest.raises(config.InputError, match="30 keys, so wanted at most 29"):
        writer.hide(length=500, depth=0.5, others=30, rng=rng)
    with pytest.raises(config.InputError, match="as many questions: wanted at least"):
        writer.lesson(length=20, facts=5, rng=rng)


def test_lessons_ask_for_every_fact_and_say_where_their_targets_begin(tmp_path):
    haystack.write(tmp_path, documents=6, lengths=(48, 200), facts=20, seed=5)
    known = tokenizer.load(tmp_path / "tokenizer")
    assert known.fingerprint == MADE_UP.fingerprint
    lines = (tmp_path / "lessons.jsonl").read_text().splitlines()
    assert len(set(lines)) == 6
    orders = []
    for line, length, most in zip(lines, (48, 200) * 3, (6, 20) * 3, strict=True):
        record = json.loads(line)
        ids, silent = record["tokens"], record["prompt_tokens"]
        assert len(ids) == length - 1  # [end] + ids + [end] has `length` pairs
        told = facts_of(known.decode(ids[:silent]))
        asked, count = known.decode(ids[silent:]).split(), len(told)
        assert count == most
        assert asked[::4] == ["?"] * count and asked[1::4] == asked[3::4]
        pairs = list(zip(asked[1::4], asked[2::4], strict=True))
        facts = [fact[1:] for fact in told]
        assert len(pairs) == count and sorted(pairs) == sorted(facts)
        orders.append(pairs == facts)
    assert not all(orders), "questions come in the order of the facts"
