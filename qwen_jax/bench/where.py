# SPDX-License-Identifier: Apache-2.0
"""Where a number was measured: the machine in words, the commit of the code.

Raises nothing: what cannot be told is left out or "".
"""

from __future__ import annotations

import os
import pathlib
import platform
import subprocess


def machine() -> str:
    """Processor, cores, memory, Python, in words."""
    model = platform.processor() or platform.machine()
    cpuinfo, meminfo = pathlib.Path("/proc/cpuinfo"), pathlib.Path("/proc/meminfo")
    if cpuinfo.is_file():
        text = cpuinfo.read_text()
        names = [
            x.split(":")[1].strip() for x in text.splitlines() if "model name" in x
        ]
        model = (names or [model])[0]
        flags = next((x for x in text.splitlines() if x.startswith("flags")), "")
        model += (
            " AVX-512" if "avx512f" in flags else " AVX2" if "avx2" in flags else ""
        )
    memory = ""
    if meminfo.is_file():
        kib = int(meminfo.read_text().split(None, 2)[1])
        memory = f", {kib / 2**20:.0f} GiB"
    return (
        f"{model}, {os.cpu_count()} cores{memory}, Python {platform.python_version()}"
    )


def git(*words: str) -> str:
    """Output of a git command in the project's folder; "" where there is none."""
    try:
        done = subprocess.run(
            ["git", *words],
            cwd=pathlib.Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
