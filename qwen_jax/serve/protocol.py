# SPDX-License-Identifier: Apache-2.0
"""Bodies of requests -> checked records, one table of fields for each route.

Source: OpenAI's interface; from vLLM's, top_k, min_p, repetition_penalty, ignore_eos,
stop_token_ids, cache_salt and chat_template_kwargs. A field of OpenAI's that asks for
what this server does not do is refused (`Unsupported`, `Only`); one that only labels a
request (user, metadata) is checked and has no effect; any other name is an error.

Units: max_tokens in tokens. Invariants: a record can be answered as far as can be known
without the model; what needs the model is checked in chat_api and completions_api.
Raises: errors.ApiError naming the field.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qwen_jax.data import chat
from qwen_jax.serve import errors, fields, messages
from qwen_jax.serve import request as request_lib

MAX_N = 16
MAX_STOPS, MAX_STOP_LETTERS = 4, 256
MAX_COUNT = 2**31 - 1
MAX_BIASES = 2048
MAX_INPUTS = 2048
FORMAT_AT = "response_format.json_schema.schema"
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
SAMPLING += ("presence_penalty", "frequency_penalty")

_Field = fields.Field
_LABEL = _Field(fields.Text(512))
_ID = fields.Integer(0, MAX_COUNT)


class _Stop:
    """Texts that end an answer: one, or a list of up to four."""

    def read(self, value: Any, at: str) -> tuple[str, ...]:
        value = value if isinstance(value, list) else [value]
        found = fields.Listed(fields.Anything(), MAX_STOPS).read(value, at)
        for i, one in enumerate(found):
            if not isinstance(one, str):
                raise fields.wrong_type(at, "a text or an array of texts", one)
            if not 0 < len(one) <= MAX_STOP_LETTERS:
                said = f"item {i} has {len(one):,} letters"
                said += f"; wanted 1 to {MAX_STOP_LETTERS}"
                raise errors.invalid(at, "invalid_value", f"Invalid {at}: {said}.")
        return tuple(found)


class _Biases:
    """{"id": -100..100}; whether the ids exist, the model knows."""

    def read(self, value: Any, at: str) -> dict[int, float]:
        if not isinstance(value, dict):
            raise fields.wrong_type(at, "an object", value)
        if len(value) > MAX_BIASES:
            said = f"Invalid {at}: {len(value):,} ids; wanted at most {MAX_BIASES:,}."
            raise errors.invalid(at, "invalid_value", said)
        made = {}
        for key, bias in value.items():
            if not (key.isascii() and key.isdigit() and len(key) < 11):
                raise fields.wrong_value(at, "ids of tokens as keys", key)
            if type(bias) not in (int, float) or not -100 <= bias <= 100:
                raise fields.wrong_value(at, "biases from -100 to 100", bias)
            made[int(key)] = float(bias)
        return made


class _Settings:
    """Settings of chat templates: an allow-list of scalars."""

    def read(self, value: Any, at: str) -> dict[str, Any]:
        table = {}
        for name, kind in chat.SETTINGS.items():
            kinds = {bool: fields.Flag(), int: fields.Integer(0, MAX_COUNT)}
            kinds |= {str: fields.Text(chat.MAX_SETTING)}
            table[name] = _Field(kinds[kind])
        found = fields.read(table, value, at)
        return {name: one for name, one in found.items() if one is not None}


class _Format:
    """response_format: "text", "json_object", or the schema of answers."""

    _TABLE: Mapping[str, fields.Field] = {
        "type": _Field(
            fields.Choice(("text", "json_object", "json_schema")), required=True
        ),
        "json_schema": _Field(fields.Anything()),
    }
    _SCHEMA: Mapping[str, fields.Field] = {
        "name": _Field(fields.Text(64, low=1, pattern=messages.NAME), required=True),
        "description": _Field(fields.Text(messages.MAX_TEXT)),
        "schema": _Field(fields.Anything()),
        "strict": _Field(fields.Flag()),
    }

    def read(self, value: Any, at: str) -> str | dict[str, Any]:
        found = fields.read(self._TABLE, value, at)
        if found["type"] != "json_schema":
            if found["json_schema"] is not None:
                said = f"null with the type {found['type']}"
                raise fields.wrong_value(f"{at}.json_schema", said, {})
            return found["type"]
        schema = found["json_schema"]
        if isinstance(schema, dict):
            schema = fields.read(self._SCHEMA, schema, f"{at}.json_schema")["schema"]
        if not isinstance(schema, dict):
            said = f"Invalid schema: {FORMAT_AT} is not there; wanted a JSON schema."
            raise errors.invalid(FORMAT_AT, "invalid_json_schema", said)
        return schema


_COMMON: dict[str, fields.Field] = {
    "model": _Field(fields.Text(512, low=1), required=True),
    "n": _Field(fields.Integer(1, MAX_N), 1),
    "max_tokens": _Field(fields.Integer(1, MAX_COUNT)),
    "temperature": _Field(fields.Decimal(0, 2)),
    "top_p": _Field(fields.Decimal(0, 1, above=True)),
    "top_k": _Field(fields.Integer(0, MAX_COUNT)),
    "min_p": _Field(fields.Decimal(0, 1)),
    "repetition_penalty": _Field(fields.Decimal(0, 100, above=True)),
    "presence_penalty": _Field(fields.Decimal(-2, 2)),
    "frequency_penalty": _Field(fields.Decimal(-2, 2)),
    "logit_bias": _Field(_Biases(), {}),
    "seed": _Field(fields.Integer(-(2**63), 2**63 - 1)),
    "stop": _Field(_Stop(), ()),
    "stop_token_ids": _Field(fields.Listed(_ID, 64), []),
    "ignore_eos": _Field(fields.Flag(), False),
    "stream": _Field(fields.Flag(), False),
    "stream_options": _Field(
        fields.Object(
            {
                "include_usage": _Field(fields.Flag(), False),
                "continuous_usage_stats": _Field(fields.Flag(), False),
                "include_obfuscation": _Field(
                    fields.Only(False, "chunks carry no padding")
                ),
            }
        )
    ),
    "user": _LABEL,
    "cache_salt": _Field(fields.Text(256), ""),
}
_CHAT = _COMMON | {
    "messages": _Field(messages.Messages(), required=True),
    "max_completion_tokens": _Field(fields.Integer(1, MAX_COUNT)),
    "logprobs": _Field(fields.Flag(), False),
    "top_logprobs": _Field(fields.Integer(0, request_lib.MAX_LOGPROBS)),
    "tools": _Field(messages.Tools()),
    "tool_choice": _Field(messages.ToolChoice()),
    "parallel_tool_calls": _Field(fields.Flag(), True),
    "response_format": _Field(_Format(), "text"),
    "reasoning_effort": _Field(
        fields.Choice(("none", "minimal", "low", "medium", "high", "xhigh"))
    ),
    "chat_template_kwargs": _Field(_Settings(), {}),
    "metadata": _Field(fields.Pairs(16, 64, 512)),
    "safety_identifier": _LABEL,
    "prompt_cache_key": _Field(fields.Text(256), ""),
    "prompt_cache_retention": _Field(
        fields.Only("in_memory", "pages are kept in memory as long as there is room")
    ),
    "store": _Field(fields.Only(False, "this server stores nothing")),
    "service_tier": _Field(fields.Choice(("auto", "default"))),
    "modalities": _Field(fields.Only(["text"], "answers are texts")),
    "verbosity": _Field(fields.Only("medium", "ask for length in the messages")),
    "audio": _Field(fields.Unsupported("answers are texts")),
    "prediction": _Field(fields.Unsupported("there are no predicted outputs")),
    "web_search_options": _Field(fields.Unsupported("there is no search")),
    "functions": _Field(fields.Unsupported("use tools")),
    "function_call": _Field(fields.Unsupported("use tool_choice")),
    "moderation": _Field(fields.Unsupported("the server's own policy holds")),
}


class _Prompt:
    """A text, ids, or a list of either."""

    def __init__(self, high: int):
        self._high = high

    def read(self, value: Any, at: str) -> tuple[str | tuple[int, ...], ...]:
        if isinstance(value, list) and value and type(value[0]) is int:
            value = [value]
        if not isinstance(value, list):
            value = [value]
        listed = fields.Listed(fields.Anything(), self._high, low=1)
        made: list[str | tuple[int, ...]] = []
        for i, one in enumerate(listed.read(value, at)):
            place = at if len(value) == 1 else f"{at}[{i}]"
            if isinstance(one, str):
                made.append(fields.Text(messages.MAX_TEXT, low=1).read(one, place))
            elif isinstance(one, list):
                ids = fields.Listed(_ID, json_ids(), low=1).read(one, place)
                made.append(tuple(ids))
            else:
                raise fields.wrong_type(place, "a text or an array of ids", one)
        return tuple(made)


def json_ids() -> int:
    """The most ids that a body can hold."""
    return 250_000


_COMPLETION = _COMMON | {
    "prompt": _Field(_Prompt(64), required=True),
    "echo": _Field(fields.Flag(), False),
    "logprobs": _Field(fields.Integer(0, request_lib.MAX_LOGPROBS)),
    "best_of": _Field(fields.Integer(1, MAX_N)),
    "suffix": _Field(fields.Unsupported("this model only continues texts")),
}
_EMBEDDING = {
    "model": _COMMON["model"],
    "input": _Field(_Prompt(MAX_INPUTS), required=True),
    "encoding_format": _Field(fields.Choice(("float", "base64")), "float"),
    "dimensions": _Field(fields.Integer(1, MAX_COUNT)),
    "user": _LABEL,
}


class _Inputs:
    """What is to be judged: a text, texts, or parts of text."""

    _PART: Mapping[str, fields.Field] = {
        "type": _Field(fields.Choice(("text",)), required=True),
        "text": _Field(fields.Text(messages.MAX_TEXT), required=True),
    }

    def read(self, value: Any, at: str) -> list[str]:
        if isinstance(value, str):
            return [value]
        texts = []
        listed = fields.Listed(fields.Anything(), MAX_INPUTS, low=1)
        for i, one in enumerate(listed.read(value, at)):
            if isinstance(one, dict):
                one = fields.read(self._PART, one, f"{at}[{i}]")["text"]
            texts.append(fields.Text(messages.MAX_TEXT).read(one, f"{at}[{i}]"))
        return texts


_MODERATION = {
    "model": _Field(fields.Text(512, low=1)),
    "input": _Field(_Inputs(), required=True),
}


@dataclasses.dataclass(frozen=True)
class Common:
    """What chat and completions have in common.

    chosen: settings of sampling that were given. seed: as given. stop_ids: besides the
    model's own. logprobs: None, or how many beside each.
    """

    model: str
    n: int
    max_tokens: int | None
    chosen: Mapping[str, Any]
    logit_bias: Mapping[int, float]
    seed: int | None
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    ignore_eos: bool
    stream: bool
    include_usage: bool
    usage_so_far: bool
    logprobs: int | None
    salt: str


@dataclasses.dataclass(frozen=True)
class Chat(Common):
    """A request of /v1/chat/completions; answer_format: "text", "json_object", or a
    schema; tool_choice: a mode, or (name,)."""

    given: messages.Given
    tools: list[dict[str, Any]] | None
    tool_choice: str | tuple[str]
    parallel: bool
    answer_format: str | dict[str, Any]
    effort: str | None
    settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Completion(Common):
    """A request of /v1/completions."""

    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool


@dataclasses.dataclass(frozen=True)
class Embedding:
    """A request of /v1/embeddings."""

    model: str
    inputs: tuple[str | tuple[int, ...], ...]
    base64: bool
    dimensions: int | None


@dataclasses.dataclass(frozen=True)
class Moderation:
    """A request of /v1/moderations."""

    model: str | None
    texts: list[str]


def _common(v: dict[str, Any]) -> dict[str, Any]:
    if v["stream_options"] is not None and not v["stream"]:
        raise fields.wrong_value("stream_options", "it with stream=true only", {})
    options = v["stream_options"] or {}
    usage, so_far = "include_usage", "continuous_usage_stats"
    if options.get(so_far) and not options[usage]:
        at = f"stream_options.{so_far}"
        raise fields.wrong_value(at, f"it with {usage}=true only", True)
    salts = (v["cache_salt"], v.get("prompt_cache_key") or "")
    return {
        "model": v["model"],
        "n": v["n"],
        "chosen": {name: v[name] for name in SAMPLING if v[name] is not None},
        "logit_bias": v["logit_bias"],
        "seed": v["seed"],
        "stop": v["stop"],
        "stop_ids": tuple(v["stop_token_ids"]),
        "ignore_eos": v["ignore_eos"],
        "stream": v["stream"],
        "include_usage": options.get(usage, False),
        "usage_so_far": options.get(so_far, False),
        "salt": "\x00".join(salts) if any(salts) else "",
    }


def chat_request(body: dict[str, Any]) -> Chat:
    """The record of a body of /v1/chat/completions."""
    v = fields.read(_CHAT, body)
    if v["top_logprobs"] is not None and not v["logprobs"]:
        raise fields.wrong_value(
            "top_logprobs", "it with logprobs=true only", v["top_logprobs"]
        )
    most = v["max_completion_tokens"]
    choice, tools = v["tool_choice"], v["tools"]
    if choice is not None and not tools:
        raise fields.wrong_value("tool_choice", "it with tools only", str(choice))
    if isinstance(choice, tuple):
        names = [tool["function"]["name"] for tool in tools]
        if choice[0] not in names:
            raise fields.wrong_value("tool_choice", "the name of a tool", choice[0])
    forced = isinstance(choice, tuple) or choice == "required"
    if forced and v["response_format"] != "text":
        raise fields.wrong_value(
            "response_format", "text where tool_choice asks for a call", {}
        )
    return Chat(
        **_common(v),
        max_tokens=v["max_tokens"] if most is None else most,
        logprobs=(v["top_logprobs"] or 0) if v["logprobs"] else None,
        given=v["messages"],
        tools=tools,
        tool_choice=choice or "auto",
        parallel=v["parallel_tool_calls"],
        answer_format=v["response_format"],
        effort=v["reasoning_effort"],
        settings=v["chat_template_kwargs"],
    )


def completion_request(body: dict[str, Any]) -> Completion:
    """The record of a body of /v1/completions."""
    v = fields.read(_COMPLETION, body)
    if v["best_of"] not in (None, v["n"]):
        raise fields.wrong_value(
            "best_of", f"n={v['n']}: all answers are given", v["best_of"]
        )
    return Completion(
        **_common(v),
        max_tokens=16 if v["max_tokens"] is None else v["max_tokens"],
        logprobs=v["logprobs"],
        prompts=v["prompt"],
        echo=v["echo"],
    )


def embedding_request(body: dict[str, Any]) -> Embedding:
    """The record of a body of /v1/embeddings."""
    v = fields.read(_EMBEDDING, body)
    wants = v["encoding_format"] == "base64"
    return Embedding(v["model"], v["input"], wants, v["dimensions"])


def moderation_request(body: dict[str, Any]) -> Moderation:
    """The record of a body of /v1/moderations."""
    v = fields.read(_MODERATION, body)
    return Moderation(v["model"], v["input"])
