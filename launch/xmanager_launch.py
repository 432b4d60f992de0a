#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs an experiment file, or every point of its sweep, as one xmanager experiment.

Usage: launch/install.sh xmanager
       launch/xmanager_launch.py --config experiments/x.py:tiny \
           --workdir DIR [--sweep] [--parallel N] [--title TEXT] [--dry_run] \
           [--config.KEY=VALUE ...]

The `qwen-jax` of this environment is packaged as an `xm.Binary` and run by xmanager's
local executor, so that runs stand in xmanager's own list (a SQLite file in the home
folder); neither Docker nor Bazel nor a network is needed. With `--sweep` the points are
those of launch/sweep.py, in the same folders: a sweep begun by one can be gone on with
and read (`sweep.py --collect`) by the other.

xmanager has no Slurm; for pods use launch/sweep.py with a --launcher. Its cloud
executors need a container image and are not used here.
Source: xmanager's documented local workflow (create_experiment, package, add).
Files: as in launch/points.py; what a point prints goes to this terminal.
Raises: exit code 2 for a mistake in flags or file, or when xmanager is missing; 1 when
a point failed.
"""

import argparse
import asyncio
import pathlib
import shlex
import sys
from typing import Any

import points
import sweep

from qwen_jax import config


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="experiment file[:variant]")
    parser.add_argument("--workdir", required=True, help="folder of the run or sweep")
    parser.add_argument("--sweep", action="store_true", help="all points of sweep(add)")
    parser.add_argument("--parallel", type=int, default=1, help="points at a time")
    parser.add_argument("--title", default="", help="the experiment's title")
    parser.add_argument("--binary", default="", help="another program than qwen-jax")
    parser.add_argument("--dry_run", action="store_true", help="print the commands")
    common = [a for a in argv if a.startswith("--config.")]
    options = parser.parse_args([a for a in argv if not a.startswith("--config.")])
    if options.parallel < 1:
        parser.error(f"--parallel {options.parallel}: wanted a number from 1")
    return options, common


async def launch(
    options: argparse.Namespace, jobs: list[tuple[points.Point, list[str]]]
) -> list[str]:
    """Run the jobs under one xmanager experiment; the names of those that failed."""
    # Imported here: an extra, and its import reads flags and credentials.
    from xmanager import xm, xm_local

    slots = asyncio.Semaphore(options.parallel)
    failed: list[str] = []

    async def run(experiment: Any, executable: Any, point: points.Point, args: list):
        job = xm.Job(
            executable=executable,
            executor=xm_local.Local(),
            args=args,
            env_vars={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
        )
        async with slots:
            unit = await experiment.add(job)
            try:
                await unit.wait_until_complete()
            except xm.ExperimentUnitError:
                failed.append(point.name)
        if options.sweep:
            sweep_dir = pathlib.Path(options.workdir) / "sweep"
            state = "failed" if point.name in failed else "done"
            record = points.read_record(sweep_dir, point)
            points.write_record(
                sweep_dir, point, record | {"run": args, "state": state}
            )

    title = options.title or f"qwen_jax {options.config}"
    try:
        async with xm_local.create_experiment(experiment_title=title) as experiment:
            [executable] = experiment.package(
                [xm.binary(executor_spec=xm_local.Local.Spec(), path=options.binary)]
            )
            await asyncio.gather(*(run(experiment, executable, *job) for job in jobs))
    except RuntimeError:
        if not failed:  # else xmanager only says again at the end what was caught above
            raise
    return failed


def plan(
    options: argparse.Namespace, common: list[str]
) -> list[tuple[points.Point, list[str]]]:
    """(point, arguments of qwen-jax) for all that is not finished yet."""
    if not options.sweep:
        arguments = ["run", "--config", options.config, "--workdir", options.workdir]
        return [(points.Point("run", (), ()), [*arguments, *common])]
    module, _ = config.load_module(options.config)
    found = points.expand(module)
    sweep.check(options, found, common)
    workdir = pathlib.Path(options.workdir)
    left = []
    for point in found:
        record = points.read_record(workdir / "sweep", point)
        if not points.is_done(workdir, point, record):
            left.append((point, sweep.run_arguments(options, point, common)))
    return left


def main(argv: list[str]) -> int:
    options, common = parse(argv)
    options.runner = options.binary
    options.binary = options.binary or str(pathlib.Path(sys.prefix) / "bin/qwen-jax")
    try:
        jobs = plan(options, common)
    except config.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.dry_run:
        for _, arguments in jobs:
            print(shlex.join([options.binary, *arguments]))
        return 0
    if not jobs:
        print("every point is finished")
        return 0
    try:
        import xmanager  # noqa: F401
    except ImportError:
        print(
            "error: xmanager is not installed; run `launch/install.sh xmanager`",
            file=sys.stderr,
        )
        return 2
    _mark_flags_as_parsed()
    failed = asyncio.run(launch(options, jobs))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _mark_flags_as_parsed() -> None:
    """xmanager reads absl flags of its own, which nobody else has parsed here."""
    from absl import flags

    parsed: Any = flags.FLAGS
    parsed(sys.argv[:1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
