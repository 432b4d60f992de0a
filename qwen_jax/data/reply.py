# SPDX-License-Identifier: Apache-2.0
"""What a model answered: thinking, content and tool calls, from its text.

Formats of a call, both of published Qwen models:
    <tool_call> {"name": NAME, "arguments": {...}} </tool_call>              Hermes
    <tool_call> <function=NAME> <parameter=KEY> VALUE </parameter> ... </function>
    </tool_call>                                                      Qwen3-Coder and on
Thinking stands before `</think>`, after `<think>` where the prompt did not open it.
In the second style values are texts; where the tool's schema asks for another type they
are read as JSON (Python's True, False and None too, as some templates write them).

Invariants: what is no well-formed call stays in the content as it was, with a reason in
`problems`. Nothing is evaluated: a JSON decoder without NaN, and searches for fixed
words. Work is linear in the text: a call that cannot be read costs at most one look at
the rest, and after MAX_BAD of them the rest is content.
`Watch` finds the first of some words in a text that comes in pieces, for stop strings
and for tags; it keeps back only what may be the beginning of one.
Raises: config.InputError for stop strings that cannot be.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwen_jax import config

OPEN, CLOSE = "<tool_call>", "</tool_call>"
THINK, THOUGHT = "<think>", "</think>"
MAX_BAD = 16
MAX_STOPS, MAX_STOP_LETTERS = 16, 256
_BLANKS = re.compile(r"\s*")
_FUNCTION = re.compile(r"\s*<function=([^<>\n]+)>\s*")
_PARAMETER = re.compile(r"<parameter=([^<>\n]+)>\n?")
_FUNCTION_END = re.compile(r"\s*</function>\s*</tool_call>")
_PYTHON = {"True": "true", "False": "false", "None": "null"}


@dataclasses.dataclass(frozen=True)
class Call:
    """A tool call: the function's name and its arguments."""

    name: str
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer in its parts; finished_thinking is false when the text ended before."""

    content: str
    thinking: str = ""
    calls: tuple[Call, ...] = ()
    problems: tuple[str, ...] = ()
    finished_thinking: bool = True

    def message(self) -> dict[str, Any]:
        """The assistant's message for the history, as templates read it."""
        made = {"role": "assistant", "content": self.content}
        if self.thinking:
            made["reasoning_content"] = self.thinking
        if self.calls:
            made["tool_calls"] = [
                {"type": "function", "function": dataclasses.asdict(call)}
                for call in self.calls
            ]
        return made


class _Malformed(ValueError):
    """Why a call cannot be read."""


def parse(
    text: str,
    *,
    thinks: bool = False,
    tools: Sequence[Mapping] = (),
    calls: bool = True,
) -> Reply:
    """The parts of an answer.

    Args:
      text: the answer without its end mark.
      thinks: the prompt ended inside a <think> block (`chat.Prompt.thinks`).
      tools: JSON schemas, for the types of parameters.
      calls: look for tool calls; without, they are content.
    """
    thinking, content, finished = _thinking(text, thinks)
    if not finished:
        return Reply("", thinking, finished_thinking=False)
    if not calls:
        return Reply(content, thinking)
    content, found, problems = _calls(content, _types(tools))
    return Reply(content, thinking, tuple(found), tuple(problems))


def _calls(
    content: str, types: dict[str, dict[str, Any]]
) -> tuple[str, list[Call], list[str]]:
    """(content without the calls, calls, what is wrong with others)."""
    kept, calls, problems, at = [], [], [], 0
    while True:
        start = content.find(OPEN, at)
        if start < 0 or len(problems) >= MAX_BAD:
            break
        try:
            call, end = _call(content, start + len(OPEN), types)
        except _Malformed as error:
            problems.append(f"tool call at letter {start}: {error}")
            end = start + len(OPEN)
            kept.append(content[at:end])
        else:
            kept.append(content[at:start].rstrip())
            calls.append(call)
        at = end
    if len(problems) >= MAX_BAD and content.find(OPEN, at) >= 0:
        problems.append(
            "too many calls that cannot be read: the rest was not looked at"
        )
    kept.append(content[at:].strip() if calls and not problems else content[at:])
    return "".join(kept), calls, problems


def _thinking(text: str, thinks: bool) -> tuple[str, str, bool]:
    """(thinking, the rest, whether thinking had an end)."""
    begun = _BLANKS.match(text).end()
    opened = text.startswith(THINK, begun)
    if not opened and not thinks:
        return "", text, True
    start = begun + len(THINK) if opened else 0
    end = text.find(THOUGHT, start)
    if end < 0:
        return text[start:].strip("\n"), "", False
    rest = text[end + len(THOUGHT) :]
    return text[start:end].strip("\n"), rest.lstrip("\n"), True


def _call(text: str, at: int, types: dict[str, dict[str, Any]]) -> tuple[Call, int]:
    """The call whose opening tag ends at `at`, and where its closing tag ends."""
    begun = _BLANKS.match(text, at).end()
    if text.startswith("{", begun):
        return _hermes(text, begun)
    if text.startswith("<function=", begun):
        return _xml(text, begun, types)
    raise _Malformed("wanted a JSON object or <function=NAME> after <tool_call>")


