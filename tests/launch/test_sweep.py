# SPDX-License-Identifier: Apache-2.0
"""Sweeps: points, order, resuming, failures, signals, tables, the other launchers."""

import json
import math
import pathlib
import signal
import sys
import time
import types

import points
import pytest
import sweep as sweep_command

from qwen_jax import config

ROOT = pathlib.Path(__file__).resolve().parents[2]
SWEEP = [sys.executable, ROOT / "launch/sweep.py"]

EXPERIMENT = """
import ml_collections

def get_config(arg=None):
    return ml_collections.ConfigDict({"optim": {"lr": 1e-3, "name": "adamw"}, "n": 2})

def sweep(add):
    add({"optim.lr": 0.1})
    add({"optim.lr": 0.2, "n": 5}, name="second one")
    add({"optim.lr": 0.3, "optim.name": "muon"})

def metrics():
    return {"loss": "min", "mfu": "max"}
"""

# The quickstart's own configuration, with a sweep to be added.
REAL = """
import runpy

get_config = runpy.run_path("experiments/quickstart.py")["get_config"]

def sweep(add):
"""

# Writes a step a call, as a run that is resumed would; ends as a file tells it to.
RUNNER = f"""#!{sys.executable}
import json, pathlib, signal, sys, time
flags = dict(a.split("=", 1) for a in sys.argv if a.startswith("--config."))
folder = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
folder.mkdir(parents=True, exist_ok=True)
path = folder / "metrics.jsonl"
lines = path.read_text().splitlines() if path.exists() else []
file = path.open("a")
def say(**row):
    print(json.dumps(row), file=file, flush=True)
lr = float(flags["--config.optim.lr"])
step = sum("loss" in line for line in lines)
say(step=step, event="resume" if step else "start")
def save(*_):
    say(step=step + 1, event="stop", reason="SIGTERM")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
say(step=step + 1, loss=lr + 1 / (step + 1), mfu=lr * (step + 1))
how = pathlib.Path("how").read_text()
if str(lr) in how and "fail" in how:
    print("no room\\nlast words", file=sys.stderr)
    sys.exit(4)
if str(lr) in how and "wait" in how:
    time.sleep(60)
if str(lr) not in how or "killed" not in how:
    say(step=step + 1, event="stop", reason="finished")
"""


@pytest.fixture
def sweep(shell):
    """Call with flags; `how` tells the runner what to do with which point."""
    shell.stand_in("runner", RUNNER)
    experiment = shell.folder / "x.py"
    experiment.write_text(EXPERIMENT)
    (shell.folder / "how").write_text("")
    workdir = shell.folder / "out"
    flags = ["--config", experiment, "--workdir", workdir]
    command = [*SWEEP, *flags, "--runner", shell.bin / "runner"]

    def call(*more, how="", code=0, start=False):
        (shell.folder / "how").write_text(how)
        if start:
            return shell.start(*command, *more, cwd=shell.folder)
        return shell(*command, *more, code=code, cwd=shell.folder)

    call.workdir, call.experiment, call.command = workdir, experiment, command
    call.shell = shell
    return call


def rows(sweep) -> dict[str, dict]:
    lines = (sweep.workdir / "results.jsonl").read_text().splitlines()
    return {row["name"]: row for row in map(json.loads, lines)}


def steps(sweep, name) -> int:
    return (sweep.workdir / name / "metrics.jsonl").read_text().count("loss")


# --- points ---


def expand(*calls, **kwargs) -> list[points.Point]:
    def body(add):
        for args in calls:
            add(*args)

    return points.expand(types.SimpleNamespace(sweep=body, __file__="x.py"))


def test_a_point_is_its_flags_and_a_name_fit_for_a_folder():
    tried = expand(({"a.b": 0.5, "s": "text"},), ({"a.c": [1, "x"]}, "my name/2"))
    assert tried[0].name == "b=0.5,s=text"
    assert tried[0].flags == ("--config.a.b=0.5", "--config.s=text")
    assert tried[1].name == "my_name_2"
    assert tried[1].flags == ("--config.a.c=[1, 'x']",)


def test_names_that_are_shortened_stay_different():
    long = "v" * 200
    names = {point.name for point in expand(({"k": long + "1"},), ({"k": long + "2"},))}
    assert len(names) == 2
    assert all(len(name) <= 80 for name in names)


@pytest.mark.parametrize(
    "calls",
    [
        [({"a": 1},), ({"a": 1}, "again")],
        [({"a": 1}, "one"), ({"a": 2}, "one")],
        [("a=1",)],
        [],
    ],
)
def test_twins_and_nonsense_are_refused(calls):
    with pytest.raises(config.InputError, match="sweep"):
        expand(*calls)


