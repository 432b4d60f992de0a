# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax bench engine`: the serving engine beside decoding loops written by hand.

Greedy answers of `new_tokens` to random prompts, prefill included, by
- `loop`: `decode.generate`, one compiled loop over a batch that does not change;
- `steps`: a compiled step in a Python loop, the same batch;
- `engine`: all prompts handed to the engine at once, pages and scheduling included;
- `queue`: to the engine one after another.
And the time to the first token of a prompt of which 9/10 are in the engine's cache,
beside one that is not there. And the engine with drafts by lookup beside the one
without, where the model says the same again and again (weights that make it so, of the
same shape: every draft is right, so it is the most that drafts can give) and where it
says what comes (many drafts are wrong: what they cost). In rounds, in random order, in
one process; ratios are taken inside a round. Answers must be equal, or it is an error
and not a time.
Formats: `--json FILE` writes the record: head (flags.py), shape, rows, first token.
Units: seconds, tokens/s of all rows together.
Raises: config.InputError for flags that do not fit.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import random
import shlex
import statistics
import time
from typing import Any

from qwen_jax.bench import candidates, flags, table
from qwen_jax.bench import shape as shape_lib

SHAPE = ("layers", "width", "heads", "kv_heads", "head_width", "ffn", "vocab")


def parser() -> flags.Parser:
    """The flags of the command."""
    top = flags.Parser(
        prog="qwen-jax bench engine",
        description="Measure the serving engine beside decoding loops by hand.",
        allow_abbrev=False,
    )
    add = top.add_argument
    add("--rows", type=int, default=8, help="requests at once")
    add("--tokens", type=int, default=64, help="tokens of a prompt")
    add("--new_tokens", type=int, default=128, help="tokens of an answer")
    add("--prefix", type=int, default=640, help="tokens of the prompt for first tokens")
    add("--rounds", type=int, default=5, help="rounds in which each takes a turn")
    add("--page_tokens", type=int, default=64, help="tokens of a page")
    add("--piece", type=int, default=256, help="tokens of a piece of a prompt")
    add("--burst", type=int, default=0, help="steps at once; 0 as served")
    flags.add_outputs(top)
    group = top.add_argument_group("shape")
    defaults = shape_lib.Shape()
    for name in SHAPE:
        group.add_argument(f"--{name}", type=int, default=getattr(defaults, name))
    return top


def main(argv: list[str]) -> int:
    """Measure what the flags ask for; returns the exit code."""
    args = flags.parse(parser(), argv)
    more = ("rows", "tokens", "new_tokens", "rounds", "page_tokens", "piece")
    flags.at_least_one(args, *SHAPE, *more, "prefix")
    record = flags.head("qwen-jax bench engine " + shlex.join(argv))
    record |= {"shape": {name: getattr(args, name) for name in (*SHAPE, *more)}}
    record |= measure(args)
    print(f"machine: {record['machine']}; commit {record['commit']}")
    print(report(record))
    lines = (flags.title(record, "engine"), "```text", report(record), "```", "")
    flags.write(args, record, "\n".join(lines))
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """{"rows": one for each way and number of requests, "first": ...}."""
    world = _World(args)
    runs = {}
    for count in sorted({1, args.rows}):
        runs |= {
            ("loop", count): lambda n=count: world.loop(n),
            ("steps", count): lambda n=count: world.steps(n),
            ("engine", count): lambda n=count: world.engine(n),
        }
    if args.rows > 1:
        runs["queue", args.rows] = lambda: world.queue(args.rows)
    candidates.say("compiling")
    answers = {name: run() for name, run in runs.items()}
    for (way, count), found in answers.items():
        if found != answers["loop", count]:
            raise RuntimeError(f"{way} with {count} rows gives other tokens than loop")
    seconds, shares = {name: [] for name in runs}, []
    first, drafts = {"cold": [], "cached": []}, _Drafts(world)
    draw = random.Random(0)
    for number in range(args.rounds):
        for name in draw.sample(list(runs), len(runs)):
            before = world.made.plan_s, world.made.busy_s
            began = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - began)
            if name == ("engine", args.rows):
                plan_s, busy_s = world.made.plan_s, world.made.busy_s
                shares.append((plan_s - before[0]) / (busy_s - before[1]))
        cold_s, cached_s = world.first()
        first["cold"].append(cold_s)
        first["cached"].append(cached_s)
        drafts.round(draw)
        candidates.say(f"round {number + 1} of {args.rounds}")
    return {
        "rows": [_row(args, name, seconds) for name in seconds],
        "scheduler_share": statistics.median(shares),
        "drafts": drafts.rows(),
        "first": {k: statistics.median(x) for k, x in first.items()}
        | {
            "times": statistics.median(
                x / y for x, y in zip(first["cold"], first["cached"], strict=True)
            )
        },
    }


