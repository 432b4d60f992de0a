# SPDX-License-Identifier: Apache-2.0
"""Requests that cannot be: the exact status, type, param and code of each.

Most go through the official SDK, so the error is what its users meet; what the SDK
itself would not send goes by hand.

Rows of the table of errors, by number:
1 keys. 2 models_that_are_not_there. 3-4 routes_and_methods. 5 bodies_of_another_type,
bodies_that_are_no_object. 6 bodies_that_are_too_large. 7 bodies_that_are_too_deep.
8 what_must_be_there. 9-10 messages. 11-15, 17-20, 25 values. 12 also
numbers_that_are_not_finite. 16 contexts. 21 unknown_fields. 22 schemas. 23 tools.
24 images. 26-31 test_openai_faults: rate_limits, a_full_queue,
a_model_that_is_being_loaded, prompts_that_the_guard_blocks, clients_of_dashscope,
faults, faults_in_a_stream; 28 also the_end. 32-33 test_http_hostile: headers,
slow_clients.
"""

import base64
import io
import json
import struct
import time
import zlib

import openai
import pytest

from qwen_jax.data import picture
from qwen_jax.serve import pictures
from tests.data import chat_templates
from tests.serve import fake_engine, scripts, servers

INVALID = "invalid_request_error"
BIG = 2**63


@pytest.fixture(scope="module")
def server():
    model = fake_engine.model(chat_templates.HERMES)
    with servers.running(model, scripts.SCRIPT) as one:
        yield one


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def told(call, *wanted):
    """The error of a call: (status, type, param, code) are as wanted."""
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    error = caught.value
    got = (error.status_code, error.type, error.param, error.code)
    assert got == wanted, error.message
    assert error.request_id
    return error


def bad(client, param, code, **how):
    how = {"model": "tiny", "messages": scripts.SAY} | how
    return told(
        lambda: client.chat.completions.create(**how), 400, INVALID, param, code
    )


