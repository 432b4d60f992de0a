# SPDX-License-Identifier: Apache-2.0
"""Kinds of fields of a request: what is right, and the exact error for what is not.

A table {name: kind} says what an object may have; `read` turns the object into a dict
of values with every name of the table in it. A kind has `read(value, at)`, where `at`
is the field's place as errors name it ("messages[2].role").

Source of codes: OpenAI's (`invalid_type`, `integer_above_max_value`, ...).
Invariants: null is a field left out; an unknown name is an error with the nearest one.
Numbers are compared before they are converted, so none overflows.
Raises: errors.ApiError 400 with param and code.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Protocol

from qwen_jax.serve import errors


class Kind(Protocol):
    """What a field may hold."""

    def read(self, value: Any, at: str) -> Any:
        """The value; ApiError naming the place."""


@dataclasses.dataclass(frozen=True)
class Field:
    """A kind with what holds where the field is left out."""

    kind: Kind
    default: Any = None
    required: bool = False


Table = Mapping[str, Field]


def read(table: Table, given: Any, at: str = "") -> dict[str, Any]:
    """The values of an object, by the table.

    Args:
      table: what it may have.
      given: the object.
      at: its place, "" for the body itself.
    Raises:
      errors.ApiError: see the module docstring.
    """
    if not isinstance(given, dict):
        raise wrong_type(at or None, "an object", given)
    for name in given:
        if name not in table:
            place = dotted(at, name)
            raise errors.unknown(place[:200], name, table)
    values = {}
    for name, field in table.items():
        place, value = dotted(at, name), given.get(name)
        if value is not None:
            values[name] = field.kind.read(value, place)
        elif field.required:
            raise errors.invalid(
                place,
                "missing_required_parameter",
                f"Missing required parameter: {place}",
            )
        else:
            values[name] = field.default
    return values


def dotted(at: str, name: str) -> str:
    """The place of a name inside another place."""
    return f"{at}.{name}" if at else name


def wrong_type(at: str | None, wanted: str, value: Any) -> errors.ApiError:
    """Of another type than wanted."""
    kinds = {bool: "a boolean", int: "an integer", float: "a number", str: "a text"}
    kinds |= {list: "an array", dict: "an object", type(None): "null"}
    what = f"Invalid type for {at}" if at else "Invalid type"
    return errors.invalid(
        at, "invalid_type", f"{what}: wanted {wanted}, got {kinds[type(value)]}."
    )


def wrong_value(at: str, wanted: str, value: Any) -> errors.ApiError:
    """Of the right type, but not what may be."""
    said = f"Invalid value for {at}: {errors.quoted(value)}; wanted {wanted}."
    return errors.invalid(at, "invalid_value", said)


def _bound(at: str, what: str, side: str, limit: Any, value: Any) -> errors.ApiError:
    least = "at least" if side == "below_min" else "at most"
    said = f"Invalid {at}: {errors.quoted(value)}; wanted {least} {limit}."
    return errors.invalid(at, f"{what}_{side}_value", said)


@dataclasses.dataclass(frozen=True)
class Integer:
    """A whole number from low to high."""

    low: int
    high: int

    def read(self, value: Any, at: str) -> int:
        """See `Kind`."""
        if type(value) is not int:
            raise wrong_type(at, "an integer", value)
        if value < self.low:
            raise _bound(at, "integer", "below_min", self.low, value)
        if value > self.high:
            raise _bound(at, "integer", "above_max", self.high, value)
        return value


@dataclasses.dataclass(frozen=True)
class Decimal:
    """A number from low to high; low itself is too small with `above`."""

    low: float
    high: float
    above: bool = False

    def read(self, value: Any, at: str) -> float:
        """See `Kind`."""
        if type(value) not in (int, float):
            raise wrong_type(at, "a number", value)
        if isinstance(value, float) and not math.isfinite(value):
            raise wrong_value(at, "a finite number", str(value))
        if value < self.low or (self.above and value == self.low):
            limit = f"more than {self.low}" if self.above else self.low
            raise _bound(at, "decimal", "below_min", limit, value)
        if value > self.high:
            raise _bound(at, "decimal", "above_max", self.high, value)
        return float(value) or 0.0  # no -0.0


@dataclasses.dataclass(frozen=True)
class Flag:
    """True or false."""

    def read(self, value: Any, at: str) -> bool:
        """See `Kind`."""
        if type(value) is not bool:
            raise wrong_type(at, "a boolean", value)
        return value


@dataclasses.dataclass(frozen=True)
class Text:
    """A text of low to high letters, matching a pattern where there is one."""

    high: int
    low: int = 0
    pattern: re.Pattern | None = None

    def read(self, value: Any, at: str) -> str:
        """See `Kind`."""
        if not isinstance(value, str):
            raise wrong_type(at, "a text", value)
        if len(value) < self.low:
            raise wrong_value(at, f"at least {self.low} letters", value)
        if len(value) > self.high:
            said = f"Invalid {at}: {len(value):,} letters; wanted at most {self.high}."
            raise errors.invalid(at, "string_above_max_length", said)
        if self.pattern is not None and not self.pattern.fullmatch(value):
            raise wrong_value(at, f"what matches {self.pattern.pattern}", value)
        return value


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of some texts."""

    names: tuple[str, ...]

    def read(self, value: Any, at: str) -> str:
        """See `Kind`."""
        if not isinstance(value, str):
            raise wrong_type(at, "a text", value)
        if value not in self.names:
            raise wrong_value(at, " or ".join(self.names), value)
        return value


