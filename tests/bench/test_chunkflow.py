# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax bench chunkflow` on a model of nothing: its record, and what it refuses."""

import json

import numpy as np
import pytest

from qwen_jax import config
from qwen_jax.bench import chunkflow
from qwen_jax.train.chunkflow import lengths

TINY = "num_layers=2,width=32,vocab_size=64,ffn_width=48,num_heads=2,num_kv_heads=1"


def test_a_step_in_every_way(tmp_path, capsys):
    file = tmp_path / "record.json"
    flags = ["--set", TINY + ",head_width=16", "--dtype", "float32", "--rounds", "2"]
    flags += ["--documents", "12", "--scale", "64", "--longest", "60"]
    assert chunkflow.main([*flags, "--chunks", "16x1,8x2", "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows) == ["padded", "single", "packed", "16 x 1", "8 x 2"]
    tokens = record["lengths"]["tokens"]
    assert rows["padded"]["padding"] == pytest.approx(1 - tokens / (12 * 60))
    assert rows["packed"]["padding"] < rows["padded"]["padding"]
    for row in rows.values():
        assert len(row["steps_s"]) == 2 and row["bytes"] > 0
        assert row["tokens_per_s"] == pytest.approx(tokens / row["step_s"])
    told = capsys.readouterr().out
    assert "x padded" in told and "16 x 1" in told


def test_what_differs_is_not_timed():
    def way(name, shift):
        grads = {"w": np.ones(4, np.float32) + shift}
        return chunkflow._Way(name, lambda: (np.float32(2), grads), 4, 4)

    chunkflow._agree([way("a", 0), way("b", 1e-5)], "float32")
    with pytest.raises(
        RuntimeError, match="b: loss or gradients are 0.01 off those of a"
    ):
        chunkflow._agree([way("a", 0), way("b", 1e-2)], "float32")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--chunks", "16"], "--chunks has '16', wanted pairs"),
        (["--chunks", "0x2"], "wanted pairs"),
        (["--ways", "", "--chunks", ""], "nothing to do"),
        (["--ways", "pad"], "did you mean 'padded'"),
        (["--set", "layers=2"], "wanted NAME=COUNT"),
        (["--rounds", "0"], "--rounds is 0, wanted at least 1"),
    ],
)
def test_flags_that_do_not_fit(flags, words):
    with pytest.raises(config.InputError, match=words):
        chunkflow.main(flags)


def test_lengths_are_those_of_the_source():
    drawn = lengths.draw(100_000, seed=0)
    shares = [np.mean(drawn < limit) for limit in (1024, 4096, 32_768)]
    np.testing.assert_allclose(shares, [0.9, 0.98, 0.9995], atol=0.003)
    assert drawn.min() >= lengths.SHORTEST
    short = lengths.draw(500, seed=1, scale=16, longest=512)
    assert short.max() == 512 and short.min() >= 2
    with pytest.raises(config.InputError, match="count=0"):
        lengths.draw(0, seed=0)
    with pytest.raises(config.InputError, match="longest=-5"):
        lengths.draw(5, seed=0, longest=-5)
