# SPDX-License-Identifier: Apache-2.0
"""Bytes that no honest client sends: each is answered by name, soon, in little memory,
and the requests of others are answered as before.

Rows of the list of bad inputs, by number; names without a file are of this one:
1-11 json. 12 packed_bodies. 13 a_body_without_end. 14-15 lengths_that_lie. 16 headers.
17 slow_clients. 18 idle_connections; test_http_limits: ten_thousand_connections.
19 paths. 20 verbs_and_upgrades. 21-32 parameters; 30 integers_of_any_size; 31 also
test_engine: penalties_biases_and_logprobs. 33-40 test_grammar: schemas_that_cannot_be,
schemas_that_look_dear_are_not; test_openai_bad: schemas, schemas_that_are_not_there.
41 test_openai_bad: tools; test_openai_tools: a_tool_of_any_name.
42 answers_that_imitate_calls. 43 test_openai_bad: unknown_fields.
44 test_openai_bad: settings_of_templates. 45-46 test_http_limits:
templates_that_misbehave. 47-48 control_tokens_in_texts. 49-50 long_texts.
51-52 test_openai_bad: images, ten_thousand_frames; tests/data/test_image:
bad_pictures_are_named.
53-54 tests/models/test_safetensors: a_file_that_lies_is_named, names_are_never_paths.
55 tests/models/test_gguf_file: a_file_that_lies_is_refused, ten_thousand_times.
56 tests/models/test_config_json. 57 tests/data/test_tokenizer: bad_files. 58 none, for
there are no adapters yet. 59 tests/checkpoint/test_damage, without links that lead out.
60 test_openai_bad: keys; test_http_limits: wrong_keys_take_the_same_time.
61 test_openai_faults: what_the_log_has. 62 test_command: a_full_disk_and_a_hangup;
test_guard: a_full_disk, a_line_that_was_cut; many_at_once.
"""

import concurrent.futures
import gzip
import json
import pathlib
import resource
import socket
import time

import httpx
import pytest

from qwen_jax.serve import listening
from tests.data import chat_templates
from tests.serve import fake_engine, scripts, servers

INVALID = "invalid_request_error"
CHAT = "/v1/chat/completions"
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture(scope="module")
def server():
    model = fake_engine.model(chat_templates.HERMES)
    with servers.running(model, scripts.SCRIPT) as one:
        yield one


@pytest.fixture(scope="module")
def other(server):
    """One for all tests: making a client takes longer than most of them."""
    return server.client()


@pytest.fixture(autouse=True)
def others(other):
    """Another client, before, after and all the while."""
    client = other
    stream = scripts.ask(client, scripts.SAY, stream=True)
    begun_s = time.monotonic()
    yield
    assert time.monotonic() - begun_s < 10
    text = "".join(c.choices[0].delta.content or "" for c in stream)
    assert text == scripts.HELLO
    whole = scripts.ask(client, scripts.SAY).choices[0].message.content
    assert whole == scripts.HELLO


def chat_of(**more):
    body = {"model": "tiny", "messages": scripts.SAY} | more
    return json.dumps(body).encode()


BODY = chat_of()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'"x"',
        BODY[:-5],
        b"[" * 100_000,
        b'{"x":' * 100_000,
        b'{"seed": ' + b"1" * 5000 + b"}",
        b'{"model": NaN}'.replace(b"NaN", b"[NaN]"),
        b'{"model": [1e999]}',
        b'{"model": "tiny", "model": "x"}',
        BODY.replace(b"say hello", b"\\ud800"),
        BODY.replace(b"say hello", b"\\udc00\\ud800"),
        BODY.replace(b"say hello", b"\xff\xfe"),
        BODY.replace(b"say hello", b"\xed\xa0\x80"),
        BODY.replace(b"say hello", b"\\u0000"),
        b"\xef\xbb\xbf" + BODY,
        BODY.decode().encode("utf-16"),
        BODY + BODY,
        b'{"x": [' + b"[]," * 2_000_000 + b"[]]}",
        b'{"a": "' + b'\\"' * 1_000_000 + b'", "b": [' + b"0," * 300_000 + b"0]}",
    ],
    ids=lambda body: repr(body[:20]),
)
def test_json(server, body):
    """Rows 1 to 11."""
    begun_s = time.monotonic()
    answer = server.raw(servers.post(CHAT, body))
    assert servers.error_of(answer) == (400, INVALID, None, "invalid_json")
    assert time.monotonic() - begun_s < 3


