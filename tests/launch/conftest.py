# SPDX-License-Identifier: Apache-2.0
"""The scripts of launch/ as commands with stand-ins for what they call."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "launch"))  # its Python files import each other


class Shell:
    """Runs commands from the repository with `bin` first on PATH."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.env = {
            **os.environ,
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "JAX_PLATFORMS": "cpu",
        }
        ours = ("VENV", "PYTHON", "EXTRAS", "GLIBC_TUNABLES", "PYTHONUNBUFFERED")
        for name in ours:
            self.env.pop(name, None)

    def stand_in(self, name: str, text: str) -> pathlib.Path:
        """An executable called `name`: bash text, or Python when it says so."""
        path = self.bin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not text.startswith("#!"):
            text = "#!/usr/bin/env bash\n" + text
        path.write_text(text)
        path.chmod(0o755)
        return path

    def start(
        self, *command: object, cwd=ROOT, stdin: int = subprocess.DEVNULL, **env: str
    ):
        return subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            env=self.env | env,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *command: object, code: int = 0, cwd=ROOT, **env: str):
        process = self.start(*command, cwd=cwd, **env)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, f"{process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(command, code, out, err)


@pytest.fixture
def shell(tmp_path: pathlib.Path) -> Shell:
    return Shell(tmp_path)
