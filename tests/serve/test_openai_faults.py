# SPDX-License-Identifier: Apache-2.0
"""What goes wrong in a server that runs: limits, guards, faults, clients that hang up,
and its end."""

import dataclasses
import json
import logging
import socket
import threading
import time

import httpx
import openai
import pytest

from qwen_jax.serve import guard, guard_verdict, http
from qwen_jax.serve import served as served_lib
from tests.serve import fake_engine, scripts, servers

INVALID = "invalid_request_error"
LONG = "word " * 200


def told(call, *wanted):
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    error = caught.value
    assert (error.status_code, error.type, error.param, error.code) == wanted
    return error


def metric(server, name, **labels):
    """A sample of /metrics; 0 where it is not there."""
    key = {"authorization": "Bearer sk-test-0123456789"}
    with httpx.Client(headers=key, verify=servers.NO_TLS) as client:
        text = client.get(f"{server.url}/metrics").text
    wanted = {f'{k}="{v}"' for k, v in labels.items()}
    for line in text.splitlines():
        found, _, rest = line.partition("{")
        given, _, value = rest.rpartition("} ")
        if found == name and wanted <= set(given.split(",")):
            return float(value)
    return 0.0


def eventually(check, seconds=5.0):
    until_s = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until_s
        time.sleep(0.02)


def test_rate_limits():
    """Row 26: requests a minute, each key its own; the SDK waits and tries again."""
    keys = ["sk-test-0123456789", "sk-other-0123456789"]
    with servers.running(keys=keys, requests_a_minute=60) as one:
        client = one.client(keys[0])
        raw = client.with_raw_response.completions.create(model="tiny", prompt="x")
        assert raw.headers["x-ratelimit-limit-requests"] == "60"
        assert raw.headers["x-ratelimit-remaining-requests"] == "59"
        assert raw.headers["x-ratelimit-reset-requests"].endswith("s")
        with pytest.raises(openai.RateLimitError) as caught:
            for _ in range(200):
                client.completions.create(model="tiny", prompt="x", max_tokens=1)
        error, headers = caught.value, caught.value.response.headers
        assert (error.type, error.param) == ("rate_limit_error", None)
        assert error.code == "rate_limit_exceeded"
        assert headers["retry-after"] == "1"
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert one.client(keys[1]).completions.create(model="tiny", prompt="x")
        again = one.client(keys[0], max_retries=2)
        assert again.completions.create(model="tiny", prompt="x", max_tokens=1)
        assert metric(one, "qwen_jax:requests_shed_total", reason="rate_limit") >= 1


def test_rate_limits_of_tokens():
    """Row 26: an answer's tokens count when it is over."""
    with servers.running(tokens_a_minute=600) as one:
        client = one.client()
        how = {"model": "tiny", "prompt": LONG, "extra_body": {"ignore_eos": True}}
        raw = client.with_raw_response.completions.create(**how, max_tokens=300)
        assert raw.headers["x-ratelimit-limit-tokens"] == "600"
        told(
            lambda: client.completions.create(model="tiny", prompt="x"),
            *(429, "rate_limit_error", None, "rate_limit_exceeded"),
        )


