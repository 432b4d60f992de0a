# SPDX-License-Identifier: Apache-2.0
"""Peers' environments: made once, remade for other wants, never silent."""

import pathlib
import sys

import pytest

from qwen_jax.bench import venvs

RECIPE = venvs.Recipe("toy", ("toy==1",), "import json")


@pytest.fixture
def commands(monkeypatch):
    """Commands that would have run; the venv command leaves a Python behind."""
    seen = []

    def run(command, out, log):
        seen.append(command)
        if "venv" in command:
            python = pathlib.Path(command[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.symlink_to(sys.executable)

    monkeypatch.setattr(venvs, "_run", run)
    return seen


def test_made_once_and_again_when_the_requirements_change(tmp_path, commands):
    python = venvs.ensure(RECIPE, tmp_path)
    assert python == tmp_path / "venv-toy" / "bin" / "python"
    assert commands[1][-1] == "toy==1"
    assert commands[2] == [str(python), "-c", "import json"]
    venvs.ensure(RECIPE, tmp_path)
    assert len(commands) == 3
    venvs.ensure(venvs.Recipe("toy", ("toy==2",), "import json"), tmp_path)
    assert commands[4][-1] == "toy==2"


def test_a_half_made_environment_is_made_anew(tmp_path, commands):
    python = tmp_path / "venv-toy" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    venvs.ensure(RECIPE, tmp_path)
    assert len(commands) == 3


def test_an_environment_that_lost_its_python_is_made_anew(tmp_path, commands):
    python = venvs.ensure(RECIPE, tmp_path)
    python.unlink()
    assert venvs.ensure(RECIPE, tmp_path).exists() and len(commands) == 6


def test_a_failing_install_tells_the_reason_and_the_log(tmp_path):
    code = "print('ERROR: no such thing'); print('bye'); raise SystemExit(1)"
    log = tmp_path / "log"
    with (
        log.open("w") as out,
        pytest.raises(venvs.NotInstalled, match="no such thing") as caught,
    ):
        venvs._run([sys.executable, "-S", "-c", code], out, log)
    assert str(log) in str(caught.value)


def test_a_python_too_old_is_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(venvs, "find_python", lambda oldest: None)
    recipe = venvs.Recipe("toy", (), "", oldest_python=(3, 99))
    with pytest.raises(venvs.NotInstalled, match=r"needs Python 3\.99"):
        venvs.ensure(recipe, tmp_path)


def test_pythons_that_do_not_run_or_are_old_are_passed_over(tmp_path, monkeypatch):
    def script(name, text):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    script("python3.97", "exit 127")  # a shim without an interpreter behind it
    script("python3.98", "echo 3 11")
    good = script("python3.99", "echo 3 99")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "none"))
    assert venvs.find_python((3, 97)) == str(good)
    assert venvs.find_python(sys.version_info[:2]) == sys.executable
