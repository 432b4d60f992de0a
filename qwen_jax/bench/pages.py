# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax bench pages`: who gets memory, by how it is cut into pages.

A trace of requests runs against each way to cut the same memory into pages. A request
holds its prompt, gains a token each step and leaves after its last; it is refused where
its prompt finds no room (nobody waits), and cut where its next page does.

Traces: `lognormal`, prompts and answers with long tails; `shifting`, short chats and
long documents whose shares swing over time; `states`, where each request also holds one
piece of memory in a row (a recurrent state) of 2 or 16 units, whose shares swing;
`sessions`, phases of short chats without and with a state, one in twenty of which rests
for long after its answer and keeps its memory: the stragglers that morphing is for.
Ways: `morph`, size classes 1 to 16 with slab morphing at NVAlloc's thresholds; `eager`,
the same at slabs up to half used, however few and however busy; `static`, only empty
slabs change their class; `fixed`, none does, once it has one; `pages of 1` and `pages
of 16` units, one size for all (a unit is --unit_tokens tokens; 16 is vLLM's page).
With classes, a prompt takes the largest pages that fit in it; an answer's next page is
at most a quarter of what it holds.

Formats: `--json FILE` writes the record: head (flags.py), flags, a row for each trace
and way. Units: tokens; steps; a token-step is a token held for a step. No time is
measured: equal seeds give equal rows. `again`: modelled flushes of a line of a slab's
bitmap soon after its last (serve/page_lines.py), for every 1,000 allocations.
Raises: config.InputError for flags that do not fit.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import math
import pathlib
import random
import shlex
import statistics
import tempfile

from qwen_jax import config
from qwen_jax.bench import flags, table
from qwen_jax.serve import page_lines, page_log
from qwen_jax.serve import pages as pages_lib

TRACES = ("lognormal", "shifting", "states", "sessions")
LARGEST = 16
LONGEST = 8192
SWINGS = 3  # of the shares, over a trace
STATE_UNITS = (2, 16)


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to cut memory: `sizes` of pages that requests ask for, in units."""

    name: str
    sizes: tuple[int, ...]
    changes: dict

    def settings(self, slab_units: int, banks: int) -> pages_lib.Settings:
        """The arena's settings."""
        made = pages_lib.Settings(slab_units=slab_units, banks=banks)
        return dataclasses.replace(made, **self.changes)


_CLASSES = tuple(1 << k for k in range(LARGEST.bit_length()))
WAYS = (
    Way("morph", _CLASSES, {}),
    Way("eager", _CLASSES, {"max_used": 0.5, "idle_ticks": 0, "low_share": 0.0}),
    Way("static", _CLASSES, {"turnover": pages_lib.EMPTY}),
    Way("fixed", _CLASSES, {"turnover": pages_lib.NEVER}),
    Way("pages of 1", (1,), {}),
    Way("pages of 16", (LARGEST,), {}),
)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request: step of arrival, tokens of prompt and answer, units of its state, and
    steps that it rests after its answer."""

    step: float
    prompt: int
    answer: int
    state_units: int = 0
    rest: int = 0

    def token_steps(self, unit_tokens: int) -> float:
        """Memory it is worth: what it holds over its life, without any waste."""
        least = self.prompt + self.state_units * unit_tokens
        growing = (least + self.answer / 2) * self.answer
        return growing + (least + self.answer) * self.rest


def parser() -> flags.Parser:
    """The flags of the command."""
    top = flags.Parser(
        prog="qwen-jax bench pages",
        description="Compare ways to cut memory into pages on long-tailed traces.",
        allow_abbrev=False,
    )
    add = top.add_argument
    add("--traces", default=",".join(TRACES), metavar="LIST")
    add("--requests", type=int, default=4000, help="of each trace")
    add("--units", type=int, default=4096, help="memory, in smallest pages")
    add("--unit_tokens", type=int, default=16, help="tokens of a smallest page")
    add("--slab_units", type=int, default=64)
    add("--load", type=float, default=1.2, help="memory asked for / memory there is")
    add("--seed", type=int, default=0, help="of the first run")
    add("--seeds", type=int, default=3, help="runs that the rows are means of")
    add(
        "--smaller",
        action="store_true",
        help="where a class has no page, take smaller ones (not for states)",
    )
    flags.add_outputs(top)
    return top


def main(argv: list[str]) -> int:
    """Simulate; returns the exit code."""
    args = parse(argv)
    record = collect(args, "qwen-jax bench pages " + shlex.join(argv))
    print(report(record))
    flags.write(args, record, f"{flags.title(record, 'pages')}\n{_fenced(record)}\n")
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags; what does not fit is told."""
    args = flags.parse(parser(), argv)
    flags.at_least_one(args, "requests", "units", "unit_tokens", "seeds")
    args.traces = flags.chosen(args.traces, TRACES, "traces")
    if not 0 < args.load <= 100:
        raise config.InputError(f"--load is {args.load}, wanted above 0, at most 100")
    if args.slab_units < LARGEST:
        raise config.InputError(
            f"--slab_units is {args.slab_units}, wanted at least {LARGEST}"
        )
    pages_lib.Pages(args.units, pages_lib.Settings(slab_units=args.slab_units))
    return args


def collect(args: argparse.Namespace, command: str) -> dict:
    """Every trace against every way; the record."""
    asked = {k: v for k, v in vars(args).items() if k not in ("json", "log")}
    record = flags.head(command) | {"flags": asked, "rows": []}
    for name in args.traces:
        print(f"{name}: {len(WAYS)} ways, {args.seeds} seeds", flush=True)
        traces = [make(name, args, args.seed + i) for i in range(args.seeds)]
        for way in WAYS:
            record["rows"].append({"trace": name, "way": way.name})
            states = max(asked.state_units for trace in traces for asked in trace)
            if max(way.sizes) < states:
                record["rows"][-1]["error"] = "no page holds a state in a row"
                continue
            runs = [measure(trace, way, args) for trace in traces]
            means = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
            record["rows"][-1] |= means | {
                "served_least": min(run["served"] for run in runs),
                "served_most": max(run["served"] for run in runs),
            }
    return record


# --- traces ---


def make(name: str, args: argparse.Namespace, seed: int) -> list[Asked]:
    """A trace that asks for `load` times the memory, on average."""
    draw = random.Random(f"{seed} {name}")
    kinds = [_kind(name, i / args.requests, draw) for i in range(args.requests)]
    worth = sum(kind.token_steps(args.unit_tokens) for kind in kinds)
    steps = worth / (args.load * args.units * args.unit_tokens)
    made, step = [], 0.0
    for kind in kinds:
        step += draw.expovariate(args.requests / steps)
        made.append(dataclasses.replace(kind, step=step))
    return made


def _kind(name: str, at: float, draw: random.Random) -> Asked:
    """What the request asks that comes after this share of the trace."""

    def tokens(median: float, sigma: float) -> int:
        drawn = int(draw.lognormvariate(math.log(median), sigma))
        return min(max(drawn, 1), LONGEST // 2)

    share = 0.5 + 0.45 * math.sin(2 * math.pi * SWINGS * at)
    second = draw.random() < share
    if name == "lognormal":
        return Asked(0.0, tokens(256, 1.2), tokens(128, 1.0))
    if name == "shifting":
        if second:
            return Asked(0.0, tokens(2000, 0.6), tokens(300, 0.8))
        return Asked(0.0, tokens(60, 0.8), tokens(100, 1.0))
    if name == "states":
        return Asked(0.0, tokens(100, 1.0), tokens(128, 1.0), STATE_UNITS[second])
    state_units = STATE_UNITS[1] if share > 0.5 else 0
    rest = tokens(500, 0.5) if draw.random() < 0.05 else 0
    return Asked(0.0, tokens(60, 0.8), tokens(100, 1.0), state_units, rest)


# --- one trace, one way ---


class _Running:
    """A request that has memory: its pages, tokens that fit in them, when it came."""

    __slots__ = ("asked", "start", "room", "units", "held")

    def __init__(self, asked: Asked):
        self.asked, self.start = asked, asked.step
        self.room = self.units = 0
        self.held: list[int] = []


class Simulation:
    """A trace's events in order, against one arena.

    At equal steps requests leave first, then running ones grow, then new ones come.
    """

    LEAVE, REST, GROW, COME = range(4)

    def __init__(self, arena: pages_lib.Pages, way: Way, args: argparse.Namespace):
        self.arena, self.sizes, self.unit_tokens = arena, way.sizes, args.unit_tokens
        self.smaller = args.smaller
        self.events: list[tuple[float, int, int, object]] = []
        self.number = 0
        self.refused = self.cut = self.finished = self.failed = self.external = 0
        self.served = self.held_pages = 0.0
        # For the share of memory that holds nothing: areas over time.
        self.step = self.area_units = self.area_payload = 0.0
        self.payload = self.running = 0

    def run(self, trace: list[Asked]) -> None:
        """All of the trace, until the last request has left."""
        for asked in trace:
            self._push(asked.step, self.COME, asked)
        while self.events:
            step, kind, _, what = heapq.heappop(self.events)
            self._pass(step)
            if kind == self.COME:
                self._come(what)
            elif kind == self.GROW:
                self._grow(what)
            elif kind == self.REST:
                self.running -= 1
                self._push(step + what.asked.rest, self.LEAVE, what)
            else:
                self._leave(what, what.asked.answer)
                self.finished += 1
                self.served += what.asked.token_steps(self.unit_tokens)
                self.held_pages += len(what.held)

    def _push(self, step: float, kind: int, what: object) -> None:
        self.number += 1  # ties are broken by it, never by the request
        heapq.heappush(self.events, (step, kind, self.number, what))

    def _pass(self, step: float) -> None:
        length = step - self.step
        self.area_units += self.arena.used * length
        self.area_payload += self.payload * length + self.running * length**2 / 2
        self.payload += self.running * length
        self.step = step

    def _come(self, asked: Asked) -> None:
        run = _Running(asked)
        if asked.state_units:
            fits = (size for size in self.sizes if size >= asked.state_units)
            state = self._take(run, min(fits), smaller=False)
        else:
            state = True
        run.room = run.units = 0
        if not state or not self._hold(run, asked.prompt + 1):
            for unit in run.held:
                self.arena.free(unit)
            self.refused += 1
            return
        self.running += 1
        self.payload += asked.prompt + asked.state_units * self.unit_tokens
        self._next(run)

    def _hold(self, run: _Running, tokens: int) -> bool:
        """Pages for so many tokens: the largest that fit in the rest, then smaller."""
        least = min(self.sizes)
        left = -(-tokens // (self.unit_tokens * least)) * least
        while left > 0:
            size = max(s for s in self.sizes if s <= left)
            before = run.units
            if not self._take(run, size, self.smaller):
                return False
            left -= run.units - before
        return True

    def _take(self, run: _Running, size: int, smaller: bool) -> bool:
        """One page of this size; where there is none, a smaller one if that will do."""
        while (unit := self.arena.alloc(size)) is None:
            if not smaller or size == min(self.sizes):
                self.failed += 1
                self.external += self.arena.free_units >= size
                return False
            size = max(s for s in self.sizes if s < size)
        run.held.append(unit)
        run.units += size
        run.room += size * self.unit_tokens
        return True

    def _next(self, run: _Running) -> None:
        """The event that comes next for a request: it outgrows its pages, or leaves."""
        grows = run.room - run.asked.prompt
        if grows < run.asked.answer:
            self._push(run.start + grows, self.GROW, run)
        else:
            self._push(run.start + run.asked.answer, self.REST, run)

    def _grow(self, run: _Running) -> None:
        wanted = max(
            [s for s in self.sizes if s <= run.units // 4] or [min(self.sizes)]
        )
        if self._take(run, wanted, self.smaller):
            self._next(run)
        else:
            self.cut += 1
            self.running -= 1
            self._leave(run, self.step - run.start)

    def _leave(self, run: _Running, gained: float) -> None:
        for unit in run.held:
            self.arena.free(unit)
        asked = run.asked
        self.payload -= asked.prompt + gained + asked.state_units * self.unit_tokens


def measure(trace: list[Asked], way: Way, args: argparse.Namespace) -> dict:
    """One row: a run with a log and interleaved lines, one with lines in order."""
    meter, plain = page_lines.Meter(), page_lines.Meter()
    with tempfile.TemporaryDirectory(prefix="qwen_jax_pages_") as scratch:
        cut = way.settings(args.slab_units, page_lines.BANKS)
        how = page_log.Settings(held_back=4096)
        arena = page_log.create(pathlib.Path(scratch, "log"), args.units, cut, how)
        arena.meter = meter
        run = Simulation(arena, way, args)
        run.run(trace)
        arena.log.close()
    cut = way.settings(args.slab_units, 1)
    other = pages_lib.Pages(args.units, cut, meter=plain)
    Simulation(other, way, args).run(trace)
    counts, log = arena.counts, arena.log
    offered = sum(asked.token_steps(args.unit_tokens) for asked in trace)
    return {
        "finished": run.finished / len(trace),
        "refused": run.refused,
        "cut": run.cut,
        "served": run.served / offered,
        "served_token_steps": run.served,
        "internal": 1 - run.area_payload / (run.area_units * args.unit_tokens),
        "used": run.area_units / (run.step * args.units),
        "failed": run.failed,
        "external": run.external,
        "pages_a_request": run.held_pages / max(1, run.finished),
        "allocs": counts.allocs,
        "morphs": counts.morphs,
        "stragglers": counts.stragglers,
        "emptied": counts.emptied,
        "log_bytes_an_operation": log.bytes_written / (counts.allocs + counts.frees),
        "log_copies": log.slow,
        "again": 1000 * meter.again / max(1, counts.allocs),
        "again_in_order": 1000 * plain.again / max(1, other.counts.allocs),
        "left_over_units": arena.used,
    }


# --- text ---


def report(record: dict) -> str:
    """The text for the terminal."""
    asked = record["flags"]
    tokens = asked["units"] * asked["unit_tokens"]
    lines = [
        f"commit {record['commit']}; {asked['units']:,} units of "
        f"{asked['unit_tokens']} tokens ({tokens:,}), slabs of {asked['slab_units']}; "
        f"{asked['requests']:,} requests that ask for {asked['load']} times that; "
        f"means of {asked['seeds']} seeds from {asked['seed']} on"
        + ("; smaller pages where need be" * asked["smaller"])
    ]
    for trace in asked["traces"]:
        rows = [row for row in record["rows"] if row["trace"] == trace]
        lines += ["", f"trace {trace}", _table(rows)]
    return "\n".join([*lines, "", *_remarks(record)])


def _table(rows: list[dict]) -> str:
    out = [["way", "finished", "served", "spread", "refused", "cut", "waste"]]
    out[0] += ["external", "pages/req", "morphs", "log B/op", "again", "in order"]
    for row in rows:
        if "error" in row:
            out.append([row["way"], "cannot"] + [""] * (len(out[0]) - 2))
            continue
        out.append(
            [
                row["way"],
                f"{row['finished']:.1%}",
                f"{row['served']:.1%}",
                f"{row['served_least']:.1%}-{row['served_most']:.1%}",
                f"{row['refused']:,.0f}",
                f"{row['cut']:,.0f}",
                f"{row['internal']:.1%}",
                f"{row['external']:,.0f}/{row['failed']:,.0f}",
                f"{row['pages_a_request']:.1f}",
                f"{row['morphs']:,.0f}",
                f"{row['log_bytes_an_operation']:.1f}",
                f"{row['again']:,.0f}",
                f"{row['again_in_order']:,.0f}",
            ]
        )
    return table.columns(out)


def _remarks(record: dict) -> list[str]:
    """What the columns are, and what the numbers say of one small page."""
    lines = [
        "finished: share of requests that got all they asked; served: their share of",
        "the token-steps asked for; waste: memory given out that holds nothing, over",
        "time; external: failed allocations while as many units were free; again, in",
        "order: near re-flushes of modelled lines for 1,000 allocations, bits dealt",
        "over 6 lines and in order (a model, no speed); cannot: no page is long enough",
    ]
    for trace in record["flags"]["traces"]:
        rows = {
            row["way"]: row
            for row in record["rows"]
            if row["trace"] == trace and "error" not in row
        }
        best = max(rows.values(), key=lambda row: row["served"])
        one = rows.get("pages of 1")
        if one is None:
            say = "pages of 1 cannot hold what must lie in a row"
        elif one["served"] >= 0.995 * best["served"]:
            ways = [row for row in rows.values() if row["way"] in ("morph", "eager")]
            most = max(ways, key=lambda row: row["served"])
            say = (
                "pages of 1 serve as much as anything: classes only save pages "
                f"({one['pages_a_request']:.0f} a request, {most['way']} "
                f"{most['pages_a_request']:.0f})"
            )
        else:
            say = f"pages of 1 serve {one['served'] / best['served']:.1%} of that"
        lines.append(f"{trace}: most is served by {best['way']}; {say}")
    return lines


def _fenced(record: dict) -> str:
    return f"```text\n{report(record)}\n```"
