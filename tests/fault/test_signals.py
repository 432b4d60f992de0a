# SPDX-License-Identifier: Apache-2.0
"""One signal stops at a step boundary, two end at once, nothing is swallowed."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from qwen_jax.fault import signals

WORKER = pathlib.Path(__file__).with_name("worker_signals.py")


@pytest.fixture
def start():
    """A function starting workers and waiting until their handlers stand."""
    started = []

    def run(*words):
        env = os.environ | {"PYTHONPATH": str(WORKER.parents[2])}
        process = subprocess.Popen(
            [sys.executable, WORKER, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def lines(process):
    out, err = process.communicate(timeout=60)
    return [x for x in out.splitlines() if x.startswith("stopped")], err


def wait_ready(process):
    while (line := process.stdout.readline()) != "ready\n":
        assert line, process.communicate()[1]


@pytest.fixture
def free_handlers():
    """Handlers as a program has them, whatever the test runner installed."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def eventually(condition):
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_close_gives_the_handlers_back(number, free_handlers):
    said = []
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    old_fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(old_fd)
    with signals.Stopper(say=said.append) as stopper:
        assert not stopper.should_stop() and stopper.reason == ""
        os.kill(os.getpid(), number)
        assert eventually(stopper.should_stop)
        assert stopper.should_stop()
        assert stopper.reason == signal.Signals(number).name
        assert eventually(lambda: said) and "once more ends at once" in said[0]
        stopper.close()
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    assert signal.set_wakeup_fd(old_fd) == old_fd
    assert not [t for t in threading.enumerate() if t.name == "signals"]


def test_a_request_from_inside_stops_too(free_handlers):
    with signals.Stopper(say=print) as stopper:
        stopper.request("checkpoints fail")
        assert stopper.should_stop() and stopper.reason == "checkpoints fail"
        stopper.request("something later")
        assert stopper.reason == "checkpoints fail"


def test_while_there_is_nothing_to_save_the_signal_goes_elsewhere(free_handlers):
    called = []
    with signals.Stopper(say=lambda text: None, at_once=called.append):
        os.kill(os.getpid(), signal.SIGTERM)
        assert eventually(lambda: called == ["SIGTERM"])
    with signals.Stopper(say=lambda text: None, at_once=called.append) as stopper:
        stopper.begin()
        os.kill(os.getpid(), signal.SIGTERM)
        assert eventually(stopper.should_stop)
    assert called == ["SIGTERM"]


def test_two_signals_within_a_moment_are_one_request(free_handlers):
    """A terminal sends Ctrl-C to a launcher as well, which passes it on."""
    with signals.Stopper(say=lambda text: None) as stopper:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert eventually(stopper.should_stop)
        time.sleep(0.05)  # a second one that counted would have ended pytest here


def test_an_ignored_interrupt_stays_ignored(free_handlers):
    """As in a job that a shell started in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with signals.Stopper(say=lambda text: None) as stopper:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        assert not stopper.should_stop()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_other_signals_are_not_taken_for_ours(free_handlers):
    hits = []
    old = signal.signal(signal.SIGUSR1, lambda *_: hits.append(1))
    with signals.Stopper(say=lambda text: None) as stopper:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert eventually(lambda: hits)
        time.sleep(0.02)
        assert not stopper.should_stop()
    signal.signal(signal.SIGUSR1, old)


def test_only_the_main_thread_may_install(free_handlers):
    caught = []

    def make():
        try:
            signals.Stopper()
        except RuntimeError as error:
            caught.append(str(error))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert caught and "main thread" in caught[0]


def test_asking_costs_next_to_nothing(free_handlers):
    with signals.Stopper(say=lambda text: None) as stopper:
        begin = time.perf_counter()
        for _ in range(10_000):
            stopper.should_stop()
        assert (time.perf_counter() - begin) / 10_000 < 50e-6


def test_one_signal_ends_in_order(start):
    process = start("loop")
    wait_ready(process)
    process.send_signal(signal.SIGTERM)
    (line,), err = lines(process)
    assert line.startswith("stopped") and line.endswith("SIGTERM")
    assert process.returncode == 0
    assert err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_process_that_is_stuck(start, number):
    process = start("stuck")
    wait_ready(process)
    process.send_signal(number)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(number)
    process.wait(timeout=30)
    assert process.returncode == 128 + number
    assert "ending now" in process.stderr.read()


def test_past_the_grace_time_it_ends_by_itself(start):
    process = start("grace")
    wait_ready(process)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "not stopped within 0.5 s" in process.stderr.read()


def two(start, mode):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    both = [start(mode, str(rank), port) for rank in range(2)]
    for process in both:
        wait_ready(process)
    return both


def test_a_signal_to_one_process_stops_both_at_the_same_step(start):
    both = two(start, "loop")
    time.sleep(0.5)
    both[1].send_signal(signal.SIGINT)
    begin = time.monotonic()
    (first,), _ = lines(both[0])
    (second,), _ = lines(both[1])
    assert time.monotonic() - begin < 30  # what a preempted machine gives us
    assert first == second and first.endswith("SIGINT in process 1")
    assert int(first.split()[1]) > 0
    assert [process.returncode for process in both] == [0, 0]


@pytest.mark.parametrize(
    "mode, told",
    [("compiles", [1]), ("compiles", [0, 1]), ("late", [0]), ("fails", [1])],
)
def test_while_one_has_not_begun_all_end_at_once_and_in_order(start, mode, told):
    """The coordinator ends last: the other would be aborted with it."""
    both = two(start, mode)
    for rank in told:
        both[rank].send_signal(signal.SIGTERM)
    begin = time.monotonic()
    outputs = [process.communicate(timeout=60) for process in both]
    assert time.monotonic() - begin < 10
    assert [process.returncode for process in both] == [0, 0], outputs
    (said,) = {out.splitlines()[-1] for out, _ in outputs}
    assert said in {f"left SIGTERM in process {rank}" for rank in told}
    for rank, (_, err) in enumerate(outputs):
        assert ("SIGTERM: " in err) == (rank in told) and "Traceback" not in err


def test_when_all_have_begun_a_signal_is_a_tidy_stop(start):
    both = two(start, "begun")
    both[0].send_signal(signal.SIGTERM)
    (first,), _ = lines(both[0])
    (second,), _ = lines(both[1])
    assert first == second and first.endswith("SIGTERM in process 0")
    assert [process.returncode for process in both] == [0, 0]


def test_sigterm_is_not_swallowed_after_distributed_initialize(start):
    """JAX's own handler takes every SIGTERM of a stuck process for a notice."""
    both = two(start, "stuck")
    for process in reversed(both):  # the coordinator last: the other dies with it
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
        assert process.returncode == 128 + signal.SIGTERM


def test_leaving_flushes_and_keeps_the_code():
    code = "from qwen_jax.fault import signals; print('last words'); signals.leave(7)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 7 and done.stdout == "last words\n"
