# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax bench step`: what it refuses before it makes weights, and its table."""

import json

import pytest

from qwen_jax import config
from qwen_jax.bench import step
from qwen_jax.models import sizes, spec


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--rows=1,x", "wanted counts"),
        ("--ways=fast", "'fast': loop, blocks, kernel, gather"),
        ("--model=qwen3-0.6c", "qwen3-0.6b"),
        ("--piece=100", "multiple of page_tokens"),
        ("--growth=1", "growth=1"),
        ("--rounds=0", "rounds"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_made(flag, says, monkeypatch):
    monkeypatch.setattr(step, "_copy", lambda args: pytest.fail("too late"))
    with pytest.raises(config.InputError, match=says):
        step.main([flag])


def test_steps_and_a_crowd_of_a_small_model(monkeypatch, tmp_path, capsys):
    tiny = spec.Spec(
        vocab_size=96,
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_width=8,
        ffn_width=48,
        max_positions=256,
    )
    monkeypatch.setattr(sizes, "get", lambda name, **more: tiny)
    file = tmp_path / "step.json"
    argv = "--rows 1,2 --tokens 16 --new_tokens 4 --crowd 2 --requests 3 --piece 16"
    argv += f" --page_tokens 8 --rounds 1 --copy_mib 1 --json {file}"
    assert step.main(argv.split()) == 0
    record = json.loads(file.read_text())
    assert [one["rows"] for one in record["steps"]] == [1, 2]
    # Both keys and values of 2 layers, 2 heads, 8 wide, in float32, of 16 + 32 tokens.
    one, two = (one["bytes"] for one in record["steps"])
    assert two - one == 2 * 2 * 2 * 8 * 4 * (16 + step.STEPS // 2)
    assert record["crowd"]["requests"] == 3 and record["crowd"]["steps"] >= 3 + 3
    assert "3 requests, 2 at once, 16 tokens in and 4 out" in capsys.readouterr().out
