# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax bench chunkflow`: one step over long-tailed documents, in several ways.

The same documents, of lengths as fine-tuning sets have them (train/chunkflow/lengths),
the same weights, gradients of the same mean loss:
- `padded`: each document a row of the longest length, full recomputation;
- `single`: each document a row of its own length (rounded up to one of two lengths for
  each doubling, since each is a program), full recomputation;
- `packed`: documents side by side in rows of the longest length, full recomputation;
- `C x K`: ChunkFlow with chunks of C tokens of which K wait.
A candidate's memory is that of its largest program as compiled: what it is given and
what it makes. Losses and gradients must agree, or nothing is reported. The time of a
step in chunks has their planning in it.
Candidates take turns of one step, in a new order each round; ratios are of medians.
Formats: `--json FILE` writes the record: head (flags.py), shape, lengths, rows.
Units: seconds, tokens/s of real tokens, bytes.
Raises: config.InputError for flags that do not fit; RuntimeError where gradients of two
candidates differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import shlex
import statistics
import time
from collections.abc import Callable
from typing import Any

from qwen_jax import config
from qwen_jax.bench import candidates, flags, table

WAYS = ("padded", "single", "packed")
PARTS = (
    *("num_layers", "width", "vocab_size", "ffn_width"),
    *("num_heads", "num_kv_heads", "head_width"),
)
SHORTEST_ROW = 16  # of a document by itself


def parser() -> flags.Parser:
    """The flags of the command."""
    top = flags.Parser(
        prog="qwen-jax bench chunkflow",
        description="Measure a step over long-tailed documents, in chunks and without.",
        allow_abbrev=False,
    )
    add = top.add_argument
    add("--model", default="qwen3-0.6b", help="a published size")
    add("--set", default="", metavar="LIST", help="other parts: num_layers=4,width=256")
    add("--dtype", default="bfloat16", help="of activations; weights are float32")
    add("--documents", type=int, default=256, help="of a step")
    add("--scale", type=int, default=1, help="lengths are divided by it")
    add("--longest", type=int, default=32_768, help="tokens of the longest document")
    add("--seed", type=int, default=0, help="of lengths and tokens")
    add("--chunks", default="8192x1,4096x2,2048x4", metavar="LIST", help="of C x K")
    add("--ways", default=",".join(WAYS), metavar="LIST", help="to compare with")
    add("--kv_grad_dtype", default="", help="of cotangents of keys and values")
    add("--rounds", type=int, default=5, help="steps of each candidate")
    flags.add_outputs(top)
    return top


def main(argv: list[str]) -> int:
    """Measure what the flags ask for; returns the exit code."""
    args = flags.parse(parser(), argv)
    from qwen_jax import planning

    flags.at_least_one(args, "documents", "scale", "longest", "rounds")
    ways = flags.chosen(args.ways, WAYS, "ways")
    sizes = planning.pairs(args.chunks)
    if not (ways or sizes):
        raise config.InputError("--ways and --chunks are both empty: nothing to do")
    record = flags.head("qwen-jax bench chunkflow " + shlex.join(argv))
    record |= measure(args, ways, sizes)
    print(f"machine: {record['machine']}; {record['device']}; {record['commit']}")
    print(report(record))
    lines = (flags.title(record, "chunkflow"), "```text", report(record), "```", "")
    flags.write(args, record, "\n".join(lines))
    return 0


@dataclasses.dataclass
class _Way:
    """One candidate: `step()` gives (loss, gradients); what its programs are."""

    name: str
    step: Callable[[], tuple[Any, Any]]
    tokens: int  # places for tokens, padding included
    bytes: int  # of its largest program


def measure(args: argparse.Namespace, ways, sizes) -> dict[str, Any]:
    """{"rows": one for each candidate, ...}."""
    import jax
    import numpy as np

    from qwen_jax.train.chunkflow import lengths as lengths_lib

    spec, params = _model(args)
    lengths = lengths_lib.draw(args.documents, args.seed, args.scale, args.longest)
    rng = np.random.default_rng(args.seed)
    documents = [rng.integers(0, spec.vocab_size, n).astype(np.int32) for n in lengths]
    real, device = int(lengths.sum()), jax.devices()[0]
    candidates.say(f"{len(lengths)} documents of {real:,} tokens")
    made = []
    for name in ways:
        candidates.say(f"compiling {name}")
        made.append(_rows_way(name, spec, params, documents, args.longest))
    for c, k in sizes:
        candidates.say(f"compiling {c} x {k}")
        made.append(_chunk_way(spec, params, documents, c, k, args.kv_grad_dtype))
    _agree(made, args.dtype)
    times: dict[str, list[float]] = {way.name: [] for way in made}
    order = list(made)
    for number in range(args.rounds):
        random.Random(number).shuffle(order)
        for way in order:
            began = time.perf_counter()
            jax.block_until_ready(way.step())
            times[way.name].append(time.perf_counter() - began)
        candidates.say(f"round {number + 1} of {args.rounds}")
    return {
        "device": f"{device.device_kind}, jax {jax.__version__}",
        "spec": f"{args.model}, {spec.num_layers} layers, width {spec.width}, "
        f"vocabulary {spec.vocab_size}, {args.dtype}",
        "lengths": {"documents": len(lengths), "tokens": real, "longest": args.longest}
        | {f"p{q}": int(np.percentile(lengths, q)) for q in (50, 90, 98)},
        "rows": [
            {
                "name": way.name,
                "step_s": statistics.median(times[way.name]),
                "steps_s": times[way.name],
                "tokens_per_s": real / statistics.median(times[way.name]),
                "padding": 1 - real / way.tokens,
                "bytes": way.bytes,
            }
            for way in made
        ],
    }


