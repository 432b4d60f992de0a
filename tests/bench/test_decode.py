# SPDX-License-Identifier: Apache-2.0
"""`bench decode` and `bench moe`: flags, the equal-work check, ratios, real runs."""

import json
import sys

import pytest

from qwen_jax import config
from qwen_jax.bench import candidates, decode, moe, shape, venvs

TINY = [
    *("--layers=1", "--width=32", "--heads=2", "--kv_heads=1", "--head_width=16"),
    *("--ffn=48", "--vocab=256", "--tokens=8", "--new_tokens=5", "--rounds=2"),
]

# Speaks the protocol without a library: SECONDS a call.
FAKE = """
import line


def build(shape, options):
    facts = {{
        "params": {params},
        "tokens_per_step": {tokens_a_row} * shape["rows"],
        "versions": "fake 1",
        "setting": "none",
    }}
    return facts, lambda n: []


line._timed = lambda steps, n: {{"seconds": {seconds} * n, "cpu_s": 0.0, "losses": []}}
line.serve(build)
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """A scripts folder whose candidates take a given time a call."""
    (tmp_path / "line.py").write_text((candidates.SCRIPTS / "line.py").read_text())
    monkeypatch.setattr(candidates, "SCRIPTS", tmp_path)
    monkeypatch.setattr(venvs, "ensure", lambda recipe, folder, say: sys.executable)
    args = decode.flags.parse(decode.parser(), TINY)
    right = shape.num_params(decode._shape(args, 1))

    def make(tokens_a_row=5, **seconds):
        for name, value in seconds.items():
            text = FAKE.format(params=right, seconds=value, tokens_a_row=tokens_a_row)
            (tmp_path / f"{name}_decode.py").write_text(text)

    return make


def test_rates_and_ratios_by_rows(fakes, tmp_path, capsys):
    fakes(ours=0.5, hf=1.25)
    file = tmp_path / "record.json"
    assert decode.main([*TINY, "--rows=1,4", "--peers=hf", f"--json={file}"]) == 0
    one, four = json.loads(file.read_text())["results"]
    ours, hf = four["rows"]
    assert ours["tokens_per_s"] == pytest.approx(4 * 5 / 0.5)
    assert ours["faster_than"]["hf"]["median"] == pytest.approx(2.5)
    assert hf["faster_than"]["ours"]["median"] == pytest.approx(0.4)
    assert one["rows"][0]["tokens_per_s"] == pytest.approx(5 / 0.5)
    assert "2.50x" in capsys.readouterr().out


def test_other_work_is_not_a_time(fakes, capsys):
    fakes(ours=0.5)
    fakes(hf=0.1, tokens_a_row=4)
    assert decode.main([*TINY, "--rows=2", "--peers=hf"]) == 0
    shown = capsys.readouterr().out
    assert "hf: not the same work: 8 tokens a call, wanted 10" in shown
    fakes(ours=0.5, tokens_a_row=6)
    assert decode.main([*TINY, "--rows=2"]) == 1


def test_ours_really_decodes(capsys):
    assert decode.main([*TINY, "--rows=2", "--rounds=1"]) == 0
    shown = capsys.readouterr().out
    assert "2 x 8 tokens + 5 new" in shown
    assert "ours: qwen_jax, jax" in shown


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rows", "1,x"], "--rows is '1,x', wanted counts such as 1,8"),
        (["--rows", "0"], "--rows is '0'"),
        (["--peers", "hff"], "did you mean 'hf'"),
        (["--new_token", "3"], "did you mean '--new_tokens'"),
        (["--calls", "0"], "--calls is 0, wanted at least 1"),
        (["--kv_heads", "3"], "not a multiple of --kv_heads 3"),
    ],
)
def test_bad_flags_are_named(flags, words):
    with pytest.raises(config.InputError, match=words):
        decode.main(flags)


def test_every_way_to_compute_experts_is_measured(tmp_path, capsys):
    file = tmp_path / "record.json"
    small = ["--experts=4", "--experts_per_token=2", "--width=32", "--ffn=16"]
    few = ["--tokens=64", "--rounds=3", "--calls=1"]
    ways = "--ways=auto,blocks,ragged,capacity"
    assert moe.main([*small, *few, ways, f"--json={file}"]) == 0
    record = json.loads(file.read_text())
    rows = {(row["way"], row["pass"]): row for row in record["rows"]}
    assert {way for way, _ in rows} == {*ways[7:].split(","), "product"}
    assert rows["product", "forward"]["times_product"] == 1
    for (_, passed), row in rows.items():
        work = 6 * 64 * 2 * 32 * 16 * (3 if passed == "gradients" else 1)
        assert row["gflops_per_s"] == pytest.approx(work / row["median_s"] / 1e9)
        assert row["least"] <= row["times_product"] <= row["most"]
    assert rows["blocks", "forward"]["dropped"] == 0
    assert rows["capacity", "forward"]["dropped"] > 0
    assert "4 experts, 2 a token, d 32, f 16, 64 tokens" in capsys.readouterr().out
    with pytest.raises(config.InputError, match="did you mean 'blocks'"):
        moe.main(["--ways=block"])
