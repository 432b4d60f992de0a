# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax bench engine` on a tiny model: what it records, and what it refuses."""

import json

import pytest

from qwen_jax import config
from qwen_jax.bench import engine

TINY = [
    f"--{name}={value}"
    for name, value in {
        "layers": 1,
        "width": 32,
        "heads": 2,
        "kv_heads": 1,
        "head_width": 16,
        "ffn": 48,
        "vocab": 128,
        "rows": 2,
        "tokens": 9,
        "new_tokens": 5,
        "prefix": 40,
        "page_tokens": 4,
        "piece": 16,
        "rounds": 2,
    }.items()
]


@pytest.mark.slow
def test_rates_and_ratios_are_recorded(tmp_path, capsys):
    file = tmp_path / "record.json"
    assert engine.main([*TINY, "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    ways = [(row["way"], row["rows"]) for row in record["rows"]]
    assert sorted(ways) == sorted(
        [(way, n) for way in ("loop", "steps", "engine") for n in (1, 2)]
        + [("queue", 2)]
    )
    for row in record["rows"]:
        assert 0 < row["least"] <= row["tokens_per_s"] <= row["most"]
        assert (row["x_loop"] is None) == (row["way"] == "loop")
        assert (row["x_queue"] is None) == (row["rows"] == 1 or row["way"] == "queue")
    assert 0 < record["scheduler_share"] < 1
    assert record["first"]["cold"] > 0 and record["first"]["times"] > 0
    told = {(one["text"], one["rows"]): one for one in record["drafts"]}
    assert len(told) == 4 and all(one["times"] > 0 for one in told.values())
    # Five ids: one behind the prompt, and drafts from when two stood there before.
    assert told["repeating", 1]["acceptance"] > 1
    assert "first token" in capsys.readouterr().out


def test_other_answers_are_an_error(monkeypatch):
    monkeypatch.setattr(engine._World, "queue", lambda self, count: [[0] * 5] * count)
    with pytest.raises(RuntimeError, match="queue with 2 rows gives other tokens"):
        engine.main(TINY)
    with pytest.raises(config.InputError, match="--rounds is 0"):
        engine.main([*TINY, "--rounds=0"])
