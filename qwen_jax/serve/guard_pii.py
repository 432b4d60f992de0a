# SPDX-License-Identifier: Apache-2.0
"""Personal data and secrets that have a form: where they begin, and whether they are.

Sources: ISO/IEC 7812-1 (Luhn), GB 11643-1999 (Chinese ID cards: ISO 7064 MOD 11-2),
ISO 13616 (IBAN: MOD 97-10), E.164, RFC 7519 (JWT), the US Social Security
Administration's rules on numbers never issued.
A `Detector` has a pattern for the first letters and a function for the rest, which
looks at no more than `longest` letters. Text is plain text of `guard_text`: digits are
0-9 and white space is one space.

Deviations: payment cards need a prefix of a known issuer and one of the usual
groupings; IPv4 and IPv6 only global addresses, which may point at a person.
Invariants: whether something begins at a place depends on BEFORE letters before it, on
`longest` letters from it, and on MARGIN after them; and on nothing beyond the first
letter that `other` matches.
"""

import base64
import binascii
import dataclasses
import datetime
import ipaddress
import json
import re
from collections.abc import Callable

BEFORE, MARGIN = 2, 2  # letters before and beyond a find that are looked at

# Letters and digits of an IBAN, by country.
IBAN_LENGTH = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22,
    "BH": 22, "BR": 29, "BY": 28, "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22,
    "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18, "FO": 18, "FR": 27,
    "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28,
    "IE": 22, "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20,
    "LB": 28, "LI": 21, "LT": 20, "LU": 20, "LV": 21, "MC": 27, "MD": 24, "ME": 22,
    "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18, "NO": 15, "PK": 24, "PL": 28,
    "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SE": 24, "SI": 19,
    "SK": 24, "SM": 27, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "XK": 20,
}  # fmt: skip
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_ID_CHECKS = "10X98765432"
_DOUBLED = {str(d): sum(divmod(2 * d, 10)) for d in range(10)}


@dataclasses.dataclass(frozen=True)
class Detector:
    """begins: the first letter, where it may stand; starts: the first `width` letters;
    find(text, start): where it stops, or 0 for no find; other: any letter that is not
    of its alphabet."""

    begins: re.Pattern
    starts: re.Pattern
    width: int
    find: Callable[[str, int], int]
    longest: int
    other: re.Pattern


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of those before it."""
    doubled = sum(_DOUBLED[d] for d in digits[-2::-2])
    return (doubled + sum(map(int, digits[::-2]))) % 10 == 0


def chinese_id(number: str) -> bool:
    """Whether 17 digits with a date of birth end in their check letter."""
    try:
        born = datetime.date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    total = sum(w * int(d) for w, d in zip(_ID_WEIGHTS, number[:17], strict=True))
    return born.year >= 1850 and _ID_CHECKS[total % 11] == number[17].upper()


def iban(number: str) -> bool:
    """Whether an IBAN without spaces has its country's length and check digits."""
    number = number.upper()
    if IBAN_LENGTH.get(number[:2]) != len(number):
        return False
    digits = "".join(str(int(c, 36)) for c in number[4:] + number[:4])
    return int(digits) % 97 == 1


def _issued(digits: str) -> bool:
    """Whether a card number begins and is as long as those of a large issuer."""
    two, four, length = int(digits[:2]), int(digits[:4]), len(digits)
    if digits[0] == "4":
        return length in (13, 16, 19)
    if 51 <= two <= 55 or 2221 <= four <= 2720:
        return length == 16
    if two in (34, 37):
        return length == 15
    if two in (36, 38, 39) or 3000 <= four <= 3059:
        return length == 14
    if two == 62:
        return 16 <= length <= 19
    return (four == 6011 or two in (64, 65) or 3528 <= four <= 3589) and length >= 16


_CARD = re.compile(
    r"(?:\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{3})?"
    r"|3\d{3}([ -])\d{6}\2\d{4,5}|\d{13,19})(?!\d)",
    re.ASCII,
)
_CARD_16 = re.compile(r"\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?!\d)", re.ASCII)


def _card(text: str, start: int) -> int:
    for pattern in (_CARD, _CARD_16):  # three digits behind sixteen may be others
        found = pattern.match(text, start)
        if found:
            digits = found[0].replace(" ", "").replace("-", "")
            if _issued(digits) and luhn(digits):
                return found.end()
    return 0


def _iban(text: str, start: int) -> int:
    length = IBAN_LENGTH.get(text[start : start + 2].upper())
    if length is None:
        return 0
    taken, place = [], start
    while len(taken) < length and place < len(text):
        if text[place] == " " and text[place - 1] != " ":
            place += 1
            continue
        if not (text[place].isascii() and text[place].isalnum()):
            return 0
        taken.append(text[place])
        place += 1
    after = text[place : place + 1]
    if len(taken) < length or (after.isascii() and after.isalnum()):
        return 0
    return place if iban("".join(taken)) else 0


def _global(kind: type) -> Callable[[str], bool]:
    def check(text: str) -> bool:
        try:
            return kind(text).is_global
        except ValueError:
            return False

    return check


