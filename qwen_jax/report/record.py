# SPDX-License-Identifier: Apache-2.0
"""What a run folder holds, read as far as it is there.

Formats: run.json is one object (commit, dirty, command, config, versions, mesh, seed,
host, started, gzip_bits_per_byte, num_steps); metrics.jsonl as in `metrics.py`;
samples.jsonl has {"step", "prompt", "text"}; checkpoints/ has a folder a step;
needle*.json are what `qwen-jax eval needle --json` wrote there.
Units: times are seconds since 1970, sizes bytes.
Invariants: a file that is missing or broken becomes a note, never an exception.
Raises: config.InputError when the folder is missing or has nothing of a run in it.
"""

import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Callable

from qwen_jax import config, metrics
from qwen_jax.report import heat

Points = list[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Run:
    """The contents of a run folder, with `notes` on what it does not hold."""

    name: str
    folder: pathlib.Path
    facts: dict
    rows: list[dict]
    samples: list[dict]
    checkpoints: list[tuple[int, int, float]]  # (step, bytes, time written)
    written_s: float  # when metrics.jsonl last grew, 0 if never
    notes: list[str]
    grids: list[dict] = dataclasses.field(default_factory=list)

    def points(self, key: str) -> tuple[Points, int]:
        """((step, value) of every line that has `key`, finite and in order of steps;
        the number of values that are not finite). Of two lines on a step the later."""
        found = {
            row["step"]: float(row[key])
            for row in self.rows
            if "event" not in row and isinstance(row.get(key), int | float)
        }
        finite = sorted((x, y) for x, y in found.items() if math.isfinite(y))
        return finite, len(found) - len(finite)

    def events(self) -> list[dict]:
        return [row for row in self.rows if "event" in row]

    def settings(self) -> dict:
        """The resolved configuration, or nothing."""
        found = self.facts.get("config")
        return found if isinstance(found, dict) else {}

    def num_steps(self) -> int:
        """Length of the whole run, 0 where run.json does not tell."""
        train = self.settings().get("train")
        given = train.get("num_steps") if isinstance(train, dict) else 0
        total = self.facts.get("num_steps") or given
        return total if isinstance(total, int) else 0

    def gzip(self) -> float:
        """Bits per byte of gzip -9 on the held-out text, nan where unknown."""
        value = self.facts.get("gzip_bits_per_byte")
        return float(value) if isinstance(value, int | float) else math.nan

    def status(self, now_s: float) -> tuple[str, str]:
        """(kind, words) on whether the run ended, goes on or was cut off."""
        last = max((row["step"] for row in self.rows), default=0)
        total = self.num_steps()
        if total and last >= total:
            return "good", f"finished, {total:,} steps"
        where = f"step {last:,}" + (f" of {total:,}" if total else "")
        events = self.events()
        if events and events[-1]["event"] == "stop":
            return "idle", f"stopped, {where}"
        if not self.written_s:
            return "idle", "no step yet"
        age_s = max(now_s - self.written_s, 0)
        if age_s < 120:
            return "live", f"running, {where}"
        return "bad", f"silent for {metrics.duration(age_s)}, {where}"

    def headline(self) -> dict[str, tuple[str, str]]:
        """Name -> (number, a word on it), the same names for every run."""
        held = self.points("eval_bits_per_byte")[0]
        loss = self.points("loss")[0]
        tokens, times = self.points("tokens")[0], self.points("step_s")[0]
        best = versus = ""
        if held:
            lowest = min(held, key=lambda p: p[1])
            best = f"best {lowest[1]:.3f} at {lowest[0]:,}"
            best = "the best so far" if lowest == held[-1] else best
        if held and self.gzip() > 0:
            versus = f"model: {held[-1][1] / self.gzip():.0%} of that"
        tail = [y for _, y in loss[-max(math.ceil(len(loss) / 20), 10) :]]
        return {
            "held-out bits/byte": (f"{held[-1][1]:.3f}" if held else "–", best),
            "gzip -9 bits/byte": (
                f"{self.gzip():.3f}" if math.isfinite(self.gzip()) else "–",
                versus,
            ),
            "training loss": (
                f"{statistics.fmean(tail):.3f}" if tail else "–",
                f"mean of last {len(tail)}" if tail else "",
            ),
            "tokens": (metrics.count(tokens[-1][1]) if tokens else "–", "targets seen"),
            "tokens/s": (self.median("tokens_per_s", metrics.count), "median"),
            "MFU": (self.median("mfu", "{:.1%}".format), "median"),
            "time": (
                metrics.duration(sum(y for _, y in times)) if times else "–",
                "sum of steps",
            ),
        }

    def median(self, key: str, show: Callable[[float], str]) -> str:
        values = [y for _, y in self.points(key)[0]]
        return show(statistics.median(values)) if values else "–"


def load(workdir: pathlib.Path | str) -> Run:
    """Read a run folder, however little of it is there."""
    folder = pathlib.Path(workdir).resolve()
    if not folder.is_dir():
        raise config.InputError(
            f"{workdir}: no such folder; wanted the --workdir of a run"
        )
    notes: list[str] = []
    facts = _facts(folder / "run.json", notes)
    rows = _lines(folder / "metrics.jsonl", notes)
    samples = _lines(folder / "samples.jsonl", notes if _sampled(facts) else [])
    checkpoints = _checkpoints(folder / "checkpoints")
    if not facts and not rows and not checkpoints:
        raise config.InputError(
            f"{workdir}: neither run.json nor metrics.jsonl nor checkpoints are in it; "
            "wanted the --workdir of a run"
        )
    if not checkpoints:
        notes.append("No finished checkpoint.")
    written_s = (folder / "metrics.jsonl").stat().st_mtime if rows else 0.0
    grids = _grids(folder, notes)
    found = facts, rows, samples, checkpoints, written_s, notes, grids
    return Run(folder.name, folder, *found)


def _facts(path: pathlib.Path, notes: list[str]) -> dict:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(facts, dict):
            return facts
        notes.append("run.json is not a JSON object and was left out.")
    except FileNotFoundError:
        notes.append("run.json is missing: command, commit, configuration unknown.")
    except ValueError:
        notes.append("run.json is not valid JSON and was left out.")
    return {}


def _grids(folder: pathlib.Path, notes: list[str]) -> list[dict]:
    """Needles that the model of this run was asked for."""
    found = []
    for path in sorted(folder.glob("needle*.json")):
        try:
            grid = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            grid = None
        if heat.is_grid(grid):
            found.append(grid)
        else:
            notes.append(f"{path.name} is no grid of needles and was left out.")
    return found


def _sampled(facts: dict) -> bool:
    """Whether the run was to write samples; without a configuration: perhaps."""
    node = facts.get("config")
    for key in ("sample", "every_steps"):
        node = node.get(key, True) if isinstance(node, dict) else True
    return bool(node)


def _lines(path: pathlib.Path, notes: list[str]) -> list[dict]:
    """Rows of a jsonl file that have a step; notes say what is missing or broken."""
    if not path.is_file():
        notes.append(f"{path.name} is missing.")
        return []
    rows, bad = metrics.scan(path)
    if bad:
        notes.append(f"{path.name}: {len(bad)} broken lines left out, first {bad[0]}.")
    return [row for row in rows if isinstance(row.get("step"), int)]


def _checkpoints(folder: pathlib.Path) -> list[tuple[int, int, float]]:
    """Finished checkpoints: the folders whose name is a step."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.isdigit() and path.is_dir():
            try:
                size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
                found.append((int(path.name), size, path.stat().st_mtime))
            except FileNotFoundError:  # the run deletes old ones while we look
                continue
    return sorted(found)
