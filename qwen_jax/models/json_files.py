# SPDX-License-Identifier: Apache-2.0
"""JSON of a folder that a stranger made: bounded, and with one meaning.

`parse` and `read` take what the format allows and refuse what readers disagree about
or choke on: a key given twice (some take the first, some the last), NaN and Infinity,
numbers of thousands of digits, nesting without end, files far beyond their kind.

Formats: UTF-8 JSON whose outermost value is an object.
Units: bytes. Invariants: no more than `cap_bytes` of a file are ever in memory.
Raises: config.InputError naming the file, what is wrong with it and the fix.
"""

import json
import pathlib
import stat
from typing import Any, NoReturn

from qwen_jax import config

# An index of a model with 70,000 tensors takes 6 MB, a config.json some kB.
CAP_BYTES = 16_000_000


def read(path: pathlib.Path, cap_bytes: int = CAP_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      config.InputError: see the module docstring.
    """
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):  # a pipe would wait for a writer
            raise config.InputError(f"{path} is no regular file: wanted JSON")
        if facts.st_size > cap_bytes:
            raise config.InputError(
                f"{path} has {facts.st_size:,} bytes, more than the {cap_bytes:,} that "
                "such a file may have: it is not what its name says; copy it anew"
            )
        with path.open("rb") as file:
            data = file.read(cap_bytes + 1)
    except OSError as error:
        raise config.InputError(
            f"{path} cannot be read: {error.strerror or error}"
        ) from error
    return parse(data, str(path))


def parse(data: bytes, what: str) -> dict[str, Any]:
    """The object that UTF-8 JSON text holds; `what` names it in messages.

    Raises:
      config.InputError: see the module docstring.
    """
    try:
        found = json.loads(
            data.decode(), object_pairs_hook=_once, parse_constant=_no_constant
        )
    except RecursionError as error:
        raise config.InputError(f"{what} is nested too deeply to be read") from error
    except ValueError as error:  # no UTF-8, no JSON, a number of 5,000 digits, a twin
        raise config.InputError(f"{what} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise config.InputError(f"{what} holds no JSON object, which it should")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {shown(key)} is given twice")
        found[key] = value
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def shown(value: Any, longest: int = 80) -> str:
    """A value as a message shows it: on one line, and no longer than a line."""
    if isinstance(value, list):
        value = value[:longest]
    text = type(value).__name__ if isinstance(value, dict) else ascii(value)
    return text if len(text) <= longest else f"{text[:longest]}..."
