# SPDX-License-Identifier: Apache-2.0
"""Whole runs through the command line: resume, signals, damage, disk, refusals.

Most run in this process on a mesh of its 8 devices; those about signals, exit codes and
several processes start real ones.
"""

import json
import os
import shutil
import time

import jax
import numpy as np
import pytest

from qwen_jax import (
    checks,
    config,
    experiment,
    main,
    metrics,
    prepare,
    session,
)
from qwen_jax.checkpoint import agree, lock
from tests import runs
from tests.run.here import LEAN, back_to


def test_a_run_folder_explains_itself(finished):
    facts = json.loads((finished / "run.json").read_text())
    assert facts["config"]["train"]["num_steps"] == 9 and facts["seed"] == 3
    sizes = {"data": 2, "fsdp": 2, "tensor": 2, "expert": 1, "context": 1, "stage": 1}
    assert facts["mesh"] == sizes
    assert "qwen-jax run --config" in facts["resume_command"]
    assert facts["versions"]["jax"] == jax.__version__
    assert 0 < facts["gzip_bits_per_byte"] < 8
    assert runs.finished(finished) == [6, 9]
    assert len(runs.losses(finished)) == 9
    assert [row["step"] for row in runs.evaluations(finished)] == [3, 6, 9]
    assert [row["event"] for row in runs.events(finished)] == ["start", "stop"]
    assert "<html" in (finished / "report.html").read_text()
    assert (finished / "export" / "model.safetensors").is_file()


PAIR = {"coordinator": "host:7", "num_processes": 2}


@pytest.mark.parametrize(
    "given, words, where",
    [
        ({}, "", ""),
        (
            {**PAIR, "process_id": 1},
            " --coordinator host:7 --num_processes 2 --process_id I",
            "\n  in each of the 2 processes, with I = 0 to 1",
        ),
        (
            {**PAIR, "num_processes": 1, "process_id": 0},
            " --coordinator host:7 --num_processes 1 --process_id 0",
            "",
        ),
        ({"distributed": True}, " --distributed", "\n  in every process of the job"),
        # The number alone has JAX look for the others, too.
        ({"num_processes": 4}, " --distributed", "\n  in every process of the job"),
    ],
)
def test_the_resume_command_is_one_for_every_process(given, words, where):
    options = main.Options("x.py", "a run", (("seed", "4"),), **given)
    line = (
        f"{main.program()} run --config x.py --workdir 'a run' --config.seed=4{words}"
    )
    assert main.command(options) == line
    assert main._go_on(options) == f"go on with:\n  {line}{where}"
    exp = experiment.resolve(str(runs.EXPERIMENT), [], "corpus")
    last = main.next_commands(options, None, exp).partition(f"  {line}")
    assert last[1] and last[2] == f" --config.train.num_steps=80{where}"


def test_a_resumed_run_equals_an_unbroken_one(here, finished, copied):
    back_to(copied, 6)
    code, out, err = here.run(copied)
    assert code == 0, err
    assert "after step 6" in out and "finished 9 steps" in out
    assert runs.steps_made(copied) == runs.steps_made(finished)
    assert runs.evaluations(copied) == runs.evaluations(finished)
    assert runs.files(copied) == runs.files(finished)


@pytest.mark.slow
def test_rows_that_are_split_over_devices(here, finished, tmp_path):
    """Training, held-out rows, samples and checkpoints, and on without the split."""
    split, short = tmp_path / "run", "--config.train.num_steps=6"
    code, out, err = here.run(split, "--config.mesh.context=2", short)
    assert code == 0, err
    assert "data 1, fsdp 2, tensor 2, expert 1, context 2" in out
    assert here.run(split)[0] == 0  # 7 to 9 on the mesh of the other run
    np.testing.assert_allclose(runs.losses(split), runs.losses(finished), rtol=1e-5)
    for one, other in zip(
        runs.evaluations(split), runs.evaluations(finished), strict=True
    ):
        assert one["step"] == other["step"]
        np.testing.assert_allclose(one["eval_loss"], other["eval_loss"], rtol=1e-5)
    samples = [(x / "samples.jsonl").read_text() for x in (split, finished)]
    assert samples[0].splitlines()[-2:] == samples[1].splitlines()[-2:]


def test_what_a_kill_cut_off_after_a_save_is_made_up_for(here, finished, copied):
    """Killed between the save of the last step and its evaluation, samples, export."""
    path = copied / "metrics.jsonl"
    kept = [line for line in runs.lines(copied) if '"step": 9, "eval' not in line]
    path.write_text("".join(kept))
    samples = (copied / "samples.jsonl").read_text()
    (copied / "samples.jsonl").unlink()
    shutil.rmtree(copied / "export")
    assert len(runs.evaluations(copied)) == 2
    assert here.run(copied)[0] == 0
    assert runs.evaluations(copied) == runs.evaluations(finished)
    assert (copied / "samples.jsonl").read_text() == samples
    assert runs.files(copied) == runs.files(finished)


