# SPDX-License-Identifier: Apache-2.0
"""The candidates of `bench train`: started, built, measured, checked, made into rows.

Candidates: `ours` (the bare compiled step), `loop` (the same step through the real
`run`), `hf`, `tunix`, `maxtext`; and two children that measure the plain matmul rate in
the same rounds. Each is a script in peers/, run by its own Python with the same options
and environment (malloc on huge pages for all: it helps some and hurts none).
Formats: rows of the record, see train.py.
Invariant: a candidate that did other work (parameters, tokens a step, a first loss far
from log(vocabulary), a loss that does not fall) becomes an error, not a time.
Raises: nothing for a candidate that fails: its row says why.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import pathlib
import sys
import tempfile
import time

from qwen_jax.bench import rounds, venvs

OURS = ("ours", "loop")
PEERS = ("hf", "tunix", "maxtext")
SCRIPTS = pathlib.Path(__file__).parent / "peers"
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
MATMUL_SIDE = 2048
MATMUL_STEPS = 8
BUILD_S = 1200.0


def say(text: str) -> None:
    """Progress, on stderr: the tables alone go to stdout."""
    print(text, file=sys.stderr, flush=True)


def options_of(args: argparse.Namespace) -> dict:
    """What every candidate is told besides the shape."""
    return {
        "threads": args.threads or os.cpu_count() or 1,
        "lr": args.lr,
        "clip": args.clip,
        "loop": args.layer_loop,
    }


def start(script: str, python: str | pathlib.Path = sys.executable) -> rounds.Child:
    """A child running one of the scripts in peers/."""
    path = [str(pathlib.Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = HUGE_PAGES | {"TOKENIZERS_PARALLELISM": "false"}
    if str(python) == sys.executable:
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    return rounds.Child([str(python), str(SCRIPTS / script)], environment)


def measure(args, shape, names, record) -> None:
    """Build every candidate, measure in rounds, fill `record`."""
    began = time.monotonic()
    children, facts, errors, steps = {}, {}, {}, {}
    with contextlib.ExitStack() as stack:
        for name in names:
            say(f"building {name}")
            try:
                child, options = launch(name, args, stack)
                stack.callback(child.close)
                request = {"do": "build", "shape": shape.record(), "options": options}
                facts[name] = child.ask(request, BUILD_S)
                children[name], steps[name] = child, args.steps
            except venvs.NotInstalled as error:
                errors[name] = f"not installed: {error}"
            except rounds.ChildError as error:
                errors[name] = f"failed: {error}{way_out(name)}"
                say(error.trace)
        rates = {} if args.no_matmul else start_matmul(args, stack)
        children |= rates
        steps |= dict.fromkeys(rates, MATMUL_STEPS)
        turns = []
        if children:
            limit = args.max_s or float("inf")
            turns = rounds.measure(
                children,
                steps,
                args.rounds,
                timeout_s=BUILD_S,
                say=say,
                seconds_left=lambda: limit - (time.monotonic() - began),
            )
    fill(record, names, facts, errors, turns)


def way_out(name: str) -> str:
    """What to do about a peer that does not begin: its files are not looked through
    (there are tens of thousands), and a crash may have taken one."""
    if name not in PEERS:
        return ""
    home = venvs.home_of(name, venvs.root())
    return f"; if its environment is damaged, delete {home} and run again"


def launch(name: str, args, stack: contextlib.ExitStack) -> tuple[rounds.Child, dict]:
    """Start a candidate's process; its options."""
    options = options_of(args)
    if name == "loop":
        # A save lands among the counted steps of a turn, and not in every turn.
        turn = args.steps + 1
        every = turn * max(1, round(args.save_every / turn))
        workdir = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
        return start("ours_loop.py"), options | {
            "workdir": workdir,
            "save_every": every,
        }
    if name == "ours":
        return start("ours_train.py"), options
    python = venvs.ensure(venvs.RECIPES[name], venvs.root(), say)
    return start(f"{name}_train.py", python), options


def start_matmul(args, stack: contextlib.ExitStack) -> dict[str, rounds.Child]:
    """Children that multiply large matrices: matmul_jax, matmul_numpy."""
    found = {}
    for library in ("jax", "numpy"):
        child = start("matmul.py")
        stack.callback(child.close)
        options = options_of(args) | {"library": library, "size": MATMUL_SIDE}
        try:
            child.ask({"do": "build", "shape": {}, "options": options}, BUILD_S)
        except rounds.ChildError as error:
            say(f"no plain matmul rate of {library}: {error}")
            continue
        found[f"matmul_{library}"] = child
    return found


def fill(record: dict, names, facts, errors, turns) -> None:
    """Turns and facts -> the rows of the record."""
    record["turns"] = [dataclasses.asdict(turn) for turn in turns]
    for library in ("jax", "numpy"):
        name = f"matmul_{library}"
        if any(turn.name == name for turn in turns):
            seconds = rounds.summarize(turns, name).median_s
            record["matmul_gflops_per_s"][library] = 2 * MATMUL_SIDE**3 / seconds / 1e9
    best = max(record["matmul_gflops_per_s"].values(), default=None)
    for name in names:
        row = {"name": name, "ours": name in ("ours", "loop")}
        record["candidates"].append(row)
        if name in errors:
            row["error"] = errors[name]
            continue
        row["facts"] = facts[name]
        time_s = rounds.summarize(turns, name)
        row["time"] = dataclasses.asdict(time_s)
        wrong = unequal(record, facts[name], time_s)
        if wrong:
            row["error"] = f"not the same work: {wrong}"
            continue
        rate = record["step_flops"] / time_s.median_s / 1e9
        causal = record["causal_step_flops"] / time_s.median_s / 1e9
        row["tokens_per_s"] = facts[name]["tokens_per_step"] / time_s.median_s
        row["gflops_per_s"], row["causal_gflops_per_s"] = rate, causal
        row["share_of_matmul"] = rate / best if best else None
        row["causal_share_of_matmul"] = causal / best if best else None
        row["ratios"] = {
            base: dataclasses.asdict(rounds.ratio(turns, name, base))
            for base in names
            if base not in errors
        }


def unequal(record: dict, facts: dict, time_s: rounds.Summary) -> str:
    """Why a candidate's work is not the shape's; "" when it is."""
    if facts["params"] != record["params"]:
        return f"{facts['params']:,} parameters, wanted {record['params']:,}"
    tokens = record["shape"]["rows"] * record["shape"]["tokens"]
    if facts["tokens_per_step"] != tokens:
        return f"{facts['tokens_per_step']:,} tokens a step, wanted {tokens:,}"
    first, expected = facts["first_loss"], math.log(record["shape"]["vocab"])
    if not abs(first - expected) < 0.15 * expected:
        return f"first loss {first:.3f}, wanted about log(vocabulary) = {expected:.3f}"
    if not time_s.last_loss < first:
        return f"the loss does not fall ({first:.3f} to {time_s.last_loss:.3f})"
    return ""