def _row(args, name, seconds) -> dict[str, Any]:
    way, count = name
    tokens, mine = count * args.new_tokens, seconds[name]

    def against(base):
        if base not in seconds or base == name:
            return None
        ratios = (x / y for x, y in zip(seconds[base], mine, strict=True))
        return statistics.median(ratios)

    return {
        "way": way,
        "rows": count,
        "tokens_per_s": tokens / statistics.median(mine),
        "least": tokens / max(mine),
        "most": tokens / min(mine),
        "x_loop": against(("loop", count)),
        "x_queue": against(("queue", count)),
    }


class _World:
    """The model, its prompts, and each way to answer them: ids of all answers."""

    def __init__(self, args: argparse.Namespace):
        import jax
        import numpy as np

        from qwen_jax import models
        from qwen_jax.models import decode
        from qwen_jax.models import spec as spec_lib
        from qwen_jax.serve import device, engine

        self.args, self.count = args, 0
        longest = max(args.tokens + args.new_tokens, args.prefix + 2)
        self.spec = spec_lib.Spec(
            vocab_size=args.vocab,
            width=args.width,
            num_layers=args.layers,
            num_heads=args.heads,
            num_kv_heads=args.kv_heads,
            head_width=args.head_width,
            ffn_width=args.ffn,
            max_positions=longest,
            init_std=args.width**-0.5,  # so that the likeliest token is likely
        )
        self.tree = tree = models.init(self.spec)
        self.laid = decode.laid_out(self.spec, tree)
        settings = device.Settings(
            rows=args.rows,
            page_tokens=args.page_tokens,
            piece=args.piece,
            burst=args.burst,
        )
        self.made = engine.Engine(self.spec, tree, settings=settings, stop_ids=())
        self.made.warm()
        self.draw = np.random.default_rng(0)
        self.prompts = [self.prompt(args.tokens) for _ in range(args.rows)]
        self.step = jax.jit(self._step, donate_argnums=1)

    def prompt(self, tokens: int) -> tuple[int, ...]:
        return tuple(map(int, self.draw.integers(0, self.args.vocab, tokens)))

    def loop(self, count: int) -> list[list[int]]:
        from qwen_jax.models import decode

        new = self.args.new_tokens
        some = self.prompts[:count]
        return decode.generate(self.spec, self.laid, some, max_tokens=new, stop_ids=())

    def _step(self, params, cache, tokens_bt):
        import jax.numpy as jnp

        from qwen_jax.models import decoder

        hidden_btd, cache = decoder.hidden_cached(self.spec, params, tokens_bt, cache)
        logits_btv = decoder.logits(self.spec, params, hidden_btd[:, -1:])
        return jnp.argmax(logits_btv[:, -1], axis=-1).astype(jnp.int32), cache

    def steps(self, count: int) -> list[list[int]]:
        import jax
        import jax.numpy as jnp
        import numpy as np

        from qwen_jax.models import cache as cache_lib

        args = self.args
        cache = cache_lib.init(self.spec, count, args.tokens + args.new_tokens)
        cache = jax.tree.map(jnp.copy, cache_lib.apart(cache))
        token_b, cache = self.step(self.laid, cache, np.array(self.prompts[:count]))
        told = [token_b]
        for _ in range(args.new_tokens - 1):
            token_b, cache = self.step(self.laid, cache, token_b[:, None])
            told.append(token_b)
        return np.stack(told, axis=1).tolist()

    def requests(self, prompts, new_tokens):
        from qwen_jax.serve import request

        self.count += 1
        # A salt of its own: nothing that was answered before is in the cache.
        return [
            request.Request(f"{self.count}-{i}", one, new_tokens, salt=str(self.count))
            for i, one in enumerate(prompts)
        ]

    def engine(self, count: int) -> list[list[int]]:
        requests = self.requests(self.prompts[:count], self.args.new_tokens)
        told = self.made.run(requests)
        return [[t for piece in told[r.id] for t in piece.ids] for r in requests]

    def queue(self, count: int) -> list[list[int]]:
        found = []
        for one in self.requests(self.prompts[:count], self.args.new_tokens):
            pieces = self.made.run([one])[one.id]
            found.append([token for piece in pieces for token in piece.ids])
        return found

    def first(self) -> tuple[float, float]:
        """Seconds to the first token: of a new prompt, and of one that begins as it."""
        prompt = self.prompt(self.args.prefix)
        shared = prompt[: len(prompt) * 9 // 10]
        other = (*shared, *self.prompt(len(prompt) - len(shared)))
        seconds, salt = [], f"first-{self.count}"
        for one in (prompt, other):
            (request,) = self.requests([one], 1)
            request = dataclasses.replace(request, salt=salt)
            began = time.perf_counter()
            self.made.run([request])
            seconds.append(time.perf_counter() - began)
        return seconds[0], seconds[1]


class _Drafts:
    """Engines with drafts by lookup and without, on two texts."""

    def __init__(self, world: _World):
        import jax

        from qwen_jax.serve import engine

        def still(path, x):
            """Layers that add nothing: the next token is the last one."""
            name = getattr(path[-1], "key", "")
            return x * 0 if name in ("o_lnkd", "down_lfd") else x

        repeating = jax.tree_util.tree_map_with_path(still, world.tree)
        plain = world.made.settings
        drafting = dataclasses.replace(plain, drafts="lookup")
        self.world, self.seconds, self.made = world, {}, {}
        self.drafts, self.accepted = collections.Counter(), collections.Counter()
        for text, tree in (("repeating", repeating), ("any", world.tree)):
            for way, settings in (("with", drafting), ("without", plain)):
                made = engine.Engine(world.spec, tree, settings=settings, stop_ids=())
                made.warm()
                self.made[text, way] = made
        for count in sorted({1, world.args.rows}):
            for text in ("repeating", "any"):
                # Once without a clock; the answers must agree.
                found = [self.run(text, way, count) for way in ("with", "without")]
                if found[0] != found[1]:
                    raise RuntimeError(f"drafts change the answers ({text})")
                self.seconds[text, count] = {"with": [], "without": []}

    def run(self, text: str, way: str, count: int) -> list[list[int]]:
        world = self.world
        requests = world.requests(world.prompts[:count], world.args.new_tokens)
        made = self.made[text, way]
        before = made.load()
        told, now = made.run(requests), made.load()
        self.drafts[text, count] += now.drafts - before.drafts
        self.accepted[text, count] += now.accepted - before.accepted
        return [[t for piece in told[r.id] for t in piece.ids] for r in requests]

    def round(self, draw: random.Random) -> None:
        for (text, count), seconds in self.seconds.items():
            for way in draw.sample(list(seconds), len(seconds)):
                began = time.perf_counter()
                self.run(text, way, count)
                seconds[way].append(time.perf_counter() - began)

    def rows(self) -> list[dict[str, Any]]:
        found = []
        for key, seconds in self.seconds.items():
            text, count = key
            tokens = count * self.world.args.new_tokens
            pairs = zip(seconds["without"], seconds["with"], strict=True)
            found.append(
                {"text": text, "rows": count}
                | {way: tokens / statistics.median(x) for way, x in seconds.items()}
                | {"times": statistics.median(x / y for x, y in pairs)}
                | {"acceptance": 1 + self.accepted[key] / max(self.drafts[key], 1)}
            )
        return found


def report(record: dict) -> str:
    """The table."""
    rows = [["way", "rows", "tokens/s", "spread", "x loop", "x one after another"]]
    for row in record["rows"]:
        rows.append(
            [
                row["way"],
                str(row["rows"]),
                f"{row['tokens_per_s']:.0f}",
                f"{row['least']:.0f}-{row['most']:.0f}",
                _times(row["x_loop"]),
                _times(row["x_queue"]),
            ]
        )
    first, share = record["first"], record["scheduler_share"]
    lines = (
        table.columns(rows),
        f"first token: {first['cold'] * 1e3:.0f} ms, with 9/10 of the prompt cached "
        f"{first['cached'] * 1e3:.0f} ms ({first['times']:.1f}x)",
        f"scheduler: {share:.1%} of a step",
        *(
            f"drafts by lookup, {one['text']} text, {one['rows']} rows: "
            f"{one['with']:.0f} tokens/s for {one['without']:.0f} "
            f"({one['times']:.2f}x), {one['acceptance']:.2f} tokens of a row in a step "
            "that checks"
            for one in record["drafts"]
        ),
    )
    return "\n".join(lines)


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
