# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax chat`: a conversation in a terminal or through a pipe.

One line is one turn. Standard output has the answers, as they come; everything else
(the prompt sign, speed, notes, errors) goes to standard error. On a terminal thinking
is dimmed; through a pipe it goes to standard error, so that `echo QUESTION | qwen-jax
chat --model DIR` prints the answer alone. Lines that begin with / are commands
(`HELP`); // stands for a message that begins with /.

Ctrl-C stops the answer, which stays in the history as far as it came; a second one
before it has stopped leaves. The end of input leaves with 0. A turn that fails is told
and taken back, and the chat goes on.
Raises: config.InputError for flags and files that cannot be.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import re
import signal
import sys
from collections.abc import Iterator
from typing import Any

from qwen_jax import config, main, params, talk, tools

HELP = """\
/help          this list
/clear         forget the conversation, keep the system message
/system TEXT   another system message (none without TEXT); the conversation stays
/undo          forget the last question and its answer
/save FILE     write the conversation as JSON
/exit          leave (so does Ctrl-D)
//TEXT         say /TEXT
Ctrl-C stops an answer."""
COMMANDS = ("/help", "/clear", "/system", "/undo", "/save", "/exit")
DIM, PLAIN = "\033[2m", "\033[0m"
# What a terminal would take for commands; a model's text has no business with them.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
MAX_TOOLS_BYTES = 1 << 20


def chat(args: argparse.Namespace) -> int:
    """The verb."""
    tools.check_dtype(args.dtype)
    schemas = _schemas(args.tools) if args.tools else None
    main.use_compile_cache()
    model = talk.load_model(args.model, args.dtype)
    given = tools.sampling_flags(args)
    settings = {}
    if args.thinking:
        settings["enable_thinking"] = args.thinking == "on"
    conversation = talk.Talk(
        model,
        system=args.system,
        tools=schemas,
        sampling=talk.wishes(given, model),
        settings=settings,
        max_tokens=args.max_tokens,
        stops=args.stop,
    )
    if settings and "enable_thinking" not in conversation.template.source(schemas):
        _note("note: the chat template cannot switch thinking; --thinking does nothing")
    count = params.count(model.params)
    _note(
        f"{args.model}: {model.spec.family}, {count:,} weights; template: "
        f"{conversation.template.origin}; context {model.spec.max_positions:,} tokens"
    )
    _note(talk.told_wishes(given, model))
    with contextlib.closing(conversation):
        return _Terminal(conversation).run()


