# SPDX-License-Identifier: Apache-2.0
"""Templates of a model that go beyond all bounds, ten thousand connections, a hundred
thousand wrong keys."""

import contextlib
import dataclasses
import resource
import socket
import statistics
import threading
import time

import httpx
import pytest

from qwen_jax.serve import errors, gate
from tests.data import chat_templates, test_chat
from tests.serve import fake_engine, scripts, servers

INVALID = "invalid_request_error"
CHAT = "/v1/chat/completions"
CONNECTIONS, KEPT = 10_000, 4096


@pytest.mark.parametrize("name", ["loops", "huge", "grows", "format", "file"])
def test_templates_that_misbehave(templates, name):
    """Rows 45 and 46, and what a template may not reach: named, soon, without a word of
    this machine, and requests of another model are answered meanwhile."""
    others = []

    def ask():
        client = templates.client()
        for _ in range(5):
            made = scripts.ask(client, scripts.SAY)
            others.append(made.choices[0].message.content)

    thread = threading.Thread(target=ask)
    thread.start()
    begun_s = time.monotonic()
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "a"}}]}}'
    answer = templates.raw(servers.post(CHAT, body.encode()))
    took_s = time.monotonic() - begun_s
    thread.join()
    assert servers.error_of(answer) == (400, INVALID, "messages", "invalid_value")
    assert took_s < 10 and others == [scripts.HELLO] * 5
    assert b"Traceback" not in answer and b".py" not in answer


@pytest.fixture(scope="module")
def templates():
    """Models that differ in their template alone."""
    model = fake_engine.model(chat_templates.HERMES)
    with servers.running(model, scripts.SCRIPT) as one:
        served = one.app.models.get(servers.NAME)
        for name, (source, _) in test_chat.BROKEN.items():
            bad = dataclasses.replace(model.template, sources={"default": source})
            other = dataclasses.replace(model, template=bad)
            one.app.models.put(dataclasses.replace(served, name=name, model=other))
        yield one


@contextlib.contextmanager
def many_files(count):
    """Leave to have so many open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        pytest.skip(f"this system allows {hard} open files, and it takes {count}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def wait_for(one, fits):
    """Until the server has a number of connections that fits."""
    until_s = time.monotonic() + 10
    while not fits(len(one.server.server_state.connections)):
        assert time.monotonic() < until_s
        time.sleep(0.05)


@pytest.mark.slow
def test_ten_thousand_connections():
    """Row 18: 4,096 are kept, the others are told, who is there is answered as before,
    and whoever comes when they are gone."""
    model = fake_engine.model(chat_templates.HERMES)
    with many_files(CONNECTIONS + KEPT + 500), contextlib.ExitStack() as stack:
        one = stack.enter_context(servers.running(model, scripts.SCRIPT, header_s=300))
        client = one.client()
        idle, longest_s = [], 0.0
        for i in range(CONNECTIONS):
            new = socket.create_connection(("127.0.0.1", one.port), 10)
            idle.append(stack.enter_context(new))
            if i % 500 == 0:
                begun_s = time.monotonic()
                made = scripts.ask(client, scripts.SAY)
                longest_s = max(longest_s, time.monotonic() - begun_s)
                assert made.choices[0].message.content == scripts.HELLO
        for connection in idle[KEPT:]:
            told = servers.error_of(servers.answer_of(connection))
            assert told == (429, "server_overloaded", None, "overloaded")
        wait_for(one, lambda count: count == KEPT)
        begun_s = time.monotonic()
        assert httpx.get(f"{one.url}/health").status_code == 429
        assert time.monotonic() - begun_s < 5 and longest_s < 5
        for connection in idle:
            connection.close()
        wait_for(one, lambda count: count <= 1)
        assert httpx.get(f"{one.url}/health").status_code == 200
        made = scripts.ask(client, scripts.SAY)
        assert made.choices[0].message.content == scripts.HELLO


@pytest.mark.slow
def test_wrong_keys_take_the_same_time():
    """Row 60: wrong from the first letter on or only in the last, the time tells
    nothing of how far a key is right."""
    right = "sk-" + "0123456789abcdef" * 4
    keys = gate.Keys([right, "sk-another-0123456789"])
    wrong = [
        f"Bearer {right[:n]}x{right[n + 1 :]}".encode()
        for n in range(0, len(right), 13)
    ]
    took_ns = [[] for _ in wrong]
    for i in range(100_000):
        at = i % len(wrong)
        begun_ns = time.perf_counter_ns()
        with contextlib.suppress(errors.ApiError):
            keys.holder(wrong[at])
            raise AssertionError("a wrong key was taken")
        took_ns[at].append(time.perf_counter_ns() - begun_ns)
    middle = [statistics.median(times) for times in took_ns]
    assert max(middle) / min(middle) < 1.05, middle
