# SPDX-License-Identifier: Apache-2.0
"""What the commands of `qwen-jax bench` share: flags, the record's head, the log.

Formats: `head` gives date, commit, machine and command of a record; `--json FILE`
writes a record, `--log` appends a paragraph to experiments/LOG.md.
Raises: config.InputError for flags that do not fit, and a log that is not here.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
from typing import NoReturn

from qwen_jax import config
from qwen_jax.bench import where


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are InputErrors (one line, exit code 2)."""

    def error(self, message: str) -> NoReturn:
        raise config.InputError(f"{message} ({self.prog} --help tells what there is)")


def add_outputs(top: argparse.ArgumentParser) -> None:
    """--json and --log."""
    top.add_argument("--json", default="", metavar="FILE", help="write the record")
    top.add_argument("--log", action="store_true", help="append to experiments/LOG.md")


def parse(top: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """The flags; an unknown one is told with its nearest name."""
    args, rest = top.parse_known_args(argv)
    if rest:
        known = [flag for action in top._actions for flag in action.option_strings]
        name = rest[0].partition("=")[0]
        raise config.InputError(f"unknown flag {name}{config.nearest(name, known)}")
    return args


def at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Refuse counts below 1."""
    for name in names:
        if getattr(args, name) < 1:
            raise config.InputError(
                f"--{name} is {getattr(args, name)}, wanted at least 1"
            )


def check_threads(args: argparse.Namespace) -> None:
    """Refuse more cores than there are."""
    cores = os.cpu_count() or 1
    if not 0 <= args.threads <= cores:
        raise config.InputError(
            f"--threads is {args.threads}, wanted 0 (all) to {cores} on this machine"
        )


def chosen(text: str, known: tuple[str, ...], flag: str) -> list[str]:
    """The names of a comma-separated list, each of which must be known."""
    names = []
    for name in filter(None, text.split(",")):
        if name not in known:
            raise config.InputError(
                f"--{flag} names {name!r}, wanted any of {','.join(known)}"
                f"{config.nearest(name, known)}"
            )
        if name not in names:
            names.append(name)
    return names


def head(command: str) -> dict:
    """Date, commit, machine and command of a record."""
    return {
        "date": datetime.datetime.now().isoformat(sep=" ", timespec="minutes"),
        "commit": where.git("rev-parse", "--short", "HEAD") or "unknown",
        "dirty": bool(where.git("status", "--porcelain")),
        "machine": where.machine(),
        "command": command,
    }


def write(args: argparse.Namespace, record: dict, paragraph: str) -> None:
    """Do what --json and --log ask for."""
    if args.json:
        path = pathlib.Path(args.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
    if not args.log:
        return
    log = pathlib.Path("experiments/LOG.md")
    if not log.parent.is_dir():
        raise config.InputError(
            f"--log writes to {log}, but {log.parent}/ is not here; run from the "
            "project's folder"
        )
    with log.open("a") as file:
        file.write("\n" + paragraph)


def title(record: dict, name: str) -> str:
    """The first lines of a paragraph in the log."""
    commit = record["commit"] + (" with changes" if record["dirty"] else "")
    return (
        f"## {record['date']} bench {name}\n"
        f"Command: `{record['command']}`. Commit {commit}. "
        f"Machine: {record['machine']}."
    )
