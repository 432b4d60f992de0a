# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax plan chunk`: which chunks a run should be trained in.

For each C (tokens of a chunk) and K (chunks of a document that wait for their backward
pass) the memory of a device and the tokens/s of a step, for documents of given lengths,
in the experiment's model, mesh, batch and longest row; the fastest that fits is named
with the flags to set. With --measure the best ones run: the very step of a run, on
random tokens. Rates that were assumed are then fitted to what was measured.

Formats: --lengths takes `published` (the long tail of ChunkFlow's evaluation set), or a
file of lines LENGTH [COUNT]. --json writes what is printed.
Units: bytes of one device, tokens/s of the whole mesh; documents longer than a row are
cut, as a run cuts them.
Raises: config.InputError for flags and files that do not fit, and where nothing fits.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qwen_jax import config, experiment, prepare
from qwen_jax.data import packing
from qwen_jax.plan import chips, memory, micro, topology
from qwen_jax.plan import chunks as costs
from qwen_jax.train import state as state_lib
from qwen_jax.train.chunkflow import chunks, lengths

GIB = 1 << 30
LIVE = (1, 2, 4, 8)
SHORTEST = 128  # candidates of C are powers of two from here on
STEPS = 4  # batches that work is counted in, and steps that are measured
ASSUMED = {"cpu": 0.5, "gpu": 0.4, "tpu": 0.4}  # of the peak that products reach
DRAWN = 100_000  # documents of the published lengths that batches are drawn from


@dataclasses.dataclass(frozen=True)
class Rates:
    """Of one device: FLOP/s of products, bytes/s of memory, seconds that each batch of
    chunks takes beside."""

    flops_per_s: float
    bytes_per_s: float
    batch_s: float = 0.0

    def seconds(self, work: costs.Work) -> float:
        """Of a step with this work."""
        moved = work.bytes / self.bytes_per_s
        return work.flops / self.flops_per_s + moved + work.batches * self.batch_s


@dataclasses.dataclass(frozen=True)
class Candidate:
    """C and K, and what they cost; tokens and work of a step, the mean of a few."""

    chunk_tokens: int
    live_chunks: int
    bytes: int
    tokens: float
    padding: float
    work: costs.Work
    step_s: float
    measured_s: float = math.nan
    measured_bytes: int = 0

    @property
    def name(self) -> str:
        return f"{self.chunk_tokens}x{self.live_chunks}"


def main(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    """Print the table and the choice; returns the exit code."""
    for name in ("measure", "memory_gib"):
        if getattr(args, name) < 0:
            raise config.InputError(f"--{name} {getattr(args, name)} is below 0")
    folder = pathlib.Path(args.json).parent
    if not folder.is_dir():
        raise config.InputError(f"--json {args.json}: there is no folder {folder}")
    if args.measure and args.topology:
        raise config.InputError(
            f"--measure runs on this machine and --topology {args.topology} is another"
        )
    exp = experiment.resolve(args.config, overrides, "")
    sizes = pairs(args.chunks) or worth_a_look(exp.data.seq_tokens)
    histogram = read_lengths(args.lengths, args.scale, args.seed)
    devices = topology.devices(args.topology, 1) if args.topology else None
    for size in sizes:
        prepare.check_chunks(with_chunks(exp, size))
    exp, setup = prepare.set_up(with_chunks(exp, sizes[0]), devices)
    device = setup.device_mesh.devices.flat[0]
    budget = int(args.memory_gib * GIB) or int(
        micro.HEADROOM * chips.memory_bytes(device)
    )
    batches = draw(histogram, exp, args.seed)
    rates = assumed(device)
    made = [candidate(with_chunks(exp, size), setup, batches, rates) for size in sizes]
    made.sort(key=lambda one: (one.bytes > budget, one.step_s))
    fitting = sum(one.bytes <= budget for one in made)
    for i in range(min(args.measure, fitting)):
        print(f"running {made[i].name} ({i + 1} of {args.measure})", flush=True)
        made[i] = measured(made[i], exp, batches, args.seed)
    if any(one.measured_bytes for one in made):
        rates = fitted(made, rates)
        made = [dataclasses.replace(x, step_s=rates.seconds(x.work)) for x in made]
    record = {
        "device": device.device_kind,
        "devices": setup.device_mesh.size,
        "budget_bytes": budget,
        "seq_tokens": exp.data.seq_tokens,
        "documents": [len(batch) for batch in batches],
        "rates": dataclasses.asdict(rates),
        "candidates": [dataclasses.asdict(one) for one in made],
    }
    print(render(record, setup.lines[:2], histogram, made))
    if args.json:
        for row in record["candidates"]:  # JSON has no NaN
            row["measured_s"] = row["measured_s"] if row["measured_bytes"] else None
        pathlib.Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
    best = chosen(made, budget, exp)
    print(
        f"take --config.train.chunk_tokens={best.chunk_tokens} "
        f"--config.train.live_chunks={best.live_chunks}"
    )
    return 0


def chosen(made: Sequence[Candidate], budget: int, exp: Any) -> Candidate:
    """The fastest that fits: as measured, where anything was.

    Raises:
      config.InputError: nothing fits.
    """
    fitting = [one for one in made if one.bytes <= budget]
    if not fitting:
        least = min(made, key=lambda one: one.bytes)
        raise config.InputError(
            f"nothing fits in {budget / GIB:.2f} GiB of a device: the least is "
            f"{least.name} with {least.bytes / GIB:.2f} GiB; take a larger "
            "--config.mesh.fsdp or --config.mesh.tensor, smaller --chunks, or a "
            f"smaller --config.data.seq_tokens (now {exp.data.seq_tokens})"
        )
    seen = [one for one in fitting if one.measured_s == one.measured_s]
    if seen:
        return min(seen, key=lambda one: one.measured_s)
    return min(fitting, key=lambda one: one.step_s)


def worth_a_look(longest: int) -> list[tuple[int, int]]:
    """(C, K) for rows of `longest`: powers of two, as many waiting as a row has."""
    top = max(longest.bit_length(), SHORTEST.bit_length())
    sizes = [1 << i for i in range(SHORTEST.bit_length() - 1, top)]
    sizes = [c for c in sizes if c <= longest] or [longest]
    return [(c, k) for c in sizes for k in LIVE if k == 1 or c * k <= longest]


def pairs(text: str) -> list[tuple[int, int]]:
    """(C, K) of "CxK,CxK".

    Raises:
      config.InputError: it is something else.
    """
    found = []
    for part in filter(None, text.split(",")):
        numbers = part.strip().split("x")
        if len(numbers) != 2 or not all(n.isdigit() and int(n) for n in numbers):
            raise config.InputError(
                f"--chunks has {part!r}, wanted pairs of tokens and chunks: "
                "4096x2,2048x4"
            )
        found.append((int(numbers[0]), int(numbers[1])))
    return found


def read_lengths(name: str, scale: int, seed: int) -> np.ndarray:
    """Lengths of documents, one for each: int64.

    Raises:
      config.InputError: naming the file and the line.
    """
    if scale < 1:
        raise config.InputError(f"--scale {scale}: wanted at least 1")
    if name == "published":
        return lengths.draw(DRAWN, seed, scale)
    path = pathlib.Path(name)
    if not path.is_file():
        raise config.InputError(
            f"--lengths {name}: no such file; give one of lines LENGTH [COUNT], or "
            "`published`"
        )
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        words = line.replace(",", " ").split()
        if not words:
            continue
        if len(words) > 2 or not all(x.isdigit() and int(x) for x in words):
            raise config.InputError(
                f"{name}, line {number}: {line!r}; wanted LENGTH [COUNT], both at "
                "least 1"
            )
        found.append((int(words[0]), int(words[1]) if len(words) == 2 else 1))
    if not found:
        raise config.InputError(f"--lengths {name}: it has no lengths")
    sizes, counts = (np.array(column, np.int64) for column in zip(*found, strict=True))
    return np.maximum(np.repeat(sizes, counts) // scale, 1)


def draw(histogram: np.ndarray, exp: Any, seed: int) -> list[list[int]]:
    """Lengths of the pieces of a few batches; the longest there is in the first."""
    rng, made = np.random.default_rng(seed), []
    for number in range(STEPS):
        pieces, left = [], exp.train.batch_tokens
        drawn = [int(histogram.max())] if number == 0 else []
        while left > 0:
            size = drawn.pop() if drawn else int(rng.choice(histogram))
            cuts = packing.cut(min(size, left), exp.data.seq_tokens)
            pieces += [stop - start for start, stop in cuts]
            left -= size
        made.append(pieces)
    return made


def with_chunks(exp: Any, size: tuple[int, int]) -> Any:
    """The experiment in chunks of (C, K)."""
    changes = {"chunk_tokens": size[0], "live_chunks": size[1], "micro_rows": 0}
    return dataclasses.replace(exp, train=dataclasses.replace(exp.train, **changes))


def assumed(device: Any) -> Rates:
    """What products and memory of a device are taken to reach."""
    share = ASSUMED.get(device.platform, 0.4)
    peak, _ = chips.peak_flops_per_s(device)
    return Rates(share * peak, chips.bandwidth_bytes_per_s(device))


def candidate(exp: Any, setup: prepare.Setup, batches, rates: Rates) -> Candidate:
    """What the experiment's chunks cost."""
    c, k = exp.train.chunk_tokens, exp.train.live_chunks
    ways = setup.batch.micro_rows
    setup = dataclasses.replace(setup, exp=exp)
    held, rounds = prepare.chunk_memory(setup), setup.rounds
    works, places, real, share = [], 0, 0, 1.0
    for batch in batches:
        plan = chunks.build(batch, c)
        short = [n for n in batch if n <= c]
        some, bins = chunks.beside(plan, ways)
        groups = [-(-batch[items[0][0][0]] // c) for items in some]
        packed = -(-len(bins) // ways)
        works.append(
            costs.work(
                exp.model,
                remat=exp.train.remat,
                chunk_tokens=c,
                live_chunks=k,
                packed=packed,
                groups=groups,
                length=sum(n * n for n in short) / max(sum(short), 1),
                weight_bytes=held.weights,
            )
        )
        if rounds is not None and len(works) == 1:  # each takes a second to deal
            share = rounds.stretch(packed, groups) / rounds.stages
        places += (packed + sum(groups)) * ways * c
        real += sum(batch)
    mean = np.mean([dataclasses.astuple(one) for one in works], axis=0)
    # Products are split between the devices that split heads, and between stages, which
    # wait for each other.
    flops = mean[0] * share
    flops /= memory.ways(exp.rules.heads, dict(setup.device_mesh.shape))
    work = costs.Work(float(flops), float(mean[1]), float(mean[2]))
    return Candidate(
        *(c, k, held.total, real / len(batches), 1 - real / places, work),
        step_s=rates.seconds(work),
    )


def measured(one: Candidate, exp: Any, batches, seed: int) -> Candidate:
    """The candidate with the time and memory of the step of a run, on random tokens."""
    exp, setup = prepare.set_up(
        with_chunks(exp, (one.chunk_tokens, one.live_chunks)), None
    )
    try:
        return _run(one, exp, setup, batches, seed)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"{one.name} ran out of memory here", flush=True)
        return dataclasses.replace(one, bytes=max(one.bytes, 1 << 62))


def _run(one: Candidate, exp: Any, setup: Any, batches, seed: int) -> Candidate:
    spec = exp.model
    step = prepare.compile_step(setup)
    place = prepare.placer_of(setup, np.zeros(spec.vocab_size, np.float32))
    rng = np.random.default_rng(seed)
    laid = []
    for batch in batches:
        documents = [rng.integers(0, spec.vocab_size, n + 1) for n in batch]
        laid.append(place(packing.pack(documents, exp.data.seq_tokens)))
    took = []
    with jax.set_mesh(setup.device_mesh):
        now = state_lib.create(
            spec, setup.tx, setup.device_mesh, exp.rules, exp.seed, None
        )
        now, told = step(now, laid[0])
        jax.block_until_ready(told)
        for work in laid:
            began_s = time.perf_counter()
            now, told = step(now, work)
            jax.block_until_ready((now, told))
            took.append(time.perf_counter() - began_s)
    mean_s = statistics.fmean(took)
    return dataclasses.replace(one, measured_s=mean_s, measured_bytes=step.needed())


def fitted(made: Sequence[Candidate], rates: Rates) -> Rates:
    """Rates whose times are nearest to those that were measured, relatively: one factor
    for products and traffic, and a time of each batch of chunks beside."""
    seen = [one for one in made if one.measured_s == one.measured_s]
    plain = dataclasses.replace(rates, batch_s=0.0)
    rows = np.array(
        [
            [plain.seconds(x.work), x.work.batches] / np.float64(x.measured_s)
            for x in seen
        ]
    )
    factor, batch_s = np.linalg.lstsq(rows, np.ones(len(seen)), rcond=None)[0]
    if len(seen) == 1 or batch_s < 0 or factor < 0:
        factor = float(np.mean(rows[:, 0]) / np.mean(rows[:, 0] ** 2))
        batch_s = 0.0
    return Rates(plain.flops_per_s / factor, plain.bytes_per_s / factor, float(batch_s))


def render(record: dict, lines: Sequence[str], histogram, made) -> str:
    """The table."""
    p50, p90, p99 = (int(np.percentile(histogram, q)) for q in (50, 90, 99))
    budget, rates = record["budget_bytes"], record["rates"]
    out = [
        *lines,
        f"documents: median {p50:,} tokens, 90 % up to {p90:,}, 99 % up to {p99:,}, "
        f"longest {int(histogram.max()):,}; rows of {record['seq_tokens']:,}, so that "
        f"{float(np.mean(histogram > record['seq_tokens'])):.2%} are cut",
        f"rates of a device: {rates['flops_per_s'] / 1e12:.3g} TFLOP/s, "
        f"{rates['bytes_per_s'] / 1e9:.3g} GB/s, {rates['batch_s'] * 1e3:.3g} ms a "
        f"chunk; memory: {budget / GIB:.2f} GiB",
        f"{'C x K':>12} {'GiB':>8} {'measured':>9} {'padding':>8} {'tokens/s':>10} "
        f"{'measured':>10}",
    ]
    for one in made:
        seen = one.measured_s == one.measured_s
        held = f"{one.measured_bytes / GIB:.3f}" if seen else ""
        rate = f"{one.tokens / one.measured_s:,.0f}" if seen else ""
        fits = "" if one.bytes <= budget else "  does not fit"
        out.append(
            f"{one.chunk_tokens:>8} x {one.live_chunks} {one.bytes / GIB:>8.3f} "
            f"{held:>9} {one.padding:>8.0%} {one.tokens / one.step_s:>10,.0f} "
            f"{rate:>10}{fits}".rstrip()
        )
    return "\n".join(out)
