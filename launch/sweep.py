#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs every point of an experiment file's `sweep(add)` and tells the results.

Usage: launch/sweep.py --config experiments/x.py:tiny --workdir DIR
           [--parallel N] [--launcher local|print|slurm|tpu|gke]
           [--launcher_args "FLAGS"] [--collect] [--resubmit] [--dry_run]
           [--config.KEY=VALUE ...]

Start it from the root of the repository. The experiment file calls
`add({"optim.lr_peak": 1e-3}, name="high")` for each point; the name may be left out.
Each point is one `qwen-jax run` in the folder DIR/NAME. `local` runs them here, N at a
time; `tpu` runs them one after another on a slice through launch/tpu_pod.sh; `slurm`
and `gke` submit one job per point (launch/gpu_slurm.sh, launch/tpu_gke.py) and return;
`print` prints the commands for any other scheduler. The launcher's own flags go in
one text: `--launcher_args "--partition h100 --nodes 2"`.

Start it again after any interruption: finished points are skipped, unfinished ones go
on from their checkpoint, failed ones are tried again. Points that were submitted are
left alone (--resubmit submits the unfinished ones again); `--collect` only reads.

Files: DIR/NAME (the run), DIR/sweep/NAME.json (what was done with the point) and
NAME.log (what it printed), DIR/results.md and results.jsonl (written at the end and
after each point): for each name in the file's `metrics()`, its last and its best value.
`metrics()` gives names, or {name: "min" | "max"}; without a direction the best loss,
error, perplexity, bits or time is the least, of anything else the greatest.
Invariants: a point is what it sets: two with equal settings, or one name with other
settings than before, are refused.
Raises: exit code 2 for a mistake in flags or file before any point starts, 1 when a
point failed or did not finish (the others still run), 130 when interrupted.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import points

from qwen_jax import config

LAUNCH = pathlib.Path(__file__).resolve().parent
GRACE_S = 60  # a run saves within 30 s of SIGTERM


@dataclasses.dataclass
class Started:
    """A point that is running now."""

    point: points.Point
    process: subprocess.Popen
    log: pathlib.Path
    since: float


def _say(text: str) -> None:
    print(text, flush=True)  # a pipe is read while the points run