def test_a_full_queue():
    """Row 27: the engine's own word, and the server's."""
    with servers.running(max_waiting=1) as one:
        client = one.client()
        one.engine.full = True
        error = told(
            lambda: scripts.ask(client, scripts.SAY),
            *(429, "server_overloaded", None, "overloaded"),
        )
        assert error.response.headers["retry-after"] == "2"
        one.engine.full, one.engine.first_delay_s = False, 0.3
        one.engine.wait_s = 7.2
        first = threading.Thread(target=scripts.ask, args=(client, scripts.SAY))
        first.start()
        eventually(lambda: one.app.board.waiting == 1)
        error = told(
            lambda: scripts.ask(client, scripts.SAY),
            *(429, "server_overloaded", None, "overloaded"),
        )
        assert error.response.headers["retry-after"] == "7"
        first.join()
        assert scripts.ask(client, scripts.SAY)
        assert metric(one, "qwen_jax:requests_shed_total", reason="queue_full") == 2


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_refusal_does_not_wait_for_the_body(path, monkeypatch):
    """Row 27: nothing is read or parsed for it, and the connection goes on."""
    good = json.dumps({"model": "tiny", "prompt": "say hello"}).encode()
    with servers.running(script=scripts.SCRIPT) as one:
        one.engine.full = True
        with socket.create_connection(("127.0.0.1", one.port), 5) as client:
            data = servers.post(path, b"{" * 2000)
            client.sendall(data[:-1000])
            answer = servers.answer_of(client)
            want = (429, "server_overloaded", None, "overloaded")
            assert servers.error_of(answer) == want
            assert b"retry-after: 2\r\n" in answer
            one.engine.full = False
            client.sendall(data[-1000:] + servers.post("/v1/completions", good))
            assert b"Hello there" in servers.answer_of(client)
        with monkeypatch.context() as patch:
            one.engine.full = True
            patch.setattr(http.json_body, "parse", lambda data: 1 / 0)
            for size in (10, 100_000):  # small ones are parsed in the loop
                answer = one.raw(servers.post(path, b"x" * size))
                assert servers.error_of(answer) == want
        assert metric(one, "qwen_jax:requests_shed_total", reason="queue_full") == 3
        # What asks no engine for answers is taken, and so is who asks another engine.
        assert one.client().embeddings.create(model="tiny", input="x").data
        other = fake_engine.Engine(one.engine.model, {"x": "from another"})
        served = dataclasses.replace(
            one.app.models.get("tiny"), name="other", engine=other
        )
        one.app.models.put(served)
        made = one.client().completions.create(model="other", prompt="x")
        assert made.choices[0].text == "from another"
        assert servers.error_of(one.raw(servers.post("/v1/completions", good))) == want
        other.close()


def test_a_model_that_is_being_loaded():
    """Row 28."""
    with servers.running() as one:
        one.app.models.expect("later")
        client = one.client()
        told(
            lambda: client.completions.create(model="later", prompt="x"),
            *(503, "service_unavailable", None, "model_loading"),
        )
        ready = httpx.get(f"{one.url}/ready")
        assert ready.status_code == 503 and ready.headers["retry-after"] == "2"
        assert ready.json()["error"]["code"] == "model_loading"
        assert httpx.get(f"{one.url}/health").status_code == 200
        assert [m.id for m in client.models.list().data] == ["tiny"]
        before = one.app.models.get("tiny")
        one.app.models.put(dataclasses.replace(before, name="later"))
        assert client.completions.create(model="later", prompt="x").model == "later"
        assert httpx.get(f"{one.url}/ready").status_code == 200


def test_another_engine_under_the_same_name():
    """A request in flight keeps the engine that it began with."""
    with servers.running(script={"x": "old answer"}) as one:
        one.engine.delay_s = 0.02
        other = fake_engine.Engine(one.engine.model, {"x": "new one"})
        stream = scripts.ask(one.client(), scripts.user("x"), stream=True)
        text = next(stream).choices[0].delta.content
        served = served_lib.Served("tiny", one.engine.model, other, 1, "v2")
        before = one.app.models.put(served)
        assert before.engine is one.engine
        assert before.fingerprint(0) != served.fingerprint(0)
        text += "".join(c.choices[0].delta.content or "" for c in stream)
        assert text == "old answer"
        made = scripts.ask(one.client(), scripts.user("x"))
        assert made.choices[0].message.content == "new one"
        other.close()


class Words:
    """A checker that finds the word bomb."""

    name = "words"
    broken = False

    def prompt(self, messages):
        if self.broken:
            raise RuntimeError("the guard is down at /secret/guard")
        return self.of(json.dumps(messages))

    def response(self, messages, text):
        return self.of(text)

    def stream(self, messages):
        return Listener(self)

    def of(self, text):
        if "bomb" in text:
            risks = {"Violent": guard_verdict.UNSAFE}
            return guard_verdict.Finding(risks, {"Violent": 0.9})
        # Beginnings of the word at the end may yet become it.
        hold = max(n for n in range(4) if text.endswith("bomb"[:n]))
        return guard_verdict.Finding(scores={"Violent": 0.1}, hold=hold)


class Listener:
    def __init__(self, words):
        self.words, self.text = words, ""

    def push(self, text):
        self.text += text
        return self.words.of(self.text)

    def end(self):
        return self.words.of(self.text)


