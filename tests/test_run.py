# SPDX-License-Identifier: Apache-2.0
"""Whole runs through the command line: resume, signals, damage, disk, refusals.

Most run in this process on a mesh of its 8 devices; those about signals, exit codes and
several processes start real ones.
"""

import contextlib
import json
import os
import shutil
import time

import jax
import numpy as np
import pytest

from qwen_jax import (
    checks,
    cli,
    config,
    experiment,
    main,
    metrics,
    prepare,
    session,
)
from qwen_jax.checkpoint import agree, lock
from qwen_jax.data import tokenizer
from tests import runs

MESH = ["--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
SHORT = ["--config.train.num_steps=9", "--config.eval.every_steps=3"]
LEAN = [
    "--config.sample.every_steps=0",
    "--config.eval.every_steps=0",
    "--config.export=false",
    "--config.checkpoint.every_steps=0",
]


@pytest.fixture(autouse=True)
def cache(monkeypatch):
    monkeypatch.setenv(
        "JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir
    )


class Here:
    """Runs in this process; says what was compiled and printed."""

    def __init__(self, monkeypatch, capsys, data):
        self.capsys, self.data, self.compiled = capsys, data, 0
        real = prepare.compile_step

        def compile_step(setup):
            self.compiled += 1
            return real(setup)

        monkeypatch.setattr(prepare, "compile_step", compile_step)

    def run(self, workdir, *more, data=None):
        """(exit code, standard output, standard error)."""
        self.compiled = 0
        self.capsys.readouterr()
        words = runs.words(workdir, data or self.data, *MESH, *SHORT, arg="adamw")
        code = cli.main([*words, *more])
        return code, *self.capsys.readouterr()

    def refused(self, workdir, *more, data=None):
        """The error of a run that ends with 2, compiles nothing and writes nothing."""
        before = runs.contents(workdir)
        code, out, err = self.run(workdir, *more, data=data)
        assert code == 2, out + err
        last = err.rpartition("error: ")
        assert last[1] and all(x.startswith("warning: ") for x in last[0].splitlines())
        assert "Traceback" not in err
        assert self.compiled == 0
        assert runs.contents(workdir) == before
        return err


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture
def here(monkeypatch, capsys, data):
    return Here(monkeypatch, capsys, data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """A run of 9 steps on 8 devices, to be copied."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        folder = jax.config.jax_compilation_cache_dir
        patch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
        words = runs.words(workdir, data, *MESH, *SHORT, arg="adamw")
        assert cli.main([*words, "--quiet"]) == 0
    return workdir


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def back_to(workdir, step):
    """Leave only the checkpoints up to a step, as a kill after it would."""
    for one in runs.finished(workdir):
        if one > step:
            shutil.rmtree(workdir / "checkpoints" / f"{one:08d}")


def test_a_run_folder_explains_itself(finished):
    facts = json.loads((finished / "run.json").read_text())
    assert facts["config"]["train"]["num_steps"] == 9 and facts["seed"] == 3
    assert facts["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
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


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The words that make a corpus of two sources."""
    folder = tmp_path_factory.mktemp("two")
    paths = [
        runs.corpus(folder / name, seed=i) for i, name in enumerate(("one", "two"))
    ]
    sources = [{"path": str(path)} for path in paths]
    return [
        f"--config.data.sources={sources}",
        *LEAN,
        "--config.checkpoint.every_steps=3",
    ]


def stages(*pairs):
    return f"--config.data.stages={list(pairs)}"


BOTH, ONE, TWO = {"one": 1.0, "two": 1.0}, {"one": 1.0}, {"two": 1.0}


@pytest.mark.parametrize(
    "before, after",
    [
        # No stages yet, and a decay stage that begins later.
        ([], [(9, BOTH), (10, TWO)]),
        # Cut off exactly where the run stands; a weight of 0 is none.
        ([(4, BOTH), (7, ONE | {"two": 0})], [(4, BOTH), (6, ONE), (10, TWO)]),
        # The last one holds on after its end, until another comes.
        ([(2, TWO), (4, BOTH)], [(2, TWO), (8, BOTH), (10, ONE)]),
    ],
)
def test_stages_that_have_not_begun_may_change(here, tmp_path, two, before, after):
    code, _, err = here.run(
        tmp_path / "run", *two, stages(*before), "--config.train.num_steps=6"
    )
    assert code == 0, err
    longer = [*two, stages(*after), "--config.train.num_steps=12"]
    for workdir in (tmp_path / "run", tmp_path / "whole"):
        code, _, err = here.run(workdir, *longer)
        assert code == 0, err
    assert runs.steps_made(tmp_path / "run") == runs.steps_made(tmp_path / "whole")


def test_stages_that_have_begun_stay(here, tmp_path, two):
    begun = [*two, stages((4, BOTH), (5, TWO)), "--config.train.num_steps=6"]
    code, _, err = here.run(tmp_path, *begun)
    assert code == 0, err
    for wrong, would in (
        ([], "[[6, {'one': 1.0, 'two': 1.0}]]"),
        ([(5, BOTH), (9, TWO)], "[[5, {'one': 1.0, 'two': 1.0}], [6, {'two': 1.0}]]"),
        ([(4, BOTH), (5, TWO), (9, ONE)], "], [5, {'two': 1.0}], [6, {'one': 1.0}]]"),
    ):
        err = here.refused(tmp_path, *begun, stages(*wrong))
        assert "data.stages: the 6 steps of this run were drawn in the stages" in err
        was = "[[4, {'one': 1.0, 'two': 1.0}], [6, {'two': 1.0}]]; those given would"
        assert was in err and would in err.partition(was)[2]
    err = here.refused(tmp_path, *begun, stages((4, BOTH), (6, TWO), (9, {"three": 1})))
    assert "no source is named 'three'" in err


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


def test_a_changed_shard_is_named(here, copied, data, tmp_path):
    changed = shutil.copytree(data, tmp_path / "other" / "corpus")
    lines = (changed / "words.jsonl").read_text().splitlines(keepends=True)
    (changed / "words.jsonl").write_text("".join(lines[:-1]))
    stored = ["--config.data.cache_dir=" + str(data.parent / "cache")]
    # The same path, so that only the content differs.
    with moved(data, changed):
        err = here.refused(copied, *stored)
    assert "'words.jsonl' of source 'corpus' changed" in err
    assert "Put the old files back" in err


@pytest.mark.parametrize("place", ["elsewhere/corpus", "elsewhere/renamed", "relative"])
def test_the_same_corpus_may_stand_elsewhere(
    here, finished, copied, data, tmp_path, monkeypatch, place
):
    """Its name in the mixture came from the path and decides the order: it is kept."""
    back_to(copied, 6)
    if place == "relative":
        monkeypatch.chdir(data.parent)
        folder = data.name
    else:
        folder = shutil.copytree(data, tmp_path / place)
    code, _, err = here.run(copied, *cache_of(data), data=folder)
    assert code == 0, err
    assert runs.steps_made(copied) == runs.steps_made(finished)
    assert runs.evaluations(copied) == runs.evaluations(finished)
    stored = json.loads((copied / "run.json").read_text())["config"]["data"]["sources"]
    assert [one["path"] for one in stored] == [str(folder)]
    # And again from there, at the old place.
    code, _, err = here.run(copied, "--config.train.num_steps=10")
    assert code == 0, err


def cache_of(data):
    return [f"--config.data.cache_dir={data.parent / 'cache'}"]


def test_another_corpus_elsewhere_is_refused_with_the_difference(
    here, copied, data, tmp_path
):
    folder = shutil.copytree(data, tmp_path / "elsewhere" / "corpus")
    (folder / "more.txt").write_text("the model learns")
    err = here.refused(copied, *cache_of(data), data=folder)
    assert "'more.txt' of source 'corpus' is new" in err
    (folder / "more.txt").rename(folder / "words.jsonl")
    err = here.refused(copied, *cache_of(data), data=folder)
    assert "'words.jsonl' of source 'corpus' changed (" in err
    # What is read of it is another matter.
    sources = [{"path": str(data), "text_field": "body"}]
    err = here.refused(copied, f"--config.data.sources={sources}")
    assert "data.sources: [" in err and "another place of the same corpus" in err


@contextlib.contextmanager
def moved(place, other):
    """`other` stands at `place` for a while."""
    aside = place.with_name("aside")
    place.rename(aside)
    shutil.copytree(other, place)
    try:
        yield
    finally:
        shutil.rmtree(place)
        aside.rename(place)


def test_a_model_folder_is_where_a_run_may_begin(here, finished, tmp_path):
    model = f"--config.train.init_from={finished / 'export'}"
    code, _, err = here.run(tmp_path / "next", model, *LEAN)
    assert code == 0, err
    begun = runs.losses(tmp_path / "next")[0]
    assert begun < runs.losses(finished)[0] - 1
    other = here.refused(
        tmp_path / "wrong", model, "--config.model.num_layers=3", *LEAN
    )
    assert "num_layers is 2 there, 3 here" in other
    assert not runs.finished(tmp_path / "wrong")


@pytest.fixture
def pretrained(finished, tmp_path):
    """A model folder whose tokenizer no run would learn from this corpus."""
    folder = shutil.copytree(finished / "export", tmp_path / "pretrained")
    texts = [" ".join(runs.WORDS).upper()] * 9
    tokenizer.train(texts, 310).save(folder)
    return folder


def test_a_model_to_begin_with_brings_its_tokenizer(here, copied, pretrained, tmp_path):
    workdir, its = tmp_path / "next", tokenizer.load(pretrained).fingerprint
    model = f"--config.train.init_from={pretrained}"
    code, out, err = here.run(workdir, model, *LEAN)
    assert code == 0, err
    assert out.count(f"tokenizer: that of {pretrained}\n") == 1
    assert tokenizer.load(workdir / "tokenizer").fingerprint == its
    facts = json.loads((workdir / "run.json").read_text())
    assert facts["tokenizer"] == its and facts["config"]["data"]["tokenizer"] == ""
    # It is the run's own now: the same command goes on when the folder is gone.
    shutil.rmtree(pretrained)
    code, out, err = here.run(workdir, model, *LEAN, "--config.train.num_steps=10")
    assert code == 0 and "tokenizer: that of" not in out, err
    assert tokenizer.load(workdir / "tokenizer").fingerprint == its
    assert len(runs.losses(workdir)) == 10


def test_another_tokenizer_than_that_of_the_weights_is_told(
    here, finished, pretrained, tmp_path
):
    model = f"--config.train.init_from={pretrained}"
    lean = [*LEAN, "--config.train.num_steps=3"]
    for folder, differs in ((finished / "tokenizer", True), (pretrained, False)):
        given = f"--config.data.tokenizer={folder}"
        code, out, err = here.run(tmp_path / folder.name, model, given, *lean)
        assert code == 0 and "tokenizer: that of" not in out, err
        note = f"note: data.tokenizer={folder} is not the tokenizer of {pretrained}"
        assert (note in out) == differs
        used = tokenizer.load(tmp_path / folder.name / "tokenizer").fingerprint
        assert used == tokenizer.load(folder).fingerprint
    (pretrained / "tokenizer.json").write_text("{")
    given = f"--config.data.tokenizer={finished / 'tokenizer'}"
    code, out, err = here.run(tmp_path / "broken", model, given, *lean)
    assert code == 0, err
    assert f"note: data.tokenizer is not compared with that of {pretrained}: " in out
    (pretrained / "tokenizer.json").unlink()
    code, out, err = here.run(tmp_path / "none", model, given, *lean)
    assert code == 0, err
    assert f"note: {pretrained} has no tokenizer.json to compare" in out


def test_a_model_without_a_published_form_is_trained_but_not_exported(here, tmp_path):
    code, _, err = here.run(tmp_path, "--config.model.qk_norm=false", *LEAN)
    assert code == 0, err
    assert len(runs.losses(tmp_path)) == 9 and not (tmp_path / "export").exists()


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
