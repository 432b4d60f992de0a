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


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """(corpus, folder of a run that nobody disturbed)."""
    folder = tmp_path_factory.mktemp("unbroken")
    data = runs.corpus(folder / "corpus")
    runs.run_ok(runs.words(folder / "run", data, "--quiet"))
    return data, folder / "run"


def wait_until(process, condition, timeout_s=240):
    """Wait for a condition, or for the process to end; true if it is still running."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def kill_at_random(workdir, data, draw):
    """Start the run, kill it at a random instant; (killed, what was visible then)."""
    before = len(runs.events(workdir))
    process = runs.start(runs.words(workdir, data, "--quiet"))
    try:
        # One in eight dies before it trains: while it imports, compiles or restores.
        if draw.random() < 1 / 8:
            time.sleep(draw.uniform(0, 6))
        elif wait_until(process, lambda: len(runs.events(workdir)) > before):
            time.sleep(draw.uniform(0, 1.0))
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


def disturb(tmp_path, unbroken, kills, seed):
    """Kill until there were `kills`; (kills, runs that came to their end)."""
    data, reference = unbroken
    draw, done, ended = random.Random(seed), 0, 0
    workdir, kept = tmp_path / "0", []
    resumed_at = []
    while True:
        if done == kills:
            runs.run_ok(runs.words(workdir, data, "--quiet"))
            killed, now = False, runs.finished(workdir)
        else:
            killed, now = kill_at_random(workdir, data, draw)
        begun = [row for row in runs.events(workdir) if row["event"] == "resume"]
        if kept and len(begun) > len(resumed_at):
            assert begun[-1]["step"] == kept[-1], "a finished checkpoint was not used"
        resumed_at = begun
        assert not kept or now[-1] >= kept[-1], f"{kept} lost, {now} left"
        kept = now
        if killed:
            done += 1
            continue
        assert_same(workdir, reference)
        ended += 1
        if done == kills:
            return done, ended
        workdir, kept, resumed_at = tmp_path / str(ended), [], []


def test_four_kills(tmp_path, unbroken):
    assert disturb(tmp_path, unbroken, 4, seed=11)[0] == 4


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_fifty_kills(tmp_path, unbroken):
    done, ended = disturb(tmp_path, unbroken, 50, seed=5)
    print(f"{done} kills, {ended} runs brought to their end")
    assert done == 50
