# SPDX-License-Identifier: Apache-2.0
"""Facts hidden in filler, and questions about them: for a test, and to learn from.

A fact says which value belongs to a key. `hide` puts one at a depth of a haystack,
other facts at random depths, and a question behind it; `write` makes documents full of
facts and questions, from which a small model learns to look things up.

Source: "needle in a haystack" (Kamradt, 2023). ENGLISH: the filler is that of the
passkey task (arXiv 2305.16300), facts and question those of RULER (arXiv 2404.06654,
appendix B), their values of seven digits. SYLLABLES: a language made up for models that
are trained in minutes, in which every word is one id of `vocabulary()`. Its facts say
their key behind the value again ("Ba ne Ba"): to predict that, a layer has to tell a
value which key stands before it, which is half of a look-up. A small model learnt
look-ups within 200 steps with it and was at 45 % after 300 without
(experiments/LOG.md).
Deviation from both: the haystack is cut to ids, so a length is exact, question and
answer within it; and there are no line breaks.

Shapes: haystacks and answers are lists of ids. Depth 0 is the begin, 1 the end.
Invariants: a key stands for one value; all is a function of the generator handed in.
Raises: config.InputError where a length does not hold what is asked for.
"""

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Sequence

import numpy as np

from qwen_jax import config
from qwen_jax.data import tokenizer


@dataclasses.dataclass(frozen=True)
class Language:
    """How haystacks are worded.

    fillers: sentences, in order again and again, or drawn where `shuffled`. keys: names
    of facts. values: for each part of a value the words it is drawn from. closing: what
    follows an answer in a lesson.
    """

    name: str
    fillers: tuple[str, ...]
    shuffled: bool
    keys: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]
    fact: str
    question: str
    answer: str
    opening: str = ""
    closing: str = ""


@dataclasses.dataclass(frozen=True)
class Needle:
    """A haystack with its question, [t] ids, and the ids that answer it."""

    prompt: list[int]
    answer: list[int]
    key: str


def _words(consonants: str, *, large: bool = False) -> tuple[str, ...]:
    made = [c + v for c in consonants for v in "aeiou"]
    return tuple(" " + (word.title() if large else word) for word in made)


ENGLISH = Language(
    name="english",
    opening=(
        "Some special magic numbers are hidden within the following text. Make sure to "
        "memorize them. I will quiz you about the numbers afterwards."
    ),
    fillers=(
        " The grass is green.",
        " The sky is blue.",
        " The sun is yellow.",
        " Here we go.",
        " There and back again.",
    ),
    shuffled=False,
    keys=(
        *("amber", "basil", "cedar", "delta", "ember", "fjord", "glade", "haven"),
        *("inlet", "jetty", "knoll", "larch", "maple", "nectar", "onyx", "pearl"),
        *("quartz", "river", "slate", "tulip", "umber", "violet", "willow", "zinc"),
    ),
    values=(tuple("123456789"), *[tuple("0123456789")] * 6),
    fact=" One of the special magic numbers for {key} is: {value}.",
    question=(
        " What is the special magic number for {key} mentioned in the provided text? "
        "The special magic number for {key} mentioned in the provided text is"
    ),
    answer=" {value}",
)
SYLLABLES = Language(
    name="syllables",
    fillers=_words("fhj"),
    shuffled=True,
    keys=_words("bdgkst", large=True),
    values=(_words("lmnp"),),
    fact="{key}{value}{key}",
    question=" ?{key}",
    answer="{value}",
    closing="{key}",
)
LANGUAGES = {one.name: one for one in (ENGLISH, SYLLABLES)}


def vocabulary() -> tokenizer.Tokenizer:
    """The vocabulary of SYLLABLES: bytes, one id for each of its words, specials."""
    words = [*SYLLABLES.fillers, *SYLLABLES.keys, " ?"]
    words += [word for part in SYLLABLES.values for word in part]
    return tokenizer.train([word for word in words for _ in range(4)], 1000)


def language_of(known: tokenizer.Tokenizer) -> Language:
    """SYLLABLES for a vocabulary in which each of its words is one id, else ENGLISH."""
    words = [*SYLLABLES.keys, *SYLLABLES.fillers]
    single = all(len(known.encode(word)) == 1 for word in words)
    return SYLLABLES if single else ENGLISH


