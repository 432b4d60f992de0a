# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax convert`: a run's checkpoint, model folder or GGUF file to a folder.

The folder is a Hugging Face one. A run is only read, it may be training. A model folder
is read and written a tensor at a time, so a model larger than memory goes through; its
tokenizer, template and generation settings travel along as they are. The other way
needs no files: a run begins with a Hugging Face folder directly
(`--config.train.init_from=DIR`).

Formats: see `models/hf.py`. Files of the target change their names at the end, so an
interrupted command leaves it as it was, and the same command may be given again.
Raises: config.InputError for a source that cannot be read, a target that holds anything
but an earlier conversion of the same model.
"""

import argparse
import pathlib
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from qwen_jax import config, experiment, export, mesh, models, params
from qwen_jax.checkpoint import manager
from qwen_jax.data import tokenizer
from qwen_jax.models import decoder, gguf, hf, hf_config
from qwen_jax.models import spec as spec_lib

DTYPES = ("float32", "bfloat16", "float16")
# What a model folder has beside weights and config.json, and goes with them.
TRAVEL = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
SAY_S = 1.0  # between two progress lines
SAY_BYTES = 1_000_000_000  # a smaller model is there before one reads the line


def run(args: argparse.Namespace) -> int:
    """The verb; returns the exit code."""
    if args.dtype and args.dtype not in DTYPES:
        raise config.InputError(
            f"--dtype {args.dtype!r}{config.nearest(args.dtype, DTYPES)}"
        )
    if args.shard_bytes < 1:
        raise config.InputError(f"--shard_bytes {args.shard_bytes}: wanted at least 1")
    origin, target = pathlib.Path(args.source), pathlib.Path(args.target)
    if target.resolve() == origin.resolve():
        raise config.InputError(f"{target} is the source itself: name another folder")
    how = {
        "dtype": args.dtype or None,
        "shard_bytes": args.shard_bytes,
        "say": progress(),
    }
    if (origin / "run.json").is_file():
        spec, weights, vocabulary, what = _of_run(origin, args.step)
        _check_target(target, export.ended(spec, vocabulary))
        export.write(spec, weights, vocabulary, target, **how)
    elif args.step >= 0:
        raise config.InputError(f"--step is for run folders, {origin} is none")
    elif gguf.is_gguf(origin):
        spec, weights = models.load(origin)
        what = str(origin)
        _check_target(target, spec)
        # A published model ends answers with ids that end no document, or several.
        vocabulary = gguf.tokenizer(origin)
        export.write(spec, weights, vocabulary, target, keep_ids=True, **how)
    else:
        spec, weights = hf.lazily(origin)
        what = str(origin)
        _check_target(target, spec)
        models.save(spec, weights, target, **how)
        _travel(origin, target)
    print(f"{what} -> {target} ({params.count(weights):,} weights)")
    return 0


def _of_run(folder: pathlib.Path, step: int) -> tuple[spec_lib.Spec, Any, Any, str]:
    """(spec, weights, tokenizer, what it is) of a run's checkpoint."""
    stored = manager.Manager(folder / "checkpoints", read_only=True)
    meta = stored.read_meta(step if step >= 0 else None)
    exp = config.freeze(experiment.Experiment, meta["config"])
    one = mesh.make(mesh.MeshConfig(), jax.devices()[:1])
    tree = decoder.decoder_params(exp.model)
    layout = params.shardings(tree, one, exp.rules)
    target = {"params": params.abstract(tree, exp.model.param_dtype, layout)}
    kept, meta = stored.restore(target, meta["step"], subset=True)
    vocabulary = tokenizer.load(folder / "tokenizer")
    return exp.model, kept["params"], vocabulary, f"step {meta['step']} of {folder}"


def _check_target(target: pathlib.Path, spec: spec_lib.Spec) -> None:
    """Refuse a folder that holds anything but this model."""
    if not target.exists():
        return
    if not target.is_dir():
        raise config.InputError(f"{target} is a file: name a folder")
    own = ("config.json", *TRAVEL)
    for path in sorted(target.iterdir()):
        weights = path.match("model*.safetensors*")
        if path.name.removesuffix(".partial") not in own and not weights:
            raise config.InputError(
                f"{target} holds something else ({path.name}): name a new folder"
            )
    if (target / "config.json").is_file():
        there = hf_config.spec_from_config(hf_config.read_config(target))
        if not hf_config.same_function(there, spec):
            raise config.InputError(
                f"{target} holds another model: name a new folder, or remove it"
            )


def _travel(origin: pathlib.Path, target: pathlib.Path) -> None:
    """Copy what goes with the weights."""
    if not (origin / "tokenizer.json").is_file():
        print(f"{origin} has no tokenizer.json: only weights are written")
    for name in TRAVEL:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, target / name)


def progress(clock: Callable[[], float] = time.monotonic) -> Callable[[int, int], None]:
    """What tells how much of a large model is written, and when it will be done."""
    began = last = clock()

    def say(done: int, total: int) -> None:
        nonlocal last
        now = clock()
        if total < SAY_BYTES or (now - last < SAY_S and done < total):
            return
        last = now
        rate = done / max(now - began, 1e-9)
        print(
            f"{done / 1e9:.1f} of {total / 1e9:.1f} GB, {rate / 1e6:,.0f} MB/s, "
            f"{(total - done) / rate:,.0f} s left",
            file=sys.stderr,
        )

    return say
