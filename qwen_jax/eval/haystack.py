# SPDX-License-Identifier: Apache-2.0
"""Facts hidden in filler, and questions about them: for a test, and to learn from.

A fact says which value belongs to a key. `hide` puts one at a depth of a haystack, other
facts at random depths, and a question behind it; `lesson` makes documents full of facts
and questions, from which a small model learns to look things up.

Source: "needle in a haystack" (Kamradt, 2023). ENGLISH: the filler is that of the
passkey task (arXiv 2305.16300), facts and question those of RULER (arXiv 2404.06654,
appendix B), their values of seven digits. SYLLABLES: a language made up for models that
are trained in minutes, in which every word is one id of `vocabulary()`.
Deviation from both: the haystack is cut to ids, so a length is exact: question and
answer are within it.

Shapes: haystacks and answers are lists of ids. Depth 0 is the begin, 1 the end.
Invariants: a key stands for one value; all is a function of the generator handed in.
Raises: config.InputError where a length does not hold what is asked for.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence

import numpy as np

from qwen_jax import config
from qwen_jax.data import tokenizer


@dataclasses.dataclass(frozen=True)
class Language:
    """How haystacks are worded.

    fillers: sentences, in order again and again, or drawn where `shuffled`. keys: names
    of facts. values: for each part of a value the words it is drawn from.
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
        "memorize them. I will quiz you about the numbers afterwards.\n"
    ),
    fillers=(
        "The grass is green.",
        " The sky is blue.",
        " The sun is yellow.",
        " Here we go.",
        " There and back again.\n",
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
        "\nWhat is the special magic number for {key} mentioned in the provided text? "
        "The special magic number for {key} mentioned in the provided text is"
    ),
    answer=" {value}",
)
SYLLABLES = Language(
    name="syllables",
    fillers=_words("bdfghjk"),
    shuffled=True,
    keys=_words("bcdfghjklmnprst", large=True),
    values=(_words("lmnp"), _words("rstv")),
    fact="{key}{value}",
    question=" ?{key}",
    answer="{value}",
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


def hide(
    language: Language,
    known: tokenizer.Tokenizer,
    *,
    length: int,
    depth: float,
    others: int,
    rng: np.random.Generator,
) -> Needle:
    """A haystack of `length` ids, question and answer among them, that asks for the
    fact at `depth` and has `others` beside it at random depths.

    Raises:
      config.InputError: the length does not hold the facts; there are too few keys.
    """
    if others + 1 > len(language.keys):
        raise config.InputError(
            f"{others} other facts: the language {language.name!r} has "
            f"{len(language.keys)} keys, so wanted at most {len(language.keys) - 1}"
        )
    keys = rng.permutation(language.keys)[: others + 1]
    values = [_value(language, rng) for _ in keys]
    facts = [known.encode(_fact(language, *pair)) for pair in zip(keys, values)]
    question = known.encode(language.question.format(key=keys[0]))
    answer = known.encode(language.answer.format(value=values[0]))
    opening = [known.eos_id, *known.encode(language.opening)]
    room = length - sum(map(len, (*facts, question, answer, opening)))
    if room < 0:
        raise config.InputError(
            f"a length of {length} tokens does not hold {len(facts)} facts and a "
            f"question in {language.name!r}: wanted at least {length - room}"
        )
    depths = [depth, *rng.random(others)]
    body = _laid(language, known, room, facts, depths, rng)
    return Needle([*opening, *body, *question], answer, str(keys[0]))


def lesson(
    language: Language,
    known: tokenizer.Tokenizer,
    *,
    length: int,
    facts: int,
    rng: np.random.Generator,
) -> tuple[list[int], int]:
    """(ids, how many of them are no targets): a haystack and a question about each of
    its facts, in another order; with the end marks a row has, `length` pairs."""
    keys = rng.permutation(language.keys)[:facts]
    pairs = [(key, _value(language, rng)) for key in keys]
    told = [known.encode(_fact(language, *pair)) for pair in pairs]
    asked = []
    for key, value in rng.permutation(pairs):
        asked += known.encode(language.question.format(key=key))
        asked += known.encode(language.answer.format(value=value))
    opening = known.encode(language.opening)
    room = length - 1 - sum(map(len, told)) - len(asked) - len(opening)
    if room < 0:
        raise config.InputError(
            f"a length of {length} tokens does not hold {facts} facts and as many "
            f"questions: wanted at least {length - room}"
        )
    body = opening + _laid(language, known, room, told, rng.random(len(told)), rng)
    return body + asked, len(body)


def lessons(
    language: Language,
    known: tokenizer.Tokenizer,
    *,
    documents: int,
    lengths: Sequence[int],
    facts: int,
    seed: int,
) -> Iterator[str]:
    """JSON lines of ready ids for `data.sources` with tokens_field="tokens"; each length
    in turn."""
    rng = np.random.default_rng(seed)
    for i in range(documents):
        length = lengths[i % len(lengths)]
        ids, silent = lesson(language, known, length=length, facts=facts, rng=rng)
        yield json.dumps({"tokens": ids, "prompt_tokens": silent}) + "\n"


def write(
    folder: str | os.PathLike,
    *,
    documents: int,
    lengths: Sequence[int],
    facts: int,
    seed: int,
) -> None:
    """A folder to train on: lessons.jsonl in SYLLABLES, and its tokenizer/."""
    known = vocabulary()
    known.save(os.path.join(folder, "tokenizer"))
    made = {"documents": documents, "lengths": lengths, "facts": facts, "seed": seed}
    with open(os.path.join(folder, "lessons.jsonl"), "w", encoding="utf-8") as file:
        file.writelines(lessons(SYLLABLES, known, **made))


def _value(language: Language, rng: np.random.Generator) -> str:
    return "".join(str(rng.choice(part)) for part in language.values)


def _fact(language: Language, key: str, value: str) -> str:
    return language.fact.format(key=key, value=value)


def _laid(language, known, room, facts, depths, rng) -> list[int]:
    """`room` ids of filler with facts between its sentences, nearest to their depths."""
    sentences = [known.encode(text) for text in language.fillers]
    chosen: list[list[int]] = []
    left = room
    while left > 0:
        number = rng.integers(len(sentences)) if language.shuffled else len(chosen)
        sentence = sentences[number % len(sentences)][:left]
        chosen.append(sentence)
        left -= len(sentence)
    ends = np.cumsum([0, *map(len, chosen)])
    places = [int(np.abs(ends - depth * room).argmin()) for depth in depths]
    out: list[int] = []
    for i in range(len(ends)):
        for fact, place in zip(facts, places, strict=True):
            if place == i:
                out += fact
        if i < len(chosen):
            out += chosen[i]
    return out