def test_every_value_reads_back_as_it_was():
    ml_collections = pytest.importorskip("ml_collections")
    values = {"f": 1e-4, "i": 3, "b": True, "t": "a, b", "n": None, "l": (1, 2)}
    node = ml_collections.ConfigDict(
        {"f": 1.0, "i": 1, "b": False, "t": "", "n": 1.5, "l": (0,)}
    )
    node = ml_collections.ConfigDict({**node, "n": None})
    [point] = expand((values,))
    pairs = [flag.removeprefix("--config.").split("=", 1) for flag in point.flags]
    changed = config.override(node, pairs)
    assert {key: changed[key] for key in values} == values


def test_direction_follows_the_name_unless_told():
    module = types.SimpleNamespace(
        metrics=lambda: ["eval_loss", "tokens_per_s", "step_s"]
    )
    assert points.directions(module) == {
        "eval_loss": "min",
        "tokens_per_s": "max",
        "step_s": "min",
    }
    module.metrics = lambda: {"mfu": "min"}
    assert points.directions(module) == {"mfu": "min"}


# --- running ---


def test_all_points_run_and_the_table_says_last_and_best(sweep):
    done = sweep()
    found = rows(sweep)
    assert list(found) == ["lr=0.1", "second_one", "lr=0.3,name=muon"]
    assert {row["state"] for row in found.values()} == {"done"}
    assert found["second_one"]["metrics"]["loss"] == {
        "last": 1.2,
        "best": 1.2,
        "best_step": 1,
    }
    table = (sweep.workdir / "results.md").read_text()
    assert table in done.stdout
    assert "| optim.lr | n | optim.name |" in table.splitlines()[0]
    assert "loss (best, min)" in table and "mfu (best, max)" in table


def test_finished_points_are_not_run_again(sweep):
    sweep()
    done = sweep()
    assert "3 points, 3 need nothing" in done.stdout
    assert steps(sweep, "lr=0.1") == 1


def test_a_failed_point_stops_no_other_and_is_tried_again(sweep):
    done = sweep(how="0.1 fail", code=1)
    assert {name: row["state"] for name, row in rows(sweep).items()} == {
        "lr=0.1": "failed",
        "second_one": "done",
        "lr=0.3,name=muon": "done",
    }
    assert "last words" in done.stdout and "lr=0.1 failed" in done.stderr
    sweep()
    assert steps(sweep, "lr=0.1") == 2 and steps(sweep, "second_one") == 1
    record = json.loads((sweep.workdir / "sweep/lr=0.1.json").read_text())
    assert (record["state"], record["attempts"]) == ("done", 2)


def test_a_run_that_stopped_early_with_exit_code_0_is_not_finished(sweep):
    sweep(how="0.2 killed", code=1)
    assert rows(sweep)["second_one"]["state"] == "stopped"
    sweep()
    assert steps(sweep, "second_one") == 2
    assert rows(sweep)["second_one"]["state"] == "done"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_saves_and_goes_on(sweep, number):
    process = sweep(how="0.2 wait", start=True)
    lines = iter(process.stdout.readline, "")
    assert any(line.startswith("second_one: started") for line in lines)
    log = sweep.workdir / "second_one/metrics.jsonl"
    while not (log.exists() and "loss" in log.read_text()):
        time.sleep(0.02)
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "to go on" in out
    assert "SIGTERM" in log.read_text()
    assert rows(sweep)["lr=0.3,name=muon"]["state"] == "not started"
    sweep()
    assert {row["state"] for row in rows(sweep).values()} == {"done"}
    assert (steps(sweep, "lr=0.1"), steps(sweep, "second_one")) == (1, 2)


def test_points_run_side_by_side_when_asked(sweep):
    process = sweep("--parallel", "3", how="0.1 0.2 0.3 wait", start=True)
    started = [process.stdout.readline() for _ in range(4)][1:]
    assert all(": started" in line for line in started)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_a_point_that_now_means_something_else_is_refused(sweep):
    sweep()
    changed = EXPERIMENT.replace('"n": 5}, name', '"n": 6}, name')
    sweep.experiment.write_text(changed)
    done = sweep(code=2)
    assert "--config.n=5" in done.stderr and "--config.n=6" in done.stderr
    assert "another --workdir" in done.stderr


