# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax bench serve`: load on an OpenAI-compatible server, and what it makes of it.

    qwen-jax bench serve --url http://HOST:PORT --request_rate 4 --goodput ttft:200
    qwen-jax bench serve --own [--model DIR] --max_concurrency 8
    qwen-jax bench serve --own --scenario overload --times 5
    qwen-jax bench serve --own --scenario drain

Source: method and names of `vllm bench serve`; see `serve_load` for what is asked and
when, `serve_report` for figures and definitions, `serve_scenarios` for the scenarios,
`serve_own` for a server that is started here. Open loop: --request_rate without
--max_concurrency; closed loop: --max_concurrency without a rate; with both, requests
that are due wait here, and their times begin when they are sent. Warm-ups come first,
one after another, and are in no figure. Failures are counted by status.

Formats: `--json FILE` writes the record: head (flags.py), the flags, figures, and with
--scenario bars. Units: as the names say. A bar that is missed is told and is no error;
the exit code is 1 when nothing was answered.
Raises: config.InputError for flags that do not fit and servers that do not answer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import pathlib
import shlex
import sys
import tempfile
import urllib.parse
from typing import Any

from qwen_jax import config
from qwen_jax.bench import flags
from qwen_jax.bench import shape as shape_lib

SHAPE = ("layers", "width", "heads", "kv_heads", "head_width", "ffn", "vocab")
ROWS = 16  # requests at once that `qwen-jax serve` computes
SCENARIOS = ("overload", "drain")


def parser() -> flags.Parser:
    """The flags of the command."""
    top = flags.Parser(
        prog="qwen-jax bench serve",
        description="Send requests to an OpenAI-compatible server and measure answers.",
        allow_abbrev=False,
    )
    add = top.add_argument
    add("--url", default="", help="a server that runs, such as http://127.0.0.1:8000")
    add("--own", action="store_true", help="start `qwen-jax serve` for this instead")
    add(
        "--model",
        default="",
        metavar="NAME",
        help="asked for (default: the server's first); with --own a model folder, and "
        "random weights of the shape below without it",
    )
    add("--api_key_env", default="", metavar="NAME", help="environment's name of a key")
    add(
        "--serve_flags", default="", metavar="TEXT", help="more flags of --own's server"
    )
    add("--scenario", choices=SCENARIOS, help="bars, see above")
    add("--times", type=float, default=5.0, help="overload: x the sustained rate")
    add("--alone", type=int, default=20, help="overload: requests without contention")
    add("--shutdown_timeout_s", type=float, default=30.0, help="drain: of the server")
    group = top.add_argument_group("load")
    add = group.add_argument
    add("--num_prompts", type=int, default=100)
    add("--request_rate", type=float, default=math.inf, help="a second, Poisson or inf")
    add("--max_concurrency", type=int, default=0, metavar="N", help="at once; 0: any")
    add("--input_tokens", type=int, default=128, help="of a prompt, its own")
    add("--output_tokens", type=int, default=32, help="of an answer")
    add("--range_ratio", type=float, default=0.0, help="both lengths vary by this part")
    add("--prefix_tokens", type=int, default=0, help="before every prompt, the same")
    add("--num_warmups", type=int, default=2, metavar="N", help="requests before")
    add(
        "--ignore_eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="answers of full length; --no-ignore_eos for servers that do not know it",
    )
    add("--temperature", type=float, default=0.0)
    add("--endpoint", choices=("completions", "chat"), default="completions")
    add(
        "--id_count",
        type=int,
        default=0,
        metavar="N",
        help="prompts are ids below N; 0: the model's own with --own, else words, of "
        "which the server says how many tokens they are",
    )
    add("--seed", type=int, default=0, help="of prompts, lengths and arrivals")
    add("--timeout_s", type=float, default=600.0, help="of a request")
    add(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="limits of a good request: ttft, tpot, e2el",
    )
    flags.add_outputs(top)
    group = top.add_argument_group("random weights of --own")
    sizes = {"layers": 4, "width": 256, "heads": 4, "kv_heads": 2, "ffn": 768}
    for name in SHAPE:
        default = sizes.get(name, getattr(shape_lib.Shape(), name))
        group.add_argument(f"--{name}", type=int, default=default)
    return top