class Runner:
    """Starts commands for points, watches them, writes down how they ended."""

    def __init__(
        self,
        workdir: pathlib.Path,
        command_of: Callable[[points.Point], list[str]],
        *,
        parallel: int = 1,
        submits: bool = False,
        say: Callable[[str], None] = _say,
    ):
        self.workdir = workdir
        self.sweep_dir = workdir / "sweep"
        self.command_of = command_of
        self.parallel = parallel
        self.submits = submits
        self.say = say
        self._signals = 0  # counted by the handler, answered in the loop
        self._deadline_s = float("inf")
        self._running: list[Started] = []

    def run(self, plan: list[points.Point], after_each: Callable[[], None]) -> None:
        """Run `plan`, at most `parallel` at a time; returns when all have ended."""
        old = {
            number: signal.signal(number, self._interrupt)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        waiting = list(plan)
        try:
            while self._running or (waiting and not self.interrupted):
                while (
                    waiting
                    and len(self._running) < self.parallel
                    and not self.interrupted
                ):
                    self._start(waiting.pop(0))
                time.sleep(0.05)
                self._answer()
                if time.monotonic() > self._deadline_s:
                    self._end_unsaved()
                for started in list(self._running):
                    if started.process.poll() is not None:
                        self._running.remove(started)
                        self._ended(started)
                        after_each()
        finally:
            self._end_unsaved()
            for number, handler in old.items():
                signal.signal(number, handler)

    @property
    def interrupted(self) -> bool:
        return self._signals > 0

    def _interrupt(self, number: int, frame: Any) -> None:
        """Count only: the signal may have come in the midst of a print or a start."""
        self._signals += 1

    def _answer(self) -> None:
        """First signal: ask every point to save and end. Second: end them."""
        if self._signals and self._deadline_s == float("inf"):
            self._deadline_s = time.monotonic() + GRACE_S
            for started in self._running:
                started.process.terminate()
            self.say("ending the points that run; once more to end them unsaved")
        if self._signals > 1:
            self._end_unsaved()

    def _end_unsaved(self) -> None:
        for started in self._running:
            started.process.kill()

    def _start(self, point: points.Point) -> None:
        command = self.command_of(point)
        record = points.read_record(self.sweep_dir, point)
        points.write_record(
            self.sweep_dir, point, record | {"state": "running", "command": command}
        )
        log = self.sweep_dir / f"{point.name}.log"
        with log.open("ab") as file:
            # Its own session: Ctrl-C reaches it once, through the handler above.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} | os.environ,
                start_new_session=True,
            )
        self._running.append(Started(point, process, log, time.monotonic()))
        self.say(f"{point.name}: started, log {log}")

    def _ended(self, started: Started) -> None:
        point, code = started.point, started.process.returncode
        record = points.read_record(self.sweep_dir, point)
        status = points.run_status(self.workdir / point.name)
        if code != 0:
            state = "stopped" if self.interrupted else "failed"
        elif self.submits:
            state = "submitted"
        elif status is None:
            state = "stopped" if self.interrupted else "done"
        else:
            state = "done" if status == "finished" else "stopped"
        seconds = time.monotonic() - started.since
        points.write_record(
            self.sweep_dir,
            point,
            record
            | {
                "state": state,
                "exit_code": code,
                "seconds": round(record.get("seconds", 0) + seconds, 1),
                "attempts": record.get("attempts", 0) + 1,
            },
        )
        self.say(f"{point.name}: {state} (exit code {code}, {seconds:.0f} s)")
        if state == "failed":
            for line in _tail(started.log, 5):
                self.say(f"    {line}")


def _tail(path: pathlib.Path, num_lines: int) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-num_lines:]


def launcher_command(
    launcher: str, launcher_args: str, point: points.Point, run: list[str]
) -> list[str]:
    """The command that runs, submits or (print) is the point's `qwen-jax run`."""
    more = shlex.split(launcher_args)
    job = re.sub(r"[^a-z0-9]+", "-", f"qwen-jax-{point.name}".lower()).strip("-")
    if len(job) > 40:
        job = f"{job[:31]}-{zlib.crc32(point.name.encode()):08x}"
    match launcher:
        case "slurm":
            return [str(LAUNCH / "gpu_slurm.sh"), "--name", job, *more, "--", *run]
        case "gke":
            return [str(LAUNCH / "tpu_gke.py"), "--name", job, *more, "--", *run]
        case "tpu":
            return [str(LAUNCH / "tpu_pod.sh"), *more, "--", *run]
        case "print":
            return ["qwen-jax", *run]
    return [sys.executable, "-m", "qwen_jax", *run]


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the --config.KEY=VALUE that go to every point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="experiment file[:variant]")
    parser.add_argument("--workdir", required=True, help="folder of the whole sweep")
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument(
        "--launcher",
        choices=("local", "print", "slurm", "tpu", "gke"),
        default="local",
    )
    parser.add_argument("--launcher_args", default="", help="flags for the launcher")
    parser.add_argument("--collect", action="store_true", help="only the table")
    parser.add_argument("--resubmit", action="store_true")
    parser.add_argument("--dry_run", action="store_true", help="print the commands")
    parser.add_argument("--runner", default="", help="another program than qwen-jax")
    common = [a for a in argv if a.startswith("--config.")]
    for flag in common:
        if "=" not in flag:
            parser.error(f"{flag}: wanted --config.KEY=VALUE")
    options = parser.parse_args([a for a in argv if not a.startswith("--config.")])
    if options.parallel < 1:
        parser.error(f"--parallel {options.parallel}: wanted a number from 1")
    return options, common


