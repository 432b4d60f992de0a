# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax bench train`: forward + backward + AdamW, side by side with other
libraries.

Every candidate runs in a process of its own with the same batch, cores and settings;
they take turns (see rounds.py), so one run gives the ratios. Candidates: `ours` (the
bare compiled step), `loop` (the same step through the real `run`: data, logging,
checkpoints), and with --peers `hf` (transformers on torch), `tunix`, `maxtext`, each in
an environment that this command makes. Two more children measure the plain matmul
rate in the same rounds. `--length` and `--loss_memory` measure how cost and memory
grow.

Formats: `--json FILE` writes the record that `collect` returns: date, commit, machine,
command, shape, FLOPs, matmul rates, a list of candidates (facts, time, rates, ratios;
or error), length and loss_memory rows.
Units: seconds, FLOPs of shape.step_flops (one count for all), tokens.
Invariants: a candidate that did other work (parameters, tokens a step, a first loss far
from log(vocabulary), a loss that does not fall) is reported as an error, not as a time.
Raises: config.InputError for flags that do not fit.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex

from qwen_jax.bench import candidates, flags, grow, table
from qwen_jax.bench import shape as shape_lib

PEERS, OURS = candidates.PEERS, candidates.OURS
FIXED = ("tied", "rope_theta", "norm_eps")  # not flags of their own


def parser() -> flags.Parser:
    """The flags of the command."""
    top = flags.Parser(
        prog="qwen-jax bench train",
        description="Measure a training step, beside other libraries with --peers.",
        allow_abbrev=False,
    )
    add = top.add_argument
    add(
        "--peers",
        nargs="?",
        const="hf,tunix",
        default="",
        metavar="LIST",
        help=f"compare with other libraries: any of {','.join(PEERS)} (default of a "
        "bare --peers: hf,tunix); their environments are made on first use",
    )
    add("--candidates", default="ours,loop", metavar="LIST", help="any of ours,loop")
    add("--rounds", type=int, default=6, help="rounds in which each takes a turn")
    add("--steps", type=int, default=3, help="steps in a turn")
    add("--max_s", type=float, default=0.0, help="start no round after this time")
    add("--threads", type=int, default=0, help="cores to use; 0 = all")
    add(
        "--layer_loop",
        choices=("scan", "unroll"),
        default="unroll",
        help="of ours: unroll is faster on a CPU, scan compiles sooner",
    )
    add("--save_every", type=int, default=20, help="checkpoint of `loop`, in steps")
    add("--lr", type=float, default=1e-3)
    add("--clip", type=float, default=0.0, help="clip the gradient norm; 0 = off")
    add("--no_matmul", action="store_true", help="leave out the plain matmul rate")
    add("--length", action="store_true", help="cost per token at 512 to 8192 tokens")
    add("--loss_memory", action="store_true", help="memory of the loss as it grows")
    flags.add_outputs(top)
    group = top.add_argument_group("shape")
    for field in dataclasses.fields(shape_lib.Shape):
        if field.name not in FIXED:
            group.add_argument(f"--{field.name}", type=int, default=field.default)
    group.add_argument("--untied", action="store_true", help="a head of its own")
    return top


def main(argv: list[str]) -> int:
    """Measure what the flags ask for; returns the exit code."""
    args = parse(argv)
    shape = read_shape(args)
    names = read_names(args)
    record = collect(args, shape, names, "qwen-jax bench train " + shlex.join(argv))
    print(report(record))
    flags.write(args, record, table.paragraph(record))
    return (
        1 if any("error" in row and row["ours"] for row in record["candidates"]) else 0
    )


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags of the command line."""
    return flags.parse(parser(), argv)


def read_shape(args: argparse.Namespace) -> shape_lib.Shape:
    """The shape the flags describe."""
    values = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(shape_lib.Shape)
        if field.name not in FIXED
    }
    return shape_lib.check(shape_lib.Shape(**values, tied=not args.untied))


def read_names(args: argparse.Namespace) -> list[str]:
    """Candidates in the order in which they are listed; flags are checked here."""
    flags.at_least_one(args, "rounds", "steps", "save_every")
    flags.check_threads(args)
    names = flags.chosen(args.candidates, OURS, "candidates")
    names += flags.chosen(args.peers, PEERS, "peers")
    if (args.length or args.loss_memory) and not args.peers:
        return []
    return names


def collect(
    args: argparse.Namespace, shape: shape_lib.Shape, names: list[str], command: str
) -> dict:
    """Measure everything asked for; the record of the run."""
    record = flags.head(command) | {
        "shape": shape.record(),
        "describe": shape.describe(),
        "params": shape_lib.num_params(shape),
        "step_flops": shape_lib.step_flops(shape, causal=False),
        "causal_step_flops": shape_lib.step_flops(shape, causal=True),
        "bases": list(PEERS),
        "matmul_gflops_per_s": {},
        "candidates": [],
        "turns": [],
        "length": [],
        "loss_memory": [],
    }
    if names:
        candidates.measure(args, shape, names, record)
    if args.length:
        record["length"] = grow.length(args, shape)
    if args.loss_memory:
        record["loss_memory"] = grow.loss_memory(args, shape)
    return record


def report(record: dict) -> str:
    """The text for the terminal."""
    parts = [f"machine: {record['machine']}; commit {record['commit']}"]
    if record["candidates"]:
        parts += [
            f"shape: {record['describe']}",
            table.work(record),
            table.matmul(record),
            "",
            table.candidates(record),
            "",
            table.facts(record),
        ]
        parts += table.remarks(record)
    for key, show in (("length", table.length), ("loss_memory", table.loss_memory)):
        if record[key]:
            parts += ["", show(record[key])]
    return "\n".join(parts)