class Writer:
    """Texts of one language as ids of one vocabulary; each text is encoded once."""

    def __init__(self, language: Language, known: tokenizer.Tokenizer):
        self.language, self.eos_id = language, known.eos_id
        self.encode = functools.cache(lambda text: tuple(known.encode(text)))
        self.fillers = [self.encode(text) for text in language.fillers]

    def _value(self, rng: np.random.Generator) -> str:
        parts = self.language.values
        return "".join(part[rng.integers(len(part))] for part in parts)

    def facts(
        self, count: int, rng: np.random.Generator
    ) -> tuple[list[tuple[str, str]], list[tuple[int, ...]]]:
        """((key, value) of so many facts with keys of their own, the ids they are told
        in)."""
        keys = self.language.keys
        pairs = [
            (keys[number], self._value(rng))
            for number in rng.permutation(len(keys))[:count]
        ]
        told = [self.language.fact.format(key=k, value=v) for k, v in pairs]
        return pairs, [self.encode(text) for text in told]

    def words(self, text: str, pair: tuple[str, str]) -> tuple[int, ...]:
        """Ids of a question or an answer on a fact."""
        return self.encode(text.format(key=pair[0], value=pair[1]))

    def laid(
        self,
        room: int,
        facts: Sequence[Sequence[int]],
        depths: Sequence[float],
        rng: np.random.Generator,
    ) -> list[int]:
        """`room` ids of filler with facts between sentences, near their depths."""
        chosen: list[Sequence[int]] = []
        if self.language.shuffled:
            order = iter(rng.integers(len(self.fillers), size=room).tolist())
        else:
            order = itertools.cycle(range(len(self.fillers)))
        left = room
        while left > 0:
            chosen.append(self.fillers[next(order)][:left])
            left -= len(chosen[-1])
        ends = np.cumsum([0, *map(len, chosen)])
        placed: dict[int, list[int]] = {}
        for fact, depth in zip(facts, depths, strict=True):
            place = int(np.abs(ends - depth * room).argmin())
            placed.setdefault(place, []).extend(fact)
        out: list[int] = []
        for i in range(len(ends)):
            out += placed.get(i, ())
            if i < len(chosen):
                out += chosen[i]
        return out

    def hide(
        self, *, length: int, depth: float, others: int, rng: np.random.Generator
    ) -> Needle:
        """A haystack of `length` ids, question and answer among them, that asks for the
        fact at `depth` and has `others` beside it at random depths.

        Raises:
          config.InputError: the length does not hold the facts; too few keys.
        """
        language = self.language
        if others >= len(language.keys):
            raise config.InputError(
                f"{others} other facts: {language.name!r} has {len(language.keys)} "
                f"keys, so wanted at most {len(language.keys) - 1}"
            )
        pairs, told = self.facts(others + 1, rng)
        question = self.words(language.question, pairs[0])
        answer = self.words(language.answer, pairs[0])
        opening = [self.eos_id, *self.encode(language.opening)]
        room = length - sum(map(len, (*told, question, answer, opening)))
        if room < 0:
            raise config.InputError(
                f"a length of {length} tokens does not hold {len(told)} facts and a "
                f"question in {language.name!r}: wanted at least {length - room}"
            )
        body = self.laid(room, told, [depth, *rng.random(others)], rng)
        return Needle([*opening, *body, *question], list(answer), pairs[0][0])

    def lesson(
        self, *, length: int, facts: int, rng: np.random.Generator
    ) -> tuple[list[int], int]:
        """(ids, how many of them are no targets): a haystack and a question about each
        of its facts in another order; with the end marks, `length` pairs."""
        language = self.language
        pairs, told = self.facts(facts, rng)
        asked: list[int] = []
        for number in rng.permutation(len(pairs)):
            for text in (language.question, language.answer, language.closing):
                asked += self.words(text, pairs[number])
        opening = self.encode(language.opening)
        room = length - 1 - sum(map(len, told)) - len(asked) - len(opening)
        if room < 0:
            raise config.InputError(
                f"a length of {length} tokens does not hold {len(told)} facts and as "
                f"many questions: wanted at least {length - room}"
            )
        body = [*opening, *self.laid(room, told, rng.random(len(told)), rng)]
        return body + asked, len(body)


def write(
    folder: str | os.PathLike,
    *,
    documents: int,
    lengths: Sequence[int],
    facts: int,
    seed: int,
) -> None:
    """A folder to train on: lessons.jsonl in SYLLABLES, and its tokenizer/.

    Lines are {"tokens", "prompt_tokens"}, as `data.source` reads ready ids, of each
    length in turn, with a fact for every eight tokens and at most `facts`: look-ups are
    learnt from the number of questions, so there are as many as there can be.
    """
    known = vocabulary()
    known.save(os.path.join(folder, "tokenizer"))
    writer, rng = Writer(SYLLABLES, known), np.random.default_rng(seed)
    with open(os.path.join(folder, "lessons.jsonl"), "w", encoding="utf-8") as file:
        for i in range(documents):
            length = lengths[i % len(lengths)]
            count = max(1, min(facts, len(SYLLABLES.keys), length // 8))
            ids, silent = writer.lesson(length=length, facts=count, rng=rng)
            file.write(json.dumps({"tokens": ids, "prompt_tokens": silent}) + "\n")