def _header(token: str) -> bool:
    """Whether a JWT's first part is a JSON object that names an algorithm."""
    head = token.partition(".")[0]
    try:
        held = json.loads(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))
    except (ValueError, binascii.Error, RecursionError):
        return False
    return isinstance(held, dict) and "alg" in held


def _whole(pattern: str, check: Callable[[str], bool] = bool):
    """A find by one pattern and a check of what it matched."""
    compiled = re.compile(pattern, re.ASCII)

    def find(text: str, start: int) -> int:
        found = compiled.match(text, start)
        return found.end() if found and check(found[0]) else 0

    return find


def _detector(
    before: str, first: str, more: str, width: int, find: Callable, longest: int,
    letters: str, *, no_fraction: bool = False,
) -> Detector:  # fmt: skip
    """before: letters that may not stand before `first`; more: what follows it;
    letters: the alphabet; no_fraction: digits as of 0.186 or =.186 are none."""
    behind = r"(?!(?<=[\d =,(\[]\.)\d)" if no_fraction else ""
    begins = f"(?<![{before}]){behind}{first}"
    return Detector(
        re.compile(begins, re.ASCII),
        re.compile(begins + more, re.ASCII),
        width,
        find,
        longest,
        re.compile(f"[^{letters}]"),
    )


def _few_digits(text: str) -> bool:
    return 8 <= sum(map(str.isdigit, text)) <= 15


_ALNUM = "A-Za-z0-9"
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
DETECTORS = {
    "email": _detector(
        f"{_ALNUM}._%+-",
        f"[{_ALNUM}_]",
        "",
        1,
        _whole(
            rf"[{_ALNUM}_][{_ALNUM}._%+-]{{0,63}}@(?:[{_ALNUM}-]{{1,63}}\.){{1,6}}"
            rf"[A-Za-z]{{2,24}}(?![{_ALNUM}-])"
        ),
        1 + 63 + 1 + 6 * 64 + 24,
        f"{_ALNUM}._%+@-",
    ),
    "chinese_mobile": _detector(
        r"\d+",
        r"[+81]",
        r"(?:(?<=\+)86|(?<=8)6|(?<=1)[3-9])",
        3,
        _whole(r"(?:\+?86[ -]?)?1[3-9]\d[ -]?\d{4}[ -]?\d{4}(?!\d)"),
        17,
        "0-9+ -",
        no_fraction=True,
    ),
    "phone": _detector(
        r"\w+",
        r"\+",
        "[1-9]",
        2,
        _whole(r"\+[1-9](?:[ .()-]{0,2}\d){7,14}(?!\d)", _few_digits),
        44,
        "0-9+ .()-",
    ),
    "us_phone": _detector(
        r"\d.+-",
        "[(2-9]",
        r"(?:(?<=\()[2-9])?\d\d",
        4,
        _whole(r"(?:\([2-9]\d\d\) ?|[2-9]\d\d[-. ])[2-9]\d\d[-. ]\d{4}(?!\d|-\d)"),
        14,
        "0-9 .()-",
    ),
    "chinese_id": _detector(
        r"\dA-Za-z",
        "[1-9]",
        r"\d{5}",
        6,
        _whole(r"[1-9]\d{16}[\dXx](?![\dA-Za-z])", chinese_id),
        18,
        "0-9A-Za-z",
        no_fraction=True,
    ),
    "us_ssn": _detector(
        r"\d-",
        "[0-8]",
        r"\d\d-",
        4,
        _whole(r"(?!000|666)[0-8]\d\d-(?!00)\d\d-(?!0000)\d{4}(?!\d|-\d)"),
        11,
        "0-9-",
    ),
    "card": _detector(
        r"\d", "[2-6]", r"\d{3}", 4, _card, 23, "0-9 -", no_fraction=True
    ),
    "iban": _detector(_ALNUM, "[A-Za-z]", r"[A-Za-z]\d\d", 4, _iban, 66, f"{_ALNUM} "),
    "ipv4": _detector(
        r"\w.",
        r"\d",
        r"\d{0,2}\.",
        4,
        _whole(
            rf"{_OCTET}(?:\.{_OCTET}){{3}}(?!\w|\.\d)", _global(ipaddress.IPv4Address)
        ),
        15,
        "0-9.",
    ),
    "ipv6": _detector(
        r"\w:.",
        "[23]",
        "[0-9A-Fa-f]{3}:",
        5,
        _whole(
            r"[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}(?![\w:])",
            _global(ipaddress.IPv6Address),
        ),
        39,
        "0-9A-Fa-f:",
    ),
    "jwt": _detector(
        f"{_ALNUM}_-",
        "e",
        "yJ",
        3,
        _whole(
            rf"eyJ[{_ALNUM}_-]{{5,1000}}\.[{_ALNUM}_-]{{4,2000}}\."
            rf"[{_ALNUM}_-]{{16,1000}}(?![{_ALNUM}_-])",
            _header,
        ),
        4005,
        f"{_ALNUM}_.-",
    ),
}