def test_a_finished_run_is_made_longer(here, copied, tmp_path):
    longer = ["--config.train.num_steps=12", *LEAN]
    assert here.run(copied, *longer)[0] == 0
    assert here.run(tmp_path / "whole", *longer)[0] == 0
    assert runs.steps_made(copied) == runs.steps_made(tmp_path / "whole")


def test_what_may_change_may_change(here, copied):
    changes = {
        "mesh.data": 4,
        "mesh.tensor": 1,
        "train.remat": "full",
        "train.loop": "unroll",
        "model.reduce_dtype": "float32",
        "checkpoint.every_steps": 5,
        "eval.every_steps": 4,
        "data.max_bad_share": 0.5,
        "train.num_steps": 11,
    }
    words = [f"--config.{key}={value}" for key, value in changes.items()]
    code, _, err = here.run(copied, *words)
    assert code == 0, err
    assert len(runs.losses(copied)) == 11


@pytest.mark.parametrize(
    "rules",
    [
        {"vocab": "None", "ffn": "None"},
        {"embed": "('data', 'fsdp')"},
        {"batch": "('data',)", "heads": "None", "kv_heads": "None"},
    ],
)
def test_a_resumed_run_on_another_layout_has_the_same_losses(
    here, finished, copied, rules
):
    back_to(copied, 6)
    code, _, err = here.run(
        copied, *(f"--config.rules.{k}={v}" for k, v in rules.items())
    )
    assert code == 0, err
    # float32, sums in another order: the bar of the project.
    np.testing.assert_allclose(runs.losses(copied), runs.losses(finished), rtol=1e-5)
    assert runs.steps_made(copied)[:6] == runs.steps_made(finished)[:6]
    facts = json.loads((copied / "run.json").read_text())["config"]["rules"]
    assert facts["ffn"] == (None if "ffn" in rules else "tensor")


@pytest.mark.parametrize(
    "change, told",
    [
        ("model.num_layers=3", "model.num_layers: 2 in the checkpoint, 3 now"),
        ("optim.lr_peak=0.5", "optim.lr_peak: 0.003 in the checkpoint, 0.5 now"),
        ("seed=4", "seed: 3 in the checkpoint, 4 now"),
        ("train.batch_tokens=512", "train.batch_tokens: 256 in the checkpoint, 512"),
        ("train.z_loss=0", "train.z_loss: 0.0001 in the checkpoint, 0.0 now"),
        ("data.seq_tokens=64", "data.seq_tokens: 32 in the checkpoint, 64 now"),
    ],
)
def test_a_changed_configuration_is_refused_with_the_difference(
    here, copied, change, told
):
    begun = time.monotonic()
    err = here.refused(copied, f"--config.{change}")
    assert told in err and "new --workdir" in err
    assert "train.num_steps, " in err  # what may change
    assert time.monotonic() - begun < 20


def test_fewer_steps_than_were_made_are_refused(here, copied):
    err = here.refused(copied, "--config.train.num_steps=5")
    assert "has made 9 steps" in err and "--config.train.num_steps=9 or more" in err


def test_a_field_of_a_later_version_does_not_hinder_a_resume(finished, copied):
    exp = experiment.resolve(f"{runs.EXPERIMENT}:adamw", [], str(copied))
    exp, setup = prepare.set_up(exp)
    new = config.thaw(exp)
    old = json.loads(json.dumps(new))
    del old["train"]["document_mask"], old["log"]
    checks.resume({"step": 1, "config": old}, new, setup, copied)
    old["train"]["gone"] = 1
    with pytest.raises(
        config.InputError, match=r"train\.gone: 1 in the .*<absent> now"
    ):
        checks.resume({"step": 1, "config": old}, new, setup, copied)


def test_a_folder_in_use_is_refused(here, copied):
    with lock.acquire(copied):
        before = runs.contents(copied)
        code, _, err = here.run(copied)
        assert code == 2 and runs.contents(copied) == before
    assert f"pid {os.getpid()}" in err and "--takeover" in err
    assert here.compiled == 0


@pytest.mark.parametrize("name", ["params.embed_vd/c/0/0", "meta.json", "local.0.json"])
def test_a_damaged_checkpoint_is_passed_over(here, finished, copied, name):
    folder = copied / "checkpoints" / "00000009"
    path = folder / "arrays" / name if "/" in name else folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    code, out, err = here.run(copied)
    assert code == 0, err
    assert "warning: checkpoint step 9" in err and path.name in err
    assert "after step 6" in out
    assert runs.steps_made(copied) == runs.steps_made(finished)
    assert runs.finished(copied) == runs.finished(finished)


