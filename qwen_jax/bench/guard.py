# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax bench guard`: what judging each token costs at the end of a decoding step.

A compiled loop of greedy steps on `rows` rows that have `tokens` ids in their cache, as
it is (`plain`) and with a head of `serve.guard_head` on the hidden state of every new
token, whose verdict on two tokens in a row is carried along (`judged`). Both in one
process, in rounds, in random order; the share is judged / plain - 1 inside a round, of
which the median is told, and that of the fastest turns of each, which a busy machine
disturbs less.

Formats: `--json FILE` writes the record: head (flags.py), shape, times, the share.
Units: seconds a step of all rows. Invariants: both make the same tokens, or it is an
error and not a time.
Raises: config.InputError for flags that do not fit.
"""

from __future__ import annotations

import argparse
import functools
import random
import shlex
import statistics
import time
from typing import Any

from qwen_jax.bench import candidates, flags, table
from qwen_jax.bench import shape as shape_lib

SHAPE = ("layers", "width", "heads", "kv_heads", "head_width", "ffn", "vocab")
MOST = 0.03  # wanted


def parser() -> flags.Parser:
    """The flags of the command."""
    top = flags.Parser(
        prog="qwen-jax bench guard",
        description="Measure what a guard's head costs in a decoding step.",
        allow_abbrev=False,
    )
    add = top.add_argument
    add("--rows", type=int, default=8, help="answers at once")
    add("--tokens", type=int, default=64, help="ids in the cache of each before")
    add("--new_tokens", type=int, default=16, help="steps of a turn")
    add("--rounds", type=int, default=41, help="rounds in which each takes a turn")
    add("--inner", type=int, default=64, help="inner width of the head")
    flags.add_outputs(top)
    group = top.add_argument_group("shape")
    defaults = shape_lib.Shape()
    for name in SHAPE:
        group.add_argument(f"--{name}", type=int, default=getattr(defaults, name))
    return top


def main(argv: list[str]) -> int:
    """Measure what the flags ask for; returns the exit code."""
    args = flags.parse(parser(), argv)
    more = ("rows", "tokens", "new_tokens", "rounds", "inner")
    flags.at_least_one(args, *SHAPE, *more)
    record = flags.head("qwen-jax bench guard " + shlex.join(argv))
    record |= {"shape": {name: getattr(args, name) for name in (*SHAPE, *more)}}
    record |= measure(args)
    print(f"machine: {record['machine']}; commit {record['commit']}")
    print(report(record))
    lines = (flags.title(record, "guard"), "```text", report(record), "```", "")
    flags.write(args, record, "\n".join(lines))
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step of both ways, and the share."""
    import jax
    import numpy as np

    from qwen_jax import models
    from qwen_jax import params as params_lib
    from qwen_jax.models import cache as cache_lib
    from qwen_jax.models import decode, decoder
    from qwen_jax.models import spec as spec_lib
    from qwen_jax.serve import guard_head

    asked = shape_lib.check(shape_lib.Shape(**{k: getattr(args, k) for k in SHAPE}))
    spec = spec_lib.Spec(
        vocab_size=asked.vocab,
        width=asked.width,
        num_layers=asked.layers,
        num_heads=asked.heads,
        num_kv_heads=asked.kv_heads,
        head_width=asked.head_width,
        ffn_width=asked.ffn,
        max_positions=args.tokens + args.new_tokens,
        init_std=asked.width**-0.5,
    )
    weights = decode.laid_out(spec, models.init(spec, 0))
    declared = guard_head.declare(asked.width, args.inner)[guard_head.RESPONSE]
    judge = params_lib.init(declared, jax.random.key(0), jax.numpy.float32)
    draw = np.random.default_rng(0)
    ids_bt = draw.integers(0, asked.vocab, (args.rows, args.tokens), np.int32)
    cache = cache_lib.init(spec, args.rows, args.tokens + args.new_tokens)
    prefill = jax.jit(functools.partial(decoder.hidden_cached, spec))
    _, cache = prefill(weights, ids_bt, cache_lib.apart(cache))
    go = jax.jit(_steps, static_argnames=("spec", "count", "judged"))

    def turn(judged: bool) -> Any:
        how = {"spec": spec, "count": args.new_tokens, "judged": judged}
        token_b, level_b = go(weights, judge, ids_bt[:, -1], cache, **how)
        return np.asarray(token_b), np.asarray(level_b)

    candidates.say("compiling")
    if not np.array_equal(turn(True)[0], turn(False)[0]):
        raise RuntimeError("judged steps give other tokens than plain ones")
    return timed(turn, args.rounds, args.new_tokens)


def _steps(weights, judge, token_b, cache, *, spec, count, judged):
    """(last token, worst verdict) of each row after so many greedy steps."""
    import jax
    import jax.numpy as jnp

    from qwen_jax.models import decoder
    from qwen_jax.serve import guard_head

    def step(_, carry):
        token_b, cache, before_b, level_b = carry
        hidden_btd, cache = decoder.hidden_cached(
            spec, weights, token_b[:, None], cache
        )
        if judged:
            risk_by, category_by = guard_head.head(judge, hidden_btd[:, -1])
            now_b = guard_head.severity(risk_by).astype(jnp.int32)
            worst_b = guard_head.debounce(before_b, now_b)
            # The category is looked at, too, or it would not be computed.
            flagged_b = jnp.where(worst_b > 0, 1 + jnp.argmax(category_by, -1), 0)
            before_b, level_b = now_b, jnp.maximum(level_b, flagged_b)
        logits_btv = decoder.logits(spec, weights, hidden_btd)
        token_b = jnp.argmax(logits_btv[:, -1], -1).astype(jnp.int32)
        return token_b, cache, before_b, level_b

    none_b = jnp.zeros_like(token_b)
    carry = jax.lax.fori_loop(0, count, step, (token_b, cache, none_b, none_b))
    return carry[0], carry[3]


def timed(turn: Any, rounds: int, steps: int) -> dict[str, Any]:
    """Medians over rounds, and the share with its spread."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    draw = random.Random(0)
    for _ in range(rounds):
        for judged in draw.sample([False, True], 2):
            began = time.perf_counter()
            turn(judged)
            seconds[judged].append((time.perf_counter() - began) / steps)
    pairs = zip(seconds[True], seconds[False], strict=True)
    shares = sorted(judged / plain - 1 for judged, plain in pairs)
    return {
        "plain_s": statistics.median(seconds[False]),
        "judged_s": statistics.median(seconds[True]),
        "share": statistics.median(shares),
        "share_of_fastest": min(seconds[True]) / min(seconds[False]) - 1,
        "least": shares[0],
        "most": shares[-1],
    }


def report(record: dict[str, Any]) -> str:
    """The figures as a table."""
    shape = record["shape"]
    rows = [["step", "ms", "more, in a round", "of the fastest"]]
    rows.append(["plain", f"{record['plain_s'] * 1e3:.3f}", "", ""])
    share = f"{record['share']:+.1%} ({record['least']:+.1%} to {record['most']:+.1%})"
    fastest = f"{record['share_of_fastest']:+.1%}"
    rows.append(["judged", f"{record['judged_s'] * 1e3:.3f}", share, fastest])
    met = "met" if record["share"] <= MOST else "MISSED"
    return "\n".join(
        [
            f"{shape['layers']} layers, d {shape['width']}, {shape['rows']} rows, head "
            f"of {shape['inner']}, {shape['rounds']} rounds of {shape['new_tokens']} "
            "steps",
            table.columns(rows),
            f"wanted: at most {MOST:.0%}: {met}",
        ]
    )