def _model(args):
    import jax

    from qwen_jax import params as params_lib
    from qwen_jax import rng
    from qwen_jax.models import decoder, sizes

    more = {}
    for text in filter(None, args.set.split(",")):
        name, _, value = text.partition("=")
        if not value.isdigit() or name not in PARTS:
            raise config.InputError(
                f"--set has {text!r}, wanted NAME=COUNT with a name of "
                f"{', '.join(PARTS)}{config.nearest(name, PARTS)}"
            )
        more[name] = int(value)
    how = {"param_dtype": "float32", "compute_dtype": args.dtype}
    more["max_positions"] = max(args.longest, 32_768)
    spec = sizes.get(args.model, **how, **more)
    tree = decoder.decoder_params(spec)
    made = params_lib.init(tree, rng.key_for(args.seed, "params"), "float32", None)
    return spec, jax.block_until_ready(made)


def _rows_way(name, spec, params, documents, longest) -> _Way:
    """Documents in rows of `decoder.hidden` with full recomputation."""
    import numpy as np

    from qwen_jax import mesh
    from qwen_jax.data import packing
    from qwen_jax.train.chunkflow import chunks, gradients

    lengths = [len(one) for one in documents]
    pieces = [chunks.whole(one) for one in documents]
    if name == "packed":
        bins = packing.best_fit(lengths, longest)
    else:
        bins = [[i] for i in range(len(documents))]
    parts = []
    for items in bins:
        size = longest
        if name == "single":
            size = min(chunks.rounded(max(lengths[items[0]], SHORTEST_ROW)), longest)
        parts.append(chunks.standalone(pieces, [items], size))
    targets = np.float32(sum(lengths) - len(lengths))
    how = {"spec": spec, "rules": mesh.Rules(), "z_coef": 0.0, "remat": "full"}

    def step():
        sums = gradients.no_sums(spec, params)
        for part in parts:
            operands = params, sums, part, targets, None
            sums = gradients.packed_gradients(*operands, **how)
        return sums.nll / targets, sums.grads

    largest = max(parts, key=lambda part: part["tokens_bt"].size)
    operands = params, gradients.no_sums(spec, params), largest, targets, None
    used = _bytes(gradients.packed_gradients.lower(*operands, **how))
    return _Way(name, step, sum(part["tokens_bt"].size for part in parts), used)


def _chunk_way(spec, params, documents, c, k, kv_grad_dtype) -> _Way:
    import numpy as np

    from qwen_jax import mesh
    from qwen_jax.train.chunkflow import chunks, gradients

    settings = gradients.Settings(c, k, kv_grad_dtype=kv_grad_dtype)
    pieces = [chunks.whole(one) for one in documents]
    plan = chunks.build([len(one) for one in pieces], c)

    def step():
        sums, targets = gradients.run(spec, params, documents, settings)
        return sums.nll / targets, sums.grads

    how = {"spec": spec, "rules": mesh.Rules(), "z_coef": 0.0}
    whole, used = np.float32(1), []
    sums = gradients.no_sums(spec, params)
    if plan.bins:
        part = chunks.standalone(pieces, plan.bins[:1], c)
        operands = params, sums, part, whole, None
        used.append(
            _bytes(gradients.packed_gradients.lower(*operands, **how, remat="none"))
        )
    if plan.groups:
        n = chunks.rounded(plan.groups[0].chunks)
        part = chunks.empty(1, c, n)
        operands = params, sums, part, np.int32(n), whole, None
        how |= {"live": k, "kv_grad_dtype": kv_grad_dtype or None}
        used.append(_bytes(gradients.group_gradients.lower(*operands, **how)))
    return _Way(f"{c} x {k}", step, plan.chunks * c, max(used))


def _bytes(lowered) -> int:
    """Bytes that a program is given and makes."""
    found = lowered.compile().memory_analysis()
    used = found.argument_size_in_bytes + found.temp_size_in_bytes
    return used + found.output_size_in_bytes - found.alias_size_in_bytes


def _agree(made: list[_Way], dtype: str) -> None:
    """Refuse to time what does not compute the same; compiles what is left, too."""
    import jax
    import jax.numpy as jnp
    import optax

    loss, grads = 0.0, None
    for way in made:
        candidates.say(f"first step of {way.name}")
        mine = way.step()
        if grads is None:
            loss, grads = mine
            continue
        apart = optax.tree.norm(jax.tree.map(jnp.subtract, mine[1], grads))
        off = max(float(abs(mine[0] / loss - 1)), float(apart / optax.tree.norm(grads)))
        if not off <= (1e-3 if dtype == "float32" else 5e-2):
            raise RuntimeError(
                f"{way.name}: loss or gradients are {off:.2g} off those of "
                f"{made[0].name}"
            )


def report(record: dict[str, Any]) -> str:
    """The record as a table."""
    lengths, rows = record["lengths"], record["rows"]
    head = ["", "step, s", "spread", "tokens/s", "padding", "GiB"]
    bases = [row for row in rows if row["name"] in WAYS]
    lines = [[*head, *(f"x {row['name']}" for row in bases)]]
    for row in rows:
        spread = (max(row["steps_s"]) - min(row["steps_s"])) / row["step_s"]
        lines.append(
            [
                row["name"],
                f"{row['step_s']:.2f}",
                f"{spread:.0%}",
                f"{row['tokens_per_s']:,.0f}",
                f"{row['padding']:.0%}",
                f"{row['bytes'] / 2**30:.3f}",
                *(f"{base['step_s'] / row['step_s']:.2f}" for base in bases),
            ]
        )
    told = ", ".join(f"{name} {n:,}" for name, n in lengths.items())
    return f"{record['spec']}\n{told}\n" + table.columns(lines)
