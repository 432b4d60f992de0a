# SPDX-License-Identifier: Apache-2.0
"""The points of a sweep: from an experiment file's `sweep(add)` to a table of results.

`expand` gives the points, `read_record` and `is_done` what became of them, `collect`
and `table` what their runs measured. Nothing is started here: sweep.py runs and
submits, xmanager_launch.py hands the same points to xmanager.

Files, below the sweep's folder: NAME (the run folder of point NAME), sweep/NAME.json:
{"name", "overrides", "run": arguments of qwen-jax, "state": running | done | failed |
stopped | submitted, "exit_code", "seconds", "attempts"}.
Invariants: names and settings of points are unique; names are fit for folders.
Raises: config.InputError for a file without `sweep`, twins, an unreadable record.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
import sys
import zlib
from collections.abc import Mapping
from typing import Any

try:
    from qwen_jax import config, metrics
except ImportError:  # started by another Python than the one that has it: change over
    _python = pathlib.Path(__file__).resolve().parent.parent / ".venv/bin/python"
    if not _python.exists() or pathlib.Path(sys.executable) == _python:
        sys.exit(f"error: {sys.executable} lacks qwen_jax; run launch/install.sh first")
    os.execv(_python, [str(_python), *sys.argv])

LOWER_IS_BETTER = re.compile(r"loss|error|perplexity|bits|(?<!_per)_s$|bytes")


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of the sweep: its name, what it sets, and the flags that say so."""

    name: str
    overrides: tuple[tuple[str, Any], ...]
    flags: tuple[str, ...]


def expand(module: Any) -> list[Point]:
    """The points that the file's `sweep(add)` adds, in its order."""
    if not hasattr(module, "sweep"):
        raise config.InputError(
            f"{module.__file__}: the file has no sweep(add); define it and call "
            'add({"optim.lr_peak": 1e-3}) in it for each point'
        )
    points: list[Point] = []

    def add(overrides: Mapping[str, Any], name: str = "") -> None:
        if not isinstance(overrides, Mapping):
            raise config.InputError(
                f"sweep: add({overrides!r}): wanted a dict of dotted keys and values"
            )
        items = tuple(overrides.items())
        points.append(Point(_slug(name) or _name(items), items, _flags(items)))

    module.sweep(add)
    if not points:
        raise config.InputError(f"{module.__file__}: sweep(add) added no point")
    for field in ("name", "flags"):
        seen: dict[Any, Point] = {}
        for point in points:
            twin = seen.setdefault(getattr(point, field), point)
            if twin is not point:
                raise config.InputError(
                    f"sweep: {dict(twin.overrides)} and {dict(point.overrides)} are "
                    f"both {getattr(point, field)!r}; give each point its own"
                )
    return points


def _flags(items: tuple[tuple[str, Any], ...]) -> tuple[str, ...]:
    return tuple(
        f"--config.{key}={value if isinstance(value, str) else repr(value)}"
        for key, value in items
    )


def _name(items: tuple[tuple[str, Any], ...]) -> str:
    """(("optim.lr_peak", 1e-3),) -> "lr_peak=0.001", fit for a folder."""
    full = ",".join(f"{key.split('.')[-1]}={value}" for key, value in items)
    name = _slug(full) or "base"
    if len(name) > 80 or name != full:  # shortened or changed: keep it unmistakable
        digest = zlib.crc32(repr(items).encode())
        name = f"{name[:70]}-{digest:08x}" if items else name
    return name


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=,+-]+", "_", text).strip("_.")


def read_record(sweep_dir: pathlib.Path, point: Point) -> dict[str, Any]:
    """What was done with the point so far; {} when nothing was."""
    path = sweep_dir / f"{point.name}.json"
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise config.InputError(
            f"{path}: not readable ({error}); delete it to run the point again"
        ) from error
    return record


def write_record(
    sweep_dir: pathlib.Path, point: Point, record: Mapping[str, Any]
) -> None:
    record = {"name": point.name, "overrides": dict(point.overrides)} | dict(record)
    text = json.dumps(record, indent=1, default=repr) + "\n"
    write_atomically(sweep_dir / f"{point.name}.json", text)


def run_status(folder: pathlib.Path) -> str | None:
    """How the run in `folder` ended by its own timeline: the reason of its last stop,
    "unfinished" when it was cut off, None when there is no timeline."""
    path = folder / "metrics.jsonl"
    lines = metrics.read(path) if path.exists() else []
    events = [line for line in lines if "event" in line]
    if not events:
        return None
    if events[-1]["event"] != "stop":
        return "unfinished"
    return events[-1].get("reason", "finished")


def is_done(workdir: pathlib.Path, point: Point, record: Mapping[str, Any]) -> bool:
    """Whether the point ran to its end, here or where it was submitted to."""
    status = run_status(workdir / point.name)
    return record.get("state") == "done" if status is None else status == "finished"


def write_atomically(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def directions(module: Any) -> dict[str, str]:
    """Name -> "min" or "max" for each metric that the experiment file names."""
    named = module.metrics() if hasattr(module, "metrics") else ("loss",)
    if isinstance(named, Mapping):
        return dict(named)
    return {n: "min" if LOWER_IS_BETTER.search(n) else "max" for n in named}


def collect(
    workdir: pathlib.Path, points: list[Point], better: Mapping[str, str]
) -> list[dict[str, Any]]:
    """One row per point: what it sets, its state, last and best of each metric."""
    rows = []
    for point in points:
        record = read_record(workdir / "sweep", point)
        state = record.get("state", "not started")
        path = workdir / point.name / "metrics.jsonl"
        lines = metrics.read(path) if path.exists() else []
        values = {}
        for name, direction in better.items():
            series = [
                (line["step"], line[name])
                for line in lines
                if isinstance(line.get(name), int | float)
            ]
            finite = [(step, v) for step, v in series if math.isfinite(v)]
            if series:
                choose = min if direction == "min" else max
                best = choose(finite, key=lambda pair: pair[1], default=(None, None))
                values[name] = {
                    "last": series[-1][1],
                    "best": best[1],
                    "best_step": best[0],
                }
        rows.append(
            {
                "name": point.name,
                "overrides": dict(point.overrides),
                "state": "done" if is_done(workdir, point, record) else state,
                "step": max((line["step"] for line in lines), default=0),
                "seconds": record.get("seconds"),
                "metrics": values,
            }
        )
    return rows


def table(rows: list[dict[str, Any]], better: Mapping[str, str]) -> str:
    """The rows as a Markdown table, columns aligned for reading as text."""
    keys = list(dict.fromkeys(key for row in rows for key in row["overrides"]))
    head = ["point", *keys, "state", "step"]
    for name, direction in better.items():
        head += [f"{name} (last)", f"{name} (best, {direction})"]
    body = [head]
    for row in rows:
        cells = [row["name"], *(str(row["overrides"].get(k, "")) for k in keys)]
        cells += [row["state"], str(row["step"])]
        for name in better:
            found = row["metrics"].get(name, {})
            cells += [_number(found.get("last")), _number(found.get("best"))]
        body.append(cells)
    widths = [max(len(line[i]) for line in body) for i in range(len(head))]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in body]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.5g}"
