# SPDX-License-Identifier: Apache-2.0
"""Text as rules and heads read it: folded, so that one word has one spelling.

Source: Unicode Standard Annex 15 (NFKC), taken of each code point on its own, so that
a text folds the same however it is cut; and a small table of look-alikes.
`Fold.feed` gives two forms of equal length. `plain` has compatibility forms replaced
(full-width letters, ligatures), every decimal digit as 0-9, dashes and quotes as - ' ",
each run of white space as one space, and no zero-width characters, combining marks or
controls. `low` is plain in lower case, without accents, look-alikes of Greek and
Cyrillic as Latin letters.
`pieces` cuts low text for a head: words in pieces of at most PIECE letters, characters
of Chinese, Japanese and Korean one by one, other marks one by one.

Units: code points; `Folded.origin[i]` is the place of plain[i] in the text as given.
Invariants: len(plain) == len(low) == len(origin); feeding a text in parts gives the
parts of what feeding it whole gives.
"""

import array
import dataclasses
import re
import unicodedata
from collections.abc import Sequence

PIECE = 8
MAX_KEPT = 30_000
_DASHES = "‐‑‒–—―−﹣－"
_QUOTES = {"‘’‛ʼ´`": "'", "“”„‟": '"'}
# Fillers that are shown as nothing and are no format characters.
_FILLERS = "ᅟᅠㅤﾠ⠀"
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
# One character of a word, as a class of a regular expression.
WORD = rf"[^\W{_CJK}]"
_IS_CJK = re.compile(f"[{_CJK}]")
_PIECES = re.compile(rf"[{_CJK}]|{WORD}{{1,{PIECE}}}|[^\w ]")


class _Kept(dict):
    """What `of` makes of a key, kept for the first MAX_KEPT that are met: a text with
    every code point there is must not fill the memory."""

    def __missing__(self, key):
        made = self.of(key)
        if len(self) < MAX_KEPT:
            self[key] = made
        return made


class _Plain(_Kept):
    """Code point -> its plain form."""

    def of(self, code: int) -> str:
        return self._of(chr(code))

    def _of(self, char: str) -> str:
        kind = unicodedata.category(char)
        if char.isspace() or kind in ("Zs", "Zl", "Zp"):
            return " "
        if kind in ("Cf", "Cc", "Mn", "Me") or char in _FILLERS:
            return ""
        if kind == "Nd":
            return str(unicodedata.decimal(char))
        if char in _DASHES:
            return "-"
        for quotes, quote in _QUOTES.items():
            if char in quotes:
                return quote
        whole = unicodedata.normalize("NFKC", char)
        return char if whole == char else "".join(map(self._of, whole))


class _Low(_Kept):
    """Code point of plain text -> one character of low text."""

    def of(self, code: int) -> str:
        char = chr(code).lower()
        char = char if len(char) == 1 else chr(code)
        base = [
            c
            for c in unicodedata.normalize("NFKD", char)
            if unicodedata.category(c) != "Mn"
        ]
        char = base[0] if len(base) == 1 else char
        return _ALIKES.get(char, char)


_ALIKES = {
    "а": "a", "ɑ": "a", "α": "a", "в": "b", "с": "c", "ϲ": "c", "ԁ": "d", "е": "e",
    "ε": "e", "ɡ": "g", "һ": "h", "і": "i", "ι": "i", "ı": "i", "ј": "j", "к": "k",
    "κ": "k", "ӏ": "l", "м": "m", "п": "n", "η": "n", "о": "o", "ο": "o", "σ": "o",
    "р": "p", "ρ": "p", "ԛ": "q", "г": "r", "ѕ": "s", "т": "t", "τ": "t", "υ": "u",
    "ν": "v", "ѵ": "v", "ԝ": "w", "х": "x", "χ": "x", "у": "y", "γ": "y",
}  # fmt: skip
_PLAIN, _LOW = _Plain(), _Low()


@dataclasses.dataclass(frozen=True)
class Folded:
    """See the module."""

    plain: str
    low: str
    origin: Sequence[int]


class Fold:
    """Folds a text that comes in parts."""

    def __init__(self):
        self._after_space, self.num_fed = False, 0

    def feed(self, text: str) -> Folded:
        """The folded form of one more part."""
        base, self.num_fed = self.num_fed, self.num_fed + len(text)
        plain = text.translate(_PLAIN)
        doubled = "  " in plain or (self._after_space and plain[:1] == " ")
        if text.isascii() and len(plain) == len(text) and not doubled:
            origin: Sequence[int] = range(base, base + len(text))
        else:
            plain, origin = self._slowly(text, base)
        self._after_space = plain[-1:] == " " if plain else self._after_space
        return Folded(plain, plain.translate(_LOW), origin)

    def _slowly(self, text: str, base: int) -> tuple[str, Sequence[int]]:
        """Letter by letter, each with its origin."""
        made, origin, after = [], array.array("q"), self._after_space
        for place, char in enumerate(text, base):
            for new in _PLAIN[ord(char)]:
                if new == " " and after:
                    continue
                after = new == " "
                made.append(new)
                origin.append(place)
        return "".join(made), origin


def fold(text: str) -> Folded:
    """A whole text."""
    return Fold().feed(text)


class _Words(_Kept):
    """Character -> whether it is one of words."""

    def of(self, char: str) -> bool:
        return (char.isalnum() or char == "_") and not _IS_CJK.match(char)


_WORDS = _Words()


def in_word(char: str) -> bool:
    """Whether a character joins its neighbours to a word (one of Chinese does not)."""
    return _WORDS[char]


def pieces(low: str, over: bool = True) -> tuple[list[tuple[int, int]], int]:
    """([(start, stop)] of the pieces of low text, where the rest begins).

    Unless it is `over`, a word at the end that may go on is left to the rest.
    """
    found = [match.span() for match in _PIECES.finditer(low)]
    if found and not over:
        start, stop = found[-1]
        if stop == len(low) and stop - start < PIECE and in_word(low[start]):
            return found[:-1], start
    return found, len(low)
