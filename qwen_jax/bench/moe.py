# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax bench moe`: a layer of experts beside one plain matrix product.

The layer is `moe.moe` as the decoder calls it (router, choice, experts, combination) on
random tokens; the product has the same FLOPs in one matmul: [m a, d] x [d, 3 f]. Every
way to compute the experts (`kernels/experts.py`) is measured, so that `auto` can be
held to the fastest of this device. In rounds, in random order, in one process;
ratios are taken inside a round.
Formats: `--json FILE` writes the record: head (flags.py), shape, a row for each way.
Units: seconds; FLOPs of the experts alone, 6 m a d f forward and three times that with
gradients.
Raises: config.InputError for flags that do not fit.
"""

from __future__ import annotations

import argparse
import random
import shlex
import statistics
import time
from typing import Any

from qwen_jax import config
from qwen_jax.bench import candidates, flags, table

WAYS = ("auto", "blocks", "ragged", "capacity", "tokamax")


def parser() -> flags.Parser:
    """The flags of the command."""
    top = flags.Parser(
        prog="qwen-jax bench moe",
        description="Measure a layer of experts against a plain matrix product.",
        allow_abbrev=False,
    )
    add = top.add_argument
    add("--ways", default="auto", metavar="LIST", help=f"any of {','.join(WAYS)}")
    add("--rounds", type=int, default=9, help="rounds in which each takes a turn")
    add("--calls", type=int, default=2, help="calls in a turn")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    flags.add_outputs(top)
    group = top.add_argument_group("shape")
    for name, default in (
        ("experts", 64),
        ("experts_per_token", 8),
        ("width", 512),
        ("ffn", 256),
        ("tokens", 4096),
    ):
        group.add_argument(f"--{name}", type=int, default=default)
    return top


def main(argv: list[str]) -> int:
    """Measure what the flags ask for; returns the exit code."""
    args = flags.parse(parser(), argv)
    shape = ("experts", "experts_per_token", "width", "ffn", "tokens")
    flags.at_least_one(args, "rounds", "calls", *shape)
    ways = flags.chosen(args.ways, WAYS, "ways")
    record = flags.head("qwen-jax bench moe " + shlex.join(argv))
    record |= {"shape": {name: getattr(args, name) for name in shape}}
    record |= measure(args, ways)
    print(f"machine: {record['machine']}; commit {record['commit']}")
    print(report(record))
    lines = (flags.title(record, "moe"), "```text", report(record), "```", "")
    flags.write(args, record, "\n".join(lines))
    return 0


def measure(args: argparse.Namespace, ways: list[str]) -> dict[str, Any]:
    """{"device": its kind, "rows": one for each way and pass}."""
    import jax

    runs, dropped, flops = {}, {}, 6 * args.tokens * args.experts_per_token
    flops *= args.width * args.ffn
    for way in ways:
        candidates.say(f"compiling {way}")
        try:
            runs[way, "forward"], runs[way, "gradients"], dropped[way] = _layer(
                args, way
            )
        except config.InputError as error:  # a way whose package is not here
            candidates.say(f"{way}: {error}")
    for passed in ("forward", "gradients"):
        runs["product", passed] = _product(args, gradients=passed == "gradients")
    seconds = _in_turns(runs, args.rounds, args.calls)
    rows = []
    for (way, passed), times in seconds.items():
        plain = seconds["product", passed]
        ratios = sorted(x / y for x, y in zip(times, plain, strict=True))
        work = flops * (3 if passed == "gradients" else 1)
        median_s = statistics.median(times)
        rows.append(
            {
                "way": way,
                "pass": passed,
                "median_s": median_s,
                "gflops_per_s": work / median_s / 1e9,
                "times_product": statistics.median(ratios),
                "least": ratios[0],
                "most": ratios[-1],
                "dropped": dropped.get(way, 0),
            }
        )
    return {"device": jax.devices()[0].device_kind, "rows": rows}


def _in_turns(runs: dict, count: int, calls: int) -> dict[Any, list[float]]:
    """Seconds a call of each run in each round; the first call of a turn is free."""
    import jax

    draw, seconds = random.Random(0), {name: [] for name in runs}
    for number in range(count):
        for name in draw.sample(list(runs), len(runs)):
            jax.block_until_ready(runs[name]())
            began = time.perf_counter()
            for _ in range(calls):
                jax.block_until_ready(runs[name]())
            seconds[name].append((time.perf_counter() - began) / calls)
        candidates.say(f"round {number + 1} of {count}")
    return seconds


def _layer(args, way):
    """(forward, forward and gradients, choices dropped) of one layer of experts."""
    import jax
    import jax.numpy as jnp

    from qwen_jax import mesh, params
    from qwen_jax.models import moe
    from qwen_jax.models import spec as spec_lib

    spec = spec_lib.Spec(
        width=args.width,
        compute_dtype=args.dtype,
        param_dtype=args.dtype,
        init_std=args.width**-0.5,
        moe=spec_lib.MoE(
            num_experts=args.experts,
            experts_per_token=args.experts_per_token,
            ffn_width=args.ffn,
            impl=way,
        ),
    )
    tree = params.init(moe.moe_params(spec, 1), jax.random.key(0), args.dtype)
    tree = jax.tree.map(lambda x: x[0], tree)
    shape = (1, args.tokens, args.width)
    x_btd = jax.random.normal(jax.random.key(1), shape, args.dtype)

    def run(p, x_btd):
        return moe.moe(p, x_btd, None, spec, mesh.Rules())

    def loss(p, x_btd):
        return jnp.sum(run(p, x_btd)[0].astype(jnp.float32) * 0.5)

    forward = jax.jit(run).lower(tree, x_btd).compile()
    gradients = jax.jit(jax.grad(loss, (0, 1))).lower(tree, x_btd).compile()
    dropped = int(forward(tree, x_btd)[1]["dropped"])
    return (lambda: forward(tree, x_btd)), (lambda: gradients(tree, x_btd)), dropped


def _product(args, *, gradients: bool):
    """One matrix product with the FLOPs of the experts, or that and both gradients."""
    import jax
    import jax.numpy as jnp

    rows = args.tokens * args.experts_per_token
    x_md = jax.random.normal(jax.random.key(0), (rows, args.width), args.dtype)
    w_df = jax.random.normal(jax.random.key(1), (args.width, 3 * args.ffn), args.dtype)

    def run(x_md, w_df):
        return x_md @ w_df

    if gradients:

        def both(x_md, w_df):
            y_mf, back = jax.vjp(run, x_md, w_df)
            return y_mf, back(jnp.ones_like(y_mf))

        product = jax.jit(both)
    else:
        product = jax.jit(run)
    return lambda: product(x_md, w_df)


def report(record: dict) -> str:
    """The table."""
    s = record["shape"]
    head = (
        f"{s['experts']} experts, {s['experts_per_token']} a token, d {s['width']}, "
        f"f {s['ffn']}, {s['tokens']} tokens on {record['device']}"
    )
    rows = [["way", "pass", "ms", "GFLOP/s", "x product", "spread", "dropped"]]
    for row in record["rows"]:
        rows.append(
            [
                row["way"],
                row["pass"],
                f"{row['median_s'] * 1e3:.1f}",
                f"{row['gflops_per_s']:.0f}",
                f"{row['times_product']:.2f}",
                f"{row['least']:.2f}-{row['most']:.2f}",
                str(row["dropped"]),
            ]
        )
    return head + "\n" + table.columns(rows)