def test_keys():
    """Row 1: no key, another key, one letter off, in the query."""
    key = "sk-right-0123456789"
    with servers.running(keys=[key, "sk-second-0123456789"]) as one:
        for wrong in ("sk-right-0123456780", "x", "sk-right-0123456789x"):
            client = one.client(wrong)
            error = told(client.models.list, 401, INVALID, None, "invalid_api_key")
            assert wrong not in error.message
            assert isinstance(error, openai.AuthenticationError)
        for path in ("/v1/models", "/metrics", "/version", "/none", "/v1/none"):
            answer = one.raw(
                f"GET {path}?api_key={key} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
            )
            assert servers.error_of(answer) == (401, INVALID, None, "invalid_api_key")
        for path in ("/health", "/ready"):
            answer = one.raw(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            assert answer.startswith(b"HTTP/1.1 200")
        for right in (key, "sk-second-0123456789"):
            assert one.client(right).models.list().data
            salt = one.client(right).completions.create(model="tiny", prompt="x")
            assert salt.choices
        salts = {request.salt for request in one.engine.seen}
        assert len(salts) == 2  # each key has pages of its own
        assert not any(key in salt for salt in salts)


def test_models_that_are_not_there(client):
    """Row 2."""
    for call in (
        lambda: client.chat.completions.create(model="gpt", messages=scripts.SAY),
        lambda: client.completions.create(model="gpt", prompt="x"),
        lambda: client.embeddings.create(model="gpt", input="x"),
        lambda: client.models.retrieve("gpt"),
    ):
        told(call, 404, INVALID, "model", "model_not_found")


@pytest.mark.parametrize(
    ("line", "want", "allowed"),
    [
        ("GET /v1/none", (404, "unknown_url"), None),
        ("GET /v1", (404, "unknown_url"), None),
        ("POST /v1/chat/completions/", (404, "unknown_url"), None),
        ("GET /v1/chat/completions", (405, "method_not_allowed"), "POST"),
        ("DELETE /v1/models", (405, "method_not_allowed"), "GET, HEAD"),
        ("PATCH /health", (405, "method_not_allowed"), "GET, HEAD"),
    ],
)
def test_routes_and_methods(server, line, want, allowed):
    """Rows 3 and 4."""
    answer = server.raw(f"{line} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    status, kind, param, code = servers.error_of(answer)
    assert (status, code) == want and (kind, param) == (INVALID, None)
    if allowed:
        assert f"allow: {allowed}\r\n".encode() in answer.lower().replace(
            allowed.lower().encode(), allowed.encode()
        )


@pytest.mark.parametrize(
    "body", [b"", b" ", b"[]", b'"x"', b"7", b"null", b'{"model"', b"{'a': 1}", b"\xff"]
)
def test_bodies_that_are_no_object(server, body):
    """Row 5."""
    answer = server.raw(servers.post("/v1/chat/completions", body))
    assert servers.error_of(answer) == (400, INVALID, None, "invalid_json")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded"])
def test_bodies_of_another_type(server, kind):
    """Row 5."""
    data = servers.post("/v1/chat/completions", b"{}").replace(
        b"application/json", kind.encode()
    )
    assert servers.error_of(server.raw(data)) == (415, INVALID, None, "invalid_json")


def test_bodies_that_are_too_large(client):
    """Row 6: the SDK has no class of its own for 413."""
    text = "x" * (11 * 2**20)
    error = told(
        lambda: scripts.ask(client, scripts.user(text)),
        *(413, INVALID, None, "request_too_large"),
    )
    assert type(error) is openai.APIStatusError


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def test_bodies_that_are_too_deep_or_many(client):
    """Row 7."""
    bad(client, None, "invalid_json", extra_body={"x": nested(40)})
    bad(client, None, "invalid_json", extra_body={"x": [0] * 300_000})
    # At the limit the body is read, and the field is what is wrong.
    bad(client, "x", "unknown_parameter", extra_body={"x": nested(30)})
    bad(client, "x", "unknown_parameter", extra_body={"x": [0] * 200_000})
    text = "," * 300_000  # commas in a text are no values
    assert scripts.ask(client, scripts.user("hi"), extra_body={"user": None})
    bad(client, "user", "string_above_max_length", extra_body={"user": text})


@pytest.mark.parametrize("name", ["model", "messages"])
def test_what_must_be_there(server, name):
    """Row 8."""
    body = {"model": "tiny", "messages": scripts.SAY}
    for given in ({}, {name: None}):
        rest = {k: v for k, v in body.items() if k != name} | given
        data = servers.post("/v1/chat/completions", json.dumps(rest).encode())
        want = (400, INVALID, name, "missing_required_parameter")
        assert servers.error_of(server.raw(data)) == want


CALLED = {
    "role": "assistant",
    "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    ],
}


@pytest.mark.parametrize(
    ("messages", "param", "code"),
    [
        ([], "messages", "empty_array"),
        ("hi", "messages", "invalid_type"),
        (["hi"], "messages[0]", "invalid_type"),
        ([*scripts.SAY, {"role": "wizard", "content": "x"}], "messages[1].role", None),
        ([{"role": 7, "content": "x"}], "messages[0].role", "invalid_type"),
        ([{"content": "x"}], "messages[0].role", "missing_required_parameter"),
        ([{"role": "user"}], "messages[0].content", None),
        ([{"role": "user", "content": None}], "messages[0].content", None),
        ([{"role": "user", "content": 7}], "messages[0].content", "invalid_type"),
        ([{"role": "user", "content": []}], "messages[0].content", "empty_array"),
        (scripts.user(["x"]), "messages[0].content[0]", "invalid_type"),
        (scripts.user([{"type": "x"}]), "messages[0].content[0].type", None),
        (
            scripts.user([{"type": "text"}]),
            "messages[0].content[0].text",
            "missing_required_parameter",
        ),
        (
            [{"role": "system", "content": [{"type": "image_url"}]}],
            "messages[0].content[0].type",
            None,
        ),
        (
            [*scripts.SAY, {"role": "tool", "content": "x"}],
            "messages[1].tool_call_id",
            "missing_required_parameter",
        ),
        (
            [*scripts.SAY, {"role": "tool", "content": "x", "tool_call_id": "a"}],
            "messages[1].tool_call_id",
            None,
        ),
        (
            [CALLED, {"role": "tool", "content": "x", "tool_call_id": "b"}],
            "messages[1].tool_call_id",
            None,
        ),
        (
            [{"role": "user", "content": "x", "tool_call_id": "a"}],
            "messages[0].tool_call_id",
            "unknown_parameter",
        ),
        (
            [json.loads(json.dumps(CALLED).replace("{}", "[]"))],
            "messages[0].tool_calls[0].function.arguments",
            None,
        ),
        (
            [json.loads(json.dumps(CALLED).replace("{}", "{"))],
            "messages[0].tool_calls[0].function.arguments",
            None,
        ),
        (
            [{"role": "assistant", "audio": {"id": "a"}}],
            "messages[0].audio",
            "unsupported_parameter",
        ),
    ],
)
def test_messages(client, messages, param, code):
    """Rows 9 and 10."""
    bad(client, param, code or "invalid_value", messages=messages)


ABOVE, BELOW = "decimal_above_max_value", "decimal_below_min_value"
MORE, LESS = "integer_above_max_value", "integer_below_min_value"


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("temperature", "hot", "invalid_type"),
        ("temperature", True, "invalid_type"),
        ("temperature", [1], "invalid_type"),
        ("temperature", 2.1, ABOVE),
        ("temperature", -1, BELOW),
        ("temperature", 10**400, ABOVE),
        ("top_p", 0, BELOW),
        ("top_p", 1.1, ABOVE),
        ("min_p", 2, ABOVE),
        ("min_p", -0.1, BELOW),
        ("top_k", -7, LESS),
        ("top_k", 2**40, MORE),
        ("top_k", 1.5, "invalid_type"),
        ("repetition_penalty", 0, BELOW),
        ("presence_penalty", 2.1, ABOVE),
        ("frequency_penalty", -2.1, BELOW),
        ("n", 0, LESS),
        ("n", -1, LESS),
        ("n", 17, MORE),
        ("n", 10**9, MORE),
        ("n", 1.0, "invalid_type"),
        ("max_tokens", 0, LESS),
        ("max_tokens", -5, LESS),
        ("max_tokens", BIG, MORE),
        ("max_completion_tokens", 0, LESS),
        ("max_completion_tokens", BIG, MORE),
        ("logprobs", 3, "invalid_type"),
        ("top_logprobs", 21, MORE),
        ("top_logprobs", 10**6, MORE),
        ("top_logprobs", 3, "invalid_value"),
        ("logit_bias", {"x": 1}, "invalid_value"),
        ("logit_bias", {"1.5": 1}, "invalid_value"),
        ("logit_bias", {"-1": 1}, "invalid_value"),
        ("logit_bias", {"4294967296": 1}, "invalid_value"),
        ("logit_bias", {"700": 1}, "invalid_value"),
        ("logit_bias", {"1": 101}, "invalid_value"),
        ("logit_bias", {"1": "x"}, "invalid_value"),
        ("logit_bias", {str(i): 1 for i in range(3000)}, "invalid_value"),
        ("logit_bias", [1], "invalid_type"),
        ("stop", ["a"] * 5, "array_above_max_length"),
        ("stop", ["a"] * 100_000, "array_above_max_length"),
        ("stop", "", "invalid_value"),
        ("stop", ["a", ""], "invalid_value"),
        ("stop", "x" * 10_000, "invalid_value"),
        ("stop", 7, "invalid_type"),
        ("stop", [7], "invalid_type"),
        ("seed", 1.5, "invalid_type"),
        ("seed", "1", "invalid_type"),
        ("seed", 2**70, MORE),
        ("stream", "yes", "invalid_type"),
        ("stream_options", {"include_usage": True}, "invalid_value"),
        ("user", "x" * 513, "string_above_max_length"),
        ("metadata", {str(i): "x" for i in range(17)}, "object_above_max_properties"),
        ("store", True, "invalid_value"),
        ("service_tier", "flex", "invalid_value"),
        ("modalities", ["text", "audio"], "invalid_value"),
        ("reasoning_effort", "huge", "invalid_value"),
        ("reasoning_effort", "high", "invalid_value"),  # the template has no thinking
        ("stop_token_ids[0]", [-1], LESS),
        ("stop_token_ids", [700], "invalid_value"),
        ("functions", [], "unsupported_parameter"),
        ("prediction", {"type": "content", "content": "x"}, "unsupported_parameter"),
        ("web_search_options", {}, "unsupported_parameter"),
    ],
)
def test_values(client, name, value, code):
    """Rows 11 to 15, 17 to 20, 25."""
    bad(client, name, code, extra_body={name.partition("[")[0]: value})


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite(server, text):
    """Row 12."""
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], '
    body += f'"temperature": {text}}}'.encode()
    got = servers.error_of(server.raw(servers.post("/v1/chat/completions", body)))
    assert got == (400, INVALID, "temperature", "invalid_value")