def test_unknown_keys_are_refused_before_anything_runs(sweep):
    wrong = EXPERIMENT.replace('"optim.lr": 0.3', '"optim.lrr": 0.3')
    sweep.experiment.write_text(wrong)
    done = sweep(code=2)
    assert "lrr" in done.stderr and "did you mean 'lr'" in done.stderr
    assert not sweep.workdir.exists()


def test_points_are_checked_against_all_that_a_run_can_be_told(
    tmp_path, monkeypatch, capsys
):
    """Keys that the file leaves open are known; wrong ones come with the nearest."""
    monkeypatch.chdir(ROOT)
    experiment = tmp_path / "x.py"
    flags = ["--config", str(experiment), "--workdir", str(tmp_path), "--dry_run"]
    experiment.write_text(REAL + "    add({'train.z_loss': 1})\n")
    assert sweep_command.main(flags) == 0
    assert "--config.train.z_loss=1" in capsys.readouterr().out
    experiment.write_text(REAL + "    add({'train.z_los': 1})\n")
    assert sweep_command.main(flags) == 2
    assert "did you mean 'z_loss'" in capsys.readouterr().err


def test_a_file_without_a_sweep_is_refused(sweep):
    sweep.experiment.write_text("def get_config(arg=None): return {}\n")
    assert "no sweep(add)" in sweep(code=2).stderr


# --- other launchers ---


def test_dry_run_prints_what_would_run_and_runs_nothing(sweep):
    done = sweep("--dry_run", "--config.n=7")
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and not sweep.workdir.exists()
    assert lines[1].endswith(
        f"run --config {sweep.experiment} --workdir {sweep.workdir}/second_one "
        "--config.n=7 --config.optim.lr=0.2 --config.n=5"
    )


def test_commands_for_every_launcher():
    [point] = expand(({"a.b": 1}, "One Two"))
    run = ["run", "--x"]

    def command(launcher, more=""):
        found = sweep_command.launcher_command(launcher, more, point, run)
        return [pathlib.Path(found[0]).name, *found[1:]]

    assert command("print") == ["qwen-jax", *run]
    assert command("local")[1:] == ["-m", "qwen_jax", *run]
    named = ["--name", "qwen-jax-one-two", "--nodes", "2", "--", *run]
    assert command("slurm", "--nodes 2") == ["gpu_slurm.sh", *named]
    assert command("gke", "--nodes 2") == ["tpu_gke.py", *named]
    assert command("tpu", "--name p") == ["tpu_pod.sh", "--name", "p", "--", *run]


def test_submitted_points_are_not_submitted_twice(sweep):
    """With sbatch standing in; later the run folders tell what became of them."""
    shell = sweep.shell
    shell.stand_in("sbatch", 'cat > /dev/null; echo >> "$SEEN"; echo 7')
    seen = shell.folder / "seen"
    logs = f"--launcher_args=--log_dir {shell.folder / 'logs'}"
    command = [*sweep.command, "--launcher", "slurm", logs]

    def submit(*more):
        shell(*command, *more, cwd=shell.folder, SEEN=str(seen))
        return len(seen.read_text().splitlines())

    assert submit() == 3
    assert {row["state"] for row in rows(sweep).values()} == {"submitted"}
    assert submit() == 3
    finished = sweep.workdir / "lr=0.1" / "metrics.jsonl"
    finished.parent.mkdir()
    stop = {"step": 4, "event": "stop", "reason": "finished"}
    lines = [{"step": 4, "loss": 0.5}, stop]
    finished.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert submit("--collect") == 3
    assert rows(sweep)["lr=0.1"]["state"] == "done"
    assert rows(sweep)["lr=0.1"]["metrics"]["loss"]["best"] == 0.5
    assert submit("--resubmit") == 5  # the two that are not finished


def test_xmanager_adapter_has_the_same_points(sweep):
    script = ROOT / "launch/xmanager_launch.py"
    flags = [*sweep.command[2:6], "--sweep", "--dry_run", "--binary", "qwen-jax"]
    done = sweep.shell(sys.executable, script, *flags)
    assert done.stdout == sweep("--launcher", "print").stdout.replace(
        f"{sweep.shell.bin / 'runner'} ", "qwen-jax "
    )


def test_a_best_value_is_never_a_number_that_is_none(tmp_path):
    [point] = expand(({"a": 1},))
    folder = tmp_path / point.name
    folder.mkdir()
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": "nan"}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    [row] = points.collect(tmp_path, [point], {"loss": "min"})
    assert math.isnan(row["metrics"]["loss"]["last"])
    assert (row["metrics"]["loss"]["best"], row["step"]) == (2.0, 2)
