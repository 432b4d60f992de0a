# SPDX-License-Identifier: Apache-2.0
"""Two processes of one run save by the clock and end together, whoever is told to."""

import json
import signal
import time

import pytest

from tests import runs

LEAN = [
    "--config.sample.every_steps=0",
    "--config.eval.every_steps=0",
    "--config.export=false",
    "--config.checkpoint.every_steps=0",
    "--config.train.num_steps=5000",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture
def start_pair():
    """Start the two processes of a run; they do not outlive the test."""
    started = []

    def begin(arguments, **environment):
        started.extend(runs.start_pair(arguments, **environment))
        return started[-2:]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def wait_until(pair, condition):
    while not condition():
        for process in pair:
            assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def ends(pair, timeout_s=60):
    """[(exit code, standard output, standard error)] of both, within the time."""
    done = [process.communicate(timeout=timeout_s) for process in pair]
    return [
        (process.returncode, *texts) for process, texts in zip(pair, done, strict=True)
    ]


def test_saves_by_time_and_the_last_one_are_of_one_step(data, tmp_path, start_pair):
    by_time = ["--config.checkpoint.every_s=0.5", "--config.checkpoint.keep=99"]
    pair = start_pair(runs.words(tmp_path, data, *LEAN, *by_time, arg="adamw"))
    wait_until(pair, lambda: len(runs.finished(tmp_path)) > 1)
    pair[1].send_signal(signal.SIGTERM)
    (code, out, err), (other_code, _, other_err) = ends(pair)
    assert (code, other_code) == (0, 0), err + other_err
    made = len(runs.steps_made(tmp_path))
    assert f"stopped by SIGTERM in process 1 after step {made}; saved" in out
    *timed, last = runs.finished(tmp_path)
    assert len(timed) > 1 and last == made < 5000
    for step in (*timed, last):
        folder = tmp_path / "checkpoints" / f"{step:08d}"
        both = [json.loads((folder / f"local.{i}.json").read_text()) for i in range(2)]
        assert [one["step"] for one in both] == [step, step]  # batches read till then


@pytest.mark.parametrize("told", [[1], pytest.param([0, 1], marks=pytest.mark.slow)])
def test_while_it_compiles_all_end_at_once_and_tidily(told, data, tmp_path, start_pair):
    """No compile cache, 64 layers written out: compiling takes a minute."""
    slow = ["--config.train.loop=unroll", "--config.model.num_layers=64"]
    words = runs.words(tmp_path, data, *LEAN, *slow, arg="adamw")
    pair = start_pair(words, JAX_COMPILATION_CACHE_DIR="")
    wait_until(pair, (tmp_path / "tokenizer" / "tokenizer_config.json").is_file)
    begun = time.monotonic()
    for process in told:
        pair[process].send_signal(signal.SIGTERM)
    both = ends(pair)
    assert [code for code, _, _ in both] == [0, 0], both
    assert time.monotonic() - begun < 10
    for process, (_, out, err) in enumerate(both):
        assert "Traceback" not in err
        assert ("nothing to save yet" in err) == (process in told)
        assert ("nothing new to save; go on with:\n" in out) == (process == 0)
    assert not runs.finished(tmp_path) and not runs.steps_made(tmp_path)
    assert (tmp_path / "run.lock").read_text() == ""