@pytest.mark.parametrize("how", ["flip", "cut", "no manifest"])
def test_only_damaged_checkpoints_are_an_error_and_no_fresh_start(here, copied, how):
    for step in (6, 9):
        folder = copied / "checkpoints" / f"{step:08d}"
        if how == "no manifest":
            (folder / "manifest.json").unlink()
            continue
        path = folder / "arrays" / "params.embed_vd" / "c" / "0" / "0"
        content = bytearray(path.read_bytes())
        content[0] ^= 1
        path.write_bytes(content[: -1 if how == "cut" else None])
    err = here.refused(copied)
    assert "no intact checkpoint" in err and "step 6" in err and "step 9" in err
    assert "move that folder away to start anew" in err


def test_a_batch_that_was_derived_stays_when_the_run_is_made_longer(here, tmp_path):
    unset = ["--config.train.num_steps=0", "--config.train.batch_tokens=0", *LEAN]
    tokens = "--config.train.tokens"
    assert here.run(tmp_path, *unset, f"{tokens}=1024")[0] == 0
    made = len(runs.losses(tmp_path))
    code, _, err = here.run(tmp_path, *unset, f"{tokens}=2048")
    assert code == 0, err
    assert len(runs.losses(tmp_path)) == 2 * made


def test_steps_that_keep_failing_end_the_run_with_the_reason(here, tmp_path):
    code, _, err = here.run(
        tmp_path,
        "--config.optim.lr_peak=1e30",
        "--config.optim.clip_norm=0",
        "--config.train.max_skipped=3",
        *LEAN,
    )
    assert code == 1 and "non-finite" in err and "--config.optim.lr_peak" in err
    assert "Traceback" not in err
    rows = [row for row in metrics.read(tmp_path / "metrics.jsonl") if "loss" in row]
    assert rows[-1]["skipped_steps"] == 3 and not np.isfinite(rows[-1]["grad_norm"])
    assert runs.events(tmp_path)[-1]["reason"] == "error"


def test_a_report_that_fails_does_not_fail_the_run(here, copied, monkeypatch):
    def broken(workdirs):
        raise RuntimeError("no ink")

    monkeypatch.setattr(session.report, "write", broken)
    code, out, err = here.run(copied)
    assert code == 0 and "report.html was not written: no ink" in out, err


def test_a_save_that_fails_ends_the_run_and_keeps_the_older_ones(
    here, copied, monkeypatch
):
    from qwen_jax.checkpoint import saving

    full = "it needs 5 bytes and 1 are free in here; free some space"
    monkeypatch.setattr(saving, "_no_room", lambda job: full)
    code, _, err = here.run(copied, "--config.train.num_steps=20")
    assert code == 2 and "checkpoint of step 12 was not saved" in err
    assert "free some space" in err and "qwen-jax run" in err
    assert runs.finished(copied) == [6, 9]
    monkeypatch.undo()
    monkeypatch.setenv(
        "JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir
    )
    assert here.run(copied, "--config.train.num_steps=12")[0] == 0
    assert len(runs.losses(copied)) == 12


def test_how_long_a_save_may_wait_is_what_the_configuration_says(
    here, copied, monkeypatch
):
    limits, real = [], agree.gather

    def gather(tag, value, timeout_s):
        limits.append(timeout_s)
        return real(tag, value, timeout_s)

    monkeypatch.setattr(agree, "gather", gather)
    back_to(copied, 6)
    code, _, err = here.run(copied, "--config.checkpoint.timeout_s=77", *LEAN)
    assert code == 0, err
    assert limits and set(limits) == {77.0}


@pytest.mark.parametrize(("first", "traced"), [(8, True), (5, False)])
def test_a_profile_that_a_resume_or_the_end_cuts(here, copied, first, traced):
    """Steps 7 to 9 are made; a window from 5 began before the resume."""
    back_to(copied, 6)
    window = [f"--config.log.profile_from={first}", "--config.log.profile_steps=3"]
    code, _, err = here.run(copied, *window, *LEAN)
    assert code == 0, err
    assert bool(list(copied.rglob("*.xplane.pb"))) == traced


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("train.max_skipped=0", "max_skipped=0 must be at least 1"),
        ("sample.max_tokens=0", "max_tokens=0 must be at least 1"),
        ("checkpoint.every_steps=-1", "every_steps=-1 must not be negative"),
        ("checkpoint.timeout_s=0", "timeout_s=0.0 must be positive"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(here, tmp_path, change, told):
    assert told in here.refused(tmp_path / "run", f"--config.{change}")


def test_a_url_as_run_folder_is_refused(here):
    code, _, err = here.run("gs://bucket/run")
    assert code == 2 and "wanted a folder that every process" in err
