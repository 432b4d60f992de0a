# SPDX-License-Identifier: Apache-2.0
"""doctor: what it finds, the fix it names, and that nothing missing makes it crash."""

import importlib.metadata
import json
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import time

import pytest

from qwen_jax import doctor

A_CPU = {"backend": "cpu", "count": 2, "kind": "cpu", "memory_bytes": None}


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")


@pytest.fixture
def no_probe(monkeypatch):
    """Without starting JAX in another process."""
    monkeypatch.setattr(doctor, "devices", lambda: A_CPU)


def hide(monkeypatch, *names):
    """As if these packages were not installed."""
    real = importlib.metadata.version

    def version(name):
        if name in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)


def test_here_all_is_well_and_devices_are_those_of_a_fresh_jax():
    start_s = time.monotonic()
    found = doctor.report()
    assert time.monotonic() - start_s < 30  # 2 s on an idle machine
    assert found["ok"] and found["problems"] == []
    assert found["devices"]["backend"] == "cpu" and found["devices"]["count"] >= 1
    assert found["packages"]["jax"] == importlib.metadata.version("jax")
    assert found["disk"]["free_bytes"] == pytest.approx(
        shutil.disk_usage(".").free, rel=0.1
    )
    text = doctor.render(found)
    assert "all well" in text and found["packages"]["jax"] in text


def test_json_is_the_report_and_the_exit_code_says_ok(no_probe, capsys, monkeypatch):
    assert doctor.main(as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["packages"]["qwen_jax"] is not None
    hide(monkeypatch, "optax")
    assert doctor.main() == 1
    assert "problem: optax is missing" in capsys.readouterr().out


def test_a_missing_core_package_is_a_problem_with_its_command(no_probe, monkeypatch):
    hide(monkeypatch, "grain")
    found = doctor.report()
    [problem] = found["problems"]
    assert problem.startswith("grain is missing: ") and "install.sh" in problem
    assert not found["ok"] and found["packages"]["grain"] is None


def test_a_wrong_version_is_a_problem_that_names_both(no_probe, monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(
        doctor.metadata, "version", lambda n: "0.4.1" if n == "jax" else real(n)
    )
    [problem] = doctor.report()["problems"]
    assert "jax 0.4.1" in problem and ">=0.10.2" in problem


def test_jax_that_fails_is_a_line_and_not_the_end(monkeypatch):
    monkeypatch.setattr(doctor, "_PROBE", "import no_such_driver")
    found = doctor.report()
    assert "no_such_driver" in found["devices"]["error"]
    assert "JAX finds no device" in doctor.render(found)
    monkeypatch.setattr(doctor, "_PROBE", "import os; os.abort()")
    assert "error" in doctor.devices()
    monkeypatch.setattr(doctor, "_PROBE", "import time; time.sleep(60)")
    assert "no answer" in doctor.devices(timeout_s=0.2)["error"]


def test_extras_say_what_they_lack_and_how_to_add_it(no_probe, monkeypatch):
    hide(monkeypatch, "pyarrow", "libtpu", "flatbuffers")
    extras = doctor.report()["extras"]
    assert extras["parquet"]["missing"] == ["pyarrow"]
    assert extras["tpu"]["missing"] == ["flatbuffers", "libtpu"]  # libtpu: jax[tpu]
    assert extras["parquet"]["command"].endswith("launch/install.sh parquet")
    assert extras["tensorboard"]["installed"]
    assert "test" not in extras


def test_outside_of_a_checkout_pip_is_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    command = doctor.install_command("hf")
    assert command == f"{sys.executable} -m pip install 'qwen_jax[hf]'"


def test_another_environment_is_named_in_the_command(monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(doctor.ROOT / ".venv"))
    assert doctor.install_command("hf").startswith(("launch/", "/"))
    monkeypatch.setattr(sys, "prefix", "/opt/my env")
    assert doctor.install_command("hf").startswith("VENV='/opt/my env' ")


@pytest.mark.parametrize(("mode", "private"), [(0o700, True), (0o770, False)])
def test_a_compile_cache_others_can_write_is_a_problem(
    no_probe, tmp_path, mode, private
):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "program").write_bytes(b"12345")
    folder.chmod(mode)
    found = doctor.report()
    cache = found["compile_cache"]
    assert (cache["private"], cache["files"], cache["bytes"]) == (private, 1, 5)
    assert any(f"chmod 700 {folder}" in p for p in found["problems"]) != private
    assert stat.S_IMODE(folder.stat().st_mode) == mode  # it looks, it does not touch


def test_no_cache_is_no_problem(no_probe, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    found = doctor.report()
    assert found["ok"] and "compile cache  off" in doctor.render(found)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/nowhere")
    assert doctor.compile_cache()["folder"] == "/nowhere/qwen_jax/compile"


def test_a_full_or_read_only_disk_is_a_problem(no_probe, monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=10**9)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    low, read_only = doctor.report()["problems"]
    assert "0.9 GiB free" in low and "--workdir" in low
    assert "read-only" in read_only


def test_huge_pages_are_advised_on_a_cpu(no_probe, monkeypatch):
    assert not any("GLIBC" in line for line in doctor.report()["advice"])
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    found = doctor.report()
    assert found["ok"] and found["malloc"]["huge_pages"] is False
    assert any("GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in x for x in found["advice"])


@pytest.mark.parametrize(("device", "extra"), [("nvidia_gpu", "cuda"), ("tpu", "tpu")])
def test_an_idle_accelerator_is_told_with_its_extra(
    no_probe, monkeypatch, device, extra
):
    real = doctor.machine()
    monkeypatch.setattr(doctor, "machine", lambda: real | {device: True})
    assert any(x.endswith(f"install.sh {extra}") for x in doctor.report()["advice"])


def test_it_answers_when_almost_nothing_is_installed(tmp_path):
    """A Python without site packages, and with no /proc to read."""
    script = (
        "import pathlib, sys; sys.path.insert(0, sys.argv[1]);"
        "from qwen_jax import doctor; doctor._text = lambda path: '';"
        "doctor._PROBE = 'import no_such_jax';"
        "sys.exit(doctor.main())"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, str(doctor.ROOT)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ),
    )
    assert done.returncode == 1, done.stderr
    assert "problem: qwen_jax is not installed as a package here" in done.stdout
    assert "problem: JAX finds no device" in done.stdout
    assert "unknown" in done.stdout
    assert pathlib.Path(sys.executable).name in done.stdout