def test_contexts(client, server):
    """Row 16: the message has the numbers."""
    long = scripts.user("one two " * 4000)
    error = bad(client, "messages", "context_length_exceeded", messages=long)
    assert "4096" in error.message
    error = bad(client, "messages", "context_length_exceeded", max_tokens=4090)
    words, prompt = server.engine.model.tokenizer, 4090
    asked = int(error.message.split("asked for ")[1].split()[0])
    assert "4096" in error.message and asked > prompt + 5
    told(
        lambda: client.completions.create(model="tiny", prompt="one two " * 4000),
        *(400, INVALID, "prompt", "context_length_exceeded"),
    )
    told(
        lambda: client.embeddings.create(model="tiny", input="one two " * 4000),
        *(400, INVALID, "input", "context_length_exceeded"),
    )
    assert words.vocab_size < 4096


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tempature", "did you mean temperature?"),
        ("max_token", "did you mean max_tokens?"),
        ("chat_template", ""),
        ("guided_json", ""),
        ("prompt_logprobs", ""),
        ("n_discard", ""),
        ("x" * 100_000, ""),
    ],
)
def test_unknown_fields(client, name, hint):
    """Row 21."""
    error = bad(client, name[:200], "unknown_parameter", extra_body={name: 1})
    assert hint in error.message and len(error.message) < 300


