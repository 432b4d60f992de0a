# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C to a whole run: saved, exit code 0 or the one that was asked for,
goes on as if unbroken."""

import pathlib
import shlex
import signal
import time

import pytest

from tests import runs

LEAN = [
    "--config.sample.every_steps=0",
    "--config.eval.every_steps=0",
    "--config.export=false",
    "--config.checkpoint.every_steps=0",
    "--config.train.num_steps=2000",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture
def start(request):
    """Start a run; it does not outlive the test."""
    started = []

    def begin(arguments, **environment):
        started.append(runs.start(arguments, **environment))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def wait_until(process, condition):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def steps(workdir):
    return [step for step, _ in runs.steps_made(workdir)]


def stop(process, number):
    """(seconds, exit code, standard output, standard error) after a signal."""
    begun = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return time.monotonic() - begun, process.returncode, out, err


def printed_command(out):
    """The words of the resume command that a run printed, without `qwen-jax`."""
    line = out.partition("; go on with:\n")[2]
    words = shlex.split(line.splitlines()[0])
    assert pathlib.Path(words[0]).name == "qwen-jax"
    return words[1:]


@pytest.mark.timeout(900)
def test_stopped_twice_and_gone_on_a_run_equals_an_unbroken_one(data, tmp_path, start):
    words = runs.words(tmp_path / "run", data, *LEAN, arg="adamw")
    made = 0
    for number, more, wanted in (
        (signal.SIGTERM, ["--exit_code_when_stopped=75"], 75),
        (signal.SIGINT, [], 0),
    ):
        process = start([*words, *more])
        enough = made + 20
        wait_until(process, lambda n=enough: len(steps(tmp_path / "run")) > n)
        seconds, code, out, err = stop(process, number)
        assert code == wanted, err
        assert seconds < 30 and "Traceback" not in err
        name = signal.Signals(number).name
        assert f"{name}: stopping after this step and saving" in err
        assert steps(tmp_path / "run") == list(
            range(1, len(steps(tmp_path / "run")) + 1)
        )
        made = len(steps(tmp_path / "run"))
        assert f"stopped by {name} after step {made}; saved" in out
        assert runs.finished(tmp_path / "run")[-1] == made < 2000
        assert runs.events(tmp_path / "run")[-1]["reason"] == name
        words = printed_command(out)
        assert "--exit_code_when_stopped" not in " ".join(words)
    last = [f"--config.train.num_steps={made + 5}"]
    runs.run_ok([*words, *last, "--exit_code_when_stopped=75"])  # it is not: it ends
    whole = runs.words(tmp_path / "whole", data, *LEAN, arg="adamw")
    runs.run_ok([*whole, *last])
    assert runs.steps_made(tmp_path / "run") == runs.steps_made(tmp_path / "whole")
    kinds = [row["event"] for row in runs.events(tmp_path / "run")]
    assert kinds == ["start", "stop", "resume", "stop", "resume", "stop"]


@pytest.mark.parametrize(
    ("number", "more", "wanted"),
    [
        (signal.SIGTERM, ["--exit_code_when_stopped=75"], 75),
        (signal.SIGINT, [], 0),
    ],
)
def test_a_signal_while_it_compiles_ends_at_once_and_tidily(
    number, more, wanted, data, tmp_path, start
):
    """No compile cache, 64 layers written out: compiling takes a minute."""
    slow = ["--config.train.loop=unroll", "--config.model.num_layers=64"]
    workdir = tmp_path / "run"
    words = runs.words(workdir, data, *LEAN, *slow, arg="adamw")
    process = start([*words, *more], JAX_COMPILATION_CACHE_DIR="")
    wait_until(process, (workdir / "tokenizer" / "tokenizer_config.json").is_file)
    seconds, code, out, err = stop(process, number)
    assert code == wanted, err
    assert seconds < 5 and "Traceback" not in err
    assert "nothing new to save" in out
    assert printed_command(out)[0] == "run"
    assert not runs.finished(workdir) and not steps(workdir)
    assert (workdir / "run.lock").read_text() == ""


def test_both_processes_of_a_run_end_with_the_code_that_was_asked_for(data, tmp_path):
    words = runs.words(
        tmp_path, data, *LEAN, "--exit_code_when_stopped=75", arg="adamw"
    )
    pair = runs.start_pair(words)
    try:
        wait_until(pair[1], lambda: len(steps(tmp_path)) > 5)
        pair[1].send_signal(signal.SIGTERM)
    finally:
        ends = [runs.finish(process, timeout_s=60) for process in pair]
    assert [code for code, _, _ in ends] == [75, 75], ends
    assert "stopped by SIGTERM in process 1" in ends[0][1]
    assert runs.finished(tmp_path) == [len(steps(tmp_path))]


@pytest.mark.slow
def test_a_second_signal_ends_at_once_and_loses_no_checkpoint(data, tmp_path, start):
    """Steps of seconds, so that the first signal cannot be answered yet."""
    long = ["--config.train.batch_tokens=524288", "--config.train.micro_rows=256"]
    words = runs.words(tmp_path, data, *LEAN, *long, arg="adamw")
    process = start([*words, "--config.checkpoint.every_steps=1"])
    wait_until(process, lambda: runs.finished(tmp_path))
    kept = runs.finished(tmp_path)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    seconds, code, _, err = stop(process, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM and seconds < 3
    assert "second signal: ending now, without saving" in err
    assert runs.finished(tmp_path)[: len(kept)] == kept


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_imports_ends_it_without_a_word(
    number, tmp_path, data, start
):
    process = start(runs.words(tmp_path / "run", data, arg="adamw"))
    maps = pathlib.Path(f"/proc/{process.pid}/maps")
    if not maps.exists():
        pytest.skip("tells where a process is by /proc")
    wait_until(process, lambda: "jaxlib" in maps.read_text())
    _, code, out, err = stop(process, number)
    assert code == -number and out + err == ""
    assert not (tmp_path / "run").exists()
