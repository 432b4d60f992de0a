# SPDX-License-Identifier: Apache-2.0
"""Two runs cannot write one folder, and a dead run never keeps the next one out."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from qwen_jax import config
from qwen_jax.checkpoint import lock

# Holds the lock of argv[1] until its standard input ends; argv[2] "fork" leaves an
# orphan behind that shares the lock's file description.
HOLDER = """
import os, sys, time
from qwen_jax.checkpoint import lock
held = lock.acquire(sys.argv[1], takeover="takeover" in sys.argv)
child = os.fork() if "fork" in sys.argv else 1
if child == 0:
    os.close(1)
    time.sleep(60)
print("held", child, flush=True)
sys.stdin.read()
held.release()
print("released", flush=True)
"""


@pytest.fixture
def hold(tmp_path):
    """A function starting another process that holds the lock of a folder."""
    started, orphans = [], []

    def start(*words):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, tmp_path, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        line = process.stdout.readline().split()
        assert line and line[0] == "held", process.communicate()[1]
        orphans.append(int(line[1]))
        return process

    yield start
    for pid in orphans:  # first: they share the pipes of the others
        if pid > 1:
            os.kill(pid, signal.SIGKILL)
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


def facts(folder):
    text = (pathlib.Path(folder) / lock.NAME).read_text()
    return json.loads(text) if text else {}


def pretend(folder, **changes):
    """The lock file as another process would have left it."""
    (folder / lock.NAME).write_text(json.dumps(lock._myself() | changes))


def test_a_second_writer_is_refused_and_told_by_whom(tmp_path, hold):
    process = hold()
    with pytest.raises(config.InputError) as caught:
        lock.acquire(tmp_path)
    text, holder = str(caught.value), facts(tmp_path)
    assert holder["pid"] == process.pid
    for word in (f"pid {process.pid}", holder["host"], holder["started"]):
        assert word in text
    assert f"kill {process.pid}" in text and "--takeover" in text
    assert str(tmp_path) in text


def test_the_same_process_cannot_take_it_twice(tmp_path):
    with lock.acquire(tmp_path), pytest.raises(config.InputError, match="in use by"):
        lock.acquire(tmp_path)
    lock.acquire(tmp_path).release()


def test_release_gives_it_free(tmp_path, hold):
    process = hold()
    assert process.communicate("")[0] == "released\n"
    held = lock.acquire(tmp_path)
    assert facts(tmp_path)["pid"] == os.getpid()
    held.release()
    held.release()
    assert facts(tmp_path) == {}
    with pytest.raises(config.InputError, match="released"):
        held.check()


@pytest.mark.parametrize("words", [(), ("fork",)])
def test_a_killed_run_is_replaced_silently(tmp_path, hold, words):
    """Also when a forked child of it lives on and keeps the kernel's lock alive."""
    process = hold(*words)
    process.kill()
    process.wait()
    with lock.acquire(tmp_path) as held:
        held.check()
        assert facts(tmp_path)["pid"] == os.getpid()
        with pytest.raises(config.InputError):
            lock.acquire(tmp_path)


def test_a_released_lock_is_free_though_a_forked_child_lives(tmp_path, hold):
    process = hold("fork")
    process.stdin.close()
    assert process.stdout.readline() == "released\n"
    lock.acquire(tmp_path).release()


def test_a_taken_over_run_learns_it_and_does_not_hurt_the_new_one(tmp_path, hold):
    mine = lock.acquire(tmp_path)
    mine.check()
    process = hold("takeover")
    with pytest.raises(
        config.InputError, match=f"pid {process.pid} .* took the folder"
    ):
        mine.check()
    mine.release()
    assert facts(tmp_path)["pid"] == process.pid
    with pytest.raises(config.InputError, match="in use by"):
        lock.acquire(tmp_path)


def test_a_removed_lock_file_is_noticed(tmp_path):
    with lock.acquire(tmp_path) as held:
        (tmp_path / lock.NAME).unlink()
        with pytest.raises(config.InputError, match="lost"):
            held.check()


def test_a_run_on_another_host_needs_takeover(tmp_path):
    pretend(tmp_path, host="node7", pid=4242, started="2030-01-01T00:00:00+00:00")
    with pytest.raises(config.InputError) as caught:
        lock.acquire(tmp_path)
    assert "pid 4242 on host node7 since 2030-01-01" in str(caught.value)
    assert "--takeover" in str(caught.value) and "kill" not in str(caught.value)
    lock.acquire(tmp_path, takeover=True).release()


