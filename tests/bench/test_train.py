# SPDX-License-Identifier: Apache-2.0
"""`bench train`: flags, the equal-work check, tables, and real children."""

import json
import math
import sys

import pytest

from qwen_jax import config
from qwen_jax.bench import candidates, grow, rounds, shape, table, train, venvs

TINY = [
    f"--{name}={value}"
    for name, value in {
        "layers": 1,
        "width": 32,
        "heads": 2,
        "kv_heads": 1,
        "head_width": 16,
        "ffn": 48,
        "vocab": 256,
        "rows": 2,
        "tokens": 16,
        "rounds": 2,
        "steps": 2,
    }.items()
]

# Speaks the protocol without a library: `SECONDS` a step, loss falling from log(v).
FAKE = """
import math
import line


def build(shape, options):
    loss = [math.log(shape.get("vocab", 256))]

    def steps(n):
        loss[0] -= 0.1
        return [loss[0]] * n

    facts = {{
        "params": {params},
        "tokens_per_step": shape.get("rows", 1) * shape.get("tokens", 1),
        "first_loss": loss[0],
        "temp_bytes": 1000 * shape.get("tokens", 1),
        "versions": "fake 1",
        "setting": "none",
    }}
    return facts, steps


line._timed = lambda steps, n: {{
    "seconds": {seconds} * n, "cpu_s": 0.0, "losses": steps(n)
}}
line.serve(build)
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """A scripts folder whose candidates take a given time a step."""
    plain = candidates.SCRIPTS / "line.py"
    (tmp_path / "line.py").write_text(plain.read_text())
    monkeypatch.setattr(candidates, "SCRIPTS", tmp_path)
    monkeypatch.setattr(venvs, "ensure", lambda recipe, folder, say: sys.executable)
    right = shape.num_params(train.read_shape(train.parse(TINY)))

    def make(**seconds):
        for name, value in seconds.items():
            text = FAKE.format(params=right, seconds=value)
            (tmp_path / f"{name}.py").write_text(text)
        return tmp_path

    return make


def test_ratios_rates_and_shares(fakes, tmp_path, capsys):
    fakes(ours_train=0.5, hf_train=0.75, matmul=0.25)
    file = tmp_path / "out" / "record.json"
    flags = ["--candidates", "ours", "--peers", "hf", "--json", str(file)]
    assert train.main([*TINY, *flags]) == 0
    record = json.loads(file.read_text())
    ours, hf = record["candidates"]
    assert ours["ratios"]["hf"]["median"] == pytest.approx(1.5)
    assert ours["tokens_per_s"] == pytest.approx(32 / 0.5)
    matmul = 2 * candidates.MATMUL_SIDE**3 / 0.25 / 1e9
    assert record["matmul_gflops_per_s"] == pytest.approx(
        {"jax": matmul, "numpy": matmul}
    )
    rate = record["step_flops"] / 0.5 / 1e9
    assert ours["share_of_matmul"] == pytest.approx(rate / matmul)
    assert hf["gflops_per_s"] == pytest.approx(rate / 1.5)
    shown = capsys.readouterr().out
    assert "x hf" in shown
    assert "1.50" in shown
    assert "fake 1; none" in shown
    # ours, hf, and two matmul children, twice
    assert len(record["turns"]) == 8


def test_a_peer_that_cannot_be_installed_is_told(fakes, monkeypatch, capsys):
    fakes(ours_train=0.5, matmul=0.25)

    def refuse(recipe, folder, say):
        raise venvs.NotInstalled("no network")

    monkeypatch.setattr(venvs, "ensure", refuse)
    assert train.main([*TINY, "--candidates", "ours", "--peers"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("not installed: no network") == 2


@pytest.mark.parametrize(
    "damage, told",
    [
        ("import not_there", "No module named 'not_there'"),
        ("no python", "failed: does not start: [Errno 13] Permission denied: '"),
    ],
)
def test_a_damaged_environment_is_told_with_the_way_out(
    fakes, monkeypatch, capsys, tmp_path, damage, told
):
    folder = fakes(ours_train=0.5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (folder / "hf_train.py").write_text(damage)
    if damage == "no python":
        broken = tmp_path / "python"
        broken.write_text("")
        monkeypatch.setattr(venvs, "ensure", lambda recipe, folder, say: broken)
    flags = ["--candidates", "ours", "--peers", "hf", "--no_matmul"]
    assert train.main([*TINY, *flags]) == 0
    shown = capsys.readouterr().out
    assert told in shown
    home = tmp_path / "qwen_jax" / "bench" / "venv-hf"
    assert f"; if its environment is damaged, delete {home} and run again" in shown


def test_a_broken_candidate_of_ours_fails_the_command(fakes, capsys):
    folder = fakes(matmul=0.25)
    (folder / "ours_train.py").write_text("raise SystemExit('boom')")
    assert train.main([*TINY, "--candidates", "ours"]) == 1
    shown = capsys.readouterr().out
    assert "failed: ended: exit code 1, boom" in shown and "delete" not in shown


GOOD = {"params": 10, "tokens_per_step": 8, "first_loss": 4.6}


@pytest.mark.parametrize(
    ("change", "last", "words"),
    [
        ({}, 4.0, ""),
        ({"params": 11}, 4.0, "11 parameters, wanted 10"),
        ({"tokens_per_step": 7}, 4.0, "7 tokens a step, wanted 8"),
        ({"first_loss": 3.0}, 2.0, "first loss 3.000"),
        ({}, 4.7, "does not fall"),
        ({}, math.nan, "does not fall"),
    ],
)
def test_other_work_is_not_a_time(change, last, words):
    record = {"params": 10, "shape": {"rows": 2, "tokens": 4, "vocab": 100}}
    time_s = rounds.Summary(1, 1, 1, 1, 1, 1, 0, last)
    found = candidates.unequal(record, GOOD | change, time_s)
    assert words in found
    assert bool(found) == bool(words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--peers", "hff"], "did you mean 'hf'"),
        (["--candidates", "our"], "did you mean 'ours'"),
        (["--ruonds", "3"], "did you mean '--rounds'"),
        (["--rounds", "0"], "--rounds is 0, wanted at least 1"),
        (["--threads", "4096"], "--threads is 4096, wanted 0"),
        (["--rounds", "x"], "invalid int value: 'x'"),
        (["--kv_heads", "3"], "not a multiple of --kv_heads 3"),
    ],
)
def test_bad_flags_are_named(flags, words):
    with pytest.raises(config.InputError, match=words):
        train.main(flags)


def test_log_is_appended_with_command_and_tables(fakes, tmp_path, monkeypatch):
    fakes(ours_train=0.5, matmul=0.25)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(config.InputError, match="--log writes to"):
        train.main([*TINY, "--candidates", "ours", "--log"])
    log = tmp_path / "experiments" / "LOG.md"
    log.parent.mkdir()
    log.write_text("# Log\n")
    train.main([*TINY, "--candidates", "ours", "--log"])
    text = log.read_text()
    assert text.startswith("# Log\n")
    assert "Command: `qwen-jax bench train --layers=1" in text
    assert "ours" in text.split("```text")[1]


def test_length_keeps_the_tokens_of_a_step(fakes, monkeypatch, capsys):
    fakes(ours_train=0.5)
    monkeypatch.setattr(grow, "LENGTHS", (16, 64))
    args = train.parse([*TINY, "--length"])
    rows = grow.length(args, train.read_shape(args))
    assert [(row["tokens"], row["rows"]) for row in rows] == [(16, 4), (64, 1)]
    assert [row["x_shortest"] for row in rows] == [1.0, 1.0]
    assert rows[0]["us_per_token"] == pytest.approx(0.5 / 64 * 1e6)
    assert rows[1]["temp_bytes"] == 64_000
    assert "us/token" in table.length(rows)


def test_columns_are_aligned():
    lines = table.columns([["a", "bb"], ["long", "1"]]).splitlines()
    assert lines == ["a     bb", "----  --", "long   1"]


def test_ours_really_learns(capsys):
    flags = ["--candidates", "ours", "--lr", "0.01", "--no_matmul"]
    assert train.main([*TINY, *flags]) == 0
    shown = capsys.readouterr().out
    assert "blockwise attention" in shown
    assert "plain float32 matmul, GFLOP/s: not measured" in shown


def test_the_matmul_child_multiplies():
    child = candidates.start("matmul.py")
    try:
        options = {"threads": 1, "library": "numpy", "size": 64}
        request = {"do": "build", "shape": {}, "options": options}
        assert child.ask(request, 60)["flops_per_step"] == 2 * 64**3
        assert child.ask({"do": "steps", "n": 2}, 60)["seconds"] > 0
        assert child.ask({"do": "stop"}, 60) == {}
    finally:
        child.close()


@pytest.mark.slow
def test_the_real_loop_takes_turns(tmp_path):
    file = tmp_path / "record.json"
    flags = ["--candidates", "ours,loop", "--save_every", "2", "--json", str(file)]
    flags += ["--vocab", "1024", "--lr", "0.01", "--steps", "4"]
    assert train.main([*TINY, *flags]) == 0
    loop = json.loads(file.read_text())["candidates"][1]
    assert loop["name"] == "loop"
    assert loop["time"]["last_loss"] < loop["facts"]["first_loss"]


@pytest.mark.slow
def test_loss_memory_does_not_grow_with_tokens_times_vocabulary(monkeypatch):
    monkeypatch.setattr(grow, "LOSS_POINTS", ((512, 512), (512, 8192), (8192, 8192)))
    args = train.parse([*TINY, "--loss_memory"])
    small, wide, long = grow.loss_memory(args, train.read_shape(args))
    assert wide["plain_temp_bytes"] >= wide["logits_bytes"]
    assert long["plain_temp_bytes"] >= long["logits_bytes"]
    assert long["temp_bytes"] < long["logits_bytes"] / 2
    assert small["temp_bytes"] <= wide["temp_bytes"]
