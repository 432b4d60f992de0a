# SPDX-License-Identifier: Apache-2.0
"""Runs in chunks have the losses of runs of whole rows, whatever the chunks, the mesh
and the number of processes, and go on with other chunks."""

import json

import jax
import numpy as np
import pytest

from qwen_jax import cli
from tests import runs

STEPS = 8
LEAN = [
    f"--config.train.num_steps={STEPS}",
    "--config.train.batch_tokens=512",
    "--config.data.seq_tokens=64",
    "--config.sample.every_steps=0",
    "--config.checkpoint.every_steps=0",
]
MOE = {"num_experts": 4, "experts_per_token": 2, "ffn_width": 32, "balance_coef": 0.1}


@pytest.fixture(autouse=True)
def cache(monkeypatch):
    folder = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", folder)


def chunks(tokens, live=1):
    return [
        f"--config.train.chunk_tokens={tokens}",
        f"--config.train.live_chunks={live}",
    ]


def trained(workdir, data, *more):
    words = runs.words(workdir, data, *LEAN, *more, arg="adamw")
    assert cli.main([*words, "--quiet"]) == 0
    return workdir


def assert_same(one, other):
    """Of two run folders: what is counted, and losses and norms but for rounding."""
    made, wanted = (
        [row for row in runs.rows(folder) if "loss" in row] for folder in (one, other)
    )
    assert len(made) == len(wanted) == STEPS
    assert wanted[0]["loss"] - wanted[-1]["loss"] > 0.5, "nothing was learnt"
    for key in ("tokens", "lr"):
        assert [row[key] for row in made] == [row[key] for row in wanted], key
    times = {"tokens_per_s", "mfu", "step_s", "data_s"}
    for key in wanted[0].keys() - times - {"padding_share"}:
        got, want = ([row[key] for row in rows] for rows in (made, wanted))
        np.testing.assert_allclose(got, want, rtol=1e-4, err_msg=key)
    score, want = runs.evaluations(one)[-1], runs.evaluations(other)[-1]
    for key in ("eval_targets", "eval_loss", "eval_bits_per_byte"):
        np.testing.assert_allclose(score[key], want[key], rtol=1e-5, err_msg=key)


def test_a_run_in_chunks_is_a_run_of_whole_rows_and_goes_on_in_others(tmp_path):
    data = runs.corpus(tmp_path / "corpus")
    whole = trained(tmp_path / "whole", data)
    made = trained(tmp_path / "made", data, *chunks(16, 2))
    assert_same(made, whole)
    trained(tmp_path / "changed", data, *chunks(24), "--config.train.num_steps=4")
    assert_same(trained(tmp_path / "changed", data, *chunks(64)), whole)


@pytest.mark.slow
def test_losses_of_routers_are_those_of_the_whole_step(tmp_path):
    data = runs.corpus(tmp_path / "corpus")
    moe = [f"--config.model.moe={MOE}", "--config.export=false"]
    whole = trained(tmp_path / "whole", data, *moe)
    made = trained(tmp_path / "made", data, *moe, *chunks(24, 2))
    assert_same(made, whole)
    rows = [row for row in runs.rows(made) if "loss" in row]
    assert all(row["expert_load_max"] > 1 and row["balance_loss"] > 1 for row in rows)


STAGES = ["--config.mesh.stage=2", "--config.rules.layers=stage"]


@pytest.mark.parametrize(
    "moe", [pytest.param(x, marks=pytest.mark.slow) for x in (False, True)]
)
def test_a_run_in_chunks_through_stages(tmp_path, moe):
    data = runs.corpus(tmp_path / "corpus")
    more = [f"--config.model.moe={MOE}", "--config.export=false"] if moe else []
    whole = trained(tmp_path / "whole", data, *more)
    made = trained(tmp_path / "made", data, *more, *chunks(16, 2), *STAGES)
    assert_same(made, whole)


@pytest.mark.parametrize(
    "axes",
    [
        pytest.param(("data=2", "tensor=2"), id="rows apart"),
        pytest.param(("fsdp=1", "tensor=4"), id="rows shared", marks=pytest.mark.slow),
        pytest.param(("data=2", "stage=2"), id="stages", marks=pytest.mark.slow),
    ],
)
def test_two_processes_lay_out_one_step(tmp_path, axes):
    data = runs.corpus(tmp_path / "corpus")
    one, two = tmp_path / "one", tmp_path / "two"
    more = [*chunks(16, 2), *(f"--config.mesh.{axis}" for axis in axes)]
    name, size = axes[1].split("=")
    if name == "stage":
        more += STAGES
    words = runs.words(two, data, *LEAN, *more, arg="adamw")
    pair = runs.start_pair(words, devices=2)
    trained(one, data)
    for code, _, err in [runs.finish(process) for process in pair]:
        assert code == 0, err
    assert_same(two, one)
    facts = json.loads((two / "run.json").read_text())
    assert facts["mesh"][name] == int(size)


def test_what_does_not_fit_is_refused_before_anything_is_compiled(tmp_path, capsys):
    data = runs.corpus(tmp_path / "corpus")

    def refused(words, *more):
        flags = runs.words(tmp_path / "made", data, *LEAN, *more, arg="adamw")
        assert cli.main([*flags, "--quiet"]) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "made" / "run.json").exists()

    refused("chunk_tokens=128 passes data.seq_tokens=64", *chunks(128))
    refused("live_chunks=0 must be at least 1", *chunks(16, 0))
    refused("chunk_tokens=-1 must not be negative", *chunks(-1))
    refused("micro_rows=2 is of whole", *chunks(16), "--config.train.micro_rows=2")
    refused("document_mask=False", *chunks(16), "--config.train.document_mask=False")
    refused("did you mean 'bfloat16'", *chunks(16), "--config.train.kv_grad_dtype=bf16")
    further = ["--config.model.mtp_layers=1"]
    refused("set --config.train.mtp_coef=0", *chunks(16), *further)
