# SPDX-License-Identifier: Apache-2.0
"""JSON schemas of strangers: what is refused before a compiler sees them.

The compiler of grammars (llguidance) is bounded by fuel and has no backtracking, so
what is caught here is what would be accepted and could never be answered, or would take
long: references that lead back to themselves or out of the schema, counts beyond any
context, patterns and lists of megabytes.

Units: levels of nested JSON, bytes of the schema as JSON.
Raises: config.InputError saying what; the caller knows the field.
"""

import json
from collections.abc import Iterator
from typing import Any

from qwen_jax import config
from qwen_jax.models import json_files

MAX_BYTES = 128 * 1024
MAX_DEPTH = 20
MAX_PATTERN = 1000
MAX_ENUM = 5000
MAX_COUNT = 65_536
_COUNTS = ("minItems", "minLength", "minProperties")
_SAME = ("allOf", "anyOf", "oneOf")  # answers to these are answers to the schema


def check(schema: Any) -> str:
    """The schema as JSON text, its keys in the order given.

    Raises:
      config.InputError: see the module docstring.
    """
    text = json.dumps(schema, ensure_ascii=False)
    if len(text.encode()) > MAX_BYTES:
        raise config.InputError(f"it has more than {MAX_BYTES:,} bytes")
    for node, depth in _nodes(schema):
        if depth > MAX_DEPTH:
            raise config.InputError(f"it is nested more than {MAX_DEPTH} levels deep")
        if isinstance(node, dict):
            _check_node(node, schema)
    return text


def _nodes(schema: Any) -> Iterator[tuple[Any, int]]:
    """Every value in the schema and its level."""
    left = [(schema, 1)]
    while left:
        node, depth = left.pop()
        yield node, depth
        inner = node.values() if isinstance(node, dict) else node
        if isinstance(node, dict | list):
            left += [(one, depth + 1) for one in inner]


def _check_node(node: dict[str, Any], root: Any) -> None:
    pattern, listed = node.get("pattern"), node.get("enum")
    if isinstance(pattern, str) and len(pattern) > MAX_PATTERN:
        raise config.InputError(f"a pattern has more than {MAX_PATTERN:,} letters")
    if isinstance(listed, list) and len(listed) > MAX_ENUM:
        raise config.InputError(f"an enum has more than {MAX_ENUM:,} values")
    for name in _COUNTS:
        count = node.get(name)
        if isinstance(count, int | float) and count > MAX_COUNT:
            raise config.InputError(f"{name} is more than {MAX_COUNT:,}")
    if isinstance(node.get("$ref"), str):
        _follow(node, root)


def _follow(node: dict[str, Any], root: Any) -> None:
    """Refuse references that come back without anything in between."""
    left, met = [node], []
    while left:
        node = left.pop()
        if any(node is one for one in met):
            raise config.InputError("a $ref leads back to itself")
        met.append(node)
        reference = node.get("$ref")
        if isinstance(reference, str):
            left.append(target(root, reference))
        for name in _SAME:
            listed = node.get(name)
            left += [one for one in listed or () if isinstance(one, dict)]


def target(root: Any, reference: str) -> dict[str, Any]:
    """What a reference inside the schema stands for.

    Raises:
      config.InputError: outside of it, or nothing.
    """
    shown = json_files.shown(reference)
    if not reference.startswith("#"):
        raise config.InputError(f"$ref {shown}: wanted one that begins with #")
    node = root
    for part in reference[1:].split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict) and part in node:
            node = node[part]
        else:
            raise config.InputError(f"$ref {shown} leads nowhere")
    if not isinstance(node, dict):
        raise config.InputError(f"$ref {shown} leads to no schema")
    return node
