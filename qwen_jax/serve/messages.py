# SPDX-License-Identifier: Apache-2.0
"""Messages and tools of a chat request -> what chat templates read.

Source: OpenAI's chat format, with `reasoning_content` (or `reasoning`) in assistants'
messages. Deviations: the role developer becomes system, the only name that templates
know; parts of text are joined where no image is among them; the arguments of earlier
tool calls, which come as text, are read, so that templates write them as they write new
ones. Images are data URIs (`pictures`); nothing is ever fetched.

Formats: `read` gives dicts for `data.chat`, in which an image is {"type": "image"}.
`Given.images` has the pictures in the order of their places.
Raises: errors.ApiError naming the place, such as messages[2].content[0].type.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

from qwen_jax.serve import errors, fields, pictures

MAX_MESSAGES = 10_000
MAX_TOOLS = 128
MAX_TEXT = 16 * 2**20  # letters; the limit of a body holds first
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
_ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXT = fields.Text(MAX_TEXT)
_NULL = fields.Unsupported("it is null in messages of this server")
_TABLE = {
    "role": fields.Field(fields.Choice(_ROLES), required=True),
    "content": fields.Field(fields.Anything()),
    "name": fields.Field(fields.Text(64, low=1)),
}
_CALL = {
    "id": fields.Field(fields.Text(256, low=1), required=True),
    "type": fields.Field(fields.Choice(("function",)), "function"),
    "index": fields.Field(fields.Integer(0, MAX_TOOLS)),
    "function": fields.Field(
        fields.Object(
            {
                "name": fields.Field(fields.Text(64, low=1), required=True),
                "arguments": fields.Field(_TEXT, "{}"),
            }
        ),
        required=True,
    ),
}
_OF_ROLE = {
    "assistant": {
        "tool_calls": fields.Field(
            fields.Listed(fields.Object(_CALL), MAX_TOOLS, low=1)
        ),
        "reasoning_content": fields.Field(_TEXT),
        "reasoning": fields.Field(_TEXT),
        "refusal": fields.Field(_TEXT),
        "annotations": fields.Field(fields.Only([], "this server gives none")),
        "audio": fields.Field(_NULL),
        "function_call": fields.Field(_NULL),
    },
    "tool": {
        "tool_call_id": fields.Field(fields.Text(256, low=1), required=True),
    },
}
_FUNCTION = {
    "name": fields.Field(fields.Text(64, low=1, pattern=NAME), required=True),
    "description": fields.Field(_TEXT),
    "parameters": fields.Field(fields.Anything()),
    "strict": fields.Field(fields.Flag()),
}
_TOOL = {
    "type": fields.Field(fields.Choice(("function",)), required=True),
    "function": fields.Field(fields.Object(_FUNCTION), required=True),
}


@dataclasses.dataclass(frozen=True)
class Given:
    """A conversation: messages for templates, and the images in it."""

    messages: list[dict[str, Any]]
    images: tuple[pictures.Picture, ...] = ()


class Messages:
    """The kind of the field `messages` (see `fields.Kind`)."""

    def read(self, value: Any, at: str) -> Given:
        """See the module docstring."""
        images: list[pictures.Picture] = []
        called: set[str] = set()
        listed = fields.Listed(fields.Anything(), MAX_MESSAGES, low=1)
        made = []
        for i, one in enumerate(listed.read(value, at)):
            place = f"{at}[{i}]"
            message = _message(one, place, images)
            called |= {call["id"] for call in message.get("tool_calls") or ()}
            if message["role"] == "tool" and message["tool_call_id"] not in called:
                said = "the id of a call in an assistant's message before it"
                raise fields.wrong_value(
                    f"{place}.tool_call_id", said, message["tool_call_id"]
                )
            made.append({k: v for k, v in message.items() if v is not None})
        pictures.check(images)
        return Given(made, tuple(images))


def _message(given: Any, at: str, images: list[pictures.Picture]) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise fields.wrong_type(at, "an object", given)
    role = given.get("role")
    more = _OF_ROLE.get(role, {}) if isinstance(role, str) else {}
    message = fields.read(_TABLE | more, given, at)
    calls = message.get("tool_calls")
    for i, call in enumerate(calls or ()):
        place = f"{at}.tool_calls[{i}].function.arguments"
        call["function"]["arguments"] = _arguments(call["function"], place)
        call.pop("index")
    if message["content"] is None and not calls:
        said = f"Invalid value for {at}.content: null; wanted a text or parts."
        raise errors.invalid(f"{at}.content", "invalid_value", said)
    if message["content"] is not None:
        message["content"] = _content(message["content"], f"{at}.content", role, images)
    for name in ("refusal", "annotations", "audio", "function_call"):
        said = message.pop(name, None)
        if name == "refusal" and said and not message["content"]:
            message["content"] = said
    if role == "developer":
        message["role"] = "system"
    reasoning = message.pop("reasoning", None)
    if reasoning and not message["reasoning_content"]:
        message["reasoning_content"] = reasoning
    return message


def _arguments(function: dict[str, Any], at: str) -> dict[str, Any]:
    """Arguments of an earlier call: the text that we gave, as an object again."""
    try:
        found = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise fields.wrong_value(at, "a JSON object as text", function["arguments"])
    return found


def _content(
    given: Any, at: str, role: str, images: list[pictures.Picture]
) -> str | list[dict[str, str]]:
    """A message's text; with images, its parts."""
    if not isinstance(given, list):
        return _TEXT.read(given, at)
    if not given:
        raise errors.invalid(at, "empty_array", f"Invalid {at}: empty.")
    parts, before = [], len(images)
    kinds: dict[str, Callable[[dict, str], str | None]] = {"text": _text_part}
    if role == "user":
        kinds["image_url"] = lambda part, at: images.append(_image_part(part, at))
    if role == "assistant":
        kinds["refusal"] = _refusal_part
    for i, part in enumerate(given):
        place = f"{at}[{i}]"
        if not isinstance(part, dict):
            raise fields.wrong_type(place, "an object", part)
        kind = fields.Choice(tuple(kinds)).read(part.get("type"), f"{place}.type")
        text = kinds[kind](part, place)
        shown = kind == "image_url"
        parts.append({"type": "image"} if shown else {"type": "text", "text": text})
    if len(images) > before:
        return parts
    return "".join(part["text"] for part in parts)