def check(args: argparse.Namespace) -> None:
    """Refuse flags that do not fit."""
    flags.at_least_one(args, *SHAPE, "num_prompts", "input_tokens", "output_tokens")
    flags.at_least_one(args, "alone")
    if bool(args.url) == args.own:
        raise config.InputError("give --url of a server, or --own, and not both")
    if args.scenario == "drain" and not args.own:
        raise config.InputError(
            "--scenario drain ends a server of its own: give --own instead of --url"
        )
    most = args.max_concurrency or ROWS
    if args.scenario == "drain" and args.num_prompts <= most:
        raise config.InputError(
            f"--num_prompts is {args.num_prompts}: --scenario drain wants more than "
            f"the {most} that are sent at once"
        )
    if args.serve_flags and not args.own:
        raise config.InputError("--serve_flags are of the server of --own")
    for name in ("max_concurrency", "prefix_tokens", "num_warmups", "id_count", "seed"):
        if getattr(args, name) < 0:
            raise config.InputError(
                f"--{name} is {getattr(args, name)}, wanted 0 or more"
            )
    for name in ("request_rate", "times", "timeout_s", "shutdown_timeout_s"):
        if not getattr(args, name) > 0:
            raise config.InputError(
                f"--{name} is {getattr(args, name)}, wanted above 0"
            )
    if not 0 <= args.range_ratio < 1:
        raise config.InputError(
            f"--range_ratio is {args.range_ratio}, wanted 0 or more and below 1"
        )
    if args.endpoint == "chat" and args.id_count:
        raise config.InputError(
            "--id_count asks for prompts of ids, which --endpoint chat has not"
        )


def main(argv: list[str]) -> int:
    """Measure what the flags ask for; returns the exit code."""
    args = flags.parse(parser(), argv)
    check(args)
    # httpx is missed here, and not in --help.
    from qwen_jax.bench import serve_report

    limits_ms = serve_report.limits(args.goodput)
    key = ""
    if args.api_key_env:
        key = os.environ.get(args.api_key_env, "")
        if not key:
            raise config.InputError(
                f"--api_key_env {args.api_key_env}: the environment has no such name"
            )
    record = flags.head("qwen-jax bench serve " + shlex.join(argv))
    record["flags"] = {k: _plain(v) for k, v in vars(args).items()}
    with contextlib.ExitStack() as stack:
        own, url, ids = None, args.url, args.id_count
        if args.own:
            own, found = _start(args, stack)
            url, ids = own.url, ids or (found if args.endpoint != "chat" else 0)
        record |= asyncio.run(_measure(args, own, base(url), key, ids, limits_ms))
    print(f"machine: {record['machine']}; commit {record['commit']}")
    told = report(record)
    print(told)
    lines = (flags.title(record, "serve"), "```text", told, "```", "")
    flags.write(args, record, "\n".join(lines))
    return 0 if record.get("completed", 1) else 1


def _plain(value: Any) -> Any:
    """JSON has no infinity."""
    return "inf" if value == math.inf else value


def say(text: str) -> None:
    """Progress, where it is in no one's way."""
    print(text, file=sys.stderr, flush=True)