def test_packed_bodies(server):
    """Row 12: nothing is unpacked, so nothing explodes."""
    for coding in ("gzip", "deflate", "br", "zstd"):
        bomb = gzip.compress(b"0" * 10_000_000)
        data = servers.post(CHAT, bomb, f"Content-Encoding: {coding}")
        want = (415, INVALID, None, "unsupported_content_encoding")
        assert servers.error_of(server.raw(data)) == want


def test_a_body_without_end(server):
    """Row 13: refused at the limit, cut off when it goes on; not kept in memory."""
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    sent = 0
    with socket.create_connection(("127.0.0.1", server.port), 5) as one:
        one.sendall((head + "Transfer-Encoding: chunked\r\n\r\n").encode())
        try:
            while sent < 2**30:
                one.sendall(chunk)
                sent += len(chunk)
        except OSError:  # hung up on: what is wanted
            pass
        else:
            raise AssertionError("a gigabyte was taken")
    assert sent < 100 * 2**20
    after_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after_kib - before_kib < 80 * 1024


def test_a_body_that_is_too_large_in_chunks(server):
    """Row 13: the answer is there for who looks."""
    answer = httpx.post(
        server.url + CHAT,
        content=(b"x" * 2**20 for _ in range(12)),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


def test_lengths_that_lie(server):
    """Rows 14 and 15."""
    data = servers.post(CHAT, BODY).replace(
        f"Content-Length: {len(BODY)}".encode(), b"Content-Length: 10"
    )
    assert servers.error_of(server.raw(data))[0] == 400
    for length in (b"-1", b"x", b"1" * 5000, b"9" * 19, b"5, 6"):
        data = servers.post(CHAT, BODY).replace(str(len(BODY)).encode(), length)
        status, _, _, code = servers.error_of(server.raw(data))
        assert (status, code) in ((400, "invalid_http"), (413, "request_too_large"))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    both = "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    want = (400, INVALID, None, "invalid_http")
    assert servers.error_of(server.raw((head + both).encode())) == want
    for coding in ("gzip", "chunked, chunked", "identity"):
        data = f"{head}Transfer-Encoding: {coding}\r\n\r\n0\r\n\r\n".encode()
        assert servers.error_of(server.raw(data))[0] in (400, 501)


def test_chunks_that_lie(server):
    """A chunk that is none, in the midst of a body."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += "Transfer-Encoding: chunked\r\n\r\n"
    for chunk in (b"zz\r\nabc\r\n", b"-5\r\nabc\r\n", b"fffffffffffffffffffff\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), 5) as one:
            one.sendall(head.encode() + b"5\r\nhello\r\n" + chunk)
            answer = servers.answer_of(one)
        assert servers.error_of(answer) == (400, INVALID, None, "invalid_http")


@pytest.mark.parametrize(
    "head",
    [
        GET + b"X-Long: " + b"x" * 65536 + b"\r\n\r\n",
        GET + b"X-Long: " + b"x" * 20_000 + b"\r\n\r\n",
        GET + b"X-A: b\r\n" * 1000 + b"\r\n",
        GET + b"X-A: b\r\n" * 101 + b"\r\n",
        b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /health?" + b"x" * 17_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        GET + b"X-Endless: " + b"x" * 500_000,
    ],
    ids=["64 KiB", "20 kB", "1000", "101", "path", "query", "no end"],
)
def test_headers(server, head):
    """Row 16."""
    want = (431, INVALID, None, "headers_too_large")
    assert servers.error_of(server.raw(head)) == want


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200 + b"\r\n\r\n",
        b"hello\r\n\r\n",
        b"GET /health\r\n\r\n",
        b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
        b"GET /health HTTP/1.1\r\n : b\r\nHost: x\r\n\r\n",
        b"GET /he alth HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_no_http(server, data):
    assert servers.error_of(server.raw(data)) == (400, INVALID, None, "invalid_http")


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/v1/models/../../etc/passwd",
        "/v1/models/%2e%2e%2fetc%2fpasswd",
        "//v1//models",
        "/v1/models%00",
        "/V1/models",
        "/%ff%fe",
        "/docs",
        "/openapi.json",
        "/admin",
        "/tokenize",
        "/v1/load_lora_adapter",
        "/pause",
        "*",
        "http://evil/v1/x",
    ],
)
def test_paths(server, path):
    """Row 19."""
    answer = server.raw(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    status, kind, _, code = servers.error_of(answer)
    assert (status, kind) == (404, INVALID)
    assert code in ("unknown_url", "model_not_found") and b"root:" not in answer


def test_verbs_and_upgrades(server):
    """Row 20."""
    for verb in ("BREW", "CONNECT", "TRACE", "OPTIONS", "PROPFIND", "X" * 40):
        answer = server.raw(f"{verb} {CHAT} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        want = (405, INVALID, None, "method_not_allowed")
        assert servers.error_of(answer) == want
    upgrade = (
        b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    )
    upgrade += b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    data = f"GET {CHAT} HTTP/1.1\r\nHost: x\r\n".encode() + upgrade
    assert servers.error_of(server.raw(data))[0] == 405
    assert server.raw(GET + upgrade).startswith(b"HTTP/1.1 200")


def test_requests_in_one_packet(server):
    """Pipelined: answered in order, a stream among them."""
    bodies = [chat_of(stream=True), chat_of(n=0), chat_of(max_tokens=1)]
    data = b"".join(servers.post(CHAT, body) for body in bodies)
    with socket.create_connection(("127.0.0.1", server.port), 10) as one:
        one.sendall(data[:-2])
        time.sleep(0.1)
        one.sendall(data[-2:])
        got = b""
        while got.count(b"HTTP/1.1 ") < 3 or b'"usage"' not in got:
            more = one.recv(65536)
            assert more
            got += more
    parts = got.split(b"HTTP/1.1 ")[1:]
    assert [part[:3] for part in parts] == [b"200", b"400", b"200"]
    assert b"data: [DONE]" in parts[0] and b"integer_below_min_value" in parts[1]


def test_slow_clients():
    """Row 17: slow bodies and headers are answered and closed, silent ones closed."""
    with servers.running(body_s=0.5, header_s=0.5) as one:
        begun_s = time.monotonic()
        data = servers.post(CHAT, BODY)
        for count in (len(data) - 5, 40, 0):
            with socket.create_connection(("127.0.0.1", one.port), 5) as slow:
                slow.sendall(data[:count])
                answer = servers.answer_of(slow)
            if count:
                want = (408, INVALID, None, "request_timeout")
                assert servers.error_of(answer) == want
            else:
                assert answer == b""
        with socket.create_connection(("127.0.0.1", one.port), 5) as slow:
            answer = b""
            try:
                for i in range(len(data)):
                    slow.sendall(data[i : i + 1])  # a byte at a time keeps nothing open
                    time.sleep(0.02)
            except OSError:  # hung up on: what was said before counts
                pass
            answer = servers.answer_of(slow)
            assert answer == b"" or servers.error_of(answer)[0] == 408
        assert time.monotonic() - begun_s < 8
        assert httpx.get(f"{one.url}/health").status_code == 200


def test_idle_connections():
    """Row 18: so many are kept and no more; those that are kept go on."""
    with servers.running(max_connections=50) as one:
        client = httpx.Client()
        assert client.get(f"{one.url}/health").status_code == 200
        idle = [
            socket.create_connection(("127.0.0.1", one.port), 5) for _ in range(120)
        ]
        refused = 0
        for connection in idle[60:]:
            answer = servers.answer_of(connection)
            refused += servers.error_of(answer)[3] == "overloaded"
        assert refused == 60
        assert client.get(f"{one.url}/health").status_code == 200
        for connection in idle:
            connection.close()
        client.close()
        time.sleep(0.2)
        assert httpx.get(f"{one.url}/health").status_code == 200


@pytest.mark.parametrize(
    ("path", "given", "want"),
    [
        ("/v1/completions", {"prompt": ""}, ("prompt", "invalid_value")),
        ("/v1/completions", {"prompt": []}, ("prompt", "empty_array")),
        ("/v1/completions", {"prompt": [[]]}, ("prompt", "empty_array")),
        ("/v1/completions", {"prompt": [-1]}, ("prompt[0]", "integer_below_min_value")),
        (
            "/v1/completions",
            {"prompt": [2**40]},
            ("prompt[0]", "integer_above_max_value"),
        ),
        ("/v1/completions", {"prompt": [100_000]}, ("prompt", "invalid_value")),
        ("/v1/completions", {"prompt": [1.5]}, ("prompt", "invalid_type")),
        (
            "/v1/completions",
            {"prompt": "x", "n": 10**9},
            ("n", "integer_above_max_value"),
        ),
        (
            "/v1/completions",
            {"prompt": "x", "best_of": 10**6},
            ("best_of", "integer_above_max_value"),
        ),
        (
            "/v1/completions",
            {"prompt": "x", "best_of": 2},
            ("best_of", "invalid_value"),
        ),
        (
            "/v1/completions",
            {"prompt": "x", "max_tokens": 2**63},
            ("max_tokens", "integer_above_max_value"),
        ),
        (
            "/v1/completions",
            {"prompt": "x", "logprobs": 10**6},
            ("logprobs", "integer_above_max_value"),
        ),
        (
            "/v1/completions",
            {"prompt": "x", "prompt_logprobs": 5},
            ("prompt_logprobs", "unknown_parameter"),
        ),
        (
            "/v1/completions",
            {"prompt": ["x"] * 65},
            ("prompt", "array_above_max_length"),
        ),
        ("/v1/embeddings", {"input": ""}, ("input", "invalid_value")),
        (
            "/v1/embeddings",
            {"input": "x", "dimensions": 0},
            ("dimensions", "integer_below_min_value"),
        ),
        (
            "/v1/embeddings",
            {"input": "x", "dimensions": 33},
            ("dimensions", "integer_above_max_value"),
        ),
        (
            "/v1/embeddings",
            {"input": "x", "encoding_format": "hex"},
            ("encoding_format", "invalid_value"),
        ),
        (
            CHAT,
            {"metadata": {str(i): "" for i in range(100_000)}},
            ("metadata", "object_above_max_properties"),
        ),
        (CHAT, {"user": "x" * 9_000_000}, ("user", "string_above_max_length")),
        (
            CHAT,
            {"logit_bias": {str(i): 1 for i in range(100_000)}},
            ("logit_bias", "invalid_value"),
        ),
    ],
    ids=lambda x: str(x)[:40],
)
def test_parameters(server, path, given, want):
    """Rows 21 to 32."""
    body = json.dumps(
        {"model": "tiny"} | ({"messages": scripts.SAY} if path == CHAT else {}) | given
    )
    got = servers.error_of(server.raw(servers.post(path, body.encode())))
    assert got == (400, INVALID, *want)


@pytest.mark.parametrize(
    "given",
    [{"temperature": -0.0}, {"temperature": 1e-45}, {"stop": ["ab", "a", "abc", "b"]}],
    ids=str,
)
def test_parameters_at_the_edge(server, given):
    """Rows 27 and 28: strange, and right."""
    answer = server.raw(servers.post(CHAT, chat_of(**given)))
    assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "name", ["n", "max_tokens", "max_completion_tokens", "top_k", "top_logprobs"]
)
@pytest.mark.parametrize("value", [-1, -(2**31), -(2**63), -(2**70), 2**31, 2**64])
def test_integers_of_any_size(server, name, value):
    """Row 30."""
    got = servers.error_of(server.raw(servers.post(CHAT, chat_of(**{name: value}))))
    side = "below_min" if value < 0 else "above_max"
    assert got == (400, INVALID, name, f"integer_{side}_value")


@pytest.mark.parametrize(
    "token",
    [
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|vision_start|>",
        "<tool_call>",
        "<think>",
    ],
)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_control_tokens_in_texts(server, role, token):
    """Rows 47 and 48: letters from anybody but the template are letters."""
    words = server.engine.model.tokenizer
    before = ask_ids(server, [{"role": role, "content": "a"}, *scripts.SAY])
    after = ask_ids(server, [{"role": role, "content": token}, *scripts.SAY])
    special = words.specials[token]
    kept = role == "assistant" and token in ("<tool_call>", "<think>")
    assert after.count(special) == before.count(special) + kept


def ask_ids(server, messages):
    assert server.raw(servers.post(CHAT, chat_of(messages=messages))).startswith(
        b"HTTP/1.1 200"
    )
    return server.engine.seen[-1].prompt


def test_long_texts(server):
    """Rows 49 and 50: millions of letters, of the kinds that tokenizers fear."""
    for text in (
        " " * 10**6,
        "a\u0301" * 200_000,
        "x" * 10**6,
        "one " * 10**6,
        "\u200b" * 10**6,
    ):
        begun_s = time.monotonic()
        body = chat_of(messages=scripts.user(text))
        got = servers.error_of(server.raw(servers.post(CHAT, body), wait_s=30))
        assert got == (400, INVALID, "messages", "context_length_exceeded")
        assert time.monotonic() - begun_s < 4


def test_answers_that_imitate_calls(server):
    """Row 42: a parser reads them, and nothing runs."""
    mark = pathlib.Path("/tmp/qwen_jax_was_here")
    code = "__import__('os').system('touch /tmp/qwen_jax_was_here')"
    server.engine.script["run it"] = (
        "<tool_call>\n<function=weather>\n<parameter=days>\n"
        + code
        + "\n</parameter>\n"
        "</function>\n</tool_call>"
    )
    made = scripts.ask(server.client(), scripts.user("run it"), tools=[scripts.WEATHER])
    call = made.choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"days": code}
    assert not mark.exists()


def test_many_at_once(server):
    """A mixture of all that is bad, and scrapes of metrics, beside others' requests."""
    bad = [
        servers.post(CHAT, b"[" * 50_000),
        GET + b"X: " + b"x" * 30_000 + b"\r\n\r\n",
        servers.post(CHAT, chat_of(n=10**9)),
        servers.post(CHAT, BODY)[:-10],
        b"\x00" * 1000,
        GET.replace(b"/health", b"/metrics") + b"\r\n",
    ]

    def attack(i):
        with socket.create_connection(("127.0.0.1", server.port), 5) as one:
            one.sendall(bad[i % len(bad)])
            if i % 3:
                one.settimeout(2)
                try:
                    one.recv(65536)
                except OSError:  # late or hung up on
                    pass

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        attacks = [pool.submit(attack, i) for i in range(150)]
        client, texts = server.client(), set()
        for _ in range(10):
            made = scripts.ask(client, scripts.SAY, temperature=0)
            texts.add(made.choices[0].message.content)
        for one in attacks:
            one.result()
    assert texts == {scripts.HELLO}
    assert not server.app.board.flights


def test_a_body_that_drips_after_the_answer():
    """Answered without being read; what drips on is cut off."""
    with servers.running(keys=["sk-test-0123456789"]) as one:
        data = servers.post(CHAT, b"x" * 1000)
        with socket.create_connection(("127.0.0.1", one.port), 5) as slow:
            slow.sendall(data[:-900])
            assert servers.error_of(servers.answer_of(slow))[0] == 401
            begun_s, cut = time.monotonic(), False
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(listening, "LINGER_S", 0.3)
                while not cut and time.monotonic() - begun_s < 3:
                    try:
                        slow.sendall(b"x")
                        time.sleep(0.05)
                    except OSError:
                        cut = True
        assert cut
        assert httpx.get(f"{one.url}/health").status_code == 200
