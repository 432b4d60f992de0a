# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C: the first asks for a tidy stop, the second ends at once.

After the first signal `Stopper.should_stop` turns true at the next step boundary, on
all processes of the run at the same step, whichever process got the signal; the caller
saves and exits. The second signal ends the process whatever it is doing.

Before the first step there is nothing to save, and it may be minutes away (a vocabulary
is learnt, the step compiled): then all processes end at once through `at_once`. That is
so while one of them has not come to `begin`, since without it no step can have ended on
the others. Process 0 ends last: with it ends the coordination service, and JAX aborts
a process that has lost it.

Source: the agreement is that of JAX's preemption sync point: every process publishes
how many steps it has begun, and the run stops at the maximum plus one. Deviations:
process 0 alone looks at the counts, so that all act alike even when one is late; it is
built on the coordination service's key-value store, because JAX's own takes SIGTERM
only (neither Ctrl-C nor a request from inside), counts it as a notice for ever, and so
leaves a stuck process that no SIGTERM can end.

How a stuck main thread is reached: Python runs signal handlers in the main thread
between bytecodes, so never while it compiles or waits in a collective. The wakeup file
descriptor is written by the C handler itself, and a thread of ours reads it. (A C
extension that never releases the interpreter lock can still only be ended with
SIGKILL.)