@pytest.fixture()
def guarded():
    words = Words()
    tail = " and then" * 30  # time enough to stop the engine before it is done
    script = {"tell": f"First you take a bomb{tail}", "fine": "All is well, bo"}
    with servers.running(script=script, guard=guard.Guard([words])) as one:
        one.words = words
        yield one


def test_prompts_that_the_guard_blocks(guarded):
    """Row 29."""
    client = guarded.client()
    told(
        lambda: scripts.ask(client, scripts.user("a bomb")),
        *(400, "content_policy_violation", "messages", "content_filter"),
    )
    told(
        lambda: client.completions.create(model="tiny", prompt="a bomb"),
        *(400, "content_policy_violation", "prompt", "content_filter"),
    )
    assert not guarded.engine.seen
    made = scripts.ask(client, scripts.user("fine")).choices[0]
    assert (made.message.content, made.finish_reason) == ("All is well, bo", "stop")
    name = "qwen_jax:moderation_total"
    assert metric(guarded, name, stage="input", label="unsafe") == 2
    assert metric(guarded, name, stage="output", label="safe") == 1


def test_clients_of_dashscope(guarded, hermes):
    """Row 29: who asks for its inspection gets its code, and what cannot be is said."""
    name = "X-DashScope-DataInspection"
    both = {name: '{"input": "cip", "output": "cip"}'}
    client, plain = guarded.client(), hermes.client()
    error = told(
        lambda: scripts.ask(client, scripts.user("a bomb"), extra_headers=both),
        *(400, "content_policy_violation", "messages", "data_inspection_failed"),
    )
    assert error.body["message"] == "Input data may contain inappropriate content."
    how = {"model": "tiny", "extra_headers": {name: '{"input": "cip"}'}}
    told(
        lambda: client.completions.create(prompt="a bomb", **how),
        *(400, "content_policy_violation", "prompt", "data_inspection_failed"),
    )
    assert not guarded.engine.seen
    made = scripts.ask(client, scripts.user("tell"), extra_headers=both).choices[0]
    assert made.finish_reason == "content_filter"
    for value in ("", "x", "[]", '{"input": "off"}', '{"input": 1}', '{"in": "cip"}'):
        told(
            lambda v=value: scripts.ask(client, scripts.SAY, extra_headers={name: v}),
            *(400, INVALID, name, "invalid_value"),
        )
    error = told(
        lambda: scripts.ask(plain, scripts.SAY, extra_headers=both),
        *(400, INVALID, name, "invalid_value"),
    )
    assert "no guard" in error.message


def test_answers_that_the_guard_blocks(guarded):
    """Not a letter of the word is sent, streamed or not; the engine is stopped."""
    client, guarded.engine.delay_s = guarded.client(), 0.02
    whole = scripts.ask(client, scripts.user("tell"), logprobs=True).choices[0]
    assert whole.finish_reason == "content_filter"
    assert whole.message.content == "First you take a"
    said = b"".join(bytes(one.bytes) for one in whole.logprobs.content)
    assert b"b" not in said and b"First" in said
    chunks = scripts.streamed(client, scripts.user("tell"))
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == whole.message.content
    assert chunks[-1].choices[0].finish_reason == "content_filter"
    assert len(guarded.engine.cancelled) == 2
    made = client.completions.create(model="tiny", prompt="tell", max_tokens=90)
    assert made.choices[0].finish_reason == "content_filter"
    assert made.choices[0].text == "First you take a "


def test_a_guard_that_breaks_lets_nothing_through(guarded):
    """Fails closed, and says nothing of itself."""
    guarded.words.broken = True
    error = told(
        lambda: scripts.ask(guarded.client(), scripts.user("fine")),
        *(400, "content_policy_violation", "messages", "content_filter"),
    )
    assert "secret" not in error.message and not guarded.engine.seen


