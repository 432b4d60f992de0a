# SPDX-License-Identifier: Apache-2.0
"""The server with the real engine behind it, on a tiny model of random weights: what
the engine's own `generate` says is what clients are told, and grammars hold."""

import json
import pathlib
import threading
import time

import jax
import numpy as np
import openai
import pytest

from qwen_jax import models
from qwen_jax.data import chat, tokenizer
from qwen_jax.models import decoder
from qwen_jax.models import spec as spec_lib
from qwen_jax.serve import device, engine, http, listening
from qwen_jax.serve import served as served_lib
from tests.data import chat_templates
from tests.serve import fake_engine, scripts, servers

PROMPT = "def load(fp, *, cls=None):"


@pytest.fixture(scope="module")
def running():
    words = tokenizer.train([pathlib.Path(json.__file__).read_text()], 500)
    words.settings["chat_template"] = chat_templates.HERMES
    spec = spec_lib.Spec(
        vocab_size=words.vocab_size + 5,
        width=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_width=16,
        ffn_width=48,
        max_positions=512,
        init_std=0.3,
    )
    params = models.init(spec, 0)
    model = fake_engine.Model(spec, words, chat.template_of(words))
    settings = device.Settings(rows=2, max_tokens=448, piece=64)
    made = engine.Engine(
        spec, params, words, settings=settings, stop_ids=words.stop_ids
    )
    made.start()
    registry = served_lib.Models()
    registry.put(served_lib.Served(servers.NAME, model, made, 1))
    app = http.App(registry)
    server = listening.server(app)
    sock = listening.listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    one = servers.Running(app, made, server, thread, sock.getsockname()[1])
    one.params = params
    yield one
    for client in one.clients:
        client.close()
    server.drain()
    thread.join(10)
    made.close(1.0)
    sock.close()


@pytest.fixture()
def client(running):
    return running.client(timeout=60)


def test_times_of_queue_and_prefill(running, client):
    """What Prometheus is told of a request is within what its client saw."""
    before, begun_s = sums(running), time.monotonic()
    client.completions.create(model=servers.NAME, prompt=PROMPT, max_tokens=3)
    took_s = time.monotonic() - begun_s
    more = {name: x - before.get(name, 0.0) for name, x in sums(running).items()}
    of = "qwen_jax:request_{}_time_seconds_"
    assert more[of.format("queue") + "count"] == 1
    assert more[of.format("prefill") + "count"] == 1
    queue_s = more[of.format("queue") + "sum"]
    prefill_s = more[of.format("prefill") + "sum"]
    first_s = more["qwen_jax:time_to_first_token_seconds_sum"]
    assert 0 <= queue_s < queue_s + prefill_s <= first_s <= took_s


def sums(running):
    """Sums and counts of /metrics."""
    lines = running.app.told.text().decode().splitlines()
    pairs = [line.rpartition(" ") for line in lines if line[0] != "#"]
    ends = ("_sum", "_count")
    names = [(x.partition("{")[0], float(value)) for x, _, value in pairs]
    return {name: value for name, value in names if name.endswith(ends)}


def test_answers_are_the_models_own(running, client):
    """Greedy ids of the whole forward pass, computed here, are the text of clients."""
    words, ids = running.engine.tokenizer, running.engine.tokenizer.encode(PROMPT)
    prompt = len(ids)
    forward = jax.jit(lambda t: decoder.forward(running.engine.spec, running.params, t))
    padded_1t = np.zeros((1, prompt + 12), np.int32)
    for _ in range(12):
        padded_1t[0, : len(ids)] = ids
        logits_v = np.asarray(forward(padded_1t))[0, len(ids) - 1]
        ids.append(int(logits_v.argmax()))
    how = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    how["extra_body"] = {"ignore_eos": True}
    made = client.completions.create(**how, logprobs=3)
    assert made.choices[0].text == words.decode(ids[prompt:], skip_special=True)
    assert made.usage.completion_tokens == 12 and made.usage.prompt_tokens == prompt
    last_v = logits_v - np.log(np.exp(logits_v).sum())
    assert abs(made.choices[0].logprobs.token_logprobs[-1] - last_v.max()) < 1e-3
    chunks = client.completions.create(**how, stream=True)
    assert "".join(c.choices[0].text for c in chunks) == made.choices[0].text


@pytest.mark.parametrize("seed", range(4))
def test_schemas_hold(client, seed):
    """A model of random weights writes what parses, or is cut by length."""
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "minimum": 0, "maximum": 99},
            "b": {"enum": ["x", "yy"]},
        },
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    made = scripts.ask(client, scripts.SAY, response_format=form, seed=seed)
    assert made.choices[0].finish_reason == "stop"
    found = json.loads(made.choices[0].message.content)
    assert 0 <= found["a"] <= 99 and found["b"] in ("x", "yy")


def test_calls_hold(client):
    tool = json.loads(json.dumps(scripts.WEATHER))
    tool["function"]["parameters"]["properties"]["place"] = {"enum": ["Ulm", "Bonn"]}
    how = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
    made = scripts.ask(client, scripts.user("hi"), seed=1, **how).choices[0]
    assert made.finish_reason == "tool_calls"
    call = made.message.tool_calls[0].function
    assert call.name == "weather"
    assert json.loads(call.arguments)["place"] in ("Ulm", "Bonn")


def test_the_same_seed_is_the_same_answer(client):
    """Whole, streamed, and as the first of two."""
    how = {"seed": 5, "max_tokens": 20}
    whole = scripts.ask(client, scripts.SAY, **how).choices[0].message.content
    chunks = scripts.streamed(client, scripts.SAY, **how)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole
    two = scripts.ask(client, scripts.SAY, n=2, **how).choices
    assert two[0].message.content == whole != two[1].message.content


def test_clients_that_hang_up(running, client):
    """Row 25: gone from the engine within a second, its pages free."""
    how = {"max_tokens": 150, "extra_body": {"ignore_eos": True}}
    before = running.engine.load()
    stream = scripts.ask(client, scripts.SAY, stream=True, **how)
    next(stream)
    stream.close()
    until_s = time.monotonic() + 1
    while running.engine.load().running and time.monotonic() < until_s:
        time.sleep(0.01)
    after = running.engine.load()
    assert (after.running, after.pages_used) == (0, before.pages_used)


def test_too_long_for_the_engine(client):
    with pytest.raises(openai.BadRequestError) as caught:
        scripts.ask(client, scripts.SAY, max_tokens=440)
    assert caught.value.code == "context_length_exceeded"
    assert "448" in caught.value.message