@pytest.mark.parametrize(
    ("name", "job"), [("QWEN_JAX_JOB", "gke a"), ("SLURM_JOB_ID", "slurm 77")]
)
def test_a_job_that_is_started_again_elsewhere_goes_on(
    tmp_path, monkeypatch, name, job
):
    monkeypatch.setenv(name, job.removeprefix("slurm "))
    pretend(tmp_path, host="node7", pid=4242, job="another job")
    with pytest.raises(config.InputError, match="node7"):
        lock.acquire(tmp_path)
    pretend(tmp_path, host="node7", pid=4242, job=job)
    before = os.stat(tmp_path / lock.NAME).st_ino
    with lock.acquire(tmp_path):
        # A new file, by which a holder that still lives would learn its loss.
        assert os.stat(tmp_path / lock.NAME).st_ino != before
        assert json.loads((tmp_path / lock.NAME).read_text())["job"] == job


def test_pid_reuse_and_a_restarted_machine_do_not_count_as_alive(tmp_path):
    for changes in (
        {"ticks": "1"},  # our pid, but a process that started at another time
        {"pid": 2**22 + 5},  # no such process
        {"boot": "another"},
        {"pid": os.getppid(), "boot": "another"},
    ):
        pretend(tmp_path, **changes)
        lock.acquire(tmp_path).release()
    pretend(tmp_path)  # exactly us, alive: on a file system without flock
    with pytest.raises(config.InputError):
        lock.acquire(tmp_path)


def test_another_container_of_this_machine_is_judged_by_the_kernels_lock(
    tmp_path, hold
):
    pretend(tmp_path, namespace="pid:[1]", ticks="1")
    lock.acquire(tmp_path).release()
    hold()
    holder = facts(tmp_path) | {"namespace": "pid:[1]", "ticks": "1"}
    (tmp_path / lock.NAME).write_text(json.dumps(holder))
    with pytest.raises(config.InputError, match="in use by"):
        lock.acquire(tmp_path)


def test_a_zombie_holds_nothing(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as process:
        pretend(tmp_path, pid=process.pid, ticks=lock._start_ticks(process.pid))
        with pytest.raises(config.InputError, match="in use by"):
            lock.acquire(tmp_path)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        lock.acquire(tmp_path).release()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00" * 50])
def test_an_unreadable_lock_file_that_nobody_holds_is_taken(tmp_path, text):
    (tmp_path / lock.NAME).write_text(text)
    with lock.acquire(tmp_path):
        assert facts(tmp_path)["pid"] == os.getpid()


def test_of_many_takers_of_a_dead_runs_lock_one_wins(tmp_path, hold):
    """All start at once; those that lose are refused, none destroys the winner's."""
    hold("fork").kill()
    code = """
import sys
from qwen_jax.checkpoint import lock
sys.stdin.readline()
try:
    held = lock.acquire(sys.argv[1])
except Exception:
    print("refused", flush=True)
else:
    print("won", flush=True)
    sys.stdin.readline()
    held.check()
    print("still", flush=True)
"""
    takers = [
        subprocess.Popen(
            [sys.executable, "-c", code, tmp_path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(5)
    ]
    for taker in takers:
        taker.stdin.write("go\n")
        taker.stdin.flush()
    first = [taker.stdout.readline().strip() for taker in takers]
    assert sorted(first) == ["refused"] * 4 + ["won"]
    rest = [taker.communicate("end\n")[0].strip() for taker in takers]
    assert "still" in rest


def test_a_folder_that_cannot_be_written_is_an_input_error(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(config.InputError, match="it is a file, not a folder"):
        lock.check_writable(file)
    with pytest.raises(config.InputError, match="part of the path is a file"):
        lock.check_writable(file / "run")
    with pytest.raises(config.InputError, match="cannot write into"):
        lock.check_writable(tmp_path / ("x" * 300))

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(lock.tempfile, "mkstemp", refuse)
    with pytest.raises(config.InputError, match="no permission: choose another"):
        lock.acquire(tmp_path)


def test_a_read_only_file_system_is_an_input_error(tmp_path):
    """Root may write anywhere else, so a read-only mount is the honest test."""
    folder = tmp_path / "ro"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", folder]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a read-only tmpfs needs root")
    try:
        for path in (folder, folder / "new"):
            with pytest.raises(config.InputError, match="read-only file system"):
                lock.acquire(path)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_the_check_leaves_nothing_behind(tmp_path):
    lock.check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []
