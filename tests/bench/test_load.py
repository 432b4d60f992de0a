# SPDX-License-Identifier: Apache-2.0
"""`bench load`: equal files for all, ratios inside rounds, and what does not fit."""

import json

import pytest

from qwen_jax import cli, config, models
from qwen_jax.bench import load


def test_a_small_folder_is_measured(tmp_path, capsys):
    out = tmp_path / "record.json"
    words = ["--gb=0.02", "--rounds=1", "--peers", f"--json={out}"]
    assert cli.main(["bench", "load", *words]) == 0
    text = capsys.readouterr().out
    record = json.loads(out.read_text())
    assert {t["name"] for t in record["turns"]} == {"plain", "ours", "safetensors"}
    assert record["summaries"]["plain"]["of_plain"] == 1.0
    for name, summary in record["summaries"].items():
        assert f"\n{name}" in text and summary["mb_per_s"] > 0
    # The result itself is counted: what is beyond it is not the size of the files.
    assert abs(record["summaries"]["plain"]["over_bytes"]) < record["bytes"] / 4


def test_what_is_made_is_a_model_of_that_size(tmp_path):
    load.make(tmp_path, 0.3, "bfloat16")
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert 0.2e9 < size < 0.4e9
    spec, weights = models.load(tmp_path)
    assert spec.param_dtype == "bfloat16"
    values = weights["layers"]["mlp"]["up_ldf"]
    assert 0 < float(abs(values[0, 0, :99]).max()) < 1


def test_ratios_are_taken_inside_rounds():
    def turn(name, number, seconds):
        return {"name": name, "round": number, "seconds": seconds} | {
            "cpu_s": seconds / 2,
            "over": 7 * number,
        }

    turns = [turn("plain", 1, 1.0), turn("ours", 1, 2.0)]
    turns += [turn("plain", 2, 8.0), turn("ours", 2, 4.0)]
    turns += [turn("plain", 3, 1.0), turn("ours", 3, 1.0)]
    made = load.summarize({"turns": turns, "bytes": 8_000_000}, "ours")
    assert made["of_plain"] == 1.0 and made["of_plain_least"] == 0.5
    assert made["mb_per_s"] == 4.0 and made["over_bytes"] == 21


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rounds=0"], "--rounds is 0, wanted at least 1"),
        (["--gb=0"], "--gb is 0.0, wanted above 0"),
        (["--round=3"], "did you mean '--rounds'"),
        (["--stored=int8"], "--stored: invalid choice"),
    ],
)
def test_flags_that_do_not_fit_are_told(words, told):
    with pytest.raises(config.InputError, match=told):
        load.parse(words)


def test_a_folder_without_weights_is_told(tmp_path):
    with pytest.raises(config.InputError, match="has no .*safetensors files"):
        load.main([f"--model={tmp_path}"])
