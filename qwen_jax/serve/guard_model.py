# SPDX-License-Identifier: Apache-2.0
"""A model that judges in words, in the format of Qwen3Guard-Gen.

Source: the model cards of Qwen3Guard-Gen (arXiv 2510.14276): a conversation that ends
with the user's message or with the assistant's answer goes through the model folder's
own chat template, and the model writes, greedily,
    Safety: Safe | Unsafe | Controversial
    Categories: None, or names of categories with commas between them
    Refusal: Yes | No            (of answers alone)
`parse` takes this and nothing else: lines in this order, each once, no other words
(an empty <think> block before them is passed over), categories exactly where the text
is not safe, Jailbreak of prompts alone.

Deviation: the published scripts take the first words that fit, wherever they stand. An
answer that is not of the format raises, and the guard then fails closed.
Invariants: the model is whatever `generate` asks: (ids, most new tokens) -> text.
A stream is judged after each `every` letters and at its end, and holds back what was
not judged yet.
Raises: MalformedError (of `parse`), config.InputError for messages or a template.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from qwen_jax import models
from qwen_jax.data import chat, tokenizer
from qwen_jax.models import decode, sampling
from qwen_jax.models import spec as spec_lib
from qwen_jax.serve import guard_verdict
from qwen_jax.serve import request as request_lib

MAX_TOKENS = 128
LEVELS = {
    "Safe": guard_verdict.SAFE,
    "Controversial": guard_verdict.CONTROVERSIAL,
    "Unsafe": guard_verdict.UNSAFE,
}
SCORES = {guard_verdict.UNSAFE: 1.0, guard_verdict.CONTROVERSIAL: 0.5}
_THINK = re.compile(r"\s*<think>\s*</think>\s*")
_ROLES = ("user", "assistant")

Generate = Callable[[list[int], int], str]


class MalformedError(ValueError):
    """What the model wrote is no verdict; tells which line, and not what it says."""


def parse(text: str, *, response: bool) -> guard_verdict.Finding:
    """A finding from what the model wrote; see the module docstring.

    Raises:
      MalformedError: it is not of the format.
    """
    text = _THINK.sub("", text, count=1) if _THINK.match(text) else text
    lines = [line.strip() for line in text.strip().split("\n")]
    wanted = ["Safety: ", "Categories: ", *(["Refusal: "] if response else [])]
    if len(lines) != len(wanted):
        raise MalformedError(f"{len(lines)} lines, wanted {len(wanted)}")
    values = []
    for number, (line, start) in enumerate(zip(lines, wanted, strict=True), 1):
        if not line.startswith(start):
            raise MalformedError(f"line {number} does not begin with {start!r}")
        values.append(line[len(start) :].strip())
    if values[0] not in LEVELS:
        raise MalformedError("Safety is none of Safe, Controversial, Unsafe")
    level, names = LEVELS[values[0]], _categories(values[1], response)
    if (level == guard_verdict.SAFE) == bool(names):
        raise MalformedError(f"Safety: {values[0]} with {len(names)} categories")
    if response and values[2] not in ("Yes", "No"):
        raise MalformedError("Refusal is neither Yes nor No")
    return guard_verdict.Finding(
        dict.fromkeys(names, level),
        dict.fromkeys(names, SCORES.get(level, 0.0)),
        values[2] == "Yes" if response else None,
    )


def _categories(text: str, response: bool) -> list[str]:
    if text == "None":
        return []
    names = [name.strip() for name in text.split(",")]
    for name in names:
        unknown = name not in guard_verdict.NAMES
        if unknown or (response and name == guard_verdict.JAILBREAK):
            raise MalformedError("Categories has a name that is not of its list")
    if len(set(names)) < len(names):
        raise MalformedError("Categories has a name twice")
    return names


def generator(
    spec: spec_lib.Spec, params: Any, vocabulary: tokenizer.Tokenizer
) -> Generate:
    """`generate` by a loaded model, one text at a time, greedily."""
    stop_ids = tuple(dict.fromkeys((*spec.eos_ids, *vocabulary.stop_ids)))

    def generate(ids: list[int], max_tokens: int) -> str:
        (new,) = decode.generate(
            spec, params, [ids], max_tokens=max_tokens, stop_ids=stop_ids
        )
        return vocabulary.decode(new, skip_special=True)

    return generate


class Runs(Protocol):
    """What is asked of an engine: the ids that end a text, all pieces of a request."""

    stop_ids: tuple[int, ...]

    def run(
        self, requests: Sequence[request_lib.Request]
    ) -> dict[str, list[request_lib.Piece]]:
        """See engine.Engine.run."""


def through_engine(engine: Runs, vocabulary: tokenizer.Tokenizer) -> Generate:
    """`generate` by a running engine, greedily, beside its other requests. The pages of
    its prompts are shared with one another and with nobody else's."""
    numbers = itertools.count()
    stop_ids = tuple(dict.fromkeys((*engine.stop_ids, *vocabulary.stop_ids)))

    def generate(ids: list[int], max_tokens: int) -> str:
        request = request_lib.Request(
            id=f"guard-{id(numbers)}-{next(numbers)}",
            prompt=tuple(ids),
            max_tokens=max_tokens,
            sampling=sampling.Sampling(temperature=0.0),
            stop_ids=stop_ids,
            salt="guard",
        )
        pieces = engine.run([request])[request.id]
        if pieces[-1].finish not in (request_lib.STOP, request_lib.LENGTH):
            raise RuntimeError(f"the guard's model ended with {pieces[-1].finish}")
        new = [token for piece in pieces for token in piece.ids]
        return vocabulary.decode(new, skip_special=True)

    return generate


