# SPDX-License-Identifier: Apache-2.0
"""The command `qwen-jax`: parses arguments, then imports what the verb needs.

Nothing heavy is imported here, so `--help` (see `verbs`) answers at once. A user's
mistake is printed as one line that starts with "error:" and ends with exit code 2; a
bad verb, flag or key comes with the nearest name. `--config.KEY=VALUE` sets any field
of an experiment.

Exit codes: 0 done (also when a signal asked for a stop and the state was saved, unless
--exit_code_when_stopped names another), 1 the work failed, 2 a mistake of the user's,
130 interrupted where there is nothing to save.
"""

import argparse
import errno
import importlib
import os
import signal
import sys
import types
from collections.abc import Sequence
from typing import Any

from qwen_jax import config, verbs

DISK = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of the quota",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "change the permissions or choose another folder",
}
SERVE_NEEDS = ("starlette", "uvicorn", "h11", "prometheus_client", "llguidance")
HUGE_PAGES = "glibc.malloc.hugetlb=1"


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """(other arguments, [(key, text)]) of --config.KEY=VALUE and --config.KEY VALUE."""
    rest, pairs = [], []
    words = iter(argv)
    for word in words:
        if not word.startswith("--config."):
            rest.append(word)
            continue
        key, equals, value = word[len("--config.") :].partition("=")
        if not equals:
            value = next(words, None)
            if value is None:
                raise config.InputError(f"--config.{key} needs a value")
        pairs.append((key, value))
    return rest, pairs


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["bench"]:
            return _bench(argv[1:])
        words, overrides = split_overrides(argv)
        top = verbs.parser()
        verbs.check_flags(top, words)
        args = top.parse_args(words)
        if args.verb is None:
            top.print_help()
            return 0
        if overrides and args.verb not in ("run", "data", "plan"):
            raise config.InputError(f"qwen-jax {args.verb} takes no --config.* flags")
        return VERBS[args.verb](args, overrides)
    except config.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `qwen-jax ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in DISK:  # a fault of the program
            raise
        what = f"{error.filename}: " if error.filename else ""
        fix = f"{DISK[error.errno]}, then give the same command again"
        print(f"error: {what}{error.strerror}; {fix}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


BENCHES = {
    "train": "a training step, beside other libraries with --peers",
    "decode": "tokens a second with a cache, beside other libraries with --peers",
    "moe": "a layer of experts beside a plain matrix product",
    "engine": "the serving engine beside a decoding loop by hand",
    "chunkflow": "a step over long-tailed documents, in chunks and without",
    "step": "a decoding step beside the memory's bandwidth, and a crowd (accelerators)",
    "answer": "a real model's answers, beside other programs with --peers",
    "load": "weights from safetensors beside a plain read of the files",
    "guard": "a guard's head at the end of a decoding step",
    "pages": "ways to cut memory into pages, on long-tailed traces (no time)",
    "serve": "load on an OpenAI-compatible server: first tokens, rates, limits",
}


def _bench(argv: list[str]) -> int:
    if argv[:1] in ([], ["--help"], ["-h"]):
        print("usage: qwen-jax bench WHAT [--help]\n")
        for name, told in BENCHES.items():
            print(f"  {name:9} {told}")
        return 0
    if argv[0] not in BENCHES:
        raise config.InputError(
            f"unknown bench {argv[0]!r}{config.nearest(argv[0], BENCHES)}"
        )
    _with_huge_pages()
    return _load(f"bench.{argv[0]}").main(argv[1:])


def _with_huge_pages() -> None:
    """Start again with malloc on huge pages: fresh buffers of some MB fault in at once,
    which takes 12 % off a training step on a CPU. glibc reads it only at start."""
    wanted = sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ
    folder, name = os.path.split(sys.argv[0])
    ours = (os.path.basename(folder), name) == ("qwen_jax", "__main__.py")
    if wanted and (name == "qwen-jax" or ours):  # and no program that calls `main`
        environment = os.environ | {"GLIBC_TUNABLES": HUGE_PAGES}
        words = [sys.executable, "-m", "qwen_jax", *sys.argv[1:]]
        os.execve(sys.executable, words, environment)


def _load(name: str) -> types.ModuleType:
    """Import a heavy module of ours; Ctrl-C meanwhile ends the process without a word:
    in the midst of an import, KeyboardInterrupt may come out as any other exception."""
    handler = signal.getsignal(signal.SIGINT)
    ours = handler is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return importlib.import_module(f"qwen_jax.{name}")
    finally:
        if ours:
            signal.signal(signal.SIGINT, handler)


def _run(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    _with_huge_pages()
    program = _load("main")
    values = {k: v for k, v in vars(args).items() if k != "verb"}
    return program.run(program.Options(**values, overrides=tuple(overrides)))


def _generate(args: argparse.Namespace, _: Any) -> int:
    _with_huge_pages()
    return _load("tools").generate(args)


def _chat(args: argparse.Namespace, _: Any) -> int:
    _with_huge_pages()
    return _load("terminal").chat(args)


def _serve(args: argparse.Namespace, _: Any) -> int:
    _with_huge_pages()
    try:
        program = _load("serving")
    except ModuleNotFoundError as error:
        if error.name not in SERVE_NEEDS:
            raise
        raise config.InputError(
            f"serve needs {error.name}: pip install 'qwen_jax[serve]'"
        ) from None
    return program.run(args)


def _data(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    return _load("tools").preview_data(args, overrides)


def _eval(args: argparse.Namespace, _: Any) -> int:
    return _load("evaluate").run(args)


def _report(args: argparse.Namespace, _: Any) -> int:
    return _load("report").main(args.workdirs, args.out)


def _convert(args: argparse.Namespace, _: Any) -> int:
    return _load("convert").run(args)


def _pull(args: argparse.Namespace, _: Any) -> int:
    return _load("pull").run(args)


def _guard(args: argparse.Namespace, _: Any) -> int:
    return _load("serve.guard_eval").main(args)


def _plan(args: argparse.Namespace, overrides: list[tuple[str, str]]) -> int:
    return _load("planning").main(args, overrides)


def _doctor(args: argparse.Namespace, _: Any) -> int:
    return _load("doctor").main(as_json=args.json)


VERBS = {
    "run": _run,
    "generate": _generate,
    "chat": _chat,
    "serve": _serve,
    "data": _data,
    "eval": _eval,
    "report": _report,
    "convert": _convert,
    "pull": _pull,
    "guard": _guard,
    "plan": _plan,
    "doctor": _doctor,
}