Units: steps are counted by calls of `should_stop`, once a step in every process.
Invariants: a single-process call costs well under a microsecond; two signals within
0.1 s count as one (a terminal and a launcher both send it); previous handlers come back
on `close`.
Raises: RuntimeError when created outside the main thread.
"""

import itertools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, Self

import jax

_instances = itertools.count()  # the same in every process: creation is collective
_SAME_REQUEST_S = 0.1
_AGREE_LIMIT_S = 30.0  # past it a process is gone; the others need not wait for it
_LEAVE_LIMIT_S = 10.0
_NOT_BEGUN = -1  # in place of a count of steps, and of the step to stop at: end at once


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Stopper:
    """Installs the handlers; create it after `jax.distributed.initialize`.

    Args:
      say: receives the one-line notices.
      grace_s: after the first signal the process ends itself (exit code 128 + signal)
        if `close` has not been called within this time; None leaves that to a second
        signal or to the scheduler's SIGKILL.
      at_once: ends the process; called with the reason, from a thread, when a signal
        comes before `begin`.
    """

    def __init__(
        self,
        *,
        say: Callable[[str], None] = _print,
        grace_s: float | None = None,
        at_once: Callable[[str], None] | None = None,
    ):
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("signals can be handled only from the main thread")
        self.reason = ""  # why the run stops: "SIGTERM", "SIGINT in process 3", ...
        self._say, self._grace_s, self._at_once = say, grace_s, at_once
        self._asked = False
        self._beginning = threading.Lock()
        self._closed = threading.Event()
        self._agreement = None
        if jax.process_count() > 1:
            self._agreement = _Agreement(self._closed, at_once)
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._write_fd, False)
        self._old_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        self._old = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            # A shell starts background jobs with SIGINT ignored: leave those alone.
            if signal.getsignal(number) != signal.SIG_IGN:
                self._old[number] = signal.signal(number, lambda *_: None)
        self._watcher = threading.Thread(
            target=self._watch, name="signals", daemon=True
        )
        self._watcher.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self) -> None:
        """From here on there is something to save: a signal asks for a tidy stop."""
        with self._beginning:
            self._at_once = None
        if self._agreement is not None:
            self._agreement.begin()

    def should_stop(self) -> bool:
        """Whether to save and leave now; call once a step in every process."""
        if self._agreement is None:
            return self._asked
        if not self._agreement.reached():
            return False
        self.reason = self._agreement.reason
        return True

    def request(self, reason: str) -> None:
        """Ask for a stop from inside the run, as the first signal does."""
        if self._asked:
            return
        self.reason = reason
        self._asked = True
        if self._agreement is not None:
            self._agreement.ask(f"{reason} in process {jax.process_index()}")

    def close(self) -> None:
        """Give the previous handlers back; twice is fine.

        Does not return where all processes are ending at once.
        """
        if self._closed.is_set():
            return
        self._closed.set()
        for number, handler in self._old.items():
            # None: installed by C code that Python cannot name; the default ends us.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._old_fd)
        os.write(self._write_fd, b"\0")
        self._watcher.join()
        os.close(self._read_fd)
        os.close(self._write_fd)
        if self._agreement is not None:
            self._agreement.join()

    def _watch(self) -> None:
        """The thread that sees the signals, whatever the main thread does."""
        first_s, first = 0.0, 0
        while True:
            left_s = None
            if first and self._grace_s is not None:
                left_s = max(0.0, first_s + self._grace_s - time.monotonic())
            ready = select.select([self._read_fd], [], [], left_s)[0]
            if self._closed.is_set():
                return
            if not ready:
                _end_now(first, f"not stopped within {self._grace_s:g} s: ending now")
            for number in os.read(self._read_fd, 64):
                if number not in self._old:
                    continue
                now_s = time.monotonic()
                if not first:
                    first, first_s = number, now_s
                    self._first(signal.Signals(number).name)
                elif now_s - first_s > _SAME_REQUEST_S:
                    _end_now(number, "second signal: ending now, without saving")

    def _first(self, name: str) -> None:
        """What the first signal does."""
        what = "stopping after this step and saving"
        with self._beginning:
            if self._at_once is not None:
                if self._agreement is None:
                    self._at_once(name)
                what = "nothing to save yet, ending with the other processes"
        self.request(name)
        self._say(f"{name}: {what}; once more ends at once without saving")


def _end_now(number: int, text: str) -> NoReturn:
    """Leave without any cleanup: nothing that is stuck can hold us up.

    A checkpoint under way stays invisible and is cleared at the next start.
    """
    if sys.stderr is not None and sys.stderr.isatty():
        text = f"\r\x1b[K\x1b[0m\x1b[?25h{text}"  # clear the line, show the cursor
    # Not through sys.stderr: its lock may be held by the thread that is stuck.
    os.write(2, f"{text}\n".encode())
    os._exit(128 + number)


class _Agreement:
    """All processes of a run agree on a step at which they stop, or to end at once.

    Keys: reason, of whoever asks; count/<i>, steps that process i has begun, published
    when it has seen a reason; decision, of process 0: where to stop and the reason, as
    several may ask; left/<i>, when process i ends at once.
    """

    def __init__(
        self, closed: threading.Event, at_once: Callable[[str], None] | None = None
    ):
        self.reason = ""
        self._tag = f"qwen_jax/stop/{next(_instances)}"
        self._closed, self._at_once = closed, at_once
        self._lock = threading.Lock()
        self._count = _NOT_BEGUN if at_once else 0  # calls of reached() so far
        self._frozen = False  # our count is published: wait for the others' first
        self._decided = threading.Event()
        self._stop_at = 0
        self._own_reason = ""
        self._wake = threading.Event()
        # One small request per process and interval; 0.25 s is felt as at once, and
        # 1,000 processes ask the coordinator 1,300 times a second.
        self._poll_s = 0.25 + jax.process_count() / 2000
        self._thread = threading.Thread(
            target=self._watch, name="stop-agreement", daemon=True
        )
        self._thread.start()

    def begin(self) -> None:
        """The steps begin; waits for a decision if one is being made without them."""
        with self._lock:
            if not self._frozen:
                self._count = max(self._count, 0)
                return
        self._decided.wait()
        self._count = max(self._count, 0)

    def reached(self) -> bool:
        """Whether this call, the n-th, is the one at which all processes stop."""
        with self._lock:
            self._count += 1
            count, frozen = self._count, self._frozen
        if not frozen:
            return False
        self._decided.wait()
        return count >= self._stop_at

    def ask(self, reason: str) -> None:
        """Announce a stop to all processes (from any thread)."""
        self._own_reason = reason
        self._wake.set()

    def join(self) -> None:
        """Wait for the thread, after `closed` is set."""
        self._wake.set()
        self._thread.join()

    def _watch(self) -> None:
        client, announced = _client(), False
        while not self._closed.is_set():
            if self._own_reason and not announced:
                announced = True
                client.key_value_set(
                    f"{self._tag}/reason", self._own_reason, allow_overwrite=True
                )
            reason = _try_get(client, f"{self._tag}/reason")
            if reason:
                self._decide(client, reason)
                return
            self._wake.wait(self._poll_s)
            self._wake.clear()

    def _decide(self, client: Any, reason: str) -> None:
        with self._lock:
            self._frozen = True
            count = self._count
        stop_at = count + 1  # where there is no decision
        try:
            client.key_value_set(f"{self._tag}/count/{jax.process_index()}", str(count))
            if jax.process_index() == 0:
                counts = list(map(int, self._counts(client)))
                stop_at = _NOT_BEGUN if _NOT_BEGUN in counts else max(counts) + 1
                client.key_value_set(f"{self._tag}/decision", f"{stop_at} {reason}")
            elif decision := self._decision(client):
                number, _, reason = decision.partition(" ")
                stop_at = int(number)
            if stop_at == _NOT_BEGUN and self._at_once is not None:
                self._leave(client, reason)
        finally:
            # Whatever happened to the coordinator, the main thread must not wait on.
            self.reason, self._stop_at = reason, stop_at
            self._decided.set()

    def _counts(self, client: Any) -> list[str]:
        """The counts of all processes, or of as many as answer in time."""
        deadline_s = time.monotonic() + _AGREE_LIMIT_S
        while True:
            pairs = client.key_value_dir_get(f"{self._tag}/count/")
            given_up = self._closed.is_set() or time.monotonic() > deadline_s
            if len(pairs) == jax.process_count() or given_up:
                return [text for _, text in pairs]
            time.sleep(0.02)

    def _decision(self, client: Any) -> str:
        """Process 0's decision, or "" where none comes."""
        deadline_s = time.monotonic() + _AGREE_LIMIT_S + 5
        while True:
            given_up = self._closed.is_set() or time.monotonic() > deadline_s
            text = _try_get(client, f"{self._tag}/decision")
            if text or given_up:
                return text
            time.sleep(self._poll_s / 5)

    def _leave(self, client: Any, reason: str) -> None:
        """End this process; process 0 when the others have."""
        client.key_value_set(f"{self._tag}/left/{jax.process_index()}", "left")
        if jax.process_index() == 0:
            deadline_s = time.monotonic() + _LEAVE_LIMIT_S
            while time.monotonic() < deadline_s:
                gone = client.key_value_dir_get(f"{self._tag}/left/")
                if len(gone) == jax.process_count():
                    break
                time.sleep(0.02)
            time.sleep(1)  # from their last word to their end
        self._at_once(reason)


def _try_get(client: Any, key: str) -> str:
    """The text at `key`, or "" when it is not there.

    An unreachable coordinator counts as not there: JAX itself ends the process then.
    """
    try:
        return client.key_value_try_get(key)
    except jax.errors.JaxRuntimeError:
        return ""


def _client() -> Any:
    # JAX has no public name for the coordination service's key-value store; Orbax and
    # Flax reach it the same way.
    from jax._src import distributed

    if distributed.global_state.client is None:
        raise RuntimeError(
            f"{jax.process_count()} processes without a coordination service: call "
            "jax.distributed.initialize() before creating a Stopper"
        )
    return distributed.global_state.client


def leave(code: int) -> NoReturn:
    """End the process now, with its output flushed but no other cleanup.

    For a multi-process run in which a peer has died: an ordinary exit waits in the
    coordination service for the dead peer's heartbeat limit (about 100 s) and aborts.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code)
