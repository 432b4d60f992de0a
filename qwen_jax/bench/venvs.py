# SPDX-License-Identifier: Apache-2.0
"""Environments of the peers, made on the spot: `python -m venv` and pip.

Each peer gets its own folder under ~/.cache/qwen_jax/bench (XDG_CACHE_HOME moves it),
so that no peer's dependencies touch ours or another's. A finished environment carries a
stamp with its requirements; a folder with another stamp, or none, is made anew.
Invariant: what is returned can run the peer's import.
Raises: NotInstalled with the reason in one line; the whole log lies beside the folder.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import sys


class NotInstalled(RuntimeError):
    """A peer's environment could not be made; the message says why."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A peer's pip requirements, oldest Python, and an import that proves it."""

    name: str
    requirements: tuple[str, ...]
    proof: str
    oldest_python: tuple[int, int] = (3, 11)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "hf",
            ("torch==2.13.0", "transformers==5.23.0"),
            "import torch; from transformers import Qwen3ForCausalLM",
        ),
        Recipe(
            "llama",
            ("llama-cpp-python==0.3.36", "gguf==0.19.0"),
            "import gguf, llama_cpp",
        ),
        Recipe(
            "tunix",
            ("google-tunix==0.1.7",),
            "from tunix.models.qwen3 import model",
        ),
        Recipe(
            "maxtext",
            ("maxtext[tpu]==0.2.5",),
            "import maxtext",
            oldest_python=(3, 12),
        ),
    )
}


def root() -> pathlib.Path:
    """The folder that holds the peers' environments."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(cache) / "qwen_jax" / "bench"


def home_of(name: str, folder: pathlib.Path) -> pathlib.Path:
    """The folder of a peer's environment."""
    return folder / f"venv-{name}"


def ensure(recipe: Recipe, folder: pathlib.Path, say=lambda text: None) -> pathlib.Path:
    """The Python of a ready environment, made now if it is not there.

    Raises:
      NotInstalled: no fitting Python, or pip failed.
    """
    home = home_of(recipe.name, folder)
    python = home / "bin" / "python"
    stamp = home / "requirements.json"
    wanted = json.dumps(recipe.requirements)

    def ready() -> bool:
        return stamp.is_file() and stamp.read_text() == wanted and python.exists()

    if ready():
        return python
    base = find_python(recipe.oldest_python)
    if base is None:
        text = ".".join(map(str, recipe.oldest_python))
        raise NotInstalled(f"needs Python {text} or newer, none found on PATH")
    say(f"making {home} ({', '.join(recipe.requirements)}); this takes minutes")
    log = folder / f"venv-{recipe.name}.log"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"venv-{recipe.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be making the same one
        if not ready():
            _make(recipe, home, base, log)
            stamp.write_text(wanted)
    return python


def _make(recipe: Recipe, home: pathlib.Path, base: str, log: pathlib.Path) -> None:
    shutil.rmtree(home, ignore_errors=True)
    python = str(home / "bin" / "python")
    with log.open("w") as out:
        _run([base, "-m", "venv", str(home)], out, log)
        pip = [python, "-m", "pip", "install", "--no-input"]
        _run([*pip, *recipe.requirements], out, log)
        _run([python, "-c", recipe.proof], out, log)


def _run(command: list[str], out, log: pathlib.Path) -> None:
    try:
        code = subprocess.run(
            command, stdout=out, stderr=subprocess.STDOUT, check=False, timeout=3600
        ).returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalled(f"{error} (log: {log})") from error
    if code:
        out.flush()
        raise NotInstalled(f"{_reason(log.read_text())} (log: {log})")


def _reason(text: str) -> str:
    """The last line of a log that names an error, else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no output"])[-1][:300]


def find_python(oldest: tuple[int, int]) -> str | None:
    """A Python of at least `oldest`: this one, or one on PATH or kept by pyenv."""
    if sys.version_info[:2] >= oldest:
        return sys.executable
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    names = [f"python3.{minor}" for minor in range(oldest[1], oldest[1] + 4)]
    found = [path for name in names if (path := shutil.which(name))]
    found += [str(p) for p in sorted(pyenv.glob("versions/3.*/bin/python"))]
    for path in found:
        version = _version(path)
        if version is not None and version >= oldest:
            return path
    return None


def _version(python: str) -> tuple[int, int] | None:
    """Version of an interpreter; None when it does not run (a shim without one)."""
    ask = "import sys; print(*sys.version_info[:2])"
    try:
        done = subprocess.run(
            [python, "-c", ask], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    major, minor = done.stdout.split()
    return int(major), int(minor)
