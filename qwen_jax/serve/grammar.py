# SPDX-License-Identifier: Apache-2.0
"""What an answer must look like: JSON, JSON by a schema, calls of tools.

    compiler = Compiler(tokenizer, spec.vocab_size, stop_ids)
    grammar = compiler.json(schema)             # or compiler.calls(tools, ...)
    matcher = grammar.start()                   # see request.Matcher

Source: llguidance (a regular-expression and Earley parser over token bytes), its
bitmasks. Calls are written as the model's template writes them: Hermes JSON, or
Qwen3-Coder's tags. With `text`, what is not a call is free, and a call, once begun, is
by its schema. Where the answer begins with thinking (`thinks`), all ids but the end are
allowed until </think>.

Shapes: masks are uint32 [ceil(vocab_size / 32)]. Invariants: blanks between parts of
JSON are at most MAX_BLANKS, so an answer cannot be blanks for ever; control tokens are
never allowed, the end only where the grammar is satisfied. Compiled grammars are kept
by their text, MAX_KEPT of them.
Raises: config.InputError for a schema that cannot be compiled; GrammarError while an
answer is made, when it breaks the grammar or the parser's limits.
"""

import collections
import dataclasses
import json
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance
import llguidance.numpy as masks
import numpy as np

from qwen_jax import config
from qwen_jax.data import reply
from qwen_jax.data import tokenizer as tokenizer_lib
from qwen_jax.serve import messages, schemas

MAX_BLANKS = 8
MAX_KEPT = 128
_WHITE = {"whitespace_pattern": f"[ \\n]{{1,{MAX_BLANKS}}}"}
_ANY_OBJECT = {"type": "object"}
_KEY = re.compile(r"[^<>\n\"\\]+")
_BEYOND = ("$ref", "allOf", "anyOf", "oneOf", "not", "if", "patternProperties")
_THOUGHT = reply.THOUGHT.encode()


class GrammarError(RuntimeError):
    """An answer that cannot go on."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A grammar for answers (see `request.Grammar`)."""

    compiler: "Compiler"
    first: llguidance.LLMatcher
    thinks: bool

    def start(self) -> "Matcher":
        """A matcher before the first id."""
        return Matcher(self.compiler, self.first.deep_copy(), self.thinks)


class Matcher:
    """Where one answer stands (see `request.Matcher`)."""

    def __init__(self, compiler: "Compiler", inner: Any, thinks: bool):
        self._compiler, self._inner = compiler, inner
        self._thinks, self._tail = thinks, b""
        self._broken: GrammarError | None = None

    def allowed(self) -> np.ndarray:
        """Ids that may come next. It never raises, for it is asked in the midst of a
        step for all answers; where the parser gave up, `accept` says so."""
        if self._thinks:
            return self._compiler.all_but_ends
        try:
            return self._compiler.mask(self._inner)
        except GrammarError as error:
            self._broken = error
            return self._compiler.all_but_ends

    def accept(self, token: int) -> None:
        """One more id."""
        if self._broken is not None:
            raise self._broken
        if self._thinks:
            self._tail = (self._tail + self._compiler.bytes_of(token))[-64:]
            self._thinks = _THOUGHT not in self._tail
        elif not self._inner.consume_token(int(token)):
            raise GrammarError(f"the id {token} does not fit: {self._error()}")

    def done(self) -> bool:
        """Whether nothing may come but the end."""
        return not self._thinks and self._inner.is_stopped()

    def _error(self) -> str:
        return self._inner.get_error()[:200] or "it is not allowed here"


class _Words:
    """A vocabulary as llguidance reads it."""

    bos_token_id = None

    def __init__(self, words: tokenizer_lib.Tokenizer, vocab_size: int, end: int):
        added = words.document.get("added_tokens") or []
        control = {one["id"] for one in added if one.get("special", True)}
        self.eos_token_id, self.special_token_ids = end, sorted(control)
        self.tokens = [words.decode_bytes([i]) for i in range(vocab_size)]
        # Tags such as <tool_call> are ids of their own, as the template writes them.
        tags = [one["content"] for one in added if one["id"] not in control]
        self._cut = re.compile("|".join(map(re.escape, tags)) or "(?!)")
        self._words = words

    def __call__(self, text: str | bytes) -> list[int]:
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        ids, at = [], 0
        for found in self._cut.finditer(text):
            ids += self._words.encode(text[at : found.start()])
            ids.append(self._words.specials[found[0]])
            at = found.end()
        return ids + self._words.encode(text[at:])


