# SPDX-License-Identifier: Apache-2.0
"""Two processes train as one does: same order of samples, same losses, same text."""

import json

import jax
import numpy as np
import pytest

from qwen_jax import cli
from qwen_jax.data import loader
from tests import runs

STEPS = 20
LEAN = [
    f"--config.train.num_steps={STEPS}",
    "--config.sample.every_steps=6",
    "--config.sample.temperature=0",
    "--config.sample.max_tokens=12",
    '--config.sample.prompts=["the ", "some ", "one "]',  # rows do not fill the mesh
    "--config.eval.every_steps=20",
    "--config.checkpoint.every_steps=0",
]


def positions(workdir):
    """What each process stored of its place in the data."""
    folder = workdir / "checkpoints" / f"{STEPS:08d}"
    paths = sorted(folder.glob("local.*.json"))
    return [json.loads(path.read_text()) for path in paths]


def texts(workdir):
    """The samples of a run."""
    lines = (workdir / "samples.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_two_processes_have_the_losses_of_one(tmp_path, monkeypatch):
    data = runs.corpus(tmp_path / "corpus")
    one, two = tmp_path / "one", tmp_path / "two"
    pair = runs.start_pair(runs.words(two, data, *LEAN, arg="adamw"))
    folder = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
    assert cli.main([*runs.words(one, data, *LEAN, arg="adamw"), "--quiet"]) == 0
    ends = [runs.finish(process) for process in pair]
    for code, _, err in ends:
        assert code == 0, err
    first, second = (out for _, out, _ in ends)
    assert "finished 20 steps" in first
    assert all(line.startswith("[Gloo]") for line in second.splitlines())
    facts = json.loads((two / "run.json").read_text())
    assert facts["mesh"]["data"] == 2
    # What goes on with it is told of both processes, not of the one that tells it.
    assert facts["resume_command"].endswith(" --num_processes 2 --process_id I")
    assert first.rstrip().endswith("\n  in each of the 2 processes, with I = 0 to 1")

    # The same documents in the same rows: all that was read, and all that comes next.
    (alone,), both = positions(one), positions(two)
    assert len(both) == 2 and set(both[0]["lanes"]).isdisjoint(both[1]["lanes"])
    assert loader.merge_states(both) == alone
    made = [row for row in runs.rows(two) if "loss" in row]
    same = [row for row in runs.rows(one) if "loss" in row]
    for key in ("step", "tokens", "padding_share", "lr"):
        assert [row[key] for row in made] == [row[key] for row in same], key
    wanted = runs.losses(one)
    assert len(wanted) == STEPS and wanted[0] - wanted[-1] > 1, "nothing was learnt"
    np.testing.assert_allclose(runs.losses(two), wanted, rtol=1e-5)
    norms = [[row["grad_norm"] for row in rows] for rows in (made, same)]
    np.testing.assert_allclose(*norms, rtol=1e-4)

    # One writer: each line once, the evaluation over the rows of both.
    (score,), (want,) = runs.evaluations(two), runs.evaluations(one)
    np.testing.assert_allclose(score["eval_loss"], want["eval_loss"], rtol=1e-5)
    assert (two / "export" / "model.safetensors").is_file()

    # Greedy text is the same and written once: three prompts, three times and the last.
    samples, alone = texts(two), texts(one)
    assert samples == alone and len(samples) == 3 * 4
    assert len({row["text"] for row in samples}) > 1


@pytest.mark.slow
def test_rows_may_be_split_over_processes(tmp_path, monkeypatch):
    """Both read the same rows whole, and hold a part of each."""
    data = runs.corpus(tmp_path / "corpus")
    one, two = tmp_path / "one", tmp_path / "two"
    split = "--config.mesh.context=2"
    pair = runs.start_pair(runs.words(two, data, *LEAN, split, arg="adamw"))
    folder = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
    assert cli.main([*runs.words(one, data, *LEAN, arg="adamw"), "--quiet"]) == 0
    for code, _, err in [runs.finish(process) for process in pair]:
        assert code == 0, err
    facts = json.loads((two / "run.json").read_text())
    assert (facts["mesh"]["data"], facts["mesh"]["context"]) == (1, 2)
    both = positions(two)
    assert len(both) == 2 and both[0] == both[1]
    assert loader.merge_states(both[:1]) == positions(one)[0]
    np.testing.assert_allclose(runs.losses(two), runs.losses(one), rtol=1e-5)
    (score,), (want,) = runs.evaluations(two), runs.evaluations(one)
    np.testing.assert_allclose(score["eval_loss"], want["eval_loss"], rtol=1e-5)
    assert texts(two) == texts(one)