def _no_constant(word: str) -> Any:
    raise _Malformed(f"{word} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _hermes(text: str, at: int) -> tuple[Call, int]:
    made, end = _read_json(text, at)
    end = _BLANKS.match(text, end).end()
    if not text.startswith(CLOSE, end):
        raise _Malformed(f"no {CLOSE} after the JSON object")
    name, arguments = made.get("name"), made.get("arguments", {})
    if isinstance(arguments, str):
        whole = arguments
        arguments, stop = _read_json(whole, _BLANKS.match(whole).end())
        if whole[stop:].strip():
            raise _Malformed("the text of arguments is not one JSON object")
    if not isinstance(name, str) or not name:
        raise _Malformed('no "name"')
    if not isinstance(arguments, dict):
        raise _Malformed('"arguments" is no object')
    return Call(name, arguments), end + len(CLOSE)


def _read_json(text: str, at: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, at)
    except _Malformed:
        raise
    except RecursionError:
        raise _Malformed("JSON nested too deeply") from None
    except ValueError as error:  # also numbers of thousands of digits
        words = getattr(error, "msg", "a number that is too long")
        raise _Malformed(f"no JSON: {words}") from None


def _xml(text: str, at: int, types: dict[str, dict[str, Any]]) -> tuple[Call, int]:
    found = _FUNCTION.match(text, at)
    if found is None:
        raise _Malformed("<function=NAME> has no name or no end")
    name, at, arguments = found[1].strip(), found.end(), {}
    while found := _PARAMETER.match(text, at):
        end = text.find("</parameter>", found.end())
        if end < 0:
            raise _Malformed(f"parameter {found[1]!r} has no </parameter>")
        key, value = found[1].strip(), text[found.end() : end]
        if key in arguments:
            raise _Malformed(f"parameter {key!r} comes twice")
        value = value.removesuffix("\n")
        arguments[key] = _typed(value, types.get(name, {}).get(key))
        at = _BLANKS.match(text, end + len("</parameter>")).end()
    ended = _FUNCTION_END.match(text, at)
    if ended is None:
        raise _Malformed(f"no </function> and {CLOSE} after the parameters")
    return Call(name, arguments), ended.end()


def _types(tools: Sequence[Mapping]) -> dict[str, dict[str, Any]]:
    """{function: {parameter: its schema}}."""
    made = {}
    for tool in tools or ():
        function = tool.get("function", tool)
        parameters = function.get("parameters")
        fields = parameters.get("properties") if isinstance(parameters, dict) else None
        made[function.get("name")] = fields if isinstance(fields, dict) else {}
    return made


def _typed(value: str, schema: Any) -> Any:
    """A parameter's text as its schema has it; the text where it cannot be read so."""
    kinds = schema.get("type") if isinstance(schema, dict) else None
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if kinds == [None] or "string" in kinds:
        return value
    text = value.strip()
    try:
        made, end = _read_json(_PYTHON.get(text, text), 0)
    except _Malformed:
        return value
    return made if end == len(_PYTHON.get(text, text)) else value


class Watch:
    """The first of some words in a text that comes in pieces."""

    def __init__(self, words: Sequence[str]):
        self._words = tuple(words)
        self._longest = max(map(len, self._words), default=0)
        self._held = ""

    def push(self, text: str) -> Iterator[tuple[str, str | None]]:
        """(text before, word) for each word that is whole, and (text, None) for what
        is no beginning of one."""
        text, self._held = self._held + text, ""
        while found := self._first(text):
            at, word = found
            yield text[:at], word
            text = text[at + len(word) :]
        keep = self._beginning(text)
        self._held = text[len(text) - keep :]
        if keep < len(text):
            yield text[: len(text) - keep], None

    def end(self) -> str:
        """What was kept back."""
        held, self._held = self._held, ""
        return held

    def _first(self, text: str) -> tuple[int, str] | None:
        """Where the word begins that is whole first; of two that end there, the longer.
        So it does not depend on how the text is cut in pieces."""
        found = [(text.find(word), word) for word in self._words]
        ends = [(at + len(word), at, word) for at, word in found if at >= 0]
        return min(ends)[1:] if ends else None

    def _beginning(self, text: str) -> int:
        """Letters at the end that may be the beginning of a word."""
        for count in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-count:]
            if any(word.startswith(tail) for word in self._words):
                return count
        return 0


def check_stops(stops: Sequence[str]) -> None:
    """Refuse stop strings that cannot be.

    Raises:
      config.InputError: too many, too long, or an empty one.
    """
    if len(stops) > MAX_STOPS:
        raise config.InputError(f"{len(stops)} stop texts: at most {MAX_STOPS}")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_LETTERS:
            raise config.InputError(
                f"stop text {stop!r}: wanted 1 to {MAX_STOP_LETTERS} letters"
            )


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of some words."""
    for before, word in Watch(stops).push(text) if stops else ():
        if word is not None:
            return before
    return text
