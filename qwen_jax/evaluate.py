# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax eval`: how good a model folder is at something, told as a table.

`needle` measures a grid of lengths and depths (see `eval/needle.py`); `lessons` writes
the made-up documents that a small model learns it from (see `eval/haystack.py`).

Formats: --json writes one object: model, what changed in it, lengths, depths, found [a
share for each length and depth], count, others, language, mean, least. --html writes
heat maps, that of --beside FILE (an earlier --json) first.
Raises: config.InputError for what is missing or does not fit.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any

from qwen_jax import config, main, talk, tools
from qwen_jax.eval import haystack, needle
from qwen_jax.models import spec as spec_lib
from qwen_jax.report import heat


def run(args: argparse.Namespace) -> int:
    """`qwen-jax eval KIND`."""
    return {"needle": _needle, "lessons": _lessons}[args.kind](args)


def _needle(args: argparse.Namespace) -> int:
    tools.check_dtype(args.dtype)
    lengths = numbers("--lengths", args.lengths, int)
    given = numbers("--depths", args.depths, float)
    settings = needle.Settings(
        lengths=tuple(lengths),
        depths=depths(given),
        count=args.count,
        others=args.others,
        seed=args.seed,
    )
    language = None
    if args.language:
        if args.language not in haystack.LANGUAGES:
            near = config.nearest(args.language, haystack.LANGUAGES)
            raise config.InputError(f"--language {args.language!r}{near}")
        language = haystack.LANGUAGES[args.language]
    earlier = [_read(path) for path in args.beside]
    main.use_compile_cache()
    model = talk.load_model(args.model, args.dtype, lay_out=False)
    spec, changes = changed(model.spec, args, max(lengths))
    for line in changes:
        print(f"note: {line}", file=sys.stderr)

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    grid = needle.measure(spec, model.params, model.tokenizer, settings, language, say)
    name = "; ".join([args.title or f"Needles found by {args.model}", *changes])
    record = {
        "title": name,
        "model": args.model,
        "changed": list(changes),
        **dataclasses.asdict(grid),
        "others": settings.others,
        "seed": settings.seed,
        "mean": grid.mean,
        "least": grid.least,
    }
    print(table(grid))
    if args.json:
        _write("--json", args.json, json.dumps(record, indent=1) + "\n")
    if args.html:
        text = heat.page([*earlier, record], "Needle in a haystack")
        _write("--html", args.html, text)
    return 0


def _lessons(args: argparse.Namespace) -> int:
    lengths = numbers("--lengths", args.lengths, int)
    if args.documents < 1:
        raise config.InputError(f"--documents {args.documents}: wanted at least 1")
    try:
        pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)
        haystack.write(
            args.out,
            documents=args.documents,
            lengths=lengths,
            facts=args.facts,
            seed=args.seed,
        )
    except OSError as error:
        raise config.InputError(
            f"--out {args.out}: {error.strerror or error}; give another folder"
        ) from error
    print(f"{args.out}: {args.documents:,} lessons and their tokenizer")
    return 0


def numbers(flag: str, text: str, kind: type) -> list[Any]:
    """Numbers of a flag, with commas between."""
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError as error:
        raise config.InputError(
            f"{flag} {text!r}: wanted numbers with commas between, such as "
            + ("256,512" if kind is int else "0,0.5,1")
        ) from error


def depths(given: list[float]) -> tuple[float, ...]:
    """Depths as they are given; of one whole number above 1, as many from 0 to 1."""
    if len(given) == 1 and given[0] > 1:
        if not given[0].is_integer() or given[0] > 1000:
            raise config.InputError(
                f"--depths {given[0]:g}: wanted a whole number up to 1000, or depths "
                "from 0 to 1"
            )
        count = int(given[0])
        return tuple(i / (count - 1) for i in range(count))
    return tuple(given)


def changed(
    spec: spec_lib.Spec, args: argparse.Namespace, longest: int
) -> tuple[spec_lib.Spec, tuple[str, ...]]:
    """(the model with the positions asked for, what is not as in its folder)."""
    lines = []
    if args.rope_theta and args.rope_theta != spec.rope_theta:
        lines.append(f"RoPE base {args.rope_theta:g} in place of {spec.rope_theta:g}")
        spec = dataclasses.replace(spec, rope_theta=args.rope_theta)
    if args.yarn:
        if not 1 < args.yarn <= 4096:
            raise config.InputError(
                f"--yarn {args.yarn:g}: wanted a factor above 1, up to 4096"
            )
        was, old = spec.max_positions, spec.rope_scaling
        if old is not None:
            was = old.original_positions or was
            lines.append(f"{old.kind} with factor {old.factor:g} is taken out")
        scaling = spec_lib.RopeScaling("yarn", args.yarn, original_positions=was)
        lines.append(f"YaRN factor {args.yarn:g} on {was:,} positions")
        more = int(was * args.yarn)
        spec = dataclasses.replace(spec, rope_scaling=scaling, max_positions=more)
    if longest > spec.max_positions:
        lines.append(
            f"lengths up to {longest:,} pass its {spec.max_positions:,} positions"
        )
    return spec, tuple(lines)


def table(grid: needle.Grid) -> str:
    """Percent found: a line for each depth, a column for each length."""
    lines = ["  depth" + "".join(f"{length:>9,}" for length in grid.lengths)]
    for j, depth in enumerate(grid.depths):
        cells = "".join(f"{100 * row[j]:>8.0f}%" for row in grid.found)
        lines.append(f"{100 * depth:>6.0f}%{cells}")
    lines.append(
        f"found {grid.mean:.1%} of {grid.count} in each cell, worst cell "
        f"{grid.least:.0%} ({grid.language})"
    )
    return "\n".join(lines)


def _read(path: str) -> dict[str, Any]:
    """A grid of an earlier --json."""
    try:
        record = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise config.InputError(f"--beside {path}: not a readable JSON file") from error
    if not heat.is_grid(record):
        raise config.InputError(
            f"--beside {path}: wanted a file that `qwen-jax eval needle --json` wrote"
        )
    return record


def _write(flag: str, path: str, text: str) -> None:
    try:
        pathlib.Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise config.InputError(
            f"{flag} {path}: {error.strerror or error}; give another file"
        ) from error
