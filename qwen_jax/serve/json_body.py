# SPDX-License-Identifier: Apache-2.0
"""The JSON of a request that a stranger sent: bounded, with one meaning.

Besides what `models.json_files` refuses (a key given twice, numbers of thousands of
digits): more than MAX_DEPTH levels, more than MAX_NODES values, half surrogate pairs,
the letter NUL, numbers that are not finite below the top level. NaN, Infinity and 1e999
as a field's own value are left to the field's check, which knows its name.

Formats: UTF-8 JSON whose outermost value is an object.
Invariants: values are counted before they are made, so the bytes of a body bound the
memory.
Raises: errors.ApiError 400 invalid_json.
"""

import json
import math
import re
from typing import Any

from qwen_jax.serve import errors

MAX_DEPTH = 32
MAX_NODES = 250_000
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_BAD = re.compile("[\x00\ud800-\udfff]")


def parse(data: bytes) -> dict[str, Any]:
    """The object of a body.

    Raises:
      errors.ApiError: see the module docstring.
    """
    if not data.strip():
        raise _refused("The body is empty: wanted a JSON object.")
    if _commas(data) > MAX_NODES and _commas(_STRING.sub(b"", data)) > MAX_NODES:
        raise _refused(f"The body has more than {MAX_NODES:,} values.")
    try:
        found = json.loads(data.decode(), object_pairs_hook=_once)
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError:
        raise _refused("The body is not UTF-8 text.") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise _refused(f"The body is not JSON: {error.msg} at {where}.") from None
    except ValueError:
        raise _refused("The body has a number of thousands of digits.") from None
    if not isinstance(found, dict):
        raise _refused("The body is JSON, but no object.")
    _check(found)
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twin = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise _refused(
            f"The body has the key {errors.quoted(twin)} twice in an object."
        )
    return found


def _commas(data: bytes) -> int:
    """An upper bound of the values, except the one outside."""
    return data.count(b",") + data.count(b"[") + data.count(b"{")


def _check(found: dict[str, Any]) -> None:
    """Refuse what JSON allows and a request may not have."""
    level, nodes = list(found.items()), 1
    for depth in range(1, MAX_DEPTH + 2):
        if not level:
            return
        if depth > MAX_DEPTH:
            break
        nodes += len(level)
        if nodes > MAX_NODES:
            raise _refused(f"The body has more than {MAX_NODES:,} values.")
        below: list[tuple[str, Any]] = []
        for key, value in level:
            _check_text(key)
            if isinstance(value, str):
                _check_text(value)
            elif isinstance(value, dict):
                below += value.items()
            elif isinstance(value, list):
                below += [("", one) for one in value]
            elif depth > 1 and isinstance(value, float) and not math.isfinite(value):
                raise _refused("The body has a number that is not finite.")
        level = below
    raise _too_deep()


def _check_text(text: str) -> None:
    if not text.isascii() or "\x00" in text:
        if _BAD.search(text):
            raise _refused("A text of the body has NUL or half a surrogate pair.")


def _too_deep() -> errors.ApiError:
    return _refused(f"The body is nested more than {MAX_DEPTH} levels deep.")


def _refused(message: str) -> errors.ApiError:
    return errors.invalid(None, "invalid_json", message)
