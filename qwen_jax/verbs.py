# SPDX-License-Identifier: Apache-2.0
"""The verbs of `qwen-jax` and their flags: what `--help` tells.

Nothing heavy is imported here, so `--help` answers at once. What a verb does: `cli`.
Raises: config.InputError for a bad flag or choice, with the nearest name.
"""

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

from qwen_jax import __version__, config


class Parser(argparse.ArgumentParser):
    """argparse that names the nearest choice or flag and exits with 2."""

    def error(self, message: str) -> NoReturn:
        raise config.InputError(f"{message} ({self.prog} --help tells what there is)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            hint = config.nearest(str(value), map(str, action.choices))
            what = next(iter(action.option_strings), "unknown command")
            raise config.InputError(f"{what} {value!r}{hint}")


def parser() -> Parser:
    """All verbs and their flags."""
    top = Parser(
        prog="qwen-jax",
        description="Train, look at and export Qwen models in JAX.",
        epilog="Each command has its own --help. Start with launch/quickstart.sh.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"qwen_jax {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="COMMAND", parser_class=Parser)
    _add_run(verbs)
    _add_generate(verbs)
    _add_chat(verbs)
    _add_serve(verbs)
    _add_data(verbs)
    _add_eval(verbs)
    _add_report(verbs)
    _add_convert(verbs)
    _add_pull(verbs)
    _add_guard(verbs)
    _add_plan(verbs)
    doctor = verbs.add_parser(
        "doctor",
        help="versions, devices, disk; what is missing and the command that adds it",
        allow_abbrev=False,
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    verbs.add_parser(
        "bench",
        help="measure: `bench train`, `bench decode` and others (--help lists them)",
        add_help=False,
        allow_abbrev=False,
    )
    return top


def _add_run(verbs: Any) -> None:
    run = verbs.add_parser(
        "run",
        help="run an experiment file; resumes when the folder has checkpoints",
        description="Run an experiment file. Any of its fields is set with "
        "--config.KEY=VALUE, for example --config.optim.lr_peak=1e-3. A run that was "
        "stopped or killed goes on when the same command is given again.",
        allow_abbrev=False,
    )
    add = run.add_argument
    add("--config", required=True, metavar="FILE[:ARG]", help="experiment file")
    add("--workdir", default="", metavar="DIR", help="the run's folder")
    add("--data", default="", metavar="PATH", help="your own text: folder, file or URL")
    add("--takeover", action="store_true", help="take the folder from another run")
    add(
        "--dry_run",
        action="store_true",
        help="memory, FLOPs and time of the compiled step, without training",
    )
    add(
        "--topology",
        default="",
        metavar="NAME",
        help="with --dry_run: a TPU slice that need not be here, such as v6e:4x4",
    )
    add("--slices", type=int, default=1, metavar="N", help="with --topology: N of them")
    add("--json", default="", metavar="FILE", help="with --dry_run: write the numbers")
    add("--distributed", action="store_true", help="join the processes of this job")
    add("--coordinator", default="", metavar="HOST:PORT", help="process 0's address")
    add("--num_processes", type=int, default=0, metavar="N")
    add("--process_id", type=int, default=-1, metavar="I")
    add(
        "--exit_code_when_stopped",
        type=int,
        default=0,
        metavar="N",
        help="end with N when a signal stopped the run before its end, for schedulers "
        "that take 0 for finished (default: 0)",
    )
    add("--quiet", action="store_true", help="print warnings and errors only")


def _add_generate(verbs: Any) -> None:
    generate = verbs.add_parser(
        "generate", help="continue prompts with a model", allow_abbrev=False
    )
    add = generate.add_argument
    add("--model", required=True, metavar="PATH", help="a model folder or a GGUF file")
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    add(
        "--prompt_file", default="", metavar="FILE", help="one prompt a line; - = stdin"
    )
    add("--chat", action="store_true", help="each prompt is a user's message")
    add("--max_tokens", type=int, default=64)
    _add_sampling(add)
    add("--json", action="store_true", help="one JSON object a line")


def _add_chat(verbs: Any) -> None:
    chat = verbs.add_parser(
        "chat",
        help="talk with a model folder, in a terminal or through a pipe",
        description="One line is one turn; answers come as they are made. /help tells "
        "the commands. Through a pipe, standard output has the answers alone.",
        allow_abbrev=False,
    )
    add = chat.add_argument
    add("--model", required=True, metavar="DIR", help="a Hugging Face model folder")
    add("--system", default="", metavar="TEXT", help="the system message")
    add(
        "--thinking",
        choices=("on", "off"),
        help="for templates that can switch it; default: as the template has it",
    )
    add("--tools", default="", metavar="FILE", help="JSON schemas of tools, a list")
    add("--max_tokens", type=int, default=2048, help="of one answer (default: 2048)")
    _add_sampling(add)


def _add_serve(verbs: Any) -> None:
    serve = verbs.add_parser(
        "serve",
        help="an OpenAI-compatible server for a model folder",
        description="Answer OpenAI's clients: /v1/chat/completions, /v1/completions, "
        "/v1/embeddings, /v1/models; /health, /ready, /metrics. Only this machine can "
        "connect unless --host says otherwise. A first SIGTERM or Ctrl-C lets requests "
        "in flight finish, a second does not.",
        allow_abbrev=False,
    )
    add = serve.add_argument
    add("--model", required=True, metavar="DIR", help="a model folder or a GGUF file")
    add("--name", default="", help="what clients call it (default: the folder's name)")
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1)")
    add("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    add(
        "--api_key_file",
        "--api-key-file",
        default="",
        metavar="FILE",
        help="keys, one a line; the environment's QWEN_JAX_API_KEY is one as well",
    )
    add("--insecure", action="store_true", help="let other machines in without a key")
    add("--dtype", default="", help="default: bfloat16, on a CPU float32")
    add(
        "--max_queue",
        type=int,
        default=256,
        metavar="N",
        help="requests that may wait; more get 429 (default: 256)",
    )
    add(
        "--max_wait_s",
        type=float,
        default=0.0,
        metavar="S",
        help="429 for those expected to wait longer for others (default: no limit); "
        "half the time to a first token of an idle server keeps that of a full one "
        "about twice as long, as --max_queue 1 does",
    )
    add("--images", type=int, default=16, metavar="N", help="most of a request; or 0")
    add("--image_patches", type=int, default=4096, metavar="N", help="most of an image")
    add(
        "--drafts",
        default="",
        choices=("lookup", "mtp"),
        help="several tokens a step: drafted from the text before, or by the MTP head",
    )
    add("--draft_tokens", type=int, default=3, metavar="N", help="a step (default: 3)")
    add("--requests_per_minute", type=int, default=0, metavar="N", help="of each key")
    add("--tokens_per_minute", type=int, default=0, metavar="N", help="of each key")
    add(
        "--shutdown_timeout_s",
        type=float,
        default=30.0,
        metavar="S",
        help="for requests in flight when the server is to end (default: 30)",
    )
    add("--guard", action="store_true", help="judge prompts and answers by rules")
    add("--guard_policy", default="", metavar="FILE", help="what it blocks; see guard")
    add("--guard_head", default="", metavar="DIR", help="a folder of `guard train`")
    add(
        "--guard_audit",
        default="",
        metavar="FILE",
        help="log of its decisions, hashes by the environment's QWEN_JAX_AUDIT_KEY",
    )
    add("--metrics_prefix", choices=("qwen_jax:", "vllm:"), default="qwen_jax:")
    add(
        "--admin_port",
        type=int,
        metavar="N",
        help="of this machine, where POST /admin/load exchanges models and weights",
    )
    add(
        "--admin_key_file",
        default="",
        metavar="FILE",
        help="keys for that; the environment's QWEN_JAX_ADMIN_KEY is one as well",
    )


def _add_sampling(add: Any) -> None:
    """Flags on how tokens are chosen; None where generation_config.json decides."""
    add("--temperature", type=float, help="0 takes the likeliest token")
    add("--top_k", type=int, metavar="N", help="of the N likeliest tokens (0: of all)")
    add("--top_p", type=float, help="of the likeliest that together reach this share")
    add("--min_p", type=float, help="of those at least this share of the likeliest")
    add(
        "--repetition_penalty", type=float, help="above 1 avoids tokens that were there"
    )
    add("--seed", type=int, default=0)
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="the answer ends before TEXT; may be repeated",
    )
    add("--dtype", default="float32", help="float32 or bfloat16")


def _add_data(verbs: Any) -> None:
    data = verbs.add_parser("data", help="look at training data", allow_abbrev=False)
    kinds = data.add_subparsers(
        dest="kind", metavar="COMMAND", parser_class=Parser, required=True
    )
    preview = kinds.add_parser(
        "preview",
        help="ids, text, loss mask and packing borders of the first rows",
        allow_abbrev=False,
    )
    add = preview.add_argument
    add("--config", required=True, metavar="FILE[:ARG]", help="experiment file")
    add("--data", default="", metavar="PATH", help="your own text instead")
    add("--workdir", default="", metavar="DIR", help="take the tokenizer of this run")
    add("--rows", type=int, default=2, help="rows to show")
    add("--color", choices=("auto", "always", "never"), default="auto")


def _add_eval(verbs: Any) -> None:
    told = {
        "needle": "how often a model finds a fact, by length and by depth",
        "lessons": "made-up documents to learn that from",
    }
    adds = _kinds(verbs, "eval", "how good a model is: needles in haystacks", told)
    add = adds["needle"]
    add("--model", required=True, metavar="DIR", help="a model folder or a GGUF file")
    add("--lengths", required=True, metavar="N,N", help="tokens, question included")
    add("--depths", default="9", metavar="X,X", help="0 to 1; or how many (default: 9)")
    add("--count", type=int, default=20, metavar="N", help="of a cell (default: 20)")
    add("--others", type=int, default=3, metavar="N", help="facts beside (default: 3)")
    add("--language", default="", help="english or syllables; default: by vocabulary")
    add("--rope_theta", type=float, default=0.0, metavar="X", help="another RoPE base")
    add("--yarn", type=float, default=0.0, metavar="X", help="YaRN with this factor")
    add("--dtype", default="float32", help="float32 or bfloat16")
    add("--title", default="", help="of the heat map")
    add("--json", default="", metavar="FILE", help="write the numbers")
    add(
        "--html", default="", metavar="FILE", help="write a heat map that loads nothing"
    )
    add("--beside", action="append", default=[], metavar="FILE", help="earlier --json")
    add = adds["lessons"]
    add("--out", required=True, metavar="DIR", help="folder to write")
    add("--documents", type=int, default=2000, metavar="N", help="default: 2000")
    add("--lengths", required=True, metavar="N,N", help="tokens of each in turn")
    add("--facts", type=int, default=30, metavar="N", help="most of a document")
    for add in adds.values():
        add("--seed", type=int, default=0)


def _add_report(verbs: Any) -> None:
    report = verbs.add_parser(
        "report", help="write report.html of one run or several", allow_abbrev=False
    )
    add = report.add_argument
    add("workdirs", nargs="+", metavar="DIR", help="run folders")
    add("--out", default="", metavar="FILE", help="default: report.html")


def _add_convert(verbs: Any) -> None:
    convert = verbs.add_parser(
        "convert",
        help="a run's checkpoint, model folder or GGUF file to a Hugging Face folder",
        description="Write a Hugging Face folder from a run's checkpoint, from a GGUF "
        "file, or from another model folder, which need not fit in memory; tokenizer "
        "and template travel along. The other way needs no conversion: a run begins "
        "with the weights of a model folder by `qwen-jax run "
        "--config.train.init_from=DIR`.",
        allow_abbrev=False,
    )
    add = convert.add_argument
    add("source", metavar="RUN_OR_MODEL", help="a run or model folder, or a GGUF file")
    add("target", metavar="DIR", help="folder to write")
    add("--step", type=int, default=-1, help="checkpoint of a run; newest by default")
    add("--dtype", default="", help="float32 or bfloat16; default: as it is")
    add(
        "--shard_bytes",
        type=int,
        default=5_000_000_000,
        metavar="N",
        help="largest file (default: 5e9)",
    )


def _add_pull(verbs: Any) -> None:
    pull = verbs.add_parser(
        "pull",
        help="a published model into a folder, at one commit, each file checked",
        description="Bring a model from a hub through its own client library: weights "
        "as safetensors, JSON, tokenizer and template; no pickles and no code. An "
        "interrupted pull goes on when the same command is given again. HF_ENDPOINT "
        "names a mirror, HF_TOKEN opens gated and private models.",
        allow_abbrev=False,
    )
    add = pull.add_argument
    add("repo", nargs="?", default="", metavar="REPO[@REVISION]", help="OWNER/NAME")
    add("dir", nargs="?", default="", metavar="DIR", help="a new folder, or one begun")
    add("--source", choices=("hub", "modelscope"), default="hub")
    add(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help="which files, instead of the usual ones; may be repeated",
    )
    add("--verify", default="", metavar="DIR", help="check the files of a folder again")


def _add_guard(verbs: Any) -> None:
    told = {
        "eval": "how well a guard tells judged texts apart, how fast, and at what cost",
        "train": "a small head from judged texts",
        "sample": "made-up judged texts, to try the other two on",
    }
    adds = _kinds(verbs, "guard", "measure a guard, or train its head", told)
    for kind in ("eval", "train"):
        adds[kind]("--data", required=True, metavar="FILE", help="JSON lines")
    add = adds["eval"]
    add("--policy", default="", metavar="FILE", help="TOML or JSON; default: built in")
    add("--head", default="", metavar="DIR", help="a folder of `guard train`")
    add("--model", default="", metavar="DIR", help="a model like Qwen3Guard-Gen")
    add("--json", action="store_true", help="print JSON")
    add = adds["train"]
    add("--out", required=True, metavar="DIR", help="folder to write")
    add("--steps", type=int, default=300, metavar="N", help="default: 300")
    adds["sample"]("--out", required=True, metavar="FILE", help="file to write")
    adds["sample"]("--rows", type=int, default=600, metavar="N", help="default: 600")
    for kind in ("train", "sample"):
        adds[kind]("--seed", type=int, default=0)


def _kinds(verbs: Any, verb: str, what: str, told: dict[str, str]) -> dict[str, Any]:
    """A verb of several kinds: `add_argument` of each."""
    kinds = verbs.add_parser(verb, help=what, allow_abbrev=False).add_subparsers(
        dest="kind", metavar="COMMAND", parser_class=Parser, required=True
    )
    return {
        kind: kinds.add_parser(kind, help=text, allow_abbrev=False).add_argument
        for kind, text in told.items()
    }


def _add_plan(verbs: Any) -> None:
    told = {"chunk": "chunks for long documents: memory and tokens/s of each size"}
    add = _kinds(verbs, "plan", "what a run would best be set to", told)["chunk"]
    add("--config", required=True, metavar="FILE[:ARG]", help="experiment file")
    add(
        "--lengths",
        default="published",
        metavar="FILE",
        help="of documents: lines LENGTH [COUNT], or `published` (default)",
    )
    add("--scale", type=int, default=1, metavar="N", help="divide lengths by N")
    add(
        "--memory_gib",
        type=float,
        default=0.0,
        help="of a device (default: what a run may use of it)",
    )
    add(
        "--topology", default="", metavar="NAME", help="of a TPU slice, such as v6e:4x4"
    )
    add("--chunks", default="", metavar="LIST", help="of C x K: 4096x2,2048x4")
    add("--measure", type=int, default=0, metavar="N", help="run the best N here")
    add("--seed", type=int, default=0, help="of the batches that are drawn")
    add("--json", default="", metavar="FILE", help="write the numbers")


def check_flags(top: Parser, words: Sequence[str]) -> None:
    """InputError naming the nearest flag for the first flag that no verb here has."""
    known, node = [], top
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name = word.partition("=")[0]
            known = [f for a in node._actions for f in a.option_strings]
            if name not in known:
                close = difflib.get_close_matches(name, known, 1, cutoff=0.6)
                hint = f"did you mean {close[0]}?" if close else "known: "
                hint += "" if close else ", ".join(f for f in known if f[:2] == "--")
                raise config.InputError(f"unknown flag {name} of {node.prog}; {hint}")
        for action in node._actions:
            if isinstance(action.choices, dict) and word in action.choices:
                node = action.choices[word]
                break
