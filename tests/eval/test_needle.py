# SPDX-License-Identifier: Apache-2.0
"""A cell counts the haystacks that greedy decoding answers, at its length and depth."""

import dataclasses
import json
import re
import xml.etree.ElementTree as ET

import jax
import numpy as np
import pytest

from qwen_jax import cli, config, models, params
from qwen_jax.eval import haystack, needle
from qwen_jax.models import decode, decoder, spec
from qwen_jax.report import heat

TINY = spec.Spec(
    vocab_size=384,
    width=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_width=8,
    ffn_width=32,
    max_positions=64,
    init_std=0.5,
)


@pytest.fixture(scope="module")
def weights():
    return params.init(decoder.decoder_params(TINY), jax.random.key(0), "float32")


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    models.save(TINY, weights, path)
    haystack.vocabulary().save(path)
    return path


def test_found_is_what_greedy_decoding_answers(weights):
    """Answers of one to three ids: right ones, and with one id changed each."""
    rng, cases = np.random.default_rng(0), []
    for size in (1, 2, 3):
        prompt = rng.integers(300, size=40 - size).tolist()
        (new,) = decode.generate(TINY, weights, [prompt], max_tokens=size)
        cases.append((prompt, new, True))
        for i in range(size):
            wrong = new[:i] + [(new[i] + 1) % 300] + new[i + 1 :]
            cases.append((prompt, wrong, False))
    made = [haystack.Needle(prompt, answer, "") for prompt, answer, _ in cases]
    assert needle.found(TINY, weights, made).tolist() == [right for *_, right in cases]


def test_rows_of_a_cell_may_go_in_several_passes(weights, monkeypatch):
    prompts = np.random.default_rng(1).integers(300, size=(5, 31)).tolist()
    news = decode.generate(TINY, weights, prompts, max_tokens=1)
    news[3] = [(news[3][0] + 1) % 300]
    made = [haystack.Needle(*pair, "") for pair in zip(prompts, news, strict=True)]
    monkeypatch.setattr(needle, "ROW_TOKENS", 64)  # two rows at a time
    assert needle.found(TINY, weights, made).tolist() == [1, 1, 1, 0, 1]


def test_a_grid_has_a_share_for_each_length_and_depth(weights, monkeypatch):
    """With what is found told by where the fact lies, in place of a model."""
    known = haystack.vocabulary()

    def found(_, __, needles):
        return np.array([_place(n) < 0.5 or len(n.prompt) < 50 for n in needles])

    def _place(one):
        keys = [i for i, token in enumerate(one.prompt) if token == one.prompt[-1]]
        return keys[0] / len(one.prompt)

    monkeypatch.setattr(needle, "found", found)
    settings = needle.Settings((40, 80), (0.0, 0.25, 1.0), count=4, others=0)
    told = []
    grid = needle.measure(TINY, weights, known, settings, say=told.append)
    assert grid.found == ((1.0, 1.0, 1.0), (1.0, 1.0, 0.0))
    assert grid.mean == pytest.approx(5 / 6) and grid.least == 0
    assert told == ["40 tokens: 100.0% found", "80 tokens: 66.7% found"]