class Compiler:
    """A handle on a model's vocabulary and the grammars compiled for it."""

    def __init__(
        self,
        words: tokenizer_lib.Tokenizer,
        vocab_size: int,
        stop_ids: Sequence[int],
    ):
        """vocab_size: of the model's scores, which may be more than the ids."""
        self._words, self._vocab_size = words, vocab_size
        self._stop_ids = tuple(dict.fromkeys(stop_ids))
        self._lock = threading.Lock()
        self._kept: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self._tokens: llguidance.LLTokenizer | None = None
        bits_v = np.zeros(-(-vocab_size // 32) * 32, bool)
        bits_v[: words.vocab_size] = True
        bits_v[list(self._stop_ids)] = False
        packed = np.packbits(bits_v, bitorder="little").view("<u4")
        self.all_but_ends = packed.astype(np.uint32)

    def bytes_of(self, token: int) -> bytes:
        """The bytes an id stands for."""
        return self._words.decode_bytes([token])

    def mask(self, inner: llguidance.LLMatcher) -> np.ndarray:
        """What a matcher of llguidance allows.

        Raises:
          GrammarError: the parser's limits.
        """
        mask_1w = masks.allocate_token_bitmask(1, self._vocab_size)
        masks.fill_next_token_bitmask(inner, mask_1w)
        if inner.is_error():
            raise GrammarError(inner.get_error()[:200])
        return mask_1w[0].view(np.uint32)

    def json(self, schema: Any = None, *, thinks: bool = False) -> Compiled:
        """Answers that are JSON by the schema; without, any object."""
        text = schemas.check(_ANY_OBJECT if schema is None else schema)
        return self._compiled(f"start: %json {_white(text)}", thinks)

    def calls(
        self,
        tools: Sequence[Mapping[str, Any]],
        *,
        tags: bool = False,
        many: bool = True,
        text: bool = False,
        schema: Any = None,
        thinks: bool = False,
    ) -> Compiled:
        """Answers that call tools.

        Args:
          tools: JSON schemas of functions; with "free", any arguments are right.
          tags: Qwen3-Coder's tags instead of Hermes JSON.
          many: more than one call.
          text: other text before, between and after, or no call at all.
          schema: JSON by this schema instead of calls is right as well.
        """
        rules, begins = [], []
        for i, tool in enumerate(tools):
            begin, more = _call(tool["function"], i, tags)
            begins.append(begin)
            rules += more
        if text:
            for i, begin in enumerate(begins):
                rules.append(f"call_{i}: open {begin} {_quoted(reply.CLOSE)}")
            rules += [f"open[lazy]: TEXT {_quoted(reply.OPEN)}", "TEXT: /(.|\\n)*/"]
            start = "call* rest" if many else "call? rest"
            rules.append("rest: TEXT")
        else:
            for i, begin in enumerate(begins):
                whole = f"{_quoted(reply.OPEN)} {begin} {_quoted(reply.CLOSE)}"
                rules.append(f"call_{i}: {whole}")
            start = 'call ("\\n" call)*' if many else "call"
        if schema is not None:
            start += " | answer"
            rules.append(f"answer: %json {_white(schemas.check(schema))}")
        rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
        lark = "\n".join(["%llguidance {}", f"start: {start}", *rules])
        return self._compiled(lark, thinks)

    def _compiled(self, lark: str, thinks: bool) -> Compiled:
        with self._lock:
            if self._tokens is None:
                words = _Words(self._words, self._vocab_size, self._stop_ids[0])
                self._tokens = llguidance.LLTokenizer(
                    llguidance.TokenizerWrapper(words),
                    n_vocab=self._vocab_size,
                    eos_token=list(self._stop_ids),
                    slices=[],
                )
            first = self._kept.get(lark)
            if first is not None:
                self._kept.move_to_end(lark)
        if first is None:
            limits = llguidance.LLParserLimits(verbose_errors=False)
            first = llguidance.LLMatcher(self._tokens, lark, log_level=0, limits=limits)
            if not first.is_error():
                masks.fill_next_token_bitmask(
                    first, masks.allocate_token_bitmask(1, self._vocab_size)
                )
            if first.is_error():
                raise config.InputError(_reason(first.get_error()))
            with self._lock:
                self._kept[lark] = first
                while len(self._kept) > MAX_KEPT:
                    self._kept.popitem(last=False)
        return Compiled(self, first, thinks)


def _reason(error: str) -> str:
    """The first lines of what llguidance says, without the grammar it shows."""
    error = re.sub(r"^at \d+\(\d+\): ", "", error.strip())
    lines = [x.strip() for x in error.splitlines() if not re.match(r"\s*\d+ \|", x)]
    words = " ".join(x for x in lines if x.strip("^ "))
    return ascii(words)[1:-1][:200] or "it cannot be compiled"


def _white(text: str) -> str:
    """A schema's text with our blanks; its own x-guidance, which is llguidance's way to
    change the compiler, is not obeyed."""
    schema = json.loads(text)
    if isinstance(schema, dict):
        schema["x-guidance"] = _WHITE
    return json.dumps(schema)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _call(function: Mapping[str, Any], i: int, tags: bool) -> tuple[str, list[str]]:
    """(what stands between the tags of a call, rules that it needs)."""
    name = function["name"]
    if function.get("free") and tags:
        head, end = f"\n<function={name}>\n", "</function>\n"
        rules = [f"args_{i}[suffix={_quoted(end)}]: /(.|\\n)*/"]
        return f"{_quoted(head)} args_{i}", rules
    schema = _ANY_OBJECT if function.get("free") else function.get("parameters")
    if schema in (None, messages.NO_PARAMETERS):
        schema = messages.NO_PARAMETERS | {"additionalProperties": False}
    text = schemas.check(schema)
    if tags:
        made = _tagged(name, schema, i)
        if made is not None:
            return made
    head = f'\n{{"name": "{name}", "arguments": '
    rules = [f"args_{i}: %json {_white(text)}"]
    return f"{_quoted(head)} args_{i} {_quoted('}' + chr(10))}", rules


def _tagged(name: str, schema: Any, i: int) -> tuple[str, list[str]] | None:
    """The same in Qwen3-Coder's tags; None for a schema that they cannot hold."""
    properties = schema.get("properties") or {}
    needed = schema.get("required") or []
    if schema.get("type", "object") != "object" or any(k in schema for k in _BEYOND):
        return None
    if not isinstance(properties, dict) or not isinstance(needed, list):
        return None
    if not all(isinstance(key, str) and key in properties for key in needed):
        return None
    if not all(_KEY.fullmatch(key) for key in properties):
        return None
    defs = {k: schema[k] for k in ("$defs", "definitions") if k in schema}
    begin, rules = _quoted(f"\n<function={name}>\n"), []
    for j, (key, one) in enumerate(properties.items()):
        value, end = f"value_{i}_{j}", "\n</parameter>\n"
        kinds = one.get("type") if isinstance(one, dict) else None
        kinds = kinds if isinstance(kinds, list) else [kinds]
        free = isinstance(one, dict) and (kinds == [None] or "string" in kinds)
        listed = one.get("enum") if free else None
        if isinstance(listed, list) and all(isinstance(x, str) for x in listed):
            choices = " | ".join(map(_quoted, listed))
            rules.append(f"{value}: ({choices}) {_quoted(end)}")
        elif free:  # reply.parse takes it as text, whatever the schema says besides
            rules.append(f"{value}[suffix={_quoted(end)}]: /(.|\\n)*/")
        elif isinstance(one, dict):
            inner = _white(json.dumps(defs | one))
            rules.append(f"{value}: %json {inner} {_quoted(end)}")
        else:
            return None
        mark = "" if key in needed else "?"
        rules.append(f"pair_{i}_{j}: {_quoted(f'<parameter={key}>{chr(10)}')} {value}")
        begin += f" pair_{i}_{j}{mark}"
    return f"{begin} {_quoted('</function>' + chr(10))}", rules