def test_moderations(guarded):
    """Row 22 of the good ones: OpenAI's categories, and the guard's own."""
    client = guarded.client()
    made = client.moderations.create(input=["a bomb", "a rose"])
    assert made.id.startswith("modr-") and made.model == "words"
    assert [one.flagged for one in made.results] == [True, False]
    first = made.results[0]
    assert first.categories.violence is True and first.categories.hate is False
    assert first.category_scores.violence == 0.9
    assert first.category_scores.model_extra["Violent"] == 0.9
    assert first.category_applied_input_types.violence == ["text"]
    assert first.model_extra["qwen"]["level"] == "unsafe"
    parts = [{"type": "text", "text": "a bomb"}]
    assert client.moderations.create(input=parts).results[0].flagged
    told(
        lambda: client.moderations.create(input=[]),
        *(400, INVALID, "input", "empty_array"),
    )


def test_moderations_without_a_guard():
    """An honest error."""
    with servers.running() as one:
        told(
            lambda: one.client().moderations.create(input="x"),
            *(404, INVALID, None, "unsupported_endpoint"),
        )


def test_faults(caplog):
    """Row 30: a generic message with the id, under which the log has the rest."""
    with servers.running(script=scripts.SCRIPT) as one, caplog.at_level(logging.ERROR):
        client = one.client()
        for fault in ("submit", "piece"):
            one.engine.fault = fault
            error = told(
                lambda: scripts.ask(client, scripts.SAY),
                *(
                    500,
                    "server_error",
                    None,
                    "internal_error" if fault == "piece" else None,
                ),
            )
            assert isinstance(error, openai.InternalServerError)
            for secret in ("secret", "path", "Traceback", "Error("):
                assert secret not in error.message
        assert "/secret/path broke" in caplog.text and "/etc/path" in caplog.text
        one.engine.fault = None
        assert scripts.ask(client, scripts.SAY)


def test_faults_in_a_stream():
    """Row 31: an error frame, then [DONE]; the SDK raises after what came."""
    with servers.running(script=scripts.SCRIPT) as one:
        one.engine.fault = "piece"
        got = []
        with pytest.raises(openai.APIError) as caught:
            for chunk in scripts.ask(one.client(), scripts.SAY, stream=True):
                got.append(chunk.choices[0].delta.content or "")
        assert "".join(got) and scripts.HELLO.startswith("".join(got))
        error = caught.value
        assert (error.type, error.code, error.param) == (
            "server_error",
            "internal_error",
            None,
        )
        assert "secret" not in error.message
        body = {"model": "tiny", "messages": scripts.SAY, "stream": True}
        text = httpx.post(f"{one.url}/v1/chat/completions", json=body).text
        frames = text.strip().split("\n\n")
        assert frames[-1] == "data: [DONE]" and '"error"' in frames[-2]


