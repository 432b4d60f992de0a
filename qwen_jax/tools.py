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
from typing import Any

from qwen_jax import checks, config, convert, experiment, main, talk
from qwen_jax.data import chat, corpus, loader, preview, reply, source
from qwen_jax.models import decode


def check_dtype(dtype: str) -> None:
    """Refuse a --dtype that is none.

    Raises:
      config.InputError: naming the nearest.
    """
    if dtype not in convert.DTYPES:
        raise config.InputError(
            f"--dtype {dtype!r}{config.nearest(dtype, convert.DTYPES)}"
        )


def sampling_flags(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of sampling as the command line has them, None where it has not."""
    return {name: getattr(args, name) for name in (*talk.ADVISED, "seed")}


def generate(args: argparse.Namespace) -> int:
    """`qwen-jax generate`: continuations on standard output, with --chat answers."""
    check_dtype(args.dtype)
    reply.check_stops(args.stop)
    prompts = list(args.prompt)
    if args.prompt_file:
        prompts += _lines(args.prompt_file)
    if not prompts:
        raise config.InputError("nothing to continue: give --prompt TEXT (repeatable)")
    main.use_compile_cache()
    model = talk.load_model(args.model, args.dtype)
    flags = sampling_flags(args)
    wish = talk.wishes(flags, model)
    if told := talk.told_wishes(flags, model):
        print(told, file=sys.stderr)
    ids, thinks = _prompt_ids(model, prompts, args.chat)
    ends = model.tokenizer.stop_ids if args.chat else ()
    new = decode.generate(
        model.spec,
        model.params,
        ids,
        max_tokens=args.max_tokens,
        sampling=[
            dataclasses.replace(wish, seed=(wish.seed + i) % 2**64)
            for i in range(len(ids))
        ],
        stop_ids=tuple(dict.fromkeys((*model.stop_ids, *ends))),
    )
    for i, (prompt, tokens) in enumerate(zip(prompts, new, strict=True)):
        text = model.tokenizer.decode(tokens, skip_special=args.chat)
        text = reply.cut(text, args.stop)
        row = {"prompt": prompt, "text": text, "tokens": len(tokens)}
        if args.chat:
            parts = reply.parse(text, thinks=thinks[i], calls=False)
            row |= {"text": parts.content, "thinking": parts.thinking}
        if args.json:
            print(json.dumps(row))
        else:
            print(row["text"] if args.chat else prompt + text)
    return 0


def _prompt_ids(
    model: talk.Model, prompts: list[str], as_chat: bool
) -> tuple[list[list[int]], list[bool]]:
    """(ids of each prompt, whether it ends inside thinking)."""
    if as_chat:
        template = model.chat_template()
        made = [
            chat.encode(model.tokenizer, template, [{"role": "user", "content": text}])
            for text in prompts
        ]
        return [one.ids for one in made], [one.thinks for one in made]
    # A model trained here begins every document with its end id; published ones say it
    # where they need one, and an empty prompt has nothing else to begin with.
    end, bos = model.tokenizer.eos_id, model.spec.bos_id
    begin = model.tokenizer.settings.get("add_bos_token", bos == end)
    begins = [bos] if begin and bos is not None else []
    ids = [begins + model.tokenizer.encode(x, allow_special=True) for x in prompts]
    return [one or [end] for one in ids], [False] * len(ids)


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
