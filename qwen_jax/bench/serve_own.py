# SPDX-License-Identifier: Apache-2.0
"""The server that `qwen-jax bench serve --own` starts: `qwen-jax serve`, in a process
of its own on a free loopback port, with a model folder, or with random weights.

Random weights are made in a process of their own, too, so that the one that sends
requests holds no model: `python -m qwen_jax.bench.serve_own DIR SHAPE POSITIONS SEED`
with SHAPE as JSON. Their vocabulary is learnt from the sources of this package.
Formats: a Hugging Face folder; the server's lines go to DIR/serve.log.
Units: seconds. Invariants: the server is gone when `Own` is closed.
Raises: config.InputError for a server that does not begin, with its last lines.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

from qwen_jax import config

START_S = 600.0
LOOK_S = 0.05
KEY = "QWEN_JAX_API_KEY"


def make(folder: pathlib.Path, shape: dict, positions: int, seed: int) -> None:
    """Write a model of random weights in a child; a failure is an InputError."""
    command = [sys.executable, "-m", "qwen_jax.bench.serve_own", str(folder)]
    command += [json.dumps(shape), str(positions), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise config.InputError(f"no model of that shape can be made: {last}")


def environment() -> dict[str, str]:
    """That of children: this package is found, no key is wanted."""
    here = str(pathlib.Path(__file__).parents[2])
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    found = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    found.pop(KEY, None)
    return found


class Own:
    """A handle on a server of ours.

    Args:
      model: a model folder or a GGUF file.
      folder: where its log goes.
      flags: more words for `qwen-jax serve`.
      program: what runs it.
    """

    def __init__(
        self,
        model: str,
        folder: pathlib.Path,
        flags: list[str],
        program: tuple[str, ...] = ("-m", "qwen_jax", "serve"),
    ):
        self.log = folder / "serve.log"
        command = [sys.executable, *program, f"--model={model}", "--port=0", *flags]
        begun_s = time.monotonic()
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment(),
            )
        self._children: dict[int, str] = {}
        try:
            self.url = self._wait_for(r"listening at (http\S+),", begun_s)
            self._wait_for(r"( is ready after )", begun_s)
        except BaseException:
            self.close()
            raise
        self.ready_s = time.monotonic() - begun_s

    def _wait_for(self, pattern: str, begun_s: float) -> str:
        while True:
            ended = self.process.poll() is not None
            text = self.log.read_text(errors="replace")
            found = re.search(pattern, text)
            if found:
                return found[1]
            if ended or time.monotonic() - begun_s > START_S:
                what = f"ended with code {self.process.poll()}" if ended else "waits"
                last = " | ".join(text.strip().splitlines()[-2:])
                raise config.InputError(f"the server {what} before it is ready: {last}")
            time.sleep(LOOK_S)

    def note_children(self) -> int:
        """Remember the processes that the server has now; how many they are."""
        self._children = {}
        todo = [self.process.pid]
        while todo:
            for child in _children_of(todo.pop()):
                self._children[child] = _begun(child)
                todo.append(child)
        return len(self._children)

    def children_left(self) -> int:
        """How many of those noted still run."""
        return sum(
            bool(_begun(child)) and _begun(child) == begun
            for child, begun in self._children.items()
        )

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float) -> int | None:
        """The exit code, or None when it runs on."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        """End it, if it has not ended."""
        if self.process.poll() is None:
            self.terminate()
            if self.wait(5.0) is None:
                self.process.kill()
                self.process.wait()


def _children_of(pid: int) -> list[int]:
    """Children of all its threads; none where there is no /proc."""
    found = []
    for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, path.read_text().split())
        except OSError:  # the thread is gone meanwhile
            continue
    return found


def _begun(pid: int) -> str:
    """When a process began, as the system tells; "" for one that is over. A number may
    come again, but not with this."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    state, *fields = text.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]


def write(folder: pathlib.Path, shape: dict, positions: int, seed: int) -> None:
    """The model itself."""
    import qwen_jax
    from qwen_jax import export, models
    from qwen_jax.data import tokenizer
    from qwen_jax.models import spec as spec_lib

    files = sorted(pathlib.Path(qwen_jax.__file__).parent.rglob("*.py"))
    texts = [path.read_text() for path in files]
    words = tokenizer.train(texts, shape["vocab"])
    spec = spec_lib.Spec(
        vocab_size=words.vocab_size,
        width=shape["width"],
        num_layers=shape["layers"],
        num_heads=shape["heads"],
        num_kv_heads=shape["kv_heads"],
        head_width=shape["head_width"],
        ffn_width=shape["ffn"],
        max_positions=positions,
        # Tied, the likeliest next token would be the last one, for ever.
        tie_embedding=False,
    )
    export.write(spec, models.init(spec, seed), words, folder)


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), *map(int, sys.argv[3:5]))
