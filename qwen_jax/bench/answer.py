# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax bench answer`: a real model's answers, beside other programs that serve it.

The same prompts, as ids, go to each candidate, and each makes `new_tokens` greedy
tokens a prompt in float32, end ids or not: `ours`, the serving engine; `hf`,
transformers' `generate` on one batch padded on the left; `llama`, llama.cpp through
llama-cpp-python, one prompt after another, as that package's server answers them. All
in their own processes without HTTP, in turns (rounds.py). Nothing is kept of a prompt
from one turn to the next.

Formats: `--json FILE` writes the record: head (flags.py), prompts, results by rows.
Units: seconds, tokens/s of all rows together; ratios are taken inside a round.
Invariants: a candidate that made another number of tokens is an error, not a time; how
many of its tokens are ours, up to the first that is not, is told.
Raises: config.InputError for flags that do not fit and a model that cannot be.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import shlex
import tempfile

from qwen_jax import config
from qwen_jax.bench import candidates, flags, rounds, table, venvs

PEERS = ("hf", "llama")
QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain in two sentences why the sky is blue.",
    "Give me a Python function that adds two numbers.",
    "List three healthy breakfast ideas.",
    "Who wrote The Tempest, and when was it first performed?",
    "Translate 'good morning' into Spanish, French and German.",
    "What should I look at when I buy a used bicycle?",
)


def parser() -> flags.Parser:
    """The flags of the command."""
    top = flags.Parser(
        prog="qwen-jax bench answer",
        description="Measure a model's answers, beside other programs.",
        allow_abbrev=False,
    )
    add = top.add_argument
    add("--model", required=True, metavar="DIR", help="a model folder or a GGUF file")
    add(
        "--peers",
        nargs="?",
        const=",".join(PEERS),
        default="",
        metavar="LIST",
        help=f"compare with: any of {','.join(PEERS)} (all by a bare --peers; llama "
        "wants a GGUF file and is built from source, minutes)",
    )
    add("--rows", default="1,8", metavar="LIST", help="numbers of prompts, at most 8")
    add("--new_tokens", type=int, default=64, help="tokens of an answer")
    add("--rounds", type=int, default=5, help="rounds in which each takes a turn")
    add("--threads", type=int, default=0, help="cores to use; 0 = all")
    flags.add_outputs(top)
    return top


def main(argv: list[str]) -> int:
    """Measure what the flags ask for; returns the exit code."""
    args = flags.parse(parser(), argv)
    flags.at_least_one(args, "new_tokens", "rounds")
    flags.check_threads(args)
    counts = _counts(args.rows)
    names = ["ours", *flags.chosen(args.peers, PEERS, "peers")]
    record = flags.head("qwen-jax bench answer " + shlex.join(argv))
    record |= {"new_tokens": args.new_tokens, "results": []}
    with tempfile.TemporaryDirectory(prefix="qwen_jax_answer_") as scratch:
        shape = _shape(args.model, names, pathlib.Path(scratch))
        for count in counts:
            some = shape | {"prompts": shape["prompts"][:count]}
            record["results"].append(measure(args, some, names))
    print(f"machine: {record['machine']}; commit {record['commit']}")
    print(report(record))
    lines = (flags.title(record, "answer"), "```text", report(record), "```", "")
    flags.write(args, record, "\n".join(lines))
    return (
        1 if any("error" in row for r in record["results"] for row in r["rows"]) else 0
    )


