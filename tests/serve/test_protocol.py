# SPDX-License-Identifier: Apache-2.0
"""Bodies of requests at and beyond the bounds of each field; anything at all becomes a
record or a named error, never another exception."""

import dataclasses
import json
import math
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_jax.models import sampling
from qwen_jax.serve import errors, fields, json_body, protocol

SAY = [{"role": "user", "content": "hi"}]
CHAT = {"model": "m", "messages": SAY}
PARSERS = {
    "chat": (protocol.chat_request, CHAT, protocol._CHAT),
    "completion": (
        protocol.completion_request,
        {"model": "m", "prompt": "hi"},
        protocol._COMPLETION,
    ),
    "embedding": (
        protocol.embedding_request,
        {"model": "m", "input": "hi"},
        protocol._EMBEDDING,
    ),
    "moderation": (protocol.moderation_request, {"input": "hi"}, protocol._MODERATION),
}


def refused(make, body):
    with pytest.raises(errors.ApiError) as caught:
        make(body)
    check(caught.value)
    return caught.value


def check(error):
    """An error that OpenAI's clients can read, and that tells nothing of ours."""
    assert error.status == 400 and error.type == errors.INVALID
    assert isinstance(error.code, str) and error.code.replace("_", "").isalnum()
    assert error.param is None or isinstance(error.param, str)
    assert error.message and len(error.message) < 1000
    assert not re.search("0x[0-9a-f]{6}|object at", error.message)
    assert set(json.loads(error.json())["error"]) == {
        "message",
        "type",
        "param",
        "code",
    }


def bounded():
    """(route, field, kind) of each field that is a number with bounds."""
    for route, (_, _, table) in PARSERS.items():
        for name, field in table.items():
            if isinstance(field.kind, fields.Integer | fields.Decimal):
                yield pytest.param(route, name, field.kind, id=f"{route}.{name}")


@pytest.mark.parametrize(("route", "name", "kind"), list(bounded()))
def test_numbers_at_their_bounds(route, name, kind):
    make, base, _ = PARSERS[route]
    whole = isinstance(kind, fields.Integer)
    step = 1 if whole else 1e-9
    what = "integer" if whole else "decimal"
    extra = {"logprobs": True} if name == "top_logprobs" else {}
    extra |= {"n": kind.high} if name == "best_of" else {}
    if not getattr(kind, "above", False):
        low = extra | {"n": kind.low} if name == "best_of" else extra
        assert make(base | low | {name: kind.low})
    assert make(base | extra | {name: kind.high})
    for value, side in (
        (kind.low - step, "below_min"),
        (kind.high + step, "above_max"),
    ):
        error = refused(make, base | extra | {name: value})
        assert (error.param, error.code) == (name, f"{what}_{side}_value")
    if getattr(kind, "above", False):
        assert refused(make, base | {name: kind.low}).code == "decimal_below_min_value"
    for value in ("1", True, [1], {}, *([1.5] if whole else [])):
        error = refused(make, base | extra | {name: value})
        assert (error.param, error.code) == (name, "invalid_type")
    for value in () if whole else (math.nan, math.inf, -math.inf):
        error = refused(make, base | {name: value})
        assert (error.param, error.code) == (name, "invalid_value")
    assert make(base | {name: None})  # null is a field left out


@pytest.mark.parametrize("route", PARSERS)
def test_every_field_refuses_what_it_is_not(route):
    """An object of an odd name and a list of a list fit no field."""
    make, base, table = PARSERS[route]
    for name in table:
        for value in ({"zz": 1}, [[["x"]]]):
            error = refused(make, base | {name: value})
            assert error.param is None or error.param.startswith(name)
    error = refused(make, base | {"zzz": 1})
    assert (error.param, error.code) == ("zzz", "unknown_parameter")


def test_every_record_of_sampling_can_be_made():
    """What the table lets through, the engine's record takes."""
    for name in protocol.SAMPLING:
        kind = protocol._CHAT[name].kind
        low = math.nextafter(0, 1) if getattr(kind, "above", False) else kind.low
        for value in (low, kind.high):
            chosen = protocol.chat_request(CHAT | {name: value}).chosen
            assert getattr(sampling.Sampling(**chosen), name) == value


