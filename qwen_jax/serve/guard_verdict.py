# SPDX-License-Identifier: Apache-2.0
"""What a guard says of a text: three levels, nine categories, and where.

Source: Qwen3Guard (arXiv 2510.14276, sections 2 and 3): the levels and categories, and
that Jailbreak is said of prompts alone.
A `Finding` is one checker's word on one text; `worst` joins several. A `Verdict` is the
guard's: the joined findings and what the policy makes of them.

Units: `Span` counts code points of the text as it was given. `hold` counts those at the
end of a stream that may yet become a part of something found: a server that sends no
more than the rest sends nothing that is found later.
Invariants: a finding is safe exactly when it has no risks; NO_CATEGORY stands for a
risk of no named category.
Raises: config.InputError for messages that are none.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qwen_jax import config

SAFE, CONTROVERSIAL, UNSAFE = "safe", "controversial", "unsafe"
LEVELS = (SAFE, CONTROVERSIAL, UNSAFE)  # from good to bad
ALLOW, FLAG, BLOCK = "allow", "flag", "block"
ACTIONS = (ALLOW, FLAG, BLOCK)
INPUT, OUTPUT, STREAM = "input", "output", "stream"
STAGES = (INPUT, OUTPUT, STREAM)
# The short names are those of policy and rule files.
CATEGORIES = {
    "violent": "Violent",
    "illegal": "Non-violent Illegal Acts",
    "sexual": "Sexual Content or Sexual Acts",
    "pii": "PII",
    "self_harm": "Suicide & Self-Harm",
    "unethical": "Unethical Acts",
    "political": "Politically Sensitive Topics",
    "copyright": "Copyright Violation",
    "jailbreak": "Jailbreak",
}
NAMES = tuple(CATEGORIES.values())
JAILBREAK = CATEGORIES["jailbreak"]
PII = CATEGORIES["pii"]
NO_CATEGORY = ""
RESPONSE = -1  # the "message" of spans in an answer
_BY_NAME = {name.lower(): name for name in NAMES} | CATEGORIES


@dataclasses.dataclass(frozen=True)
class Span:
    """Where something was found: text[start:stop] of messages[message] (RESPONSE for
    an answer), by which rule, and as what."""

    start: int
    stop: int
    category: str
    rule: str
    message: int = RESPONSE


@dataclasses.dataclass(frozen=True)
class Finding:
    """One checker's word: risks {category: controversial or unsafe}, scores {category:
    0 to 1}, whether an answer refuses (None: not judged), places, and `hold`."""

    risks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    refusal: bool | None = None
    spans: tuple[Span, ...] = ()
    hold: int = 0

    @property
    def level(self) -> str:
        """The worst of the risks."""
        return max(self.risks.values(), key=LEVELS.index, default=SAFE)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The guard's word on a text at a stage, and what is to be done.

    failed: names of checkers that raised. hold: see the module; 0 but in streams.
    """

    level: str
    categories: tuple[str, ...]
    scores: Mapping[str, float]
    refusal: bool | None
    action: str
    where: tuple[Span, ...] = ()
    stage: str = INPUT
    failed: tuple[str, ...] = ()
    hold: int = 0


def worst(findings: Iterable[Finding]) -> Finding:
    """Several findings on one text as one: the worst level of each category, its
    highest score, all places, the longest hold; one that saw a refusal is believed."""
    risks: dict[str, str] = {}
    scores: dict[str, float] = {}
    refusals, spans, hold = [], [], 0
    for one in findings:
        for category, level in one.risks.items():
            old = risks.get(category, SAFE)
            risks[category] = max(old, level, key=LEVELS.index)
        for category, score in one.scores.items():
            scores[category] = max(scores.get(category, 0.0), score)
        refusals += [] if one.refusal is None else [one.refusal]
        spans += one.spans
        hold = max(hold, one.hold)
    order = (*NAMES, NO_CATEGORY)
    risks = dict(sorted(risks.items(), key=lambda pair: order.index(pair[0])))
    places = sorted(set(spans), key=lambda s: (s.message, s.start, s.stop, s.rule))
    refusal = any(refusals) if refusals else None
    return Finding(risks, scores, refusal, tuple(places), hold)


def category(name: str, what: str) -> str:
    """The full name of a category given by its short or full name.

    Raises:
      config.InputError: it is none; `what` says where it stands.
    """
    found = _BY_NAME.get(str(name).lower())
    if found is None:
        raise config.InputError(
            f"{what}: category {name!r}{config.nearest(str(name), CATEGORIES)}"
        )
    return found


def texts_of(messages: Any) -> list[tuple[int, str, str]]:
    """(index, role, text) of every text in a prompt: contents, parts of contents,
    thoughts, names and arguments of calls; a string is one message of a user.

    Raises:
      config.InputError: messages that are no list of {role, content}.
    """
    if isinstance(messages, str):
        return [(0, "user", messages)]
    if not isinstance(messages, Sequence):
        raise config.InputError("messages: wanted a text or a list of {role, content}")
    found = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise config.InputError(f"messages[{i}]: wanted an object with a role")
        role = str(message.get("role", "user"))
        found += [(i, role, text) for text in _strings(message) if text]
    return found


def _strings(message: Mapping[str, Any]) -> list[str]:
    content = message.get("content")
    texts = [content] if isinstance(content, str) else []
    if isinstance(content, list | tuple):
        for part in content:
            if isinstance(part, Mapping):
                text = part.get("text", part.get("refusal"))
                texts += [text] if isinstance(text, str) else []
            elif isinstance(part, str):
                texts.append(part)
    for key in ("reasoning_content", "reasoning", "thinking", "name"):
        texts += [message[key]] if isinstance(message.get(key), str) else []
    for call in message.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        if isinstance(function, Mapping):
            texts += [str(function.get(k) or "") for k in ("name", "arguments")]
    return texts
