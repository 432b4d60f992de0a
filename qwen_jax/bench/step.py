# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax bench step`: a model's decoding beside the memory's bandwidth, and a crowd.

For accelerators, with random weights of a published size:
- `copy`: what the memory moves in a second when an array is copied, read plus written;
- `step`: the engine's compiled decoding step of some rows, each with `--tokens` tokens
  in its pages, given to the device one behind the other without waiting, and in bursts
  of a few (`device.Settings.burst`); the bytes that a step must read (every weight that
  it uses once, and the rows' keys and values) over its time, and that as a share of
  `copy`; no row has top-k, top-p or min-p;
- `crowd`: the engine itself, `--crowd` requests at once, `--tokens` random tokens in
  and `--new_tokens` out: tokens/s of answers, time to the first token, time of a token.
`--profile DIR` leaves a trace of a few steps, and the kernels that took longest.
Formats: `--json FILE` writes the record: head (flags.py), copy, steps, crowd.
Units: seconds, bytes/s, tokens/s of all rows together.
Raises: config.InputError for flags that do not fit.
"""

from __future__ import annotations

import argparse
import collections
import glob
import gzip
import itertools
import json
import shlex
import statistics
import time
import types
from typing import Any
from unittest import mock

from qwen_jax import config
from qwen_jax.bench import candidates, flags, table

STEPS = 64  # in a row, without waiting


def parser() -> flags.Parser:
    """The flags of the command."""
    top = flags.Parser(
        prog="qwen-jax bench step",
        description="Measure decoding beside the memory's bandwidth, and a crowd.",
        allow_abbrev=False,
    )
    add = top.add_argument
    add("--model", default="qwen3-0.6b", help="a published size")
    add("--layers", type=int, default=0, help="fewer layers than it has; 0 for all")
    add("--dtype", default="bfloat16", help="of weights, pages and products")
    add("--rows", default="1", metavar="LIST", help="rows of a step; '' for no steps")
    add("--tokens", type=int, default=1024, help="tokens of a row, or of a prompt")
    add("--new_tokens", type=int, default=1024, help="tokens of an answer of the crowd")
    add("--crowd", type=int, default=0, help="requests at once; 0 leaves it out")
    add("--requests", type=int, default=0, help="requests of the crowd; 0 for as many")
    add("--piece", type=int, default=1024, help="tokens of a piece of a prompt")
    add("--page_tokens", type=int, default=64, help="tokens of a page")
    add("--rounds", type=int, default=5, help="times that steps are measured")
    add("--growth", type=int, default=0, help="of numbers of rows; 0 as served")
    add("--ways", default="", metavar="LIST", help="over pages; '' for the platform's")
    add("--copy_mib", type=int, default=2048, help="size of the array that is copied")
    add("--profile", default="", metavar="DIR", help="leave a trace of a few steps")
    flags.add_outputs(top)
    return top


def main(argv: list[str]) -> int:
    """Measure what the flags ask for; returns the exit code."""
    args = flags.parse(parser(), argv)
    flags.at_least_one(args, "tokens", "new_tokens", "piece", "page_tokens", "rounds")
    flags.at_least_one(args, "copy_mib")
    parts = [part.strip() for part in args.rows.split(",") if part.strip()]
    if not all(part.isdigit() and int(part) for part in parts):
        raise config.InputError(f"--rows is {args.rows!r}, wanted counts such as 1,8")
    record = flags.head("qwen-jax bench step " + shlex.join(argv))
    record |= measure(args, [int(part) for part in parts])
    print(f"machine: {record['machine']}; {record['device']}; {record['commit']}")
    print(report(record))
    lines = (flags.title(record, "step"), "```text", report(record), "```", "")
    flags.write(args, record, "\n".join(lines))
    return 0


def measure(args: argparse.Namespace, rows: list[int]) -> dict[str, Any]:
    """{"copy": bytes/s, "steps": one for each way and number of rows, "crowd": ...}."""
    import jax

    from qwen_jax.models import page_ways

    names = [name for name in args.ways.split(",") if name] or [page_ways.here()]
    for way in names:
        if way not in page_ways.WAYS:
            raise config.InputError(f"--ways has {way!r}: {', '.join(page_ways.WAYS)}")
    world = _World(args)
    device = jax.devices()[0]
    found: dict[str, Any] = {"device": f"{device.device_kind}, jax {jax.__version__}"}
    found["copy"] = _copy(args)
    candidates.say(f"copy: {found['copy'] / 1e9:,.0f} GB/s")
    world.make()
    found["model"] = args.model + (f", {args.layers} layers" if args.layers else "")
    found["weights"] = world.weights
    found["steps"] = []
    for way, count in itertools.product(names, rows):
        with mock.patch.object(page_ways, "here", lambda way=way: way):
            steps = world.step(count)
        for one in steps:
            one |= {"way": way, "share": one["bytes_per_s"] / found["copy"]}
            found["steps"].append(one)
            told = f"{way}, {count} rows: {one['step_s'] * 1e3:.3f} ms a step"
            candidates.say(f"{told}, {one['burst']} at once")
        jax.clear_caches()  # programs of another way have the same arguments
    if args.crowd:
        found["crowd"] = world.crowd()
    return found


def _copy(args) -> float:
    """Bytes a second, read and written, of the fastest of some copies."""
    import jax
    import jax.numpy as jnp

    x = jax.random.bits(jax.random.key(0), (args.copy_mib << 18,), jnp.uint32)
    copy = jax.jit(jnp.copy)
    jax.block_until_ready(copy(x))
    best_s = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(copy(x))
        best_s = min(best_s, time.perf_counter() - began)
    return 2 * x.nbytes / best_s


class _World:
    """Random weights, and what is measured with them."""

    def __init__(self, args: argparse.Namespace):
        from qwen_jax.models import sizes

        self.args = args
        more = {"num_layers": args.layers} if args.layers else {}
        how = {"param_dtype": args.dtype, "compute_dtype": args.dtype}
        self.spec = sizes.get(args.model, **how, **more)
        self.settings(max(args.crowd, 1), args.new_tokens)  # refuses what does not fit

    def make(self) -> None:
        """The weights."""
        import jax

        from qwen_jax import params as params_lib
        from qwen_jax import rng
        from qwen_jax.models import decode, decoder

        args = self.args
        candidates.say(f"making weights of {args.model}")
        tree = decoder.decoder_params(self.spec)
        made = params_lib.init(tree, rng.key_for(0, "params"), args.dtype, None)
        self.params = decode.laid_out(self.spec, made)
        del made
        jax.block_until_ready(self.params)
        sizes_of = {
            "".join(map(str, path)): leaf.nbytes
            for path, leaf in jax.tree.leaves_with_path(self.params)
        }
        tied = self.spec.tie_embedding
        self.weights = sum(
            n for name, n in sizes_of.items() if tied or "embed" not in name
        )

    def settings(self, rows: int, new_tokens: int):
        from qwen_jax.serve import device

        args = self.args
        longest = args.tokens + new_tokens
        pages = rows * -(-longest // args.page_tokens) + 1
        return device.Settings(
            rows=rows,
            page_tokens=args.page_tokens,
            pages=pages,
            max_tokens=longest,
            piece=args.piece,
            max_waiting=10_000,
            sharing=False,
            growth=args.growth,
        )

    def step(self, rows: int) -> list[dict[str, Any]]:
        """The decoding step of so many rows, one at a time and in bursts."""
        import jax
        import numpy as np

        from qwen_jax.models import paged, sampling
        from qwen_jax.serve import device, programs

        args, spec = self.args, self.spec
        settings = self.settings(rows, STEPS)
        made = device.Device(spec, self.params, settings, None)
        per_row = made.table_pages
        table_bp = 1 + np.arange(rows * per_row, dtype=np.int32).reshape(rows, -1)
        wishes = jax.tree.map(
            jax.numpy.asarray, sampling.stack([sampling.Sampling()] * rows)
        )
        ones = np.ones(rows, np.int32)

        def some(count, burst):
            ids = None
            for i in range(0, count, burst):
                length_b = ones * (args.tokens + i)
                places = paged.Places(
                    table_bp, length_b, np.arange(rows, dtype=np.int32)
                )
                feed = programs.Feed(-ones, ones, ones * i, ones, places, wishes)
                if burst > 1:
                    ids = made._several(feed, True)
                else:
                    ids, _ = made._decode(False, feed, None, True)
            jax.block_until_ready(ids)

        return [
            self._timed(rows, burst, lambda count, n=burst: some(count, n))
            for burst in sorted({1, made.burst})
        ]

    def _timed(self, rows: int, burst: int, some) -> dict[str, Any]:
        """`some(count)` makes so many steps."""
        from qwen_jax.models import paged

        args = self.args
        began = time.perf_counter()
        some(3 * burst)
        candidates.say(f"compiled in {time.perf_counter() - began:.1f} s")
        times_s = []
        for _ in range(args.rounds):
            began = time.perf_counter()
            some(STEPS)
            times_s.append((time.perf_counter() - began) / STEPS)
        kernels = []
        if args.profile:
            kernels = _profiled(args.profile, lambda: some(2 * burst), 2 * burst)
        step_s = statistics.median(times_s)
        token = paged.page_bytes(self.spec, args.page_tokens) // args.page_tokens
        moved = self.weights + rows * (args.tokens + STEPS // 2) * token
        return {
            "rows": rows,
            "burst": burst,
            "step_s": step_s,
            "least_s": min(times_s),
            "most_s": max(times_s),
            "bytes": moved,
            "bytes_per_s": moved / step_s,
            "tokens_per_s": rows / step_s,
            "kernels": kernels,
        }

    def crowd(self) -> dict[str, Any]:
        """Many requests at once through the engine."""
        import numpy as np

        from qwen_jax.serve import engine, request

        args = self.args
        settings = self.settings(args.crowd, args.new_tokens)
        made = engine.Engine(self.spec, self.params, settings=settings, stop_ids=())
        candidates.say("compiling the engine's programs")
        began = time.perf_counter()
        self._warm(made._device)
        warm_s = time.perf_counter() - began
        draw, count = np.random.default_rng(0), args.requests or args.crowd
        come_s, first_s, last_s = {}, {}, {}

        def tell(piece):
            now = time.perf_counter()
            first_s.setdefault(piece.request, now)
            last_s[piece.request] = now

        began = time.perf_counter()
        for i in range(count):
            prompt = tuple(
                map(int, draw.integers(0, self.spec.vocab_size, args.tokens))
            )
            come_s[str(i)] = began
            made.submit(request.Request(str(i), prompt, args.new_tokens), tell)
        told_s = began
        while made.in_flight:
            made.step()
            if time.perf_counter() - told_s > 10:
                told_s = time.perf_counter()
                candidates.say(f"{made.in_flight} of {count} in flight")
        took_s = time.perf_counter() - began
        ttft_s = [first_s[k] - come_s[k] for k in come_s]
        more = max(args.new_tokens - 1, 1)
        return {
            "requests": count,
            "at_once": args.crowd,
            "tokens": args.tokens,
            "new_tokens": args.new_tokens,
            "warm_s": warm_s,
            "took_s": took_s,
            "tokens_per_s": count * args.new_tokens / took_s,
            "ttft_mean_s": statistics.mean(ttft_s),
            "ttft_p50_s": statistics.median(ttft_s),
            "ttft_most_s": max(ttft_s),
            "tpot_s": statistics.mean((last_s[k] - first_s[k]) / more for k in come_s),
            "steps": made.steps,
            "scheduler_share": made.plan_s / made.busy_s,
        }

    def _warm(self, device) -> None:
        """What a greedy crowd needs; `warm` itself compiles what others need, too."""
        from qwen_jax.serve import request, scheduler

        prompt = (0,) * min(self.args.tokens, self.args.piece)
        row = scheduler.Row(request.Request("", prompt, 1), 0, device.table_pages)
        row.slot = device.settings.rows  # nobody's
        row.answer = types.SimpleNamespace(matcher=None)
        logits_1v, _ = device.prefill(scheduler.Prefill(row, 0, len(prompt)))
        device.first(row, logits_1v)
        candidates.say("a piece")
        for b in device.settings.row_buckets():
            candidates.say(f"{b} rows")
            feed, _ = device._feed([], b, False)
            device._decode(False, feed, None, True)
            if device.burst > 1:
                device._several(feed, True)


def _profiled(folder: str, run, steps: int) -> list[tuple[str, float, int]]:
    """(name, microseconds a step, times a step) of kernels, the longest first."""
    import jax

    jax.profiler.start_trace(folder)
    run()
    jax.profiler.stop_trace()
    files = sorted(glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True))
    if not files:
        return []
    with gzip.open(files[-1]) as file:
        events = json.load(file)["traceEvents"]
    streams = {
        (e["pid"], e["tid"])
        for e in events
        if e.get("name") == "thread_name" and "Stream" in str(e["args"].get("name"))
    }
    took, times = collections.Counter(), collections.Counter()
    for e in events:
        if e.get("ph") == "X" and (e["pid"], e.get("tid")) in streams:
            took[e["name"]] += e["dur"]
            times[e["name"]] += 1
    return [(name, us / steps, times[name] // steps) for name, us in took.most_common()]


def report(record: dict) -> str:
    """The table."""
    rows = [
        ["way", "rows", "at once", "ms a step", "spread", "GB/s", "of copy", "tokens/s"]
    ]
    for one in record["steps"]:
        rows.append(
            [
                one["way"],
                str(one["rows"]),
                str(one["burst"]),
                f"{one['step_s'] * 1e3:.3f}",
                f"{one['least_s'] * 1e3:.3f}-{one['most_s'] * 1e3:.3f}",
                f"{one['bytes_per_s'] / 1e9:.0f}",
                f"{one['share']:.0%}",
                f"{one['tokens_per_s']:.0f}",
            ]
        )
    lines = [
        f"{record['model']}: {record['weights'] / 1e9:.2f} GB of weights in a step; "
        f"copy {record['copy'] / 1e9:,.0f} GB/s",
        *([table.columns(rows)] if record["steps"] else []),
    ]
    for one in record["steps"]:
        for name, us, times in one["kernels"][:16]:
            lines.append(f"  {us:8.1f} us {times:4d}x {name[:80]}")
        if one["kernels"]:
            total = sum(us for _, us, _ in one["kernels"])
            count = sum(times for *_, times in one["kernels"])
            lines.append(f"  {total:8.1f} us {count:4d}x in all, {one['rows']} rows")
    if crowd := record.get("crowd"):
        lines.append(
            f"{crowd['requests']} requests, {crowd['at_once']} at once, "
            f"{crowd['tokens']} tokens in and {crowd['new_tokens']} out: "
            f"{crowd['tokens_per_s']:,.0f} tokens/s in {crowd['took_s']:.1f} s; first "
            f"token {crowd['ttft_mean_s'] * 1e3:,.0f} ms (median "
            f"{crowd['ttft_p50_s'] * 1e3:,.0f}, most {crowd['ttft_most_s'] * 1e3:,.0f})"
            f", then {crowd['tpot_s'] * 1e3:.2f} ms a token; warm in "
            f"{crowd['warm_s']:.0f} s; scheduler {crowd['scheduler_share']:.1%}"
        )
    return "\n".join(lines)