@pytest.mark.parametrize(
    "name", ["tokenize", "tools", "messages", "add_generation_prompt"]
)
def test_settings_of_templates(client, name):
    """Only an allow-list of scalars reaches a template."""
    given = {"chat_template_kwargs": {name: True}}
    bad(client, f"chat_template_kwargs.{name}", "unknown_parameter", extra_body=given)
    given = {"chat_template_kwargs": {"enable_thinking": True}}
    at = "chat_template_kwargs.enable_thinking"
    bad(client, at, "invalid_value", extra_body=given)  # this template has none


def deep(levels):
    schema = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


SCHEMA_AT = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    "schema",
    [
        None,
        7,
        {"type": "banana"},
        {"type": "object", "properties": 7},
        deep(24),
        {"$ref": "#"},
        {
            "$ref": "#/$defs/a",
            "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
        },
        {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        {"$ref": "http://169.254.169.254/schema"},
        {"$ref": "#/$defs/none"},
        {"type": "string", "pattern": "["},
        {"type": "string", "pattern": "(?=a)b"},
        {"type": "string", "pattern": "a" * 2000},
        {"type": "array", "minItems": 10**9},
        {"type": "string", "minLength": 10**9},
        {"enum": list(range(20_000))},
        {"not": {"type": "string"}},
    ],
    ids=lambda schema: json.dumps(schema)[:40],
)
def test_schemas(client, schema):
    """Row 22."""
    given = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    begun_s = time.monotonic()
    error = bad(client, SCHEMA_AT, "invalid_json_schema", response_format=given)
    assert time.monotonic() - begun_s < 5 and len(error.message) < 400


def test_schemas_that_are_not_there(client):
    """Row 22."""
    for given in ({}, {"json_schema": None}):
        given = {"type": "json_schema"} | given
        bad(client, SCHEMA_AT, "invalid_json_schema", response_format=given)
    bad(
        client,
        "response_format.type",
        "invalid_value",
        response_format={"type": "ebnf"},
    )
    given = {"type": "structural_tag", "structures": "x"}
    bad(
        client, "response_format.structures", "unknown_parameter", response_format=given
    )
    bad(client, "response_format", "invalid_type", response_format="json")


def tool(name="f", **more):
    return {"type": "function", "function": {"name": name} | more}


