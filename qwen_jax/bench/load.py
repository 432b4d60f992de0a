# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax bench load`: weights from safetensors, beside a plain read of the files.

A folder of random weights of a Qwen3 is made on the spot (or --model DIR). Each turn is
a process of its own with nothing else in it: `plain` reads every file whole into fresh
memory with one call of Python's `read`; `ours` is `models.load`, until the weights are
on the device, checks, casts and turned layouts included; with --peers `safetensors`
loads every tensor with that library, as it lies in the files. They take turns in a new
order each round, so a round's ratio compares neighbours in time. Before each turn the
files are brought into the system's page cache, or with --cold dropped from it.

Formats: `--json FILE` writes the record: date, commit, machine, command, bytes, turns,
summaries. Units: MB/s is 10^6 bytes of the files a second of wall time; `cpu` the same
by processor time, which neighbours on a busy machine disturb less; peak memory is what
a turn's process holds at most (VmHWM) beyond what it held before and beyond the result.
Raises: config.InputError for flags that do not fit.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pathlib
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

from qwen_jax import config
from qwen_jax.bench import flags, table

CANDIDATES = ("plain", "ours", "safetensors")


def parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    top = flags.Parser(
        prog="qwen-jax bench load",
        description="Measure loading weights, beside a plain read of the same files.",
        allow_abbrev=False,
    )
    add = top.add_argument
    add("--gb", type=float, default=1.5, help="size of the model, in 10^9 bytes")
    add("--model", default="", metavar="DIR", help="a model folder instead")
    add("--dtype", default="", help="load as this; default: as it is stored")
    add("--stored", default="bfloat16", choices=("bfloat16", "float32"))
    add("--rounds", type=int, default=7, help="rounds in which each takes a turn")
    add("--cold", action="store_true", help="drop the files from the page cache first")
    add("--peers", action="store_true", help="the safetensors library, too")
    flags.add_outputs(top)
    return top


def main(argv: list[str]) -> int:
    """Measure; returns the exit code."""
    args = parse(argv)
    command = "qwen-jax bench load " + shlex.join(argv)
    if args.model:
        record = collect(args, pathlib.Path(args.model), command)
    else:
        with tempfile.TemporaryDirectory(prefix="qwen_jax_load_") as scratch:
            make(pathlib.Path(scratch), args.gb, args.stored)
            record = collect(args, pathlib.Path(scratch), command)
    print(report(record))
    flags.write(args, record, paragraph(record))
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags; what does not fit is told."""
    args = flags.parse(parser(), argv)
    flags.at_least_one(args, "rounds")
    if not 0 < args.gb <= 200:
        raise config.InputError(f"--gb is {args.gb}, wanted above 0 and at most 200")
    return args


def make(folder: pathlib.Path, gb: float, dtype: str) -> None:
    """Write a model of about this size with random bytes of sensible numbers."""
    import numpy as np

    from qwen_jax.models import decoder, hf, spec

    width = 256 if gb < 0.2 else 1024 if gb < 3 else 2560
    itemsize = 2 if dtype == "bfloat16" else 4
    made = spec.Spec(
        width=width,
        ffn_width=3 * width,
        num_layers=1,
        vocab_size=min(65_536, int(0.2 * gb * 1e9 / itemsize / width)),
        param_dtype=dtype,
        compute_dtype=dtype,
    )
    layer = itemsize * width * (3 * 3 * width + 48 * 128)
    rest = itemsize * width * made.vocab_size
    layers = max(1, round((gb * 1e9 - rest) / layer))
    made = config.freeze(spec.Spec, config.thaw(made) | {"num_layers": layers})
    draw = np.random.default_rng(0)
    # Normal numbers of bfloat16 and float32 alike by their upper bits.
    bits = draw.integers(0x3C00, 0x3D00, 1 << 22, np.uint16)

    class Random:
        """A weight whose parts are drawn when they are asked for."""

        def __init__(self, p):
            self.shape = p.shape
            self.dtype = np.dtype(hf.jnp.dtype(dtype))

        def __getitem__(self, place):
            shape = self.shape[len(place) :]
            low = np.resize(bits, shape)
            if itemsize == 2:
                return low.view(self.dtype)
            return (low.astype(np.uint32) << 16).view(self.dtype)

    from qwen_jax import params

    weights = params.tree_map(Random, decoder.decoder_params(made))
    hf.save(made, weights, folder, shard_bytes=500_000_000)


def collect(args: argparse.Namespace, folder: pathlib.Path, command: str) -> dict:
    """Measure in rounds; the record."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise config.InputError(f"--model {folder} has no *.safetensors files")
    names = [n for n in CANDIDATES if n != "safetensors" or args.peers]
    record = flags.head(command) | {
        "bytes": sum(path.stat().st_size for path in files),
        "files": len(files),
        "largest_file": max(path.stat().st_size for path in files),
        "cold": args.cold,
        "dtype": args.dtype or "as stored",
        "turns": [],
    }
    draw = random.Random(0)
    for number in range(args.rounds + 1):  # the first is not counted
        for name in draw.sample(names, len(names)):
            for path in files:
                prepare(path, args.cold)
            turn = one_turn(name, folder, args.dtype)
            if number:
                record["turns"].append({"name": name, "round": number} | turn)
        if number:
            _say(record["turns"][-len(names) :], record["bytes"])
    record["summaries"] = {name: summarize(record, name) for name in names}
    return record


