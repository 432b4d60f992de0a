# SPDX-License-Identifier: Apache-2.0
"""Chat templates rendered in a child process with limits on time, memory and output.

    with Sandbox() as sandbox:
        text = sandbox.render(template, {"messages": [...], ...})

The child (`template_child.py`) lives on between calls, so its start (0.2 s) is paid
once; one that broke a limit is ended, and the next call starts another. `shared()` is
the one of this process. Calls from several threads wait for each other.

Units: seconds, bytes, characters. A rendering may take CPU_S of the processor and
MEMORY_BYTES above what the interpreter takes (where the system has /proc; elsewhere the
time and the output are limited), and give OUTPUT_CHARS; a request holds REQUEST_BYTES.
WALL_S is for a child that neither computes nor answers.
Raises: config.InputError saying what the template did.
"""

import atexit
import functools
import importlib.util
import json
import os
import pathlib
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from typing import Any

from qwen_jax import config

CPU_S = 1.0
WALL_S = 60.0
MEMORY_BYTES = 256 * 2**20
OUTPUT_CHARS = 16 * 2**20
REQUEST_BYTES = 16 * 2**20
FIX = "take the template of the model's publisher, or remove it from the folder"


class Sandbox:
    """A handle on the child process."""

    def __init__(
        self,
        *,
        cpu_s: float = CPU_S,
        memory_bytes: int = MEMORY_BYTES,
        output_chars: int = OUTPUT_CHARS,
        wall_s: float = WALL_S,
    ):
        self._limits = [str(cpu_s), str(memory_bytes), str(output_chars)]
        self.cpu_s, self.wall_s = cpu_s, wall_s
        self._lock = threading.Lock()
        self._child = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()

    def render(self, template: str, variables: dict[str, Any]) -> str:
        """The template's text.

        Args:
          template: Jinja source.
          variables: what it sees, of JSON types; anything else becomes its type's name.
        Raises:
          config.InputError: the template has a mistake, refuses, fails or breaks a
            limit; the request is too large.
        """
        content = {"template": template, "variables": variables}
        try:
            data = json.dumps(content, default=lambda x: f"<{type(x).__name__}>")
        except (ValueError, RecursionError, TypeError) as error:
            raise config.InputError(
                f"the messages cannot be written as JSON: {error}; wanted dicts, "
                "lists, texts and numbers"
            ) from error
        if len(data) > REQUEST_BYTES:
            raise config.InputError(
                f"template and messages hold {len(data):,} bytes, at most "
                f"{REQUEST_BYTES:,} are rendered; shorten the conversation"
            )
        with self._lock:
            answer = self._ask(data.encode())
        if "text" in answer:
            return answer["text"]
        did = {
            "refused": "refuses this conversation",
            "syntax": f"cannot be read ({FIX})",
            "limit": f"goes beyond its limits ({FIX})",
            "failed": "fails on this conversation",
        }[answer["kind"]]
        if answer["kind"] == "limit":
            self.close()
        raise config.InputError(f"the chat template {did}: {answer['error']}")

    def _ask(self, data: bytes) -> dict[str, str]:
        """Send a request and wait; a child that dies or hangs is ended."""
        until = time.monotonic() + self.wall_s
        try:
            if self._child is None or self._child.poll() is not None:
                self.close()
                self._start()
                self._receive(until)
            self._send(data, until)
            return self._receive(until)
        except (EOFError, BrokenPipeError):
            code = self._child.wait()
        except TimeoutError:
            code = None
        except BaseException:  # such as Ctrl-C: an answer may be on its way
            self.close()
            raise
        self.close()
        words = f"its process ended with {code}"
        if code is None:
            words = f"no answer in {self.wall_s:g} s"
        elif code == -signal.SIGPROF:
            words = f"it took more than {self.cpu_s:g} s of the processor"
        return {"kind": "limit", "error": words}

    def _start(self) -> None:
        script = pathlib.Path(__file__).with_name("template_child.py")
        found = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
        folders = {os.path.dirname(os.path.dirname(spec.origin)) for spec in found}
        environment = {k: os.environ[k] for k in ("TZ",) if k in os.environ}
        # -I: nothing of the user's settings or the current folder is imported.
        words = [sys.executable, "-I", "-X", "utf8", str(script)]
        self._child = subprocess.Popen(
            [*words, os.pathsep.join(sorted(folders)), *self._limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C is for us
        )
        os.set_blocking(self._child.stdin.fileno(), False)

    def _send(self, data: bytes, until: float) -> None:
        pipe = self._child.stdin.fileno()
        left = memoryview(struct.pack("<Q", len(data)) + data)
        while left:
            _, ready, _ = select.select([], [pipe], [], _left(until))
            if ready:
                left = left[os.write(pipe, left[: 1 << 16]) :]

    def _receive(self, until: float) -> dict[str, str]:
        pipe, parts, size = self._child.stdout.fileno(), bytearray(), None
        while size is None or len(parts) < 8 + size:
            ready, _, _ = select.select([pipe], [], [], _left(until))
            if not ready:
                continue
            part = os.read(pipe, 1 << 20)
            if not part:
                raise EOFError
            parts += part
            if size is None and len(parts) >= 8:
                size = struct.unpack("<Q", parts[:8])[0]
        return json.loads(parts[8:])


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


@functools.cache
def shared() -> Sandbox:
    """The sandbox of this process, ended with it."""
    made = Sandbox()
    atexit.register(made.close)
    return made