def test_streams_are_kept_alive():
    """Comments while nothing comes; the SDK does not see them."""
    with servers.running(script=scripts.SCRIPT, ping_s=0.05) as one:
        one.engine.first_delay_s = 0.35
        body = {"model": "tiny", "messages": scripts.SAY, "stream": True}
        answer = httpx.post(f"{one.url}/v1/chat/completions", json=body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.text.count(": ping\n\n") >= 3
        chunks = scripts.streamed(one.client(), scripts.SAY)
        assert (
            "".join(c.choices[0].delta.content or "" for c in chunks) == scripts.HELLO
        )


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_hang_up(stream):
    """Row 25 of the good ones: gone from the engine within a second."""
    with servers.running() as one:
        one.engine.delay_s = 0.02
        client = one.client(timeout=0.5)
        how = {"max_tokens": 2000, "extra_body": {"ignore_eos": True}}
        if stream:
            got = scripts.ask(one.client(), scripts.SAY, stream=True, **how)
            next(got)
            eventually(lambda: metric(one, "qwen_jax:num_requests_running") == 1)
            got.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                scripts.ask(client, scripts.SAY, **how)
        eventually(lambda: one.engine.cancelled, 1.0)
        eventually(lambda: metric(one, "qwen_jax:num_requests_running") == 0, 1.0)
        assert metric(one, "qwen_jax:requests_cancelled_total") == 1
        assert one.app.in_flight == 0 and not one.app.board.flights


def test_metrics():
    """The names people's dashboards know, and what they count."""
    with servers.running(script=scripts.SCRIPT) as one:
        client = one.client()
        made = scripts.ask(client, scripts.SAY)
        scripts.ask(client, scripts.SAY, max_tokens=1)
        client.completions.with_raw_response.create(model="tiny", prompt="x")
        prompt = made.usage.prompt_tokens
        name = {"model_name": "tiny"}
        of = "qwen_jax:"
        assert metric(one, of + "prompt_tokens_total", **name) == 2 * prompt + 1
        total = made.usage.completion_tokens + 1 + 16
        assert metric(one, of + "generation_tokens_total", **name) == total
        done = of + "request_success_total"
        assert metric(one, done, finished_reason="length", **name) == 2
        assert metric(one, done, finished_reason="stop", **name) == 1
        first = of + "time_to_first_token_seconds_count"
        assert metric(one, first, **name) == 3
        for more, each_s in (("queue", 0.25), ("prefill", 0.5)):
            times = f"{of}request_{more}_time_seconds"
            assert metric(one, times + "_count", **name) == 3
            assert metric(one, times + "_sum", **name) == 3 * each_s
        for more in ("request_prompt_tokens", "request_generation_tokens"):
            assert metric(one, f"{of}{more}_count", **name) == 3
        between = metric(one, of + "inter_token_latency_seconds_count", **name)
        assert between == total - 3
        assert metric(one, of + "prefix_cache_queries_total", **name) == 100
        assert metric(one, of + "prefix_cache_hits_total", **name) == 40
        assert metric(one, of + "compile_total", **name) == 3
        assert metric(one, of + "model_version_info", **name) == 1
        route = {"handler": "/v1/chat/completions", "method": "POST", "status": "200"}
        assert metric(one, "http_requests_total", **route) == 2
        httpx.get(f"{one.url}/v1/{'x' * 50}")
        none = {"handler": "none", "method": "GET", "status": "404"}
        assert metric(one, "http_requests_total", **none) == 1
    with servers.running(metrics_prefix="vllm:") as one:
        assert "vllm:num_requests_running{" in httpx.get(f"{one.url}/metrics").text
        drafts = "vllm:spec_decode_num_"
        assert metric(one, drafts + "drafts_total", **name) == 5
        assert metric(one, drafts + "draft_tokens_total", **name) == 15
        assert metric(one, drafts + "accepted_tokens_total", **name) == 9


@pytest.mark.parametrize("rest", ["enough", "too little"])
def test_the_end(rest):
    """Draining: /ready and new requests get 503, those in flight finish, or end with an
    error frame at the timeout; then the server is gone."""
    shutdown_s = 20.0 if rest == "enough" else 0.5
    with servers.running(script=scripts.SCRIPT, shutdown_s=shutdown_s) as one:
        client = one.client()
        assert scripts.ask(client, scripts.SAY)  # its connection stays
        one.engine.delay_s = 0.05
        stream = scripts.ask(client, scripts.SAY, stream=True)
        text = next(stream).choices[0].delta.content
        one.server.drain()
        begun_s = time.monotonic()
        assert httpx.get(f"{one.url}/ready").json()["error"]["code"] == "draining"
        assert httpx.get(f"{one.url}/health").status_code == 200
        told(
            lambda: scripts.ask(one.client(), scripts.SAY),
            *(503, "service_unavailable", None, "draining"),
        )
        if rest == "enough":
            text += "".join(c.choices[0].delta.content or "" for c in stream)
            assert text == scripts.HELLO
        else:
            with pytest.raises(openai.APIError) as caught:
                list(stream)
            assert caught.value.code == "draining"
        one.thread.join(10)
        assert not one.thread.is_alive()
        assert rest == "enough" or time.monotonic() - begun_s < shutdown_s + 1
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", one.port), 1).close()


def test_what_the_log_has(caplog):
    """Neither keys, nor query strings, nor prompts."""
    key = "sk-test-0123456789"
    with caplog.at_level(logging.DEBUG), servers.running(keys=[key]) as one:
        one.client(key).completions.create(model="tiny", prompt="very private")
        one.raw(f"GET /v1/models?api_key={key} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        mine = {"authorization": f"Bearer {key}"}
        httpx.get(f"{one.url}/v1/models?private=1", headers=mine)
        ours = [
            x.getMessage() for x in caplog.records if x.name.startswith(("qwen", "uvi"))
        ]
    assert any("/v1/completions 200" in line for line in ours)
    assert not any(
        word in line for line in ours for word in (key, "private", "api_key")
    )
