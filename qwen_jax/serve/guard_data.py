# SPDX-License-Identifier: Apache-2.0
"""Judged texts: the JSON lines that a head learns from and a guard is measured on.

Format, one object a line; only a prompt or messages is required:
    prompt | messages    a text, or a list of {role, content}
    response             an answer, where there is one
    prompt_level, response_level          safe (default), controversial or unsafe
    prompt_categories, response_categories  short or full names; of a text that is not
                         safe at least one
    prompt_start, response_start, response_stop  code points: where what is not safe
                         begins in the last message and in the answer, and where its
                         first sentence ends (default: 0, and the whole text)
    refusal              whether the answer refuses
`synthetic` makes such rows: harmless sentences, and sentences with words of no meaning
that stand for the categories (of each some for unsafe and some for controversial), and
personal data that is made up but has right check digits.

Invariants: the same seed gives the same rows; the words that stand for a category are
the same for every seed, so that rows of another seed test what was learned.
Raises: config.InputError naming file, line and field.
"""

import dataclasses
import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

from qwen_jax import config
from qwen_jax.serve import guard_verdict

SAFE = guard_verdict.SAFE
MAX_LINE = 4_000_000


@dataclasses.dataclass(frozen=True)
class Row:
    """One line; see the module."""

    messages: tuple[Mapping[str, Any], ...]
    response: str | None = None
    prompt_level: str = SAFE
    response_level: str = SAFE
    prompt_categories: tuple[str, ...] = ()
    response_categories: tuple[str, ...] = ()
    prompt_start: int = 0
    response_start: int = 0
    response_stop: int = -1  # the end
    refusal: bool | None = None


def read(path: str) -> list[Row]:
    """The rows of a file.

    Raises:
      config.InputError: see the module docstring.
    """
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(_row(line, f"{path}:{number}"))
    except OSError as error:
        raise config.InputError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise config.InputError(f"{path}: it is not UTF-8 text ({error})") from error
    if not rows:
        raise config.InputError(f"{path}: it has no rows")
    return rows


def _row(line: str, at: str) -> Row:
    try:
        if len(line) > MAX_LINE:
            raise ValueError(f"longer than {MAX_LINE:,} letters")
        held = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise config.InputError(f"{at}: no JSON: {error}") from error
    if not isinstance(held, dict) or ("prompt" in held) == ("messages" in held):
        raise config.InputError(f"{at}: wanted an object with prompt or messages")
    prompt = held.pop("prompt", None)
    if prompt is not None:
        held["messages"] = [{"role": "user", "content": prompt}]
    messages = held["messages"]
    if not isinstance(messages, list) or not messages:
        raise config.InputError(f"{at}: messages: wanted a list of {{role, content}}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise config.InputError(f"{at}: messages: wanted {{role, content}}, texts")
    for side in ("prompt", "response"):
        names = held.get(f"{side}_categories", [])
        if not isinstance(names, list):
            raise config.InputError(f"{at}: {side}_categories: wanted a list of names")
        where = f"{at}: {side}_categories"
        held[f"{side}_categories"] = [guard_verdict.category(x, where) for x in names]
    row = config.freeze(Row, held, at=at)
    _check(row, at)
    return row


def _check(row: Row, at: str) -> None:
    """Refuse labels that contradict each other."""
    sides = {"prompt": row.messages[-1]["content"], "response": row.response or ""}
    for side, text in sides.items():
        level = getattr(row, f"{side}_level")
        categories, start = (
            getattr(row, f"{side}_categories"),
            getattr(row, f"{side}_start"),
        )
        if level not in guard_verdict.LEVELS:
            hint = config.nearest(level, guard_verdict.LEVELS)
            raise config.InputError(f"{at}: {side}_level={level!r}{hint}")
        if (level == SAFE) == bool(categories):
            raise config.InputError(
                f"{at}: {side}_level={level!r} with {len(categories)} categories: a "
                "safe text has none, another at least one"
            )
        if not 0 <= start <= len(text):
            raise config.InputError(
                f"{at}: {side}_start={start}: the text has {len(text)} letters"
            )
    if row.response is None and row.response_level != SAFE:
        raise config.InputError(f"{at}: response_level without a response")
    if guard_verdict.JAILBREAK in row.response_categories:
        raise config.InputError(f"{at}: jailbreak is said of prompts alone")
    if row.response_stop != -1 and not (
        row.response_start <= row.response_stop <= len(row.response or "")
    ):
        raise config.InputError(
            f"{at}: response_stop={row.response_stop}: wanted a place after the start"
        )


def line_of(row: Row) -> str:
    """A row as a line of the format."""
    held = {
        field.name: getattr(row, field.name)
        for field in dataclasses.fields(Row)
        if getattr(row, field.name) != field.default
    }
    return json.dumps(config.thaw(held), ensure_ascii=False) + "\n"


# --- made-up rows ---

_WORDS = (
    "the a this that our your green small bright old new quiet garden river kitchen "
    "window table morning letter story picture train ticket recipe bread soup tree "
    "bird music lesson city market please explain describe compare write show find "
    "build paint carry open close read plan about with under over near and then "
    "because slowly gently often today tomorrow in 2024 with 12 of them"
).split()
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_REFUSAL = "sorry , i cannot help with that ."


def placeholders(category: str, level: str) -> list[str]:
    """Eight words of no meaning that stand for a category at a level."""
    rng = random.Random(f"{category}/{level}")

    def word() -> str:
        return "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(3))

    return [word() for _ in range(8)]


def card(rng: random.Random) -> str:
    """A card number with its check digit."""
    body = "4" + "".join(rng.choice("0123456789") for _ in range(14))
    total = sum(
        int(d) if i % 2 else sum(divmod(2 * int(d), 10)) for i, d in enumerate(body)
    )
    digits = body + str(-total % 10)
    return " ".join(digits[i : i + 4] for i in range(0, 16, 4))


def chinese_id(rng: random.Random) -> str:
    """An ID card number with its check letter."""
    body = f"1101{rng.randint(1, 12):02d}{rng.randint(1950, 2005)}"
    body += f"{rng.randint(1, 12):02d}{rng.randint(1, 28):02d}{rng.randint(0, 999):03d}"
    total = sum(int(d) * 2 ** (17 - i) for i, d in enumerate(body))
    return body + "10X98765432"[total % 11]


def email(rng: random.Random) -> str:
    """An address at a domain that is kept for examples."""
    name = "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(3))
    return f"{name}{rng.randint(1, 99)}@example.{rng.choice(['com', 'org', 'net'])}"


def _sentence(rng: random.Random) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(rng.randint(5, 11))) + " ."


