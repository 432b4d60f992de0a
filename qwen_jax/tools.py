# SPDX-License-Identifier: Apache-2.0
"""The small verbs: generate from a model folder, preview training data.

`generate` prints the continuation of each prompt; `preview` shows the first packed rows
of an experiment.
Raises: config.InputError for what is missing or does not fit.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile

import jax

from qwen_jax import checks, config, convert, experiment, main, models
from qwen_jax.data import corpus, loader, preview, source, tokenizer
from qwen_jax.models import decode, decoder, hf_config


def _check_dtype(dtype: str) -> None:
    if dtype not in convert.DTYPES:
        raise config.InputError(
            f"--dtype {dtype!r}{config.nearest(dtype, convert.DTYPES)}"
        )


def generate(args: argparse.Namespace) -> int:
    """`qwen-jax generate`: continuations on standard output."""
    _check_dtype(args.dtype)
    prompts = list(args.prompt)
    if args.prompt_file:
        prompts += _lines(args.prompt_file)
    if not prompts:
        raise config.InputError("nothing to continue: give --prompt TEXT (repeatable)")
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        raise config.InputError(
            f"--temperature {args.temperature} must be at least 0, --top_p "
            f"{args.top_p} above 0 and at most 1"
        )
    folder = pathlib.Path(args.model)
    if (folder / "run.json").is_file() and not (folder / "config.json").is_file():
        raise config.InputError(
            f"{folder} is a run folder: give --model {folder}/export, or make a model "
            f"of its newest checkpoint with `qwen-jax convert {folder} DIR`"
        )
    main.use_compile_cache()
    spec = hf_config.spec_from_config(hf_config.read_config(folder))
    vocabulary = tokenizer.load(folder)
    checks.ids_fit(vocabulary, spec, folder)
    spec, weights = models.load(folder, dtype=args.dtype)
    if not spec.eos_ids:
        spec = dataclasses.replace(spec, eos_ids=(vocabulary.eos_id,))
    # A model trained here begins every document with its end id; published ones do not
    # need it, and an empty prompt has nothing else to begin with.
    begins = [spec.bos_id] if spec.bos_id == vocabulary.eos_id else []
    ids = [begins + vocabulary.encode(text, allow_special=True) for text in prompts]
    ids = [one or [vocabulary.eos_id] for one in ids]
    new = decode.generate(
        spec,
        decoder.unstacked(spec, weights) if spec.num_layers <= 12 else weights,
        ids,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        key=jax.random.key(args.seed),
    )
    for prompt, tokens in zip(prompts, new, strict=True):
        text = vocabulary.decode(tokens)
        if args.json:
            print(json.dumps({"prompt": prompt, "text": text, "tokens": len(tokens)}))
        else:
            print(prompt + text)
    return 0


def _lines(path: str) -> list[str]:
    """Prompts of a file, one a line; - reads standard input."""
    try:
        data = pathlib.Path(path).read_bytes() if path != "-" else None
        text = sys.stdin.read() if data is None else data.decode()
    except OSError as error:
        raise config.InputError(f"--prompt_file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise config.InputError(
            f"--prompt_file {path}: it is not UTF-8 text ({error})"
        ) from error
    return [line for line in text.splitlines() if line]


def preview_data(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    """`qwen-jax data preview`: the first packed rows as training would see them."""
    if args.rows < 1:
        raise config.InputError(f"--rows {args.rows}: wanted at least 1")
    exp = experiment.resolve(args.config, overrides, args.data)
    sources = source.open_sources(exp.data)
    with tempfile.TemporaryDirectory() as scratch:
        # The run's own tokenizer where there is one, else what a run would begin with.
        kept = pathlib.Path(args.workdir) / "tokenizer" if args.workdir else None
        folder = kept if kept and kept.is_dir() else pathlib.Path(scratch)
        if folder != kept:
            checks.own_tokenizer(exp)
        data = dataclasses.replace(exp.data, tokenizer=exp.tokenizer)
        vocabulary = corpus.prepare_tokenizer(data, folder, sources=sources)
    batch_rows = max(args.rows, exp.data.streams)
    rows = loader.Loader(
        exp.data, vocabulary, batch_rows=batch_rows, seed=exp.seed, sources=sources
    )
    try:
        batch = next(rows)
        counts = rows.counters()
    finally:
        rows.close()
    color = args.color == "always" or (args.color == "auto" and sys.stdout.isatty())
    print(preview.render(batch, vocabulary, counts, num_rows=args.rows, color=color))
    return 0