def _counts(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    most = len(QUESTIONS)
    if not all(part.isdigit() and 0 < int(part) <= most for part in parts):
        raise config.InputError(f"--rows is {text!r}, wanted counts of 1 to {most}")
    return [int(part) for part in parts]


def _shape(path: str, names: list[str], scratch: pathlib.Path) -> dict:
    """What every candidate is told: where the model is, and ids of the prompts."""
    from qwen_jax import models, talk
    from qwen_jax.data import chat
    from qwen_jax.models import gguf

    candidates.say(f"reading {path}")
    model = talk.load_model(path, lay_out=False)
    template = model.chat_template()
    prompts = [
        chat.encode(model.tokenizer, template, [{"role": "user", "content": text}]).ids
        for text in QUESTIONS
    ]
    is_file = gguf.is_gguf(pathlib.Path(path))
    if "llama" in names and not is_file:
        raise config.InputError("--peers llama wants --model FILE.gguf")
    folder = path
    if "hf" in names and is_file:
        folder = str(scratch / "folder")
        models.save(model.spec, model.params, folder)
    return {
        "model": str(pathlib.Path(path).resolve()),
        "folder": folder,
        "scratch": str(scratch),
        "prompts": [[int(i) for i in ids] for ids in prompts],
    }


def measure(args: argparse.Namespace, shape: dict, names: list[str]) -> dict:
    """All candidates on some prompts, in turns."""
    facts, errors, children = {}, {}, {}
    options = {
        "threads": args.threads or os.cpu_count() or 1,
        "new_tokens": args.new_tokens,
    }
    count = len(shape["prompts"])
    with contextlib.ExitStack() as stack:
        for name in names:
            candidates.say(f"building {name} for {count} prompts")
            try:
                child = _start(name)
                stack.callback(child.close)
                request = {"do": "build", "shape": shape, "options": options}
                facts[name] = child.ask(request, candidates.BUILD_S)
                made = [len(ids) for ids in facts[name]["ids"]]
                if made == [args.new_tokens] * count:
                    children[name] = child
                else:
                    errors[name] = f"not the same work: answers of {made} tokens"
            except venvs.NotInstalled as error:
                errors[name] = f"not installed: {error}"
            except rounds.ChildError as error:
                errors[name] = f"failed: {error}"
                candidates.say(error.trace)
        turns = []
        if children:
            turns = rounds.measure(
                children,
                dict.fromkeys(children, 1),
                args.rounds,
                timeout_s=candidates.BUILD_S,
                say=candidates.say,
            )
    rows = [_row(name, args, facts, errors, turns) for name in names]
    return {"rows_at_once": count, "rows": rows}


def _start(name: str) -> rounds.Child:
    if name == "ours":
        return candidates.start("ours_answer.py")
    python = venvs.ensure(venvs.RECIPES[name], venvs.root(), candidates.say)
    return candidates.start(f"{name}_answer.py", python)


def _row(name, args, facts, errors, turns) -> dict:
    row = {"name": name, "facts": facts.get(name)}
    if name in errors:
        return row | {"error": errors[name]}
    ids = facts[name]["ids"]
    equal = _equal(ids, facts["ours"]["ids"]) if "ours" in facts else None
    return (
        row
        | {"equal": equal}
        | rounds.compared(turns, name, len(ids) * args.new_tokens)
    )


def _equal(found: list[list[int]], ours: list[list[int]]) -> float:
    """The share of tokens that stand before an answer's first other one."""
    same = total = 0
    for one, other in zip(found, ours, strict=True):
        differ = [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
        same += differ[0] if differ else len(one)
        total += len(one)
    return same / total


def report(record: dict) -> str:
    """One table for each number of prompts."""
    parts = []
    for result in record["results"]:
        rows = [["candidate", "tokens/s", "spread", "ours is", "ids as ours", "others"]]
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
                    f"{row['tokens_per_s']:.1f}",
                    f"{time['least_s']:.2f}-{time['most_s']:.2f} s",
                    f"{ratio['median']:.2f}x" if ratio else "",
                    "" if row["equal"] is None else f"{row['equal']:.0%}",
                    f"{time['others']:.0%}",
                ]
            )
        many = f"{result['rows_at_once']} prompts, {record['new_tokens']} new tokens"
        parts += [f"{many} each, greedy, float32", table.columns(rows)]
        for row in result["rows"]:
            facts = row["facts"] or {}
            told = f"{facts.get('versions')}; {facts.get('setting')}"
            parts.append(f"{row['name']}: {row.get('error') or told}")
    return "\n".join(parts)