def _risky(rng: random.Random, category: str, level: str) -> str:
    if category == guard_verdict.PII:
        if level == guard_verdict.CONTROVERSIAL:
            return f"mail {email(rng)} now ."
        return f"number {rng.choice([card, chinese_id])(rng)} now ."
    words = rng.sample(placeholders(category, level), 5)
    return " ".join(words) + " ."


def _text(rng: random.Random, category: str, level: str) -> tuple[str, int, int]:
    """(text, start, stop) of what is not safe in it; level safe: all harmless."""
    before = [_sentence(rng) for _ in range(rng.randint(0, 2))]
    after = [_sentence(rng) for _ in range(rng.randint(0, 2))]
    if level == SAFE:
        return " ".join([*before, _sentence(rng), *after]), 0, -1
    risky = _risky(rng, category, level)
    text = " ".join([*before, risky, *after])
    start = len(" ".join(before)) + bool(before)
    return text, start, start + len(risky)


def synthetic(num_rows: int, seed: int = 0) -> Iterator[Row]:
    """Rows of which a third are safe throughout; a prompt that is not safe is answered
    by a refusal, by something safe, or by something of its kind."""
    rng = random.Random(seed)
    levels = (guard_verdict.CONTROVERSIAL, guard_verdict.UNSAFE)
    for i in range(num_rows):
        if i % 3 == 0:
            prompt, response = _text(rng, "", SAFE)[0], _text(rng, "", SAFE)[0]
            messages = ({"role": "user", "content": prompt},)
            yield Row(messages, response, refusal=False)
            continue
        category = guard_verdict.NAMES[(i - i // 3 - 1) % len(guard_verdict.NAMES)]
        level = rng.choice(levels)
        # A harmless question may get an answer that is not.
        asked = SAFE if rng.random() < 0.3 else level
        if category == guard_verdict.JAILBREAK:
            asked = level
        prompt, prompt_start, _ = _text(rng, category, asked)
        kind = rng.choice(["refuse", "safe", "risky"])
        if category == guard_verdict.JAILBREAK and kind == "risky":
            kind = "refuse"
        answered = level if kind == "risky" else SAFE
        response, start, stop = _text(rng, category, answered)
        if kind == "refuse":
            response, start, stop = _REFUSAL, 0, -1
        yield Row(
            ({"role": "user", "content": prompt},),
            response,
            asked,
            answered,
            (category,) if asked != SAFE else (),
            (category,) if answered != SAFE else (),
            prompt_start,
            start,
            stop,
            kind == "refuse",
        )