def _schemas(path: str) -> list[dict]:
    """Tools of a JSON file."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_TOOLS_BYTES + 1)
        if len(data) > MAX_TOOLS_BYTES:
            raise config.InputError(
                f"--tools {path}: more than {MAX_TOOLS_BYTES} bytes"
            )
        return json.loads(data)
    except OSError as error:
        raise config.InputError(f"--tools {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, config.InputError):
            raise
        raise config.InputError(
            f"--tools {path}: it is not JSON ({error}); wanted a list of JSON schemas"
        ) from error


def _note(text: str) -> None:
    if text:
        print(text, file=sys.stderr, flush=True)


class _Terminal:
    """One chat: lines in, answers out."""

    def __init__(self, conversation: talk.Talk):
        self.talk = conversation
        self.asks = sys.stdin.isatty()
        self._told_speed = False
        self.paints = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        if self.asks and importlib.util.find_spec("readline"):
            import readline  # noqa: F401  # input() then edits lines and has a history

    def run(self) -> int:
        """Until the end of input or /exit."""
        if self.asks:
            _note("/help tells the commands")
        for line in self._lines("> "):
            if not line.strip():
                continue
            if line.startswith("/") and not line.startswith("//"):
                if not self._command(line):
                    return 0
                continue
            said = line[1:] if line.startswith("//") else line
            self._turn({"role": "user", "content": said})
        return 0

    def _lines(self, sign: str) -> Iterator[str]:
        while True:
            try:
                line = self._line(sign)
            except KeyboardInterrupt:
                if not self.asks:
                    raise
                _note("\n(/exit or Ctrl-D leaves)")
                continue
            if line is None:
                return
            yield line

    def _line(self, sign: str) -> str | None:
        """The next line without its end, None at the end of input."""
        try:
            if self.asks and sys.stdout.isatty():
                return input(sign)
            if self.asks:
                print(sign, end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
        except EOFError:
            line = ""
        except UnicodeDecodeError as error:
            raise config.InputError(
                f"standard input is not UTF-8 text ({error})"
            ) from error
        if not line:
            if self.asks:
                _note("")
            return None
        return line.removesuffix("\n").removesuffix("\r")

    def _command(self, line: str) -> bool:
        """Run one command; False leaves."""
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if word == "/exit":
            return False
        if word == "/help":
            _note(HELP)
        elif word == "/clear":
            self.talk.clear()
            _note("the conversation is forgotten")
        elif word == "/system":
            self.talk.system = rest
            _note("the system message is set" if rest else "no system message")
        elif word == "/undo":
            done = self.talk.undo()
            _note("the last question is taken back" if done else "nothing to undo")
        elif word == "/save":
            self._save(rest)
        else:
            _note(f"error: {word}{config.nearest(word, COMMANDS)}; // begins a message")
        return True

    def _save(self, name: str) -> None:
        if not name:
            _note("error: /save FILE: name a file")
            return
        content = {"model": self.talk.model.path, "messages": self.talk.history()}
        if self.talk.tools:
            content["tools"] = self.talk.tools
        try:
            path = pathlib.Path(name).expanduser()
            text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
            path.write_text(text, encoding="utf-8", errors="replace")
        except (OSError, RuntimeError, ValueError) as error:
            _note(f"error: /save {name}: {error}")
            return
        _note(f"saved {len(self.talk.messages)} messages to {path}")

    def _turn(self, *said: dict[str, Any]) -> None:
        """One answer, and one more for results of tools while it asks for any."""
        while said:
            try:
                self._show(said)
            except config.InputError as error:
                _note(f"error: {error}")
                return
            said = self._results()

    def _show(self, said: tuple[dict[str, Any], ...]) -> None:
        """Print an answer as it comes."""
        interrupted = []
        # Between chunks of tokens, so that the cache is whole when it stops.
        with _on_interrupt(interrupted):
            pieces = self.talk.answer(*said, stopped=lambda: bool(interrupted))
            for kind, text in self._with_breaks(pieces):
                self._put(kind, text)
        print(PLAIN if self.paints else "", flush=True)
        told = self.talk.told
        why = {
            "length": f"; cut at --max_tokens {self.talk.max_tokens}",
            "context": "; cut, as the context is full: /clear or /undo",
            "stopped": "; stopped",
        }.get(told.why, "")
        why += "" if self._told_speed else "; compiling included"
        self._told_speed = True
        _note(
            f"[{told.num_tokens} tokens, {told.tokens_per_s:.1f} tokens/s, first after "
            f"{told.first_s:.2f} s; {told.reused_tokens} of the prompt's "
            f"{told.prompt_tokens} tokens were there{why}]"
        )
        for problem in told.reply.problems:
            _note(f"[{problem}]")

    def _with_breaks(self, pieces: Iterator[tuple[str, str]]):
        """Pieces, with a line's end where thinking goes over to the answer."""
        before = None
        for kind, text in pieces:
            if before == "thinking" and kind != "thinking":
                yield "thinking", "\n\n"
            before = kind
            yield kind, text
        if before == "thinking" and not sys.stdout.isatty():
            yield "thinking", "\n"

    def _put(self, kind: str, text: str) -> None:
        if sys.stdout.isatty():
            text = _CONTROLS.sub("\ufffd", text)
        if kind == "thinking" and not sys.stdout.isatty():
            print(text, end="", file=sys.stderr, flush=True)
        elif self.paints:
            begin = DIM if kind == "thinking" else PLAIN
            print(f"{begin}{text}", end="", flush=True)
        else:
            print(text, end="", flush=True)

    def _results(self) -> tuple[dict[str, Any], ...]:
        """Ask for what the tools that were called give; none ends the turn."""
        made = []
        for call in self.talk.told.reply.calls:
            inner = json.dumps(call.arguments, ensure_ascii=False)
            _note(f"[result of {call.name} {inner}, one line:]")
            line = next(self._lines("= "), None)
            if line is None:
                return ()
            made.append({"role": "tool", "name": call.name, "content": line})
        return tuple(made)


@contextlib.contextmanager
def _on_interrupt(seen: list[int]) -> Iterator[None]:
    """Ctrl-C is noted; a second one is the usual KeyboardInterrupt."""

    def note(number: int, _: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