def base(url: str) -> str:
    """The URL up to and with /v1.

    Raises:
      config.InputError: it is none.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname)
        fits = fits and (parts.port is None or parts.port > 0)
    except ValueError:
        fits = False
    if not fits or parts.query or parts.fragment:
        raise config.InputError(
            f"--url {url!r}: wanted http://HOST:PORT or https://HOST"
        )
    if "@" in parts.netloc:  # it would stand in the record
        raise config.InputError("--url has a password in it; use --api_key_env NAME")
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def _start(args: argparse.Namespace, stack: contextlib.ExitStack) -> tuple[Any, int]:
    """A server of ours, and below what its ids are plain tokens."""
    from qwen_jax.bench import serve_own

    folder = pathlib.Path(
        stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-serve-"))
    )
    model = pathlib.Path(args.model or folder / "random")
    if not args.model:
        checked = shape_lib.check(
            shape_lib.Shape(**{k: getattr(args, k) for k in SHAPE})
        )
        longest = args.input_tokens + args.output_tokens
        longest = args.prefix_tokens + math.ceil(longest * (1 + args.range_ratio)) + 2
        say(f"random weights: {longest} positions, {shape_lib.num_params(checked):,}")
        serve_own.make(model, checked.record(), -(-longest // 64) * 64, args.seed)
    words = [f"--shutdown_timeout_s={args.shutdown_timeout_s}"]
    words += shlex.split(args.serve_flags)
    say(f"a server of {model.name} starts")
    own = serve_own.Own(str(model), folder, words)
    stack.callback(own.close)
    say(f"ready after {own.ready_s:.1f} s at {own.url}")
    return own, plain_ids(model)


def plain_ids(model: pathlib.Path) -> int:
    """Ids below this are no special tokens, which stand at the end in Qwen's
    vocabularies; 0 where the folder does not tell."""
    try:
        told = json.loads((model / "tokenizer.json").read_text())
        special = [int(one["id"]) for one in told["added_tokens"]]
        least = min(special, default=len(told["model"]["vocab"]))
        return min(least, len(told["model"]["vocab"]))
    except (OSError, ValueError, KeyError, TypeError):
        return 0


async def _measure(
    args: argparse.Namespace,
    own: Any,
    url: str,
    key: str,
    ids: int,
    limits_ms: dict[str, float],
) -> dict[str, Any]:
    """What the record has besides its head."""
    from qwen_jax.bench import serve_load, serve_report, serve_scenarios

    name = args.model
    if not name or own is not None:
        name = await serve_load.first_model(url, key)
    work = serve_load.Work(
        num_prompts=args.num_prompts,
        input_tokens=args.input_tokens,
        output_tokens=args.output_tokens,
        range_ratio=args.range_ratio,
        prefix_tokens=args.prefix_tokens,
        rate=args.request_rate,
        vocab=ids,
        chat=args.endpoint == "chat",
        seed=args.seed,
    )
    fields: dict[str, Any] = {"temperature": args.temperature}
    if args.ignore_eos:
        fields["ignore_eos"] = True
    client = serve_load.Client(
        url,
        name,
        key=key,
        fields=fields,
        timeout_s=args.timeout_s,
    )
    most = args.max_concurrency
    made: dict[str, Any] = {"url": url, "model": serve_load.printable(name)}
    try:
        await serve_load.warm(client, work, args.num_warmups)
        if args.scenario == "overload":
            how = {"alone": args.alone, "most": most or ROWS, "times": args.times}
            made |= await serve_scenarios.overload(client, work, **how, say=say)
        elif args.scenario == "drain":
            how = {"most": most or ROWS, "timeout_s": args.shutdown_timeout_s}
            made |= await serve_scenarios.drain(client, work, own, **how, say=say)
        else:
            run = await serve_load.run(client, serve_load.asks(work), most=most)
            made |= serve_report.summary(run, limits_ms)
    finally:
        await client.close()
    return made


def report(record: dict[str, Any]) -> str:
    """The text for the terminal."""
    from qwen_jax.bench import serve_report

    given = record["flags"]
    load = f"{given['num_prompts']} requests, {given['input_tokens']} + "
    load += f"{given['prefix_tokens']} tokens in, {given['output_tokens']} out"
    load += f", lengths +-{given['range_ratio']:.0%}" if given["range_ratio"] else ""
    lines = [f"{record['model']} at {record['url']}: {load}; seed {given['seed']}"]
    if given["scenario"] == "overload":
        for part in ("uncontended", "sustained", "overload"):
            lines += ["", f"{part}:", serve_report.text(record[part])]
        lines += ["", f"arrivals in the overload: {record['rate']:.1f} a second"]
    elif given["scenario"] == "drain":
        lines.append(
            f"at SIGTERM {record['streams']} streams were under way, "
            f"{record['waiting']} requests waited ({record['waiting_answered']} of "
            f"them were answered); the last ended {record['last_s']:.1f} s later; "
            f"failures by status: {record['statuses']}"
        )
    else:
        rate = given["request_rate"]
        most = given["max_concurrency"] or "any number"
        lines.append(
            f"arrivals: {rate} a second, {most} at once; {given['num_warmups']} "
            "warm-ups before, not counted"
        )
        lines += ["", serve_report.text(record)]
    if "bars" in record:
        lines += ["", serve_report.bars(record["bars"])]
    return "\n".join(lines)