class ModelChecker:
    """The checker of `guard.Guard` that asks a model.

    Args:
      vocabulary: the model's tokenizer.
      template: its chat template.
      generate: (ids of the prompt, most new tokens) -> what the model writes, without
        control tokens.
      every: letters of a stream after which it is judged anew; 0 for at its end alone.
    """

    name = "model"

    def __init__(
        self,
        vocabulary: tokenizer.Tokenizer,
        template: chat.Template,
        generate: Generate,
        every: int = 400,
    ):
        self._vocabulary, self._template = vocabulary, template
        self._generate, self._every = generate, every

    def prompt(self, messages: Any) -> guard_verdict.Finding:
        """The conversation; what is judged is what a user said last."""
        return self._ask(_conversation(messages), response=False)

    def response(self, messages: Any, text: str) -> guard_verdict.Finding:
        """A whole answer, after its prompt."""
        talk = [*_conversation(messages), {"role": "assistant", "content": text}]
        return self._ask(talk, response=True)

    def stream(self, messages: Any) -> "ModelListener":
        """An answer while it comes."""
        return ModelListener(self, messages, self._every)

    def _ask(
        self, talk: Sequence[Mapping[str, Any]], response: bool
    ) -> guard_verdict.Finding:
        prompt = chat.encode(self._vocabulary, self._template, talk)
        text = self._generate(prompt.ids, MAX_TOKENS)
        # A template may leave the think block open, or the model write it.
        return parse(text.removeprefix("</think>"), response=response)


class ModelListener:
    """A model on one answer."""

    def __init__(self, checker: ModelChecker, messages: Any, every: int):
        self._checker, self._messages, self._every = checker, messages, every
        self._text, self._judged = "", 0
        self._found = guard_verdict.Finding()

    def push(self, text: str) -> guard_verdict.Finding:
        """See guard.Listener."""
        self._text += text
        if self._every and len(self._text) - self._judged >= self._every:
            self._judge()
        return guard_verdict.worst(
            [self._found, guard_verdict.Finding(hold=len(self._text) - self._judged)]
        )

    def end(self) -> guard_verdict.Finding:
        """See guard.Listener."""
        if self._judged < len(self._text) or not self._text:
            self._judge()
        return self._found

    def _judge(self) -> None:
        """What was said of a part stays said; whether it refuses is the last word's."""
        new = self._checker.response(self._messages, self._text)
        joined = guard_verdict.worst([self._found, new])
        self._found = guard_verdict.Finding(joined.risks, joined.scores, new.refusal)
        self._judged = len(self._text)


def _conversation(messages: Any) -> list[dict[str, Any]]:
    """Texts of users and assistants alone: a guard's template knows no others, so what
    a system or a tool said is read as the user's."""
    talk: list[dict[str, Any]] = []
    for _, role, text in guard_verdict.texts_of(messages):
        role = role if role in _ROLES else "user"
        if talk and talk[-1]["role"] == role:
            talk[-1] = {"role": role, "content": f"{talk[-1]['content']}\n\n{text}"}
        else:
            talk.append({"role": role, "content": text})
    return talk or [{"role": "user", "content": ""}]


def load(folder: str, dtype: str | None = None, every: int = 400) -> ModelChecker:
    """The checker of a Hugging Face model folder, such as one of Qwen3Guard-Gen.

    Raises:
      config.InputError: see `models.load`, `tokenizer.load` and `chat.template_of`.
    """
    vocabulary = tokenizer.load(folder)
    template = chat.template_of(vocabulary)
    spec, params = models.load(folder, dtype=dtype)
    return ModelChecker(
        vocabulary, template, generator(spec, params, vocabulary), every
    )