def test_defaults():
    made = protocol.chat_request(CHAT)
    assert dataclasses.asdict(made) | {"given": None} == {
        "model": "m",
        "n": 1,
        "max_tokens": None,
        "chosen": {},
        "logit_bias": {},
        "seed": None,
        "stop": (),
        "stop_ids": (),
        "ignore_eos": False,
        "stream": False,
        "include_usage": False,
        "usage_so_far": False,
        "logprobs": None,
        "salt": "",
        "given": None,
        "tools": None,
        "tool_choice": "auto",
        "parallel": True,
        "answer_format": "text",
        "effort": None,
        "settings": {},
    }
    assert protocol.completion_request({"model": "m", "prompt": "x"}).max_tokens == 16


def test_what_only_labels_is_taken():
    labels = {
        "user": "u",
        "metadata": {"a": "b"},
        "safety_identifier": "s",
        "store": False,
        "service_tier": "auto",
        "modalities": ["text"],
        "verbosity": "medium",
        "prompt_cache_retention": "in_memory",
    }
    made, plain = (protocol.chat_request(CHAT | x) for x in (labels, {}))
    assert dataclasses.replace(made, given=plain.given) == plain


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
NAMES = sorted({n for _, _, t in PARSERS.values() for n in t} | {"role", "content"})
NAMES += ["type", "function", "name", "text", "image_url", "url", "schema", "id"]
ROUGH = st.recursive(
    st.sampled_from(
        ["user", "tool", "text", "function", "auto", "json_schema", "x", ""]
    )
    | st.sampled_from([0, 1, -1, 2**63, 0.5, -0.0, math.nan, True, None]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("route", PARSERS)
@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(
        st.sampled_from(NAMES) | st.text(max_size=6), JSON | ROUGH, max_size=4
    )
)
def test_anything(route, given_):
    make, base, table = PARSERS[route]
    kept = {k: v for k, v in given_.items() if k in table or len(given_) < 3}
    try:
        make(base | kept)
    except errors.ApiError as error:
        check(error)


@settings(max_examples=300)
@given(st.lists(st.dictionaries(st.sampled_from(NAMES), ROUGH, max_size=4), max_size=3))
def test_any_messages(messages):
    try:
        made = protocol.chat_request(CHAT | {"messages": messages})
        assert len(made.given.messages) == len(messages)
    except errors.ApiError as error:
        check(error)


@settings(max_examples=500)
@given(
    st.binary(max_size=60)
    | st.text(max_size=60).map(str.encode)
    | JSON.map(json.dumps).map(str.encode)
)
def test_any_bytes(data):
    """As the standard library reads them, but for what is refused."""
    try:
        made = json_body.parse(data)
    except errors.ApiError as error:
        check(error)
        assert error.code == "invalid_json"
        return
    assert json.dumps(made) == json.dumps(json.loads(data))


def test_twins_surrogates_and_nul():
    for text in (
        '{"a": 1, "a": 1}',
        '{"x": {"a": 1, "b": 2, "a": 3}}',
        '{"a": "\\ud800"}',
        '{"\\udfff": 1}',
        '{"a": ["\\u0000"]}',
        '{"a": [NaN]}',
        '{"a": {"b": 1e999}}',
    ):
        assert refused(json_body.parse, text.encode()).code == "invalid_json"
    assert json_body.parse(b'{"a": "\\ud83d\\ude42"}') == {"a": "🙂"}
    assert math.isnan(json_body.parse(b'{"a": NaN}')["a"])  # the field's own check
    assert json_body.parse(b'{"a": [1.5]}') == {"a": [1.5]}


@pytest.mark.parametrize("depth", [1, 31, 32, 33, 34, 200])
def test_levels(depth):
    """The object itself is the first; the innermost of 32 levels is a value."""
    value = "x"
    for _ in range(depth - 1):
        value = [value]
    text = json.dumps({"a": value}).encode()
    if depth <= json_body.MAX_DEPTH:
        assert json_body.parse(text)
    else:
        assert "levels" in refused(json_body.parse, text).message
