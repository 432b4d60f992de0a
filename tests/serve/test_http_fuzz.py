# SPDX-License-Identifier: Apache-2.0
"""Requests with anything in any field, to a server that runs, with a guard: each is
answered as it should or by a named error, and the answers to others stay what they are.

QWEN_JAX_FUZZ sets how many; the bar of the design is 10,000.
"""

import json
import os
import random
import time

import httpx

from qwen_jax.serve import guard
from tests.data import chat_templates
from tests.serve import fake_engine, scripts, servers

COUNT = int(os.environ.get("QWEN_JAX_FUZZ", "400"))
CALL = {
    "id": "a",
    "type": "function",
    "function": {"name": "weather", "arguments": "{}"},
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
BASES = {
    "/v1/chat/completions": [
        {
            "messages": scripts.SAY,
            "max_tokens": 5,
            "temperature": 0.5,
            "logprobs": True,
            "top_logprobs": 2,
            "stop": ["x"],
            "logit_bias": {"5": 1},
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "a", "content": "sunny"},
                {"role": "user", "content": [{"type": "text", "text": "the weather?"}]},
            ],
            "tools": [scripts.WEATHER],
            "tool_choice": "required",
            "max_tokens": 60,
        },
        {
            "messages": scripts.SAY,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA},
            },
            "max_tokens": 30,
        },
    ],
    "/v1/completions": [
        {"prompt": ["a", "b"], "echo": True, "logprobs": 1, "n": 2, "max_tokens": 3},
        {"prompt": [1, 2, 3], "max_tokens": 3, "seed": 1},
    ],
    "/v1/embeddings": [{"input": ["a", "b"], "dimensions": 4}],
    "/v1/moderations": [{"input": "a"}],
}
ODD = [None, True, 0, -1, 1, 17, 2**31, 2**63, -(2**70), 0.5, -0.0, 1e308, 10**300]
ODD += ["", "x", "auto", "none", "required", "text", "json_object", "user", "tool"]
ODD += ["<|im_start|>", "\ud800", "\x00", "é" * 300, "x" * 5000, "{}", "[1", "data:,"]
ODD += [[], {}, [[]], [None], [""], {"": None}, {"type": "object"}, {"$ref": "#"}]
ODD += [{"type": "image_url", "image_url": {"url": "http://x"}}, ["a"] * 70]
ODD += [{"enable_thinking": True}, {"pattern": "("}, {"role": "user", "content": "x"}]


def places(value, path=()):
    """Where something may be changed."""
    yield path
    inner = value.items() if isinstance(value, dict) else ()
    inner = enumerate(value) if isinstance(value, list) else inner
    for key, one in inner:
        yield from places(one, (*path, key))


def changed(draw, value):
    """The value with one place odd, gone, doubled or under another name."""
    value = json.loads(json.dumps(value))
    path = draw.choice([*places(value)][1:] or [()])
    if not path:  # nothing is left of it
        return value
    node = value
    for key in path[:-1]:
        node = node[key]
    key, how = path[-1], draw.random()
    if how < 0.15:
        del node[key]
    elif how < 0.25 and isinstance(node, dict):
        node[draw.choice(["x", f"{key}s", "type", "content"])] = node.pop(key)
    elif how < 0.35 and isinstance(node, list):
        node *= draw.choice([2, 40])
    elif how < 0.45:
        node[key] = draw.choice([[node[key]], {"a": node[key]}])
    else:
        node[key] = draw.choice(ODD)
    return value


def check(answer):
    """Right, or an error by name."""
    request_id = answer.headers["x-request-id"]
    if answer.status_code == 200:
        if answer.headers["content-type"].startswith("text/event-stream"):
            assert answer.text.endswith("data: [DONE]\n\n")
            assert '"error"' not in answer.text
        else:
            assert answer.json().get("object") or answer.json()["results"]
        return
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, request_id
    honest = (answer.status_code, error["code"]) in (
        (404, "model_not_found"),
        (404, "unsupported_endpoint"),
    )
    assert answer.status_code == 400 or honest, (answer.status_code, error)
    assert error["type"] == "invalid_request_error" and error["code"]
    for word in ("Traceback", "object at 0x", "/tmp", "/work", "site-packages", ".py"):
        assert word not in error["message"]


def test_anything_in_any_field():
    draw, counts = random.Random(4), {}
    model = fake_engine.model(chat_templates.HERMES)
    with (
        servers.running(model, scripts.SCRIPT, guard=guard.load()) as one,
        httpx.Client() as client,
    ):
        other = one.client()
        for i in range(COUNT):
            path = draw.choice([*BASES, "/v1/chat/completions", "/v1/chat/completions"])
            body = {"model": "tiny"} | draw.choice(BASES[path])
            for _ in range(draw.choice([1, 1, 2, 3])):
                body = changed(draw, body)
            begun_s = time.monotonic()
            answer = client.post(
                one.url + path,
                content=json.dumps(body).encode(),
                headers={"content-type": "application/json"},
                timeout=20,
            )
            check(answer)
            assert time.monotonic() - begun_s < 10
            counts[answer.status_code] = counts.get(answer.status_code, 0) + 1
            if i % 50 == 0:
                made = scripts.ask(other, scripts.SAY, temperature=0).choices[0]
                assert made.message.content == scripts.HELLO
        assert not one.app.board.flights and one.app.in_flight == 0
    assert counts[200] > COUNT / 20 and counts[400] > COUNT / 3
