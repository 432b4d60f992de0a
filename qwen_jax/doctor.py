# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax doctor`: what is here, what is missing, and the command that adds it.

`report` looks at Python, the packages and extras, JAX's devices, memory, disk, the
compile cache and malloc's huge pages; `render` says it in lines; `main` prints it.
JAX is asked in a process of its own, so that a driver that crashes or a TPU that
another process holds is a line of the report and not its end.

Format of the report, also given by --json: a dict of plain values with the keys python,
packages, devices, machine, disk, compile_cache, malloc, extras, problems, advice, ok.
"problems" stop work and make the exit code 1, "advice" would help; each names its fix.
Units: sizes in bytes.
Raises: nothing; what cannot be found out is None in the report.
"""

import importlib.util
import json
import os
import pathlib
import platform
import shlex
import shutil
import stat
import subprocess
import sys
from importlib import metadata
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
GIB = 2**30
LEAST_DISK_BYTES = 2 * GIB
NOT_FOR_USERS = ("test",)

_PROBE = """
import json, jax
devices = jax.local_devices()
print(json.dumps({
    "backend": jax.default_backend(),
    "count": len(devices),
    "kind": devices[0].device_kind,
    "memory_bytes": (devices[0].memory_stats() or {}).get("bytes_limit"),
}))
"""


def report() -> dict[str, Any]:
    """All facts, problems and advice, as plain values."""
    requirements = _requirements()
    found: dict[str, Any] = {
        "python": {
            "version": platform.python_version(),
            "executable": sys.executable,
        },
        "packages": packages(requirements),
        "extras": extras(requirements),
        "devices": devices(),
        "machine": machine(),
        "disk": disk(pathlib.Path.cwd()),
        "compile_cache": compile_cache(),
        "malloc": malloc(),
    }
    found["problems"] = _problems(found, requirements)
    found["advice"] = _advice(found)
    found["ok"] = not found["problems"]
    return found


# --- packages ---


def _requirements() -> list[Any]:
    """What the project asks for, extras included; [] when that is not known."""
    if importlib.util.find_spec("packaging") is None:
        return []
    from packaging import requirements

    try:
        lines = metadata.requires("qwen_jax") or []
    except metadata.PackageNotFoundError:
        return []
    return [requirements.Requirement(line) for line in lines]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _applies(requirement: Any, extra: str = "") -> bool:
    marker = requirement.marker
    return marker is None or marker.evaluate({"extra": extra})


def packages(requirements: list[Any]) -> dict[str, str | None]:
    """Core package -> installed version, or None."""
    names = [r.name for r in requirements if _applies(r)]
    return {name: _version(name) for name in sorted({"qwen_jax", "jaxlib", *names})}


def extras(requirements: list[Any]) -> dict[str, dict[str, Any]]:
    """Extra -> what it lacks here, and the command that adds it."""
    if not requirements:
        return {}
    names = metadata.metadata("qwen_jax").get_all("Provides-Extra") or []
    found = {}
    for extra in sorted(set(names) - set(NOT_FOR_USERS)):
        missing = _missing(requirements, extra)
        found[extra] = {
            "installed": not missing,
            "missing": missing,
            "command": install_command(extra),
        }
    return found


def _missing(requirements: list[Any], extra: str) -> list[str]:
    """Names of absent packages that `extra` asks for, through extras of packages."""
    from packaging import requirements as parser

    missing = []
    for requirement in requirements:
        if _applies(requirement) or not _applies(requirement, extra):
            continue
        if _version(requirement.name) is None:
            missing.append(requirement.name)
            continue
        lines = metadata.requires(requirement.name) or []
        inner = [parser.Requirement(line) for line in lines]
        for name in requirement.extras:
            missing += _missing(inner, name)
    return sorted(set(missing))


def install_command(extra: str = "") -> str:
    """The command line that adds an extra (or mends the core) here."""
    script = ROOT / "launch" / "install.sh"
    if not script.exists():
        what = f"qwen_jax[{extra}]" if extra else "qwen_jax"
        return shlex.join([sys.executable, "-m", "pip", "install", what])
    prefix = pathlib.Path(sys.prefix)
    where = "" if prefix == ROOT / ".venv" else f"VENV={shlex.quote(str(prefix))} "
    return f"{where}{_short(script)} {extra}".rstrip()


def _short(path: pathlib.Path) -> str:
    """The path as one would type it from here."""
    here = pathlib.Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


# --- the machine ---


def devices(timeout_s: float = 60.0) -> dict[str, Any]:
    """What JAX runs on: backend, count, kind, memory of one; or the error."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {
            "error": f"JAX gave no answer in {timeout_s:.0f} s; is the device taken?"
        }
    except OSError as error:
        return {"error": str(error)}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"error": lines[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    """Platform, cores this process may use, memory, accelerators by their files."""
    memory = {}
    for line in _text("/proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        memory[name] = int(rest.split()[0]) * 1024 if rest.split() else None
    has_affinity = hasattr(os, "sched_getaffinity")
    return {
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count(),
        "memory_bytes": memory.get("MemTotal"),
        "memory_available_bytes": memory.get("MemAvailable"),
        "nvidia_gpu": os.path.exists("/dev/nvidiactl"),
        "tpu": any(pathlib.Path("/dev").glob("accel[0-9]*")),
    }


def disk(folder: pathlib.Path) -> dict[str, Any]:
    """Free space where runs would be written."""
    try:
        free_bytes = shutil.disk_usage(folder).free
    except OSError:
        free_bytes = None
    return {
        "folder": str(folder),
        "free_bytes": free_bytes,
        "writable": os.access(folder, os.W_OK),
    }


def compile_cache_folder() -> pathlib.Path | None:
    """Where compiled programs are kept; None when the user has switched that off."""
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if named == "":
        return None
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(named or os.path.join(root, "qwen_jax", "compile"))


def compile_cache() -> dict[str, Any]:
    """The cache's folder, its size, and whether only this user can write there."""
    folder = compile_cache_folder()
    if folder is None:
        return {"folder": None, "private": None, "files": 0, "bytes": 0}
    found: dict[str, Any] = {"folder": str(folder), "private": None}
    found |= {"files": 0, "bytes": 0, "writable": None}
    try:
        status = folder.stat()
        found["private"] = status.st_uid == os.getuid() and not (
            status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        )
        found["writable"] = os.access(folder, os.W_OK)
        sizes = [entry.stat().st_size for entry in os.scandir(folder)]
        found |= {"files": len(sizes), "bytes": sum(sizes)}
    except FileNotFoundError:
        found["private"] = True  # the first run makes it, for this user alone
    except OSError as error:
        found["error"] = str(error)
    return found


def malloc() -> dict[str, Any]:
    """Whether malloc takes huge pages, which is worth 12 % of a step on a CPU."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    kernel = _text("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "GLIBC_TUNABLES": tunables,
        "huge_pages": "glibc.malloc.hugetlb=1" in tunables.split(":"),
        "kernel": kernel.partition("[")[2].partition("]")[0] or None,
    }


def _text(path: str) -> str:
    """A small system file's text; "" where there is none."""
    try:
        return pathlib.Path(path).read_text()
    except OSError:
        return ""


# --- what follows from it ---


def _problems(found: dict[str, Any], requirements: list[Any]) -> list[str]:
    """Lines for what stops work, each with its fix."""
    problems = []
    if not requirements:
        problems.append(
            f"qwen_jax is not installed as a package here: {install_command()}"
        )
    for requirement in filter(_applies, requirements):
        version = _version(requirement.name)
        if version is None:
            problems.append(f"{requirement.name} is missing: {install_command()}")
        elif not requirement.specifier.contains(version, prereleases=True):
            problems.append(
                f"{requirement.name} {version} is installed, wanted "
                f"{requirement.specifier}: {install_command()}"
            )
    if "error" in found["devices"]:
        problems.append(f"JAX finds no device: {found['devices']['error']}")
    space = found["disk"]
    if space["free_bytes"] is not None and space["free_bytes"] < LEAST_DISK_BYTES:
        problems.append(
            f"only {_size(space['free_bytes'])} free at {space['folder']}, wanted "
            f"{_size(LEAST_DISK_BYTES)}: free some, or use a --workdir on another disk"
        )
    if not space["writable"]:
        problems.append(
            f"{space['folder']} is read-only: use a --workdir you can write to"
        )
    cache = found["compile_cache"]
    if cache["private"] is False:
        problems.append(
            f"others may write to the compile cache {cache['folder']}, and what lies "
            f"there is run as code: chmod 700 {shlex.quote(cache['folder'])}"
        )
    return problems


def _advice(found: dict[str, Any]) -> list[str]:
    """Lines for what would help, each with its fix."""
    advice = []
    backend = found["devices"].get("backend")
    if found["machine"]["nvidia_gpu"] and backend not in ("gpu", "cuda"):
        advice.append(f"a GPU is here, JAX does not use it: {install_command('cuda')}")
    if found["machine"]["tpu"] and backend != "tpu":
        advice.append(f"a TPU is here, JAX does not use it: {install_command('tpu')}")
    on_cpu_linux = backend == "cpu" and sys.platform == "linux"
    if on_cpu_linux and not found["malloc"]["huge_pages"]:
        advice.append(
            "malloc does not take huge pages, which costs about 12 % of a step on a "
            "CPU: export GLIBC_TUNABLES=glibc.malloc.hugetlb=1 before the start"
        )
    if on_cpu_linux and found["malloc"]["kernel"] == "never":
        advice.append(
            "the kernel gives no huge pages: echo madvise > "
            "/sys/kernel/mm/transparent_hugepage/enabled (as root)"
        )
    if found["compile_cache"].get("writable") is False:
        advice.append(
            f"the compile cache {found['compile_cache']['folder']} cannot be written: "
            "set JAX_COMPILATION_CACHE_DIR to a folder of yours"
        )
    return advice


def _size(count: int | None) -> str:
    return "unknown" if count is None else f"{count / GIB:.1f} GiB"


def render(found: dict[str, Any]) -> str:
    """The report as lines for a terminal."""
    has, space, cache = found["machine"], found["disk"], found["compile_cache"]
    device = found["devices"]
    memory = device.get("memory_bytes")
    shown = device.get("error") or (
        f"{device['count']} x {device['kind']} ({device['backend']})"
        + (f", {_size(memory)} each" if memory else "")
    )
    kept = f"{cache['files']} programs, {cache['bytes'] / 2**20:.0f} MiB"
    pages = "yes" if found["malloc"]["huge_pages"] else "no"
    lines = [
        f"python         {found['python']['version']}  {found['python']['executable']}",
        f"devices        {shown}",
        f"machine        {has['cores']} cores, {_size(has['memory_available_bytes'])} "
        f"of {_size(has['memory_bytes'])} free, {has['platform']}",
        f"disk           {_size(space['free_bytes'])} free at {space['folder']}",
        f"compile cache  {cache['folder'] or 'off'}: {kept}",
        f"huge pages     {pages} (kernel: {found['malloc']['kernel'] or 'unknown'})",
        "packages",
    ]
    lines += [
        f"  {name:<18} {version or 'missing'}"
        for name, version in found["packages"].items()
    ]
    lines.append("extras")
    for name, extra in found["extras"].items():
        lacking = f"add with: {extra['command']}"
        lines.append(f"  {name:<18} {'installed' if extra['installed'] else lacking}")
    lines += [f"advice: {line}" for line in found["advice"]]
    lines += [f"problem: {line}" for line in found["problems"]]
    lines.append("all well" if found["ok"] else f"{len(found['problems'])} problems")
    return "\n".join(lines)


def main(as_json: bool = False) -> int:
    """Print the report; 0 when nothing stops work, else 1."""
    found = report()
    print(json.dumps(found, indent=1) if as_json else render(found))
    return 0 if found["ok"] else 1