def _part(name: str, kind: fields.Kind) -> fields.Table:
    return {
        "type": fields.Field(fields.Anything()),
        name: fields.Field(kind, required=True),
    }


def _text_part(part: dict, at: str) -> str:
    return fields.read(_part("text", _TEXT), part, at)["text"]


def _refusal_part(part: dict, at: str) -> str:
    return fields.read(_part("refusal", _TEXT), part, at)["refusal"]


_IMAGE = {
    "url": fields.Field(_TEXT, required=True),
    "detail": fields.Field(fields.Choice(pictures.DETAILS), "auto"),
}


def _image_part(part: dict, at: str) -> pictures.Picture:
    found = fields.read(_part("image_url", fields.Object(_IMAGE)), part, at)
    shown = found["image_url"]
    return pictures.of_url(shown["url"], shown["detail"], at)


class Tools:
    """The kind of the field `tools`."""

    def read(self, value: Any, at: str) -> list[dict[str, Any]]:
        """Tools as they came, without nulls."""
        listed = fields.Listed(fields.Object(_TOOL), MAX_TOOLS, low=1)
        made, names = [], set()
        for i, tool in enumerate(listed.read(value, at)):
            function, place = tool["function"], f"{at}[{i}].function"
            if function["name"] in names:
                said = "a name that no other tool has"
                raise fields.wrong_value(f"{place}.name", said, function["name"])
            names.add(function["name"])
            parameters = function["parameters"]
            if parameters is not None and not isinstance(parameters, dict):
                raise fields.wrong_type(f"{place}.parameters", "an object", parameters)
            kept = {k: v for k, v in function.items() if v is not None}
            kept.setdefault("parameters", NO_PARAMETERS)  # templates look at them
            made.append({"type": "function", "function": kept})
        return made


class ToolChoice:
    """The kind of the field `tool_choice`: none, auto, required or a tool's name."""

    _MODES = fields.Choice(("none", "auto", "required"))
    _NAMED = fields.Object(
        {
            "type": fields.Field(fields.Choice(("function",)), required=True),
            "function": fields.Field(
                fields.Object({"name": fields.Field(fields.Text(64), required=True)}),
                required=True,
            ),
        }
    )

    def read(self, value: Any, at: str) -> str | tuple[str]:
        """The mode, or (name,)."""
        if isinstance(value, dict):
            return (self._NAMED.read(value, at)["function"]["name"],)
        return self._MODES.read(value, at)
