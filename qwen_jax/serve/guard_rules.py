# SPDX-License-Identifier: Apache-2.0
"""Rules: phrases, keys with a known prefix, and the detectors of `guard_pii`.

Format of a rule file (JSON; `guard_rules.json` is the built-in one), lists of
- phrases: {name, category, level, phrases}. A phrase is met in folded text
  (`guard_text`) where it begins and ends with a word; " {3} " in it stands for up to
  three further words, once in a phrase.
- tokens: {name, category, level, prefixes, letters, least, most}: after a prefix, a run
  of least to most letters (as in brackets of a regular expression) with a digit in it.
- detectors: {name, category, level} of those in `guard_pii.DETECTORS`.
- refusals: phrases with which an answer refuses.
Categories are short names; level is unsafe or controversial (scores 1 and 0.5). What is
said of jailbreak is looked for in prompts alone.

Invariants: time is linear in the length of a text, whatever it says: no rule holds a
regular expression, phrases are found by their first words, and what follows is bounded.
A text in parts has the findings of the whole text. `Finding.hold` counts the letters at
the end of a stream from the first that may still begin something found.
Units: places are code points of a message's text (of its own text for a part of one).
Raises: config.InputError for a rule file, naming the rule.
"""

import bisect
import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from qwen_jax import config
from qwen_jax.models import json_files
from qwen_jax.serve import guard_pii, guard_text, guard_verdict