@pytest.mark.parametrize(
    ("how", "param", "code"),
    [
        ({"tools": [tool("a b")]}, "tools[0].function.name", "invalid_value"),
        (
            {"tools": [tool("x" * 65)]},
            "tools[0].function.name",
            "string_above_max_length",
        ),
        ({"tools": [tool("")]}, "tools[0].function.name", "invalid_value"),
        ({"tools": [tool("é")]}, "tools[0].function.name", "invalid_value"),
        ({"tools": [tool(), tool()]}, "tools[1].function.name", "invalid_value"),
        ({"tools": []}, "tools", "empty_array"),
        (
            {"tools": [tool(str(i)) for i in range(10_000)]},
            "tools",
            "array_above_max_length",
        ),
        (
            {"tools": [tool(parameters=[])]},
            "tools[0].function.parameters",
            "invalid_type",
        ),
        (
            {"tools": [{"type": "custom", "custom": {}}]},
            "tools[0].custom",
            "unknown_parameter",
        ),
        (
            {"tools": [{"type": "function"}]},
            "tools[0].function",
            "missing_required_parameter",
        ),
        ({"tools": [tool()], "tool_choice": "maybe"}, "tool_choice", "invalid_value"),
        ({"tools": [tool()], "tool_choice": tool("g")}, "tool_choice", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tool_choice": tool()}, "tool_choice", "invalid_value"),
        (
            {"tools": [tool(strict=True, parameters={"type": "banana"})]},
            "tools",
            "invalid_json_schema",
        ),
    ],
)
def test_tools(client, how, param, code):
    """Row 23."""
    bad(client, param, code, **how)


def test_tools_that_the_template_does_not_know():
    """Row 23: no raw text with 200."""
    with servers.running() as one:
        error = bad(one.client(), "tools", "invalid_value", tools=[tool()])
        assert "template" in error.message


def png(width, height, data=b""):
    """A PNG by hand: its header claims what it likes."""

    def chunk(kind, body):
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    found = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
    return (
        found + chunk(b"IDAT", data or zlib.compress(b"\x00" * 4)) + chunk(b"IEND", b"")
    )


def uri(data, kind="image/png"):
    return f"data:{kind};base64," + base64.b64encode(data).decode()


def gif():
    Image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "GIF")
    return file.getvalue()


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest",
        "http://[::ffff:127.0.0.1]/x.png",
        "http://127.1/x.png",
        "http://allowed\\@evil/x.png",
        "https://example.com/x.png",
        "file:///etc/passwd",
        "/etc/passwd",
        "",
        "data:image/png;base64,",
        "data:image/png;base64,####",
        "data:text/html;base64,PGI+",
        uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"),
        uri(b"\x00" * (7 * 2**20)),
        uri(b"no image at all"),
        uri(png(60_000, 60_000)),
        uri(png(0, 0)),
        uri(png(9, 9)[:40]),
        uri(b"\xff\xd8\xff\xe0" + b"x" * 20, "image/jpeg"),
        uri(gif(), "image/png"),
    ],
    ids=lambda url: url[:40],
)
def test_images(client, url):
    """Row 24."""
    part = {"type": "image_url", "image_url": {"url": url}}
    said = scripts.user([{"type": "text", "text": "what is it?"}, part])
    at = "messages[0].content[1].image_url.url"
    error = bad(client, at, "invalid_image_url", messages=said)
    assert "0x" not in error.message and "passwd" not in error.message


def test_of_a_picture_with_ten_thousand_frames_the_first_is_read(monkeypatch):
    """Row 52 of the hostile table."""
    Image = pytest.importorskip("PIL.Image")
    kind = pytest.importorskip("PIL.GifImagePlugin").GifImageFile
    one, frames = gif(), 10_000
    # Behind the header and the colours: the frame, then the end of the file.
    begins = one.index(b",\x00\x00\x00\x00")
    many = one[:begins] + one[begins:-1] * frames + one[-1:]
    assert Image.open(io.BytesIO(many)).n_frames == frames
    seen, plain = [], kind.seek
    see = lambda self, frame: (seen.append(frame), plain(self, frame))[1]  # noqa: E731
    monkeypatch.setattr(kind, "seek", see)
    made = pictures.of_url(uri(many, "image/gif"), "auto", "x")
    assert (made.pixels, made.data) == (4, many)
    assert picture.load(many, pictures.LIMITS).size == (2, 2)
    assert all(frame == 0 for frame in seen)


def test_an_engine_that_never_can(server, client):
    """What the engine itself refuses is the client's fault as well."""
    server.engine.fault = "never"
    try:
        bad(client, None, "invalid_value")
    finally:
        server.engine.fault = None
