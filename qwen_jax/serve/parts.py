# SPDX-License-Identifier: Apache-2.0
"""An answer's text in pieces -> its parts as they come: thinking, content, tool calls.

    parts = Parts(thinks=prompt.thinks, tools=tools)
    for part in parts.push(text): ...
    for part in parts.end(): ...

Source: `data.reply` reads the same formats in one go; here nothing is told twice or
taken back. A call is told when it is whole; its text is kept back until then, and
becomes content where it is no call. A call of a function that is not among the tools
is content as well.

Invariants: the parts of a kind, joined, do not depend on how the text was cut; where
all calls can be read the parts are those of `reply.parse`, but for blanks around
content between two calls. Work is linear: a call is looked
at when a closing tag comes, at most MAX_LOOKS times.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from qwen_jax.data import reply

THINKING, CONTENT, CALL = "thinking", "content", "call"
MAX_LOOKS = 16
Part = tuple[str, Any]  # (THINKING or CONTENT, text) or (CALL, reply.Call)


@dataclasses.dataclass
class _State:
    kind: str
    may_think: bool = True  # nothing but blanks yet
    cut: str = ""  # blanks that are left out where this kind begins
    called: bool = False
    looks: int = 0


class Parts:
    """See the module docstring."""

    def __init__(self, *, thinks: bool = False, tools: Sequence[dict] = ()):
        """tools: JSON schemas; without, calls are not looked for."""
        tags = (reply.THINK, reply.THOUGHT, *((reply.OPEN, reply.CLOSE) * bool(tools)))
        self._watch, self._tools = reply.Watch(tags), tuple(tools)
        self._names = {tool.get("function", tool)["name"] for tool in tools}
        self._at = _State(THINKING if thinks else CONTENT, cut="\n" if thinks else "")
        self._opens = thinks  # the prompt opened the thinking: a <think> is its own
        self._held = ""  # blanks before what may be the end, or the text of a call
        self._blanks = ""  # those before a call

    @property
    def thinking(self) -> bool:
        """Whether what comes next is thinking."""
        return self._at.kind == THINKING

    def push(self, text: str) -> Iterator[Part]:
        """What can be told with one more piece."""
        for part, tag in self._watch.push(text):
            yield from self._text(part)
            if tag is not None:
                yield from self._tag(tag)

    def end(self) -> Iterator[Part]:
        """The rest, when the answer is over."""
        yield from self._text(self._watch.end())
        held, self._held = self._held, ""
        if self._at.kind == CALL:
            yield from self._read(held)
        elif self._at.kind == CONTENT and held and not self._at.called:
            yield CONTENT, held

    def _text(self, text: str) -> Iterator[Part]:
        at = self._at
        if not text:
            return
        if at.kind == CALL:
            self._held += text
            return
        if at.cut:
            text = text.lstrip(at.cut)
            if not text:
                return
            at.cut = ""
        # Blanks at the end are told when something follows: thinking ends before its
        # line feeds, content before the blanks in front of a call, and blanks in front
        # of <think> are nothing.
        body = text.rstrip("\n") if at.kind == THINKING else text.rstrip()
        if not body:
            self._held += text
            return
        at.may_think = False
        yield at.kind, self._held + body
        self._held = text[len(body) :]

    def _tag(self, tag: str) -> Iterator[Part]:
        at = self._at
        if at.kind == CALL:
            self._held += tag
            if tag == reply.CLOSE:
                at.looks += 1
                if at.looks > MAX_LOOKS:
                    held, self._held = self._held, ""
                    self._at = _State(CONTENT, may_think=False, called=at.called)
                    yield CONTENT, held
                else:
                    yield from self._whole()
            return
        if tag == reply.THINK and at.may_think and (at.kind == CONTENT or self._opens):
            self._held, self._opens = "", False
            self._at = _State(THINKING, may_think=False, cut="\n")
        elif tag == reply.THOUGHT and at.kind == THINKING:
            self._held, self._opens = "", False
            self._at = _State(CONTENT, may_think=False, cut="\n")
        elif tag == reply.OPEN and at.kind == CONTENT and at.looks <= MAX_LOOKS:
            self._blanks, self._held = self._held, tag
            self._at = _State(CALL, called=at.called, looks=at.looks)
        else:
            yield from self._text(tag)

    def _whole(self) -> Iterator[Part]:
        """Tell the call that is held, if it is one."""
        found = reply.parse(self._held, tools=self._tools)
        known = all(call.name in self._names for call in found.calls)
        if found.calls and known and not found.problems:
            self._held = ""
            self._at = _State(CONTENT, False, " \t\r\n", True, 0)
            for call in found.calls:
                yield CALL, call

    def _read(self, held: str) -> Iterator[Part]:
        """Tell what is held, which has no more end: calls among content."""
        found = reply.parse(held, tools=self._tools)
        if not found.calls or any(c.name not in self._names for c in found.calls):
            yield CONTENT, self._blanks + held
            return
        if found.content:
            yield CONTENT, self._blanks + found.content
        for call in found.calls:
            yield CALL, call