BUILT_IN = pathlib.Path(__file__).with_name("guard_rules.json")
MAX_PHRASE, MAX_GAP, MAX_WORD, MAX_RUN = 200, 8, 20, 4000
MAX_SPANS = 200  # told of one rule
SCORES = {guard_verdict.UNSAFE: 1.0, guard_verdict.CONTROVERSIAL: 0.5}
REFUSAL_LETTERS = 300  # an answer that refuses says so at its beginning
_GAP = re.compile(r" \{(\d)\} ")
_LETTERS = re.compile(r"(?:[A-Za-z0-9]-[A-Za-z0-9]|[A-Za-z0-9_.])+-?")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is said of a text where something of this name is found."""

    name: str
    category: str
    level: str


class Matcher(Protocol):
    """One way of finding things in a text that grows.

    `begin`, in and out: starts before it are decided. `over`: the text is whole.
    """

    def scan(
        self, text: guard_text.Folded, begin: int, seen: int, over: bool
    ) -> tuple[list[tuple[Rule, int, int]], int]:
        """([(rule, start, stop)], new begin); `seen` letters were there before. What
        was found may be found again."""

    def open(self, text: guard_text.Folded, begin: int) -> int:
        """The first place from `begin` where something may yet begin."""


@dataclasses.dataclass(frozen=True)
class Phrase:
    """`first`, then up to `gap` words and `rest`; rest None where there is no gap."""

    rule: Rule
    first: str
    rest: re.Pattern | None
    gap: int
    words: int  # in first and rest and the gap, at most
    longest: int


class Phrases:
    """Matcher of phrases in low text."""

    def __init__(self, phrases: list[Phrase]):
        self._phrases = phrases
        self._longest = max((p.longest for p in phrases), default=0)
        self._firsts = _Firsts({p.first for p in phrases})
        self._gapped = [p for p in phrases if p.rest]

    def scan(self, text, begin, seen, over):
        low, found = text.low, []
        for phrase in self._phrases:
            # What begins before it was decided when the letters seen were scanned.
            at = low.find(phrase.first, max(begin, seen - phrase.longest - 1))
            while at >= 0:
                if stop := self._stop(phrase, low, at, over):
                    found.append((phrase.rule, at, stop))
                at = low.find(phrase.first, at + 1)
        return found, len(low) if over else max(begin, len(low) - self._longest - 1)

    def _stop(self, phrase: Phrase, low: str, at: int, over: bool) -> int:
        """Where a phrase that begins here ends; 0 where it is not (yet) one."""
        if not _starts_word(low, at):
            return 0
        stop = at + len(phrase.first)
        if phrase.rest is not None:
            match = phrase.rest.match(low, stop)
            if not match:
                return 0
            stop = match.end()
        if not guard_text.in_word(low[stop - 1]):
            return stop
        if stop == len(low):
            return stop if over else 0
        return 0 if guard_text.in_word(low[stop]) else stop

    def open(self, text, begin):
        low = text.low
        at = self._firsts.partial(low, begin)
        for phrase in self._gapped:
            for place in _places(low, phrase.first, begin):
                left = low.count(" ", place) < phrase.words
                if place < at and left and _starts_word(low, place):
                    at = place
        return at


@dataclasses.dataclass(frozen=True)
class Token:
    """A prefix and the run of letters behind it."""

    rule: Rule
    prefix: str
    run: re.Pattern
    least: int
    most: int


class Tokens:
    """Matcher of keys in plain text."""

    def __init__(self, tokens: list[Token]):
        self._tokens = tokens
        self._longest = max((len(t.prefix) + t.most + 1 for t in tokens), default=0)
        self._firsts = _Firsts({t.prefix for t in tokens})

    def scan(self, text, begin, seen, over):
        plain, found = text.plain, []
        for token, at, run in self._runs(plain, begin):
            ended = over or run.end() < len(plain)
            length = run.end() - run.start()
            fits = token.least <= length <= token.most
            if ended and fits and any(c.isdigit() for c in run[0]):
                found.append((token.rule, at, run.end()))
        return found, len(plain) if over else max(begin, len(plain) - self._longest)

    def _runs(self, plain: str, begin: int) -> Iterator[tuple[Token, int, re.Match]]:
        for token in self._tokens:
            for at in _places(plain, token.prefix, begin):
                before = plain[at - 1 : at]
                if not (before.isascii() and before.isalnum()):
                    yield token, at, token.run.match(plain, at + len(token.prefix))

    def open(self, text, begin):
        plain = text.plain
        going_on = [
            at
            for token, at, run in self._runs(plain, begin)
            if run.end() == len(plain) and run.end() - run.start() <= token.most
        ]
        return min([self._firsts.partial(plain, begin), *going_on])


class Detected:
    """Matcher of one detector."""

    def __init__(self, rule: Rule, detector: guard_pii.Detector):
        self._rule, self._is = rule, detector

    def scan(self, text, begin, seen, over):
        plain = text.plain
        settled = len(plain) if over else self._settled(plain, begin, seen)
        found, place = [], begin
        while match := self._is.starts.search(plain, place):
            at = match.start()
            if at >= settled:
                break
            if stop := self._is.find(plain, at):
                found.append((self._rule, at, stop))
            place = at + 1
        return found, settled

    def _settled(self, plain: str, begin: int, seen: int) -> int:
        """Starts before it are decided: by length, or by a letter that ends all."""
        enough = max(begin, len(plain) - self._is.longest - guard_pii.MARGIN)
        for at in range(len(plain) - 1, max(enough, seen) - 1, -1):
            if self._is.other.match(plain, at):
                return at + 1
        return enough

    def open(self, text, begin):
        plain = text.plain
        for match in self._is.begins.finditer(plain, begin):
            at = match.start()
            if len(plain) - at < self._is.width or self._is.starts.match(plain, at):
                return at
        return len(plain)


def _places(text: str, word: str, begin: int) -> Iterator[int]:
    at = text.find(word, begin)
    while at >= 0:
        yield at
        at = text.find(word, at + 1)


def _starts_word(text: str, at: int) -> bool:
    """Whether no word goes on over text[at - 1 : at + 1]."""
    joined = (
        at > 0 and guard_text.in_word(text[at]) and guard_text.in_word(text[at - 1])
    )
    return not joined


class _Firsts:
    """The words with which things begin."""

    def __init__(self, words: set[str]):
        self._sorted = sorted(words)
        self._longest = max(map(len, words), default=0)
        self._two = {word[:n] for word in words for n in (1, 2)}

    def partial(self, text: str, begin: int) -> int:
        """The first place whose text up to the end may become one of the words."""
        end = len(text)
        for at in range(max(begin, end - self._longest), end):
            if text[at : at + 2] in self._two and _starts_word(text, at):
                tail = text[at:]
                k = bisect.bisect_left(self._sorted, tail)
                if k < len(self._sorted) and self._sorted[k].startswith(tail):
                    return at
        return end


@dataclasses.dataclass(frozen=True)
class Rules:
    """Matchers of a rule file, for prompts and for answers; phrases of refusal."""

    prompt: tuple[Matcher, ...]
    response: tuple[Matcher, ...]
    refusals: Phrases


class Scan:
    """What rules find in one text that grows; see `Matcher`."""

    def __init__(self, matchers: tuple[Matcher, ...], message: int):
        self._matchers, self._message = matchers, message
        self._fold = guard_text.Fold()
        self._text = guard_text.Folded("", "", range(0))
        self._begins = [0] * len(matchers)
        self._found: dict[tuple[str, int], tuple[Rule, int]] = {}

    def feed(self, text: str, over: bool = False) -> None:
        """More of the text."""
        new, old = self._fold.feed(text), self._text
        self._text = whole = _joined(old, new)
        for i, matcher in enumerate(self._matchers):
            found, self._begins[i] = matcher.scan(
                whole, self._begins[i], len(old.plain), over
            )
            for rule, start, stop in found:
                place = (rule.name, whole.origin[start])
                before = self._found.get(place, (rule, 0))[1]
                self._found[place] = (rule, max(before, whole.origin[stop - 1] + 1))

    def finding(self, over: bool = False) -> guard_verdict.Finding:
        """On all that came; afterwards what is decided is let go."""
        spans, risks = [], {}
        for (name, start), (rule, stop) in sorted(self._found.items(), key=_order):
            level = risks.get(rule.category, guard_verdict.SAFE)
            levels = guard_verdict.LEVELS
            risks[rule.category] = max(level, rule.level, key=levels.index)
            last = spans[-1] if spans else None
            if last and last.rule == name and stop <= last.stop:
                continue  # inside of what the same rule found
            spans.append(
                guard_verdict.Span(start, stop, rule.category, name, self._message)
            )
        scores = {category: SCORES[level] for category, level in risks.items()}
        hold = 0 if over else self._hold()
        self._let_go()
        return guard_verdict.Finding(risks, scores, None, _capped(spans), hold)

    def _hold(self) -> int:
        text = self._text
        pairs = zip(self._matchers, self._begins, strict=True)
        at = min([m.open(text, begin) for m, begin in pairs], default=len(text.plain))
        if at >= len(text.plain):
            return 0
        return self._fold.num_fed - text.origin[at]

    def _let_go(self) -> None:
        text = self._text
        begin = min(self._begins, default=len(text.plain))
        keep = begin - guard_pii.BEFORE
        if keep > 0:
            self._begins = [one - keep for one in self._begins]
            self._text = guard_text.Folded(
                text.plain[keep:], text.low[keep:], text.origin[keep:]
            )


def _order(item: Any) -> tuple[str, int]:
    return item[0]


def _capped(spans: list[guard_verdict.Span]) -> tuple[guard_verdict.Span, ...]:
    """At most MAX_SPANS of each rule."""
    told: dict[str, int] = {}
    kept = []
    for span in spans:
        told[span.rule] = told.get(span.rule, 0) + 1
        if told[span.rule] <= MAX_SPANS:
            kept.append(span)
    return tuple(kept)


def _joined(old: guard_text.Folded, new: guard_text.Folded) -> guard_text.Folded:
    if not old.plain:
        return new
    origin = [*old.origin, *new.origin]
    return guard_text.Folded(old.plain + new.plain, old.low + new.low, origin)


class RuleChecker:
    """The checker of `guard.Guard` that asks rules."""

    name = "rules"

    def __init__(self, rules: Rules):
        self._rules = rules

    def prompt(self, messages: Any) -> guard_verdict.Finding:
        """Every text of every message."""
        found = []
        for i, _, text in guard_verdict.texts_of(messages):
            scan = Scan(self._rules.prompt, i)
            scan.feed(text, over=True)
            found.append(scan.finding(over=True))
        return guard_verdict.worst(found)

    def response(self, messages: Any, text: str) -> guard_verdict.Finding:
        """A whole answer; `messages` do not matter."""
        listener = self.stream(messages)
        return listener.end(text)

    def stream(self, messages: Any) -> "RuleListener":
        """An answer while it comes."""
        return RuleListener(self._rules)


class RuleListener:
    """Rules on one answer."""

    def __init__(self, rules: Rules):
        self._scan = Scan(rules.response, guard_verdict.RESPONSE)
        self._refusals = Scan((rules.refusals,), guard_verdict.RESPONSE)
        self._left, self._refuses = REFUSAL_LETTERS, False

    def push(self, text: str) -> guard_verdict.Finding:
        """See guard.Listener."""
        return self._step(text, over=False)

    def end(self, text: str = "") -> guard_verdict.Finding:
        """See guard.Listener; `text` is the last of the answer."""
        return self._step(text, over=True)

    def _step(self, text: str, over: bool) -> guard_verdict.Finding:
        self._scan.feed(text, over)
        if self._left > 0 and not self._refuses:
            begin = text[: self._left]
            self._left -= len(begin)
            ended = over or self._left == 0
            self._refusals.feed(begin, ended)
            self._refuses = bool(self._refusals.finding(ended).spans)
        found = self._scan.finding(over)
        return dataclasses.replace(found, refusal=True if self._refuses else None)


def load(path: str = "") -> Rules:
    """The rules of a file; with "" the built-in ones.

    Raises:
      config.InputError: see the module docstring.
    """
    file = pathlib.Path(path) if path else BUILT_IN
    held = json_files.read(file)
    try:
        return _rules(held)
    except config.InputError as error:
        raise config.InputError(f"rules {file}: {error}") from error


def _rules(held: Mapping[str, Any]) -> Rules:
    known = ("version", "phrases", "tokens", "detectors", "refusals")
    for key in held:
        if key not in known:
            raise config.InputError(f"unknown key {key!r}{config.nearest(key, known)}")
    if held.get("version", 1) != 1:
        raise config.InputError(f"version {held['version']!r}: wanted 1")
    phrases, tokens, detected = [], [], []
    for group in _groups(held, "phrases", ("phrases",)):
        rule = _rule(group)
        phrases += [_phrase(rule, text) for text in _strings(group, "phrases")]
    for group in _groups(held, "tokens", ("prefixes", "letters", "least", "most")):
        tokens += _tokens(_rule(group), group)
    for group in _groups(held, "detectors", ()):
        rule = _rule(group)
        if rule.name not in guard_pii.DETECTORS:
            hint = config.nearest(rule.name, guard_pii.DETECTORS)
            raise config.InputError(f"detector {rule.name!r}{hint}")
        detected.append((rule, guard_pii.DETECTORS[rule.name]))

    def matchers(wanted: Any) -> tuple[Matcher, ...]:
        made = [
            Phrases([p for p in phrases if wanted(p.rule)]),
            Tokens([t for t in tokens if wanted(t.rule)]),
        ]
        return (*made, *(Detected(r, d) for r, d in detected if wanted(r)))

    refusal = Rule("refusal", guard_verdict.NO_CATEGORY, guard_verdict.CONTROVERSIAL)
    texts = _strings(held, "refusals") if "refusals" in held else []
    return Rules(
        prompt=matchers(lambda rule: True),
        response=matchers(lambda rule: rule.category != guard_verdict.JAILBREAK),
        refusals=Phrases([_phrase(refusal, text) for text in texts]),
    )


def _groups(
    held: Mapping[str, Any], kind: str, more: tuple[str, ...]
) -> list[Mapping[str, Any]]:
    """The list of objects under a key, each with its keys and no others."""
    groups, wanted = held.get(kind, []), ("name", "category", "level", *more)
    if not isinstance(groups, list):
        raise config.InputError(f"{kind}: wanted a list")
    for i, group in enumerate(groups):
        if not isinstance(group, dict) or set(group) != set(wanted):
            raise config.InputError(
                f"{kind}[{i}]: wanted an object with {', '.join(wanted)}"
            )
    return groups


def _rule(group: Mapping[str, Any]) -> Rule:
    name, level = group["name"], group["level"]
    if not isinstance(name, str) or not re.fullmatch(r"\w{1,64}", name, re.ASCII):
        raise config.InputError(
            f"name {json_files.shown(name)}: wanted up to 64 letters, digits and _"
        )
    if level not in SCORES:
        raise config.InputError(
            f"rule {name}: level {json_files.shown(level)}: wanted unsafe or "
            "controversial"
        )
    return Rule(name, guard_verdict.category(group["category"], f"rule {name}"), level)


def _strings(group: Mapping[str, Any], key: str) -> list[str]:
    texts = group[key]
    if not isinstance(texts, list) or not all(
        isinstance(text, str) and 0 < len(text) <= MAX_PHRASE for text in texts
    ):
        raise config.InputError(
            f"{key}: wanted a list of texts of 1 to {MAX_PHRASE} letters"
        )
    return texts


def _phrase(rule: Rule, text: str) -> Phrase:
    first, gap, rest = (*_GAP.split(text, 1), "", "")[:3]
    first, rest = (guard_text.fold(part).low.strip() for part in (first, rest))
    if len(first) < 2 or bool(gap) != bool(rest) or _GAP.search(f" {rest} "):
        raise config.InputError(
            f"rule {rule.name}: phrase {text!r}: wanted at least 2 letters, and at "
            'most one gap such as " {3} ", between words'
        )
    if not gap:
        return Phrase(rule, first, None, 0, 0, len(first))
    most = int(gap)
    if not 1 <= most <= MAX_GAP:
        raise config.InputError(
            f"rule {rule.name}: phrase {text!r}: a gap of 1 to {MAX_GAP} words"
        )
    between = rf"(?: [^ ]{{1,{MAX_WORD}}}){{0,{most}}}? "
    ends = f"(?!{guard_text.WORD})" if guard_text.in_word(rest[-1]) else ""
    longest = len(first) + most * (MAX_WORD + 1) + 1 + len(rest)
    words = first.count(" ") + most + 2 + rest.count(" ")
    return Phrase(
        rule, first, re.compile(between + re.escape(rest) + ends), most, words, longest
    )


def _tokens(rule: Rule, group: Mapping[str, Any]) -> list[Token]:
    letters, least, most = (group[key] for key in ("letters", "least", "most"))
    if not isinstance(letters, str) or not _LETTERS.fullmatch(letters):
        raise config.InputError(
            f"rule {rule.name}: letters {json_files.shown(letters)}: wanted ranges and "
            "letters such as A-Za-z0-9_-"
        )
    numbers = all(type(n) is int for n in (least, most))
    if not numbers or not 1 <= least <= most <= MAX_RUN:
        raise config.InputError(
            f"rule {rule.name}: least {json_files.shown(least)} and most "
            f"{json_files.shown(most)}: wanted 1 <= least <= most <= {MAX_RUN}"
        )
    run = re.compile(f"[{letters}]{{0,{most + 1}}}")
    return [
        Token(rule, prefix, run, least, most) for prefix in _strings(group, "prefixes")
    ]
