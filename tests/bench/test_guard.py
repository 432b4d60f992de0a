# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax bench guard`: what counts as a share, and that both ways make the same."""

import json

import pytest

from qwen_jax import config
from qwen_jax.bench import guard

TINY = {"layers": 1, "width": 32, "heads": 2, "kv_heads": 1, "head_width": 16}
TINY |= {"ffn": 48, "vocab": 128, "rows": 2, "tokens": 5, "new_tokens": 3, "rounds": 2}
WORDS = [f"--{name}={value}" for name, value in TINY.items()]


def test_the_share_is_recorded(tmp_path, capsys):
    file = tmp_path / "record.json"
    assert guard.main([*WORDS, "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert record["plain_s"] > 0 and record["judged_s"] > 0
    assert record["least"] <= record["share"] <= record["most"]
    assert "wanted: at most 3%" in capsys.readouterr().out


def test_times_of_known_turns(monkeypatch):
    clock_s = [0.0]
    monkeypatch.setattr(guard.time, "perf_counter", lambda: clock_s[0])

    def turn(judged):
        clock_s[0] += 1.02 if judged else 1.0

    found = guard.timed(turn, 5, 10)
    assert found["plain_s"] == pytest.approx(0.1)
    assert found["judged_s"] == pytest.approx(0.102)
    assert found["share"] == pytest.approx(found["share_of_fastest"])
    assert found["share"] == pytest.approx(0.02)


def test_judging_is_in_the_judged_way_alone(monkeypatch):
    """Else the share would be of nothing."""
    seen = []
    real = guard._steps

    def steps(*given, **how):
        token_b, level_b = real(*given, **how)
        seen.append(how["judged"])
        return token_b + how["judged"], level_b

    monkeypatch.setattr(guard, "_steps", steps)
    with pytest.raises(RuntimeError, match="other tokens"):
        guard.main(WORDS)
    assert sorted(seen) == [False, True]
    with pytest.raises(config.InputError, match="--inner is 0"):
        guard.main([*WORDS, "--inner=0"])