@dataclasses.dataclass(frozen=True)
class Only:
    """The one value for which nothing has to be done."""

    value: Any
    reason: str

    def read(self, value: Any, at: str) -> Any:
        """See `Kind`."""
        if type(value) is not type(self.value):
            wanted = "a boolean" if isinstance(self.value, bool) else "a text"
            wanted = "an array" if isinstance(self.value, list) else wanted
            raise wrong_type(at, wanted, value)
        if value != self.value:
            raise wrong_value(at, f"{errors.quoted(self.value)}: {self.reason}", value)
        return value


@dataclasses.dataclass(frozen=True)
class Unsupported:
    """A field of OpenAI's that this server does not have; saying so beats silence."""

    reason: str

    def read(self, value: Any, at: str) -> Any:
        """See `Kind`."""
        said = f"Unsupported parameter: {at}; {self.reason}."
        raise errors.invalid(at, "unsupported_parameter", said)


@dataclasses.dataclass(frozen=True)
class Listed:
    """A list of low to high values of one kind."""

    kind: Kind
    high: int
    low: int = 0

    def read(self, value: Any, at: str) -> list[Any]:
        """See `Kind`."""
        if not isinstance(value, list):
            raise wrong_type(at, "an array", value)
        if len(value) < self.low:
            said = f"Invalid {at}: empty; wanted at least {self.low}."
            raise errors.invalid(at, "empty_array", said)
        if len(value) > self.high:
            said = f"Invalid {at}: {len(value):,} items; wanted at most {self.high}."
            raise errors.invalid(at, "array_above_max_length", said)
        return [self.kind.read(one, f"{at}[{i}]") for i, one in enumerate(value)]


@dataclasses.dataclass(frozen=True)
class Object:
    """An object with the fields of a table."""

    table: Table

    def read(self, value: Any, at: str) -> dict[str, Any]:
        """See `Kind`."""
        return read(self.table, value, at)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """An object of texts under names of one's own."""

    pairs: int
    name_letters: int
    value_letters: int

    def read(self, value: Any, at: str) -> dict[str, str]:
        """See `Kind`."""
        if not isinstance(value, dict):
            raise wrong_type(at, "an object", value)
        if len(value) > self.pairs:
            said = f"Invalid {at}: {len(value):,} pairs; wanted at most {self.pairs}."
            raise errors.invalid(at, "object_above_max_properties", said)
        for name, text in value.items():
            Text(self.name_letters).read(name, at)
            Text(self.value_letters).read(text, f"{at}.{name}")
        return value


@dataclasses.dataclass(frozen=True)
class Anything:
    """JSON that is looked at elsewhere."""

    def read(self, value: Any, at: str) -> Any:
        """See `Kind`."""
        return value