def check(
    options: argparse.Namespace, plan: list[points.Point], common: list[str]
) -> None:
    """Refuse now what would fail in a run: unknown keys, a name that changed."""
    for point in plan:
        flags = [*common, *point.flags]
        pairs = [tuple(f.removeprefix("--config.").split("=", 1)) for f in flags]
        try:
            if options.runner:  # what else it can be told, only that command knows
                config.override(config.load(options.config), pairs)
            else:
                from qwen_jax import experiment  # brings JAX, so only when needed

                experiment.resolve(options.config, pairs)
        except config.InputError as error:
            raise config.InputError(f"point {point.name}: {error}") from error
        run = run_arguments(options, point, common)
        record = points.read_record(pathlib.Path(options.workdir) / "sweep", point)
        if record.get("run", run) != run:
            raise config.InputError(
                f"point {point.name} was begun as\n    {shlex.join(record['run'])}\n"
                f"and would now be\n    {shlex.join(run)}\ngive another --workdir, or "
                f"delete {options.workdir}/{point.name} and its file in sweep/"
            )


def run_arguments(
    options: argparse.Namespace, point: points.Point, common: list[str]
) -> list[str]:
    folder = pathlib.Path(options.workdir) / point.name
    head = ["run", "--config", options.config, "--workdir", str(folder)]
    return [*head, *common, *point.flags]


def main(argv: list[str]) -> int:
    options, common = parse(argv)
    try:
        module, _ = config.load_module(options.config)
        plan = points.expand(module)
        better = points.directions(module)
        check(options, plan, common)
        return sweep(options, common, plan, better)
    except config.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def sweep(
    options: argparse.Namespace,
    common: list[str],
    plan: list[points.Point],
    better: Mapping[str, str],
) -> int:
    """Run or submit what is left of the points; write and print the table."""
    workdir = pathlib.Path(options.workdir)
    sweep_dir = workdir / "sweep"
    submits = options.launcher in ("slurm", "gke")

    def command_of(point: points.Point) -> list[str]:
        run = run_arguments(options, point, common)
        if options.runner and options.launcher == "local":
            return [*shlex.split(options.runner), *run]
        return launcher_command(options.launcher, options.launcher_args, point, run)

    left = []
    for point in plan:
        record = points.read_record(sweep_dir, point)
        waits = record.get("state") == "submitted" and not options.resubmit
        if not points.is_done(workdir, point, record) and not waits:
            left.append(point)
    if options.dry_run or options.launcher == "print":
        for point in left:
            print(shlex.join(command_of(point)))
        return 0

    def write_results() -> list[dict[str, Any]]:
        rows = points.collect(workdir, plan, better)
        lines = "".join(json.dumps(row, default=repr) + "\n" for row in rows)
        points.write_atomically(workdir / "results.jsonl", lines)
        points.write_atomically(workdir / "results.md", points.table(rows, better))
        return rows

    runner = Runner(
        workdir,
        command_of,
        parallel=1 if options.launcher == "tpu" else options.parallel,
        submits=submits,
    )
    if not options.collect:
        print(f"{len(plan)} points, {len(plan) - len(left)} need nothing")
        for point in left:
            record = points.read_record(sweep_dir, point)
            record["run"] = run_arguments(options, point, common)
            points.write_record(sweep_dir, point, record)
        runner.run(left, write_results)
    rows = write_results()
    print(points.table(rows, better))
    print(f"written to {workdir / 'results.md'} and results.jsonl")
    if runner.interrupted:
        print(f"interrupted; to go on: {shlex.join([sys.executable, *sys.argv])}")
        return 130
    unfinished = [r for r in rows if r["state"] not in ("done", "submitted")]
    for row in unfinished:
        log = sweep_dir / f"{row['name']}.log"
        print(f"{row['name']} {row['state']}, see {log}", file=sys.stderr)
    return 1 if unfinished else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