def _say(turns: list[dict], num_bytes: int) -> None:
    rates = (f"{t['name']} {num_bytes / t['seconds'] / 1e6:,.0f}" for t in turns)
    print(f"round {turns[0]['round']}: {', '.join(sorted(rates))} MB/s", flush=True)


def prepare(path: pathlib.Path, cold: bool) -> None:
    """Bring a file into the page cache, or out of it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        if cold:
            os.fsync(handle)  # what is not on the disk yet cannot be dropped
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            return
        while os.read(handle, 1 << 24):
            continue
    finally:
        os.close(handle)


def one_turn(name: str, folder: pathlib.Path, dtype: str) -> dict:
    """One turn in a process of its own."""
    words = [sys.executable, "-m", "qwen_jax.bench.load", name, str(folder), dtype]
    # Without malloc's huge pages, which would not be there for any other plain read.
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise config.InputError(f"the turn of {name} failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def turn(name: str, folder: str, dtype: str) -> dict:
    """What a process of one turn does: its time, and its memory beyond the result."""
    files = sorted(pathlib.Path(folder).glob("*.safetensors"))
    if name == "plain":
        held, seconds, cpu_s, before = _timed(lambda: [p.read_bytes() for p in files])
        size = sum(map(len, held))
    elif name == "safetensors":
        importlib.import_module("ml_dtypes")  # tells NumPy what bfloat16 is
        safetensors = importlib.import_module("safetensors.numpy")

        held, seconds, cpu_s, before = _timed(
            lambda: [safetensors.load_file(path) for path in files]
        )
        size = sum(x.nbytes for one in held for x in one.values())
    else:
        import jax

        from qwen_jax import models

        jax.block_until_ready(jax.numpy.zeros(8))
        held, seconds, cpu_s, before = _timed(
            lambda: jax.block_until_ready(models.load(folder, dtype=dtype or None)[1])
        )
        size = sum(x.nbytes for x in jax.tree.leaves(held))
    return {"seconds": seconds, "cpu_s": cpu_s, "over": peak() - before - size}


def _timed(call) -> tuple:
    before, cpu_s, start = peak(), time.process_time(), time.perf_counter()
    held = call()
    seconds = time.perf_counter() - start
    return held, seconds, time.process_time() - cpu_s, before


def peak() -> int:
    """The most memory that this process has held, in bytes."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def summarize(record: dict, name: str) -> dict:
    """Medians of one candidate, and its ratio to `plain` inside rounds."""
    mine = [t for t in record["turns"] if t["name"] == name]
    plain = {t["round"]: t for t in record["turns"] if t["name"] == "plain"}
    rates = [record["bytes"] / t["seconds"] / 1e6 for t in mine]
    ratios = [plain[t["round"]]["seconds"] / t["seconds"] for t in mine]
    cpu = [plain[t["round"]]["cpu_s"] / t["cpu_s"] for t in mine]
    return {
        "mb_per_s": statistics.median(rates),
        "least": min(rates),
        "most": max(rates),
        "of_plain": statistics.median(ratios),
        "of_plain_least": min(ratios),
        "of_plain_most": max(ratios),
        "cpu_of_plain": statistics.median(cpu),
        "over_bytes": max(t["over"] for t in mine),
    }


def report(record: dict) -> str:
    """The text for the terminal."""
    rows = [
        ["candidate", "MB/s", "spread", "of plain", "spread", "by cpu", "peak over"]
    ]
    for name, s in record["summaries"].items():
        rows.append(
            [
                name,
                f"{s['mb_per_s']:,.0f}",
                f"{s['least']:,.0f}-{s['most']:,.0f}",
                f"{s['of_plain']:.2f}",
                f"{s['of_plain_least']:.2f}-{s['of_plain_most']:.2f}",
                f"{s['cpu_of_plain']:.2f}",
                f"{s['over_bytes'] / 1e6:,.0f} MB",
            ]
        )
    cache = "dropped from" if record["cold"] else "in"
    return "\n".join(
        [
            f"machine: {record['machine']}; commit {record['commit']}",
            f"{record['bytes'] / 1e9:.2f} GB in {record['files']} files (largest "
            f"{record['largest_file'] / 1e9:.2f}), {cache} the page cache, loaded as "
            f"{record['dtype']}",
            "",
            table.columns(rows),
            "",
            "peak over: memory beyond what was held before and beyond the result",
        ]
    )


def paragraph(record: dict) -> str:
    """The dated paragraph for the log."""
    return f"{flags.title(record, 'load')}\n```text\n{report(record)}\n```\n"


if __name__ == "__main__":
    print(json.dumps(turn(*sys.argv[1:4])))
