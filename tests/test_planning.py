# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax plan chunk`: what it says of chunks, and what it refuses."""

import json

import numpy as np
import pytest

from qwen_jax import cli, planning
from qwen_jax.plan import chunks as costs
from tests import runs

LARGER = [
    f"--config.{key}={value}"
    for key, value in {
        "data.seq_tokens": 1024,
        "train.batch_tokens": 8192,
        "model.max_positions": 2048,
        "model.width": 256,
        "model.num_layers": 6,
        "model.ffn_width": 768,
        "model.num_kv_heads": 2,
        "model.head_width": 32,
    }.items()
]


def words(*more):
    experiment = f"--config={runs.EXPERIMENT}:adamw"
    return ["plan", "chunk", experiment, *LARGER, "--scale=32", *more]


def test_the_fastest_that_fits_is_named(tmp_path, capsys):
    """Of two that fit that with less to do; less memory leaves smaller chunks."""

    def told(*more):
        assert cli.main(words("--json", str(tmp_path / "a.json"), *more)) == 0
        record = json.loads((tmp_path / "a.json").read_text())
        return capsys.readouterr().out, record

    out, record = told()
    rows = record["candidates"]
    # Every power of two from 128, with as many that wait as a row has.
    names = {(row["chunk_tokens"], row["live_chunks"]) for row in rows}
    assert names == {
        *((128, k) for k in (1, 2, 4, 8)),
        *((256, k) for k in (1, 2, 4)),
        *((512, k) for k in (1, 2)),
        (1024, 1),
    }
    assert all(row["measured_s"] is None for row in rows)
    times = [row["step_s"] for row in rows]
    assert times == sorted(times)
    best = rows[0]
    flags = "--config.train.chunk_tokens={chunk_tokens} --config.train.live_chunks="
    assert flags.format(**best) + str(best["live_chunks"]) in out
    by_name = {(x["chunk_tokens"], x["live_chunks"]): x for x in rows}
    waits = [by_name[128, k]["bytes"] for k in (1, 2, 4)]
    assert waits[2] - waits[1] == 2 * (waits[1] - waits[0]) > 0
    passes = [by_name[128, k]["work"]["flops"] for k in (1, 2, 4, 8)]
    assert passes == sorted(passes, reverse=True) and passes[0] > passes[-1]
    budget = (waits[0] + waits[1]) / 2 / 2**30
    out, record = told("--memory_gib", str(budget))
    fit = [row for row in record["candidates"] if row["bytes"] <= budget * 2**30]
    assert 0 < len(fit) < len(rows) and "does not fit" in out
    assert f"chunk_tokens={fit[0]['chunk_tokens']} " in out


def test_histograms_are_read_and_long_documents_cut(tmp_path, capsys):
    path = tmp_path / "lengths"
    path.write_text("10 3\n\n2000\n")
    np.testing.assert_array_equal(
        planning.read_lengths(str(path), 1, 0), [10, 10, 10, 2000]
    )
    assert cli.main([*words("--chunks=256x1"), f"--lengths={path}", "--scale=1"]) == 0
    assert "longest 2,000; rows of 1,024, so that 25.00% are cut" in (
        capsys.readouterr().out
    )


def test_rates_are_fitted_to_what_was_measured():
    """Steps that take what two rates make of their work are told to take just that."""
    truth = planning.Rates(2e9, 1e9, 0.01)
    works = [costs.Work(flops, flops / 10, n) for flops, n in ((4e9, 10), (1e10, 400))]
    made = [
        planning.Candidate(128, 1, 1, 1.0, 0.0, work, 1.0, truth.seconds(work))
        for work in works
    ]
    found = planning.fitted(made, planning.Rates(4e9, 2e9))
    assert [found.seconds(work) for work in works] == pytest.approx(
        [truth.seconds(work) for work in works]
    )
    one = planning.fitted(made[:1], planning.Rates(4e9, 2e9))
    assert one.seconds(works[0]) == pytest.approx(truth.seconds(works[0]))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--memory_gib=0.001"], "nothing fits in 0.00 GiB of a device: the least is"),
        (["--chunks=128"], "--chunks has '128', wanted pairs of tokens and chunks"),
        (
            ["--chunks=256x1,4096x1"],
            "train.chunk_tokens=4096 passes data.seq_tokens=1024",
        ),
        (["--lengths=nowhere"], "--lengths nowhere: no such file"),
        (["--measure=1", "--topology=v6e:2x2"], "--measure runs on this machine"),
        (["--measure=-1"], "--measure -1 is below 0"),
        (["--chunk=1x1"], "did you mean --chunks?"),
    ],
)
def test_what_is_no_plan_is_refused(more, told, capsys):
    assert cli.main(words(*more)) == 2
    assert told in capsys.readouterr().err


def test_a_line_that_is_no_length_is_told(tmp_path, capsys):
    path = tmp_path / "lengths"
    path.write_text("10\nten\n")
    assert cli.main(words(f"--lengths={path}")) == 2
    assert "line 2: 'ten'; wanted LENGTH [COUNT]" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_is_what_the_compiler_allocates(tmp_path):
    """Of programs compiled as a run compiles them, in a process of its own."""
    path = tmp_path / "a.json"
    flags = ["--chunks=512x2,1024x1", "--measure=2", f"--json={path}"]
    runs.run_ok(words(*flags), XLA_FLAGS="")
    rows = json.loads(path.read_text())["candidates"]
    assert len(rows) == 2
    for row in rows:
        assert row["bytes"] == pytest.approx(row["measured_bytes"], rel=0.25)
        assert row["measured_s"] > 0
