# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax bench answer`: its flags, what counts as the same answer, and its table."""

import argparse

import pytest

from qwen_jax import config
from qwen_jax.bench import answer, rounds


def test_mistakes_are_told_before_anything_is_read():
    for words, says in (
        (["--rows", "9"], "--rows is '9', wanted counts of 1 to 8"),
        (["--rows", "1,x"], "--rows is '1,x'"),
        (["--peers", "lama"], "did you mean 'llama'"),
        (["--new_tokens", "0"], "--new_tokens is 0"),
        (["--model", "/none"], "none"),
    ):
        with pytest.raises(config.InputError) as caught:
            answer.main(["--model", "x", *words])
        assert says in str(caught.value)


def test_tokens_count_as_equal_up_to_the_first_that_is_not():
    assert answer._equal(
        [[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 3, 4], [5, 0, 7, 8]]
    ) == (5 / 8)
    assert answer._equal([[1, 2]], [[1, 2]]) == 1


def test_the_table_has_ratios_of_rounds_and_tells_what_failed():
    turns = [
        rounds.Turn(name, number, 1, seconds, seconds, 0.0, (1.0,))
        for number in range(3)
        for name, seconds in (("ours", 2.0), ("hf", 3.0 + number))
    ]
    args = argparse.Namespace(new_tokens=4)
    facts = {
        name: {"ids": [[1, 2, 3, last]], "versions": name, "setting": "so"}
        for name, last in (("ours", 4), ("hf", 5))
    }
    errors = {"llama": "not installed: no compiler"}
    rows = [
        answer._row(name, args, facts, errors, turns)
        for name in ("ours", "hf", "llama")
    ]
    assert rows[0]["tokens_per_s"] == 2.0 and rows[1]["equal"] == 3 / 4
    result = {"rows_at_once": 1, "rows": rows}
    text = answer.report({"new_tokens": 4, "results": [result]})
    lines = text.splitlines()
    assert any(line.split()[:2] == ["hf", "1.0"] and "2.00x" in line for line in lines)
    assert lines[-1] == "llama: not installed: no compiler"
