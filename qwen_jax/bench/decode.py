# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax bench decode`: tokens a second with a cache, beside other libraries.

Every candidate has a process of its own and takes its turn in every round (rounds.py);
a step is one greedy call on `rows` prompts of `tokens` random ids that makes
`new_tokens` tokens a row, prefill included. Candidates: `ours`, and with --peers `hf`
(transformers on torch) and `tunix` (its Sampler); each number of rows is measured by
itself.
Formats: `--json FILE` writes the record: head (flags.py), shape, results by rows.
Units: seconds, tokens/s of all rows together. Ratios are taken inside a round.
Invariants: a candidate with other parameters or another number of tokens is an error,
not a time.
Raises: config.InputError for flags that do not fit.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex

from qwen_jax import config
from qwen_jax.bench import candidates, flags, rounds, table, venvs
from qwen_jax.bench import shape as shape_lib

PEERS = ("hf", "tunix")
SHAPE = ("layers", "width", "heads", "kv_heads", "head_width", "ffn", "vocab", "tokens")


def parser() -> flags.Parser:
    """The flags of the command."""
    top = flags.Parser(
        prog="qwen-jax bench decode",
        description="Measure decoding with a cache, beside other libraries.",
        allow_abbrev=False,
    )
    add = top.add_argument
    add(
        "--peers",
        nargs="?",
        const=",".join(PEERS),
        default="",
        metavar="LIST",
        help=f"compare with other libraries: any of {','.join(PEERS)} (both by a bare "
        "--peers); their environments are made on first use",
    )
    add("--rows", default="1,8", metavar="LIST", help="numbers of rows to measure")
    add("--new_tokens", type=int, default=128, help="tokens that a call makes in a row")
    add("--rounds", type=int, default=5, help="rounds in which each takes a turn")
    add("--calls", type=int, default=1, help="calls in a turn")
    add("--threads", type=int, default=0, help="cores to use; 0 = all")
    flags.add_outputs(top)
    group = top.add_argument_group("shape")
    fields = {field.name: field for field in dataclasses.fields(shape_lib.Shape)}
    for name in SHAPE:
        default = 64 if name == "tokens" else fields[name].default
        group.add_argument(f"--{name}", type=int, default=default)
    return top


def main(argv: list[str]) -> int:
    """Measure what the flags ask for; returns the exit code."""
    args = flags.parse(parser(), argv)
    flags.at_least_one(args, "new_tokens", "rounds", "calls")
    flags.check_threads(args)
    names = ["ours", *flags.chosen(args.peers, PEERS, "peers")]
    shapes = [_shape(args, rows) for rows in _rows(args.rows)]
    record = flags.head("qwen-jax bench decode " + shlex.join(argv))
    record |= {"new_tokens": args.new_tokens, "results": []}
    for shape in shapes:
        record["results"].append(measure(args, shape, names))
    print(f"machine: {record['machine']}; commit {record['commit']}")
    print(report(record))
    lines = (flags.title(record, "decode"), "```text", report(record), "```", "")
    flags.write(args, record, "\n".join(lines))
    return 1 if any("error" in r["rows"][0] for r in record["results"]) else 0


def _rows(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise config.InputError(f"--rows is {text!r}, wanted counts such as 1,8")
    return [int(part) for part in parts]


def _shape(args: argparse.Namespace, rows: int) -> shape_lib.Shape:
    values = {name: getattr(args, name) for name in SHAPE}
    return shape_lib.check(shape_lib.Shape(**values, rows=rows))


def measure(args: argparse.Namespace, shape: shape_lib.Shape, names: list[str]) -> dict:
    """All candidates on one shape, in turns."""
    facts, errors, children = {}, {}, {}
    options = {
        "threads": args.threads or os.cpu_count() or 1,
        "new_tokens": args.new_tokens,
    }
    with contextlib.ExitStack() as stack:
        for name in names:
            candidates.say(f"building {name} for {shape.rows} rows")
            try:
                child = _start(name)
                stack.callback(child.close)
                request = {"do": "build", "shape": shape.record(), "options": options}
                facts[name] = child.ask(request, candidates.BUILD_S)
                wrong = _unequal(shape, args.new_tokens, facts[name])
                if wrong:
                    errors[name] = f"not the same work: {wrong}"
                else:
                    children[name] = child
            except venvs.NotInstalled as error:
                errors[name] = f"not installed: {error}"
            except rounds.ChildError as error:
                errors[name] = f"failed: {error}{candidates.way_out(name)}"
                candidates.say(error.trace)
        turns = []
        if children:
            turns = rounds.measure(
                children,
                dict.fromkeys(children, args.calls),
                args.rounds,
                timeout_s=candidates.BUILD_S,
                say=candidates.say,
            )
    rows = [_row(name, shape, args, facts, errors, turns) for name in names]
    return {"shape": shape.record(), "describe": shape.describe(), "rows": rows}


def _start(name: str) -> rounds.Child:
    if name == "ours":
        return candidates.start("ours_decode.py")
    python = venvs.ensure(venvs.RECIPES[name], venvs.root(), candidates.say)
    return candidates.start(f"{name}_decode.py", python)


def _unequal(shape: shape_lib.Shape, new_tokens: int, facts: dict) -> str:
    params, tokens = shape_lib.num_params(shape), shape.rows * new_tokens
    if facts["params"] != params:
        return f"{facts['params']:,} parameters, wanted {params:,}"
    if facts["tokens_per_step"] != tokens:
        return f"{facts['tokens_per_step']:,} tokens a call, wanted {tokens:,}"
    return ""


def _row(name, shape, args, facts, errors, turns) -> dict:
    row = {"name": name, "facts": facts.get(name)}
    if name in errors:
        return row | {"error": errors[name]}
    return row | rounds.compared(turns, name, shape.rows * args.new_tokens)


def report(record: dict) -> str:
    """One table for each number of rows."""
    parts = []
    for result in record["results"]:
        rows = [["candidate", "tokens/s", "s/call", "spread", "ours is", "others"]]
        ours = result["rows"][0]
        for row in result["rows"]:
            if "error" in row:
                rows.append([row["name"], "-", "", "", "", ""])
                continue
            time = row["time"]
            ratio = ours.get("faster_than", {}).get(row["name"])
            rows.append(
                [
                    row["name"],
                    f"{row['tokens_per_s']:.0f}",
                    f"{time['median_s']:.3f}",
                    f"{time['least_s']:.2f}-{time['most_s']:.2f}",
                    f"{ratio['median']:.2f}x" if ratio else "",
                    f"{time['others']:.0%}",
                ]
            )
        parts.append(f"{result['describe']} + {record['new_tokens']} new, float32")
        parts.append(table.columns(rows))
        for row in result["rows"]:
            if "error" in row:
                parts.append(f"{row['name']}: {row['error']}")
            else:
                made = row["facts"]
                parts.append(f"{row['name']}: {made['versions']}; {made['setting']}")
    return "\n".join(parts)