@pytest.mark.parametrize(
    "change, told",
    [
        ({"depths": (0.5, 1.5)}, "depth 1.5: wanted shares of the length, from 0 to 1"),
        ({"lengths": ()}, "lengths: wanted at least one number"),
        ({"count": 0}, "count=0"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(change, told):
    with pytest.raises(config.InputError, match=re.escape(told)):
        dataclasses.replace(needle.Settings((64,), (0.5,)), **change)


def test_the_command_writes_table_numbers_and_heat_maps(folder, tmp_path, capsys):
    words = ["eval", "needle", f"--model={folder}", "--count=2", "--depths=3"]
    first, page = tmp_path / "first.json", tmp_path / "page.html"
    more = ["--lengths=32,48", f"--json={first}", "--title=before <b>"]
    assert cli.main([*words, *more]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["depth", "32", "48"]
    assert [line.split()[0] for line in table[1:4]] == ["0%", "50%", "100%"]
    record = json.loads(first.read_text())
    assert record["depths"] == [0, 0.5, 1] and record["lengths"] == [32, 48]
    assert record["language"] == "syllables" and np.shape(record["found"]) == (2, 3)
    more = ["--lengths=96", "--yarn=2", f"--beside={first}", f"--html={page}"]
    assert cli.main([*words, *more]) == 0
    err = capsys.readouterr().err
    assert "note: YaRN factor 2 on 64 positions" in err and "pass" not in err
    text = page.read_text()
    assert text.count("<svg") == 2 and "before &lt;b&gt;" in text
    assert "http" not in text.replace('http-equiv="', "") and "<script" not in text


def test_lengths_beyond_the_positions_are_measured_and_told(folder, capsys):
    words = ["eval", "needle", f"--model={folder}", "--count=1", "--depths=0.5"]
    assert cli.main([*words, "--lengths=80", "--rope_theta=1000"]) == 0
    err = capsys.readouterr().err
    assert "note: lengths up to 80 pass its 64 positions" in err
    assert "note: RoPE base 1000 in place of 1e+06" in err


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--lengths=32,x"], "--lengths '32,x': wanted numbers with commas between"),
        (["--lengths=9"], "a length of 9 tokens does not hold 4 facts"),
        (["--lengths=32", "--language=englisch"], "did you mean 'english'"),
        (["--lengths=32", "--yarn=0.5"], "--yarn 0.5: wanted a factor above 1"),
        (["--lengths=32", "--beside=/nowhere.json"], "not a readable JSON file"),
    ],
)
def test_mistakes_of_the_command_line(folder, capsys, flags, told):
    assert cli.main(["eval", "needle", f"--model={folder}", *flags]) == 2
    assert told in capsys.readouterr().err


def test_lessons_are_written_by_the_command(tmp_path, capsys):
    words = ["eval", "lessons", f"--out={tmp_path / 'new'}", "--documents=5"]
    assert cli.main([*words, "--lengths=48,64"]) == 0
    assert "5 lessons and their tokenizer" in capsys.readouterr().out
    lines = (tmp_path / "new" / "lessons.jsonl").read_text().splitlines()
    assert [len(json.loads(x)["tokens"]) for x in lines] == [47, 63, 47, 63, 47]


def test_a_heat_map_shows_every_cell_where_it_belongs():
    grid = {
        "lengths": [256, 4096],
        "depths": [0.0, 0.5, 1.0],
        "found": [[1.0, 0.9, 0.8], [0.7, 0.25, 0.0]],
    }
    svg = re.search("<svg.*</svg>", heat.figure(grid, "a & b"))[0]
    cells = [g for g in ET.fromstring(svg) if g.tag == "g"]
    told = {g[0].text: (float(g[1].get("x")), float(g[1].get("y"))) for g in cells}
    assert len(told) == 6
    low = told["256 tokens, depth 0 %: 100%"]
    high = told["4,096 tokens, depth 50 %: 25%"]
    assert high[0] > low[0] and high[1] > low[1]
    assert "a &amp; b: found 60.8%, worst cell 0%" in svg
    fills = [g[1].get("fill") for g in cells]
    assert "hsl(120,62%,72%)" in fills and "hsl(0,62%,72%)" in fills


@pytest.mark.parametrize(
    "record",
    [
        None,
        [],
        {},
        {"lengths": [1], "depths": [0.5], "found": []},
        {"lengths": [1], "depths": [0.5], "found": [[0.5], [0.5]]},
        {"lengths": [1], "depths": [0.5], "found": [["<b>"]]},
        {"lengths": [1], "depths": [0.5], "found": [[float("nan")]]},
        {"lengths": [10**400], "depths": [0.5], "found": [[0.5]]},
    ],
)
def test_what_is_no_grid_is_not_drawn(record):
    assert not heat.is_grid(record)
    assert heat.is_grid({"lengths": [1], "depths": [0.5], "found": [[1]]})
