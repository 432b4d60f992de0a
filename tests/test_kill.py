# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at random instants of training and saving: nothing is lost, nothing differs.

A run is killed and started again until it has ended; then every number of every step
must equal an unbroken run's byte for byte, the same files must be there and no others.
After each kill the newest checkpoint that was visible must be the one that is resumed.
"""

import random
import time

import pytest

from tests import runs


def wait_until(process, condition, timeout_s=900):
    """Wait for a condition, or for the process to end; true if it is still running."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        if process.poll() is not None:
            return False
        time.sleep(0.01)
    return True


def trains(workdir, events):
    """Whether steps were made after the events that are known."""
    rows = runs.rows(workdir)
    return sum("event" in row for row in rows) > events and "loss" in rows[-1]


def kill_at_random(workdir, arguments, draw, environment):
    """Start the run, kill it at a random instant; (killed, what was visible then)."""
    before = len(runs.events(workdir))
    process = runs.start(arguments, **environment)
    try:
        # One in eight dies before it trains: while it imports, compiles or restores.
        if draw.random() < 1 / 8:
            time.sleep(draw.uniform(0, 8))
        elif wait_until(process, lambda: trains(workdir, before)):
            time.sleep(draw.uniform(0, 0.7))
        killed = process.poll() is None
        process.kill()
        _, err = process.communicate()
    finally:
        process.kill()
    assert killed or process.returncode == 0, err
    return killed, runs.finished(workdir)


def assert_same(workdir, reference):
    assert runs.steps_made(workdir) == runs.steps_made(reference)
    assert runs.evaluations(workdir) == runs.evaluations(reference)
    samples = (reference / "samples.jsonl").read_text()
    assert (workdir / "samples.jsonl").read_text() == samples
    assert runs.files(workdir) == runs.files(reference)


def disturb(folder, kills, seed, num_steps, **environment):
    """Kill runs until there were `kills`; the number of runs that came to their end."""
    data = runs.corpus(folder / "corpus")
    more = ("--quiet", f"--config.train.num_steps={num_steps}")
    reference = folder / "unbroken"
    runs.run_ok(runs.words(reference, data, *more), **environment)
    draw, done, ended = random.Random(seed), 0, 0
    workdir, kept, resumed = folder / "0", [], 0
    while True:
        arguments = runs.words(workdir, data, *more)
        if done == kills:
            runs.run_ok(arguments, **environment)
            killed, now = False, runs.finished(workdir)
        else:
            killed, now = kill_at_random(workdir, arguments, draw, environment)
        begun = [row for row in runs.events(workdir) if row["event"] == "resume"]
        if kept and len(begun) > resumed:
            assert begun[-1]["step"] == kept[-1], "a finished checkpoint was not used"
        assert not kept or now[-1] >= kept[-1], f"{kept} lost, {now} left"
        kept, resumed = now, len(begun)
        if killed:
            done += 1
            continue
        assert_same(workdir, reference)
        ended += 1
        if done == kills:
            return ended
        workdir, kept, resumed = folder / str(ended), [], 0


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_kills(tmp_path, kills):
    assert disturb(tmp_path, kills, seed=11, num_steps=40) >= 1


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_fifty_kills(tmp_path):
    # Compiled as users' runs are, not as the tests' programs.
    assert disturb(tmp_path, 50, seed=5, num_steps=300, XLA_FLAGS="") >= 1
