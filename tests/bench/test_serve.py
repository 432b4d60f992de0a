# SPDX-License-Identifier: Apache-2.0
"""`bench serve`: arrivals by their statistics, figures by hand, streams cut anywhere,
known delays of a fake engine behind the real server, failures counted, scenarios."""

import asyncio
import contextlib
import importlib
import json
import math
import socket
import statistics
import sys
import threading

import numpy as np
import pytest

from qwen_jax import cli, config
from qwen_jax.bench import serve, serve_load, serve_report, serve_scenarios
from tests.serve import scripts, servers

IDS = 300


@pytest.fixture(scope="module")
def server():
    with servers.running(script=scripts.SCRIPT, max_waiting=6) as one:
        yield one


@pytest.fixture
def engine(server):
    """A quick one, with nothing wrong."""
    server.engine.delay_s = server.engine.first_delay_s = 0.0
    server.engine.full, server.engine.fault = False, None
    return server.engine


def work(count, **how):
    how = {"input_tokens": 5, "output_tokens": 10, "vocab": IDS} | how
    return serve_load.Work(num_prompts=count, **how)


def load(url, todo, *, most=0, **how):
    """A run of requests."""
    fields = {"temperature": 0.0, "ignore_eos": True}

    async def go():
        client = serve_load.Client(
            f"{url}/v1", servers.NAME, **({"fields": fields} | how)
        )
        try:
            return await serve_load.run(client, todo, most=most)
        finally:
            await client.close()

    return asyncio.run(go())


# --- what is asked ---


def test_arrivals_are_a_poisson_process():
    due = serve_load.arrivals(np.random.default_rng(5), 50.0, 20_000)
    gaps = np.sort(np.diff(due, prepend=0.0))
    assert np.mean(gaps) == pytest.approx(1 / 50, rel=0.03)
    # Kolmogorov and Smirnov's distance to the exponential law, at the level of 0.1 %.
    steps = np.arange(1, len(gaps) + 1) / len(gaps)
    distance = np.abs(1 - np.exp(-50 * gaps) - steps).max()
    assert distance < 1.95 / math.sqrt(len(gaps))
    counts = np.bincount(due.astype(int))[:-1]  # of whole seconds
    assert np.var(counts) / np.mean(counts) == pytest.approx(1.0, abs=0.25)
    gaps = np.diff(due, prepend=0.0)
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.03


def test_a_seed_fixes_what_is_asked_and_a_rate_only_when():
    slow = serve_load.asks(work(50, rate=2.0, range_ratio=0.4, seed=3))
    fast = serve_load.asks(work(50, rate=8.0, range_ratio=0.4, seed=3))
    assert slow == serve_load.asks(work(50, rate=2.0, range_ratio=0.4, seed=3))
    for one, other in zip(slow, fast, strict=True):
        assert one.due_s == pytest.approx(4 * other.due_s)
        assert (one.prompt, one.output_tokens) == (other.prompt, other.output_tokens)
    assert serve_load.asks(work(50, seed=4))[0].prompt != slow[0].prompt
    assert all(one.due_s == 0 for one in serve_load.asks(work(9)))


def test_lengths_and_a_shared_prefix():
    how = {"input_tokens": 10, "output_tokens": 20, "range_ratio": 0.5}
    asked = serve_load.asks(work(400, prefix_tokens=7, **how))
    assert {len(one.prompt) - 7 for one in asked} == set(range(5, 16))
    assert {one.output_tokens for one in asked} == set(range(10, 31))
    assert {one.input_tokens - len(one.prompt) for one in asked} == {0}
    assert len({tuple(one.prompt[:7]) for one in asked}) == 1
    assert len({tuple(one.prompt[7:]) for one in asked}) == 400
    assert all(0 <= i < IDS for one in asked for i in one.prompt)
    texts = serve_load.asks(work(3, prefix_tokens=2, vocab=0))
    assert [len(one.prompt.split(" ")) for one in texts] == [7, 7, 7]
    assert len({one.prompt.split()[0] for one in texts}) == 1


# --- figures ---


def made(sent_s, first_s, gaps_s, tokens, status=serve_load.OK, number=0):
    ended_s = first_s + sum(gaps_s)
    one = serve_load.Sent(number, sent_s, sent_s, first_s, ended_s, gaps_s)
    one.events, one.input_tokens = len(gaps_s) + 1, 7
    one.output_tokens, one.asked_tokens, one.status = tokens, 4, status
    return one


@pytest.fixture
def records():
    draw = np.random.default_rng(0)
    sent = []
    for i in range(37):
        times = draw.exponential(0.1, 5)
        sent.append(made(i / 10, i / 10 + times[0], list(times[1:]), 4 + i % 3))
    sent.append(made(1.0, 1.5, [], 1))  # one token: no time a token
    sent.append(made(2.0, 2.004, [], 0, status="429"))
    sent.append(made(2.0, 2.008, [], 0, status="503"))
    sent.append(made(2.0, 9.0, [], 0, status="cut"))
    return sent


def test_figures_by_hand(records):
    figures = serve_report.summary(serve_load.Run(records, 8.0, [0.0, 0.01]))
    done = records[:38]
    tokens = sum(4 + i % 3 for i in range(37)) + 1
    assert (figures["completed"], figures["failed"], figures["short"]) == (38, 3, 1)
    assert figures["failed_by_status"] == {"429": 1, "503": 1, "cut": 1}
    assert figures["total_input_tokens"] == 38 * 7
    assert figures["total_output_tokens"] == tokens
    assert figures["request_throughput"] == 38 / 8
    assert figures["output_throughput"] == tokens / 8
    assert figures["total_token_throughput"] == (tokens + 38 * 7) / 8
    assert figures["request_goodput"] is None
    assert figures["refused"] == 2
    assert figures["mean_refusal_ms"] == pytest.approx(6.0)
    assert figures["p99_client_lag_ms"] == pytest.approx(9.9)
    by_hand = {
        "ttft": [one.first_s - one.sent_s for one in done],
        "itl": [gap for one in done for gap in one.gaps_s],
        "e2el": [one.first_s + sum(one.gaps_s) - one.sent_s for one in done],
        "tpot": [sum(x.gaps_s) / (x.output_tokens - 1) for x in done[:37]],
    }
    for name, values in by_hand.items():
        values = [1e3 * value for value in values]
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        wanted = {"mean": statistics.fmean(values), "median": statistics.median(values)}
        wanted["std"] = statistics.pstdev(values)
        wanted |= {f"p{p}": cuts[p - 1] for p in (50, 90, 95, 99)}
        for one, value in wanted.items():
            found = figures[f"{one}_{name}_ms"]
            assert found == pytest.approx(value, rel=1e-9), (one, name)


def test_goodput_counts_requests_within_every_limit():
    sent = [
        made(0.0, 0.1, [0.03, 0.03, 0.03], 4),  # ttft 100, tpot 30, e2el 190
        made(0.0, 0.3, [0.01, 0.01, 0.01], 4),  # 300, 10, 330
        made(0.0, 0.1, [0.09, 0.09, 0.09], 4),  # 100, 90, 370
        made(0.0, 0.1, [], 1),  # 100, none, 100
        made(0.0, 0.0, [], 0, status="500"),
    ]

    def goodput(*words):
        limits_ms = serve_report.limits(words)
        run = serve_load.Run(sent, 2.0, [])
        return serve_report.summary(run, limits_ms)["request_goodput"]

    assert goodput("ttft:200") == 3 / 2
    assert goodput("ttft:200", "tpot:50") == 2 / 2
    assert goodput("tpot:50", "e2el:330.5") == 3 / 2
    assert goodput("tpot:10.5", "ttft:99") == 0.0


def test_a_run_without_answers_has_no_times():
    run = serve_load.Run([made(0.0, 0.1, [], 0, status="500")], 1.0, [])
    figures = serve_report.summary(run, {"ttft": 1.0})
    assert figures["completed"] == 0 and figures["mean_ttft_ms"] is None
    assert figures["request_goodput"] == 0.0
    assert "failed: 500" in serve_report.text(figures)
    json.dumps(figures, allow_nan=False)


# --- streams ---

STREAM = (
    ": ping\n\n"
    'data: {"a": "世界 🙂"}\n\n'
    'event: x\r\ndata: {"b":\r\ndata: 2}\r\nid: 7\r\n\r\n'
    "\n\n"
    "data:[DONE]\n\n"
    "data: without an end"
).encode()
WANTED = ['{"a": "世界 🙂"}', '{"b":\n2}', "[DONE]"]


def test_events_cut_anywhere():
    for first in range(len(STREAM) + 1):
        for second in range(first, len(STREAM) + 1, 7):
            events = serve_load.Events()
            parts = (STREAM[:first], STREAM[first:second], STREAM[second:])
            assert [x for part in parts for x in events.push(part)] == WANTED
    events = serve_load.Events()
    singly = [STREAM[i : i + 1] for i in range(len(STREAM))]
    assert [x for one in singly for x in events.push(one)] == WANTED


@contextlib.contextmanager
def saying(answer: bytes):
    """A server that says these bytes to everybody, one at a time, and hangs up."""

    def serve_one(one):
        with one, contextlib.suppress(OSError):
            one.settimeout(5)
            with one.makefile("rb") as file:  # all of it: the rest would be a reset
                head = list(iter(file.readline, b"\r\n"))
                (length,) = (x for x in head if x.lower().startswith(b"content-length"))
                file.read(int(length.split(b":")[1]))
            for i in range(len(answer)):
                one.sendall(answer[i : i + 1])

    def accept():
        with contextlib.suppress(OSError):
            while True:
                one, _ = listener.accept()
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                serve_one(one)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)
    assert not thread.is_alive()


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n"
LAST = b"HTTP/1.1 %s\r\nconnection: close\r\n\r\n"
CHUNK = 'data: {"choices": [{"text": "世"}]}\n\n'.encode()
ROLE = b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n'
USAGE = (
    b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 9}}\n'
)
DONE = b"\ndata: [DONE]\n\n"


def test_a_stream_byte_by_byte():
    """The role is no token; tokens are the usage's where there is one."""
    with saying(HEAD + b"\r\n" + ROLE + CHUNK + CHUNK + USAGE + DONE) as url:
        (one,) = load(url, serve_load.asks(work(1))).sent
    assert (one.status, one.events, len(one.gaps_s)) == (serve_load.OK, 2, 1)
    assert (one.input_tokens, one.output_tokens) == (5, 9)
    with saying(HEAD + b"\r\n" + CHUNK * 3 + DONE) as url:
        (one,) = load(url, serve_load.asks(work(1, input_tokens=8))).sent
    assert (one.input_tokens, one.output_tokens) == (8, 3)


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [
        (HEAD + b"\r\n" + CHUNK, "cut", "without"),
        (HEAD + b"content-length: 999\r\n\r\n" + CHUNK, "cut", ""),
        (LAST % b"200 OK\r\ncontent-length: 2" + b"{}", "no stream", "no type"),
        (HEAD + b"\r\ndata: {oops\n\n", "no chunk", "oops"),
        (LAST % b"418 x\r\ncontent-length: 6" + b"a\n\x1b[2J", "418", "a ?[2J"),
        (HEAD + b"\r\ndata: [1]\n\n", "no chunk", "AttributeError"),
        (HEAD + b"\r\n" + CHUNK + b'data: {"error": "bad"}\n\n', "error frame", ""),
        (LAST % b"502 Bad\r\ncontent-length: 4" + b"<h1>", "502", "<h1>"),
        (b"", "no answer", "disconnected"),
    ],
)
def test_what_is_no_answer_is_a_failure(answer, status, said):
    with saying(answer) as url:
        run = load(url, serve_load.asks(work(2)), most=1)
    figures = serve_report.summary(run)
    assert figures["completed"] == 0 and figures["failed_by_status"] == {status: 2}
    assert said in figures["failed_said"][status]
    assert figures["mean_e2el_ms"] is None


# --- a server with known delays ---


def test_known_delays(server, engine):
    engine.first_delay_s, engine.delay_s = 0.2, 0.03
    # What was slept is a floor; above it there is the machine: of three runs the one
    # that others disturbed least is held to the tops.
    runs = [load(server.url, serve_load.asks(work(6))) for _ in range(3)]
    run = min(runs, key=lambda one: max(sent.e2el_s for sent in one.sent))
    figures = serve_report.summary(run, {"ttft": 150.0})
    firsts_ms = [1000 * sent.ttft_s for sent in run.sent]
    assert figures["median_ttft_ms"] == pytest.approx(statistics.median(firsts_ms))
    assert figures["completed"] == 6 and figures["short"] == 0
    assert figures["total_input_tokens"] == 30
    assert figures["total_output_tokens"] == 60
    assert 200 <= figures["median_ttft_ms"] < 400
    assert 29 <= figures["median_tpot_ms"] < 90
    assert 200 + 9 * 30 <= figures["median_e2el_ms"] < 1200
    assert figures["request_goodput"] == 0.0
    easy = serve_report.summary(run, {"ttft": 5e3, "e2el": 9e3})
    assert easy["request_goodput"] == easy["request_throughput"]
    assert all(
        sum(x.gaps_s) == pytest.approx(x.e2el_s - x.ttft_s, abs=0.1) for x in run.sent
    )


def in_flight(sent):
    return max(sum(x.sent_s <= y.sent_s < x.ended_s for x in sent) for y in sent)


def test_open_and_closed_loops(server, engine):
    engine.delay_s = 0.01
    closed = load(server.url, serve_load.asks(work(12)), most=3).sent
    assert in_flight(closed) == 3 and all(x.ok for x in closed)
    engine.first_delay_s = 1.5
    todo = serve_load.asks(work(6, rate=30.0, output_tokens=2))
    opened = load(server.url, todo).sent
    assert in_flight(opened) == 6  # none waits for another
    for ask, one in zip(todo, opened, strict=True):
        assert ask.due_s <= one.sent_s
        assert one.number == ask.number


def test_failures_are_counted_by_status(server, engine):
    def statuses(count=4, **how):
        run = load(server.url, serve_load.asks(work(count)), **how)
        figures = serve_report.summary(run)
        assert figures["completed"] + figures["failed"] == count
        return figures

    engine.full = True
    figures = statuses()
    assert figures["failed_by_status"] == {"429": 4} and figures["refused"] == 4
    assert "more requests than it can take" in figures["failed_said"]["429"]
    assert 0 < figures["p95_refusal_ms"] < 2000
    engine.full, engine.fault = False, "submit"
    assert statuses()["failed_by_status"] == {"500": 4}
    engine.fault = "piece"
    figures = statuses()
    assert figures["failed_by_status"] == {"error frame internal_error": 4}
    engine.fault, engine.first_delay_s = None, 1.0
    assert statuses(2, timeout_s=0.2)["failed_by_status"] == {"timeout": 2}
    figures = statuses(12)  # no more than six may wait
    assert figures["completed"] == 6 and figures["failed_by_status"] == {"429": 6}


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as one:
        url = f"http://127.0.0.1:{one.getsockname()[1]}"
    run = load(url, serve_load.asks(work(2)))
    assert [x.status for x in run.sent] == ["connect", "connect"]


def test_chats_with_a_key():
    with servers.running(keys=("sk-right-key",)) as one:
        todo = serve_load.asks(work(2, chat=True))
        wrong = load(one.url, todo, key="sk-wrong-key").sent
        right = load(one.url, todo, key="sk-right-key").sent
    assert [x.status for x in wrong] == ["401", "401"]
    assert [x.output_tokens for x in right] == [10, 10]


# --- scenarios ---


def test_bars_of_an_overload():
    calm = {"p95_ttft_ms": 40.0}
    busy = {"p95_ttft_ms": 79.0, "p95_refusal_ms": 49.0, "failed": 7, "refused": 7}

    def met(**how):
        bars = serve_scenarios.overload_bars(calm, busy | how)
        return [bar["met"] for bar in bars]

    assert met() == [True, True, True]
    assert met(p95_ttft_ms=81.0) == [False, True, True]
    assert met(p95_refusal_ms=50.0) == [True, False, True]
    assert met(p95_refusal_ms=None) == [True, False, True]
    assert met(failed=8) == [True, True, False]


def test_an_overload_is_refused(server, engine):
    engine.first_delay_s, engine.delay_s = 0.05, 0.002
    notes = []

    async def go():
        fields = {"ignore_eos": True}
        client = serve_load.Client(f"{server.url}/v1", servers.NAME, fields=fields)
        try:
            how = {"alone": 4, "most": 4, "times": 8.0, "say": notes.append}
            return await serve_scenarios.overload(client, work(60), **how)
        finally:
            await client.close()

    found = asyncio.run(go())
    assert found["uncontended"]["completed"] == 4
    assert found["sustained"]["completed"] == 12
    assert found["rate"] == 8 * found["sustained"]["request_throughput"]
    figures = found["overload"]
    assert figures["refused"] > 0 and figures["failed"] == figures["refused"]
    assert figures["completed"] + figures["failed"] == 60
    assert len(notes) == 3 and len(found["bars"]) == 3


class Refused(serve_load.Client):
    """Counts what is refused and in flight; `engine` has room after three refusals."""

    def __init__(self, *args, engine):
        super().__init__(*args)
        self.engine, self.refused, self.flying, self.most = engine, 0, 0, 0

    async def send(self, *args):
        self.flying += 1
        self.most = max(self.most, self.flying)
        sent = await super().send(*args)
        self.flying -= 1
        self.refused += sent.status == "429"
        self.engine.full = self.refused < 3
        return sent


def test_what_is_refused_is_sent_again_where_capacity_is_measured(server, engine):
    """Each request is answered in the end, and nothing is sent twice at a time."""

    async def go(again):
        client = Refused(f"{server.url}/v1", servers.NAME, engine=engine)
        engine.full = True
        try:
            todo = serve_load.asks(work(4))
            return client, await serve_load.run(client, todo, most=2, again=again)
        finally:
            engine.full = False
            await client.close()

    seen = len(engine.seen)
    client, run = asyncio.run(go(True))
    assert [one.status for one in run.sent] == ["ok"] * 4
    assert len(engine.seen) == seen + 4 and client.refused >= 3 and client.most == 2
    assert min(one.sent_s for one in run.sent[:2]) > serve_load.AGAIN_S / 2
    _, run = asyncio.run(go(False))
    assert [one.status for one in run.sent].count("429") >= 3


def drained(**how):
    figures = {
        "streams": 3,
        "streams_whole": 3,
        "after": 2,
        "after_refused": 2,
        "exit_code": 0,
        "exit_s": 5.9,
        "timeout_s": 5.0,
        "children": 1,
        "children_left": 0,
    }
    return [bar["met"] for bar in serve_scenarios.drain_bars(figures | how)]


def test_bars_of_a_drain():
    assert drained() == [True, True, True, True]
    assert drained(streams_whole=2) == [False, True, True, True]
    assert drained(streams=0, streams_whole=0)[0] is False
    assert drained(after_refused=1) == [True, False, True, True]
    assert drained(exit_code=-9) == [True, True, False, True]
    assert drained(exit_code=None) == [True, True, False, True]
    assert drained(exit_s=6.1) == [True, True, False, True]
    assert drained(children_left=1) == [True, True, True, False]


def test_requests_by_what_they_did_at_the_signal():
    sent = [
        made(0.0, 0.5, [0.1], 4),  # over before
        made(0.0, 0.5, [2.0], 4),  # a stream, whole
        made(0.0, 0.5, [2.0], 3),  # a stream, short
        made(0.0, 0.5, [2.0], 4, status="cut"),  # a stream, cut
        made(0.9, 1.5, [0.2], 4),  # waits, is answered
        made(1.1, 1.2, [], 0, status="503"),  # later
        made(1.1, 1.2, [], 0, status="connect"),
        made(1.1, 1.2, [], 0, status="no answer"),
        made(1.1, 1.2, [], 0, status="cut"),
    ]
    figures = serve_scenarios.drain_figures(serve_load.Run(sent, 3.0, []), 1.0)
    del figures["statuses"]
    assert figures == {
        "streams": 3,
        "streams_whole": 1,
        "waiting": 1,
        "waiting_answered": 1,
        "after": 4,
        "after_refused": 3,
        "last_s": 1.5,
    }


# --- the command ---


def test_the_command(server, engine, tmp_path, capsys):
    file = tmp_path / "record.json"
    words = [f"--url={server.url}", "--num_prompts=5", "--input_tokens=4"]
    words += ["--output_tokens=3", "--request_rate=100", "--goodput", "ttft:9000"]
    assert cli.main(["bench", "serve", *words, f"--json={file}"]) == 0
    record, text = json.loads(file.read_text()), capsys.readouterr().out
    assert record["model"] == servers.NAME and record["completed"] == 5
    assert record["total_output_tokens"] == 15
    assert record["request_goodput"] == record["request_throughput"]
    assert "tiny at http://127.0.0.1" in text and "100.0 a second" in text
    line = next(x for x in text.splitlines() if x.startswith("ttft "))
    assert line.split()[1] == f"{record['mean_ttft_ms']:,.1f}"
    engine.fault = "submit"
    assert cli.main(["bench", "serve", *words, "--num_warmups=0"]) == 1
    assert cli.main(["bench", "serve", *words]) == 2
    assert "a request before the run failed (500: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "give --url of a server, or --own"),
        (["--url=http://x", "--own"], "not both"),
        (["--url=ftp://x"], "wanted http://HOST:PORT"),
        (["--url=http://x:99999"], "wanted http://HOST:PORT"),
        (["--url=http://me:secret@x"], "--url has a password in it"),
        (["--own", "--scenario=drain", "--num_prompts=16"], "wants more than the 16"),
        (["--url=http://x", "--scenario=drain"], "give --own instead"),
        (["--own", "--request_rate=0"], "--request_rate is 0.0, wanted above 0"),
        (["--own", "--request_rate=nan"], "wanted above 0"),
        (["--own", "--range_ratio=1"], "below 1"),
        (["--own", "--num_prompts=0"], "at least 1"),
        (["--own", "--max_concurrency=-1"], "wanted 0 or more"),
        (["--own", "--goodput", "tftt:3"], "did you mean 'ttft'"),
        (["--own", "--goodput", "ttft:-3"], "wanted ttft:MILLISECONDS above 0"),
        (["--own", "--goodput", "ttft"], "wanted ttft:MILLISECONDS above 0"),
        (["--own", "--api_key_env=NO_SUCH_KEY"], "no such name"),
        (["--own", "--num_prompt=3"], "did you mean '--num_prompts'"),
        (["--url=http://x", "--id_count=5", "--endpoint=chat"], "prompts of ids"),
        (["--own", "--kv_heads=3"], "not a multiple of --kv_heads"),
        (["--url=http://127.0.0.1:9", "--timeout_s=3"], "names no model"),
    ],
)
def test_flags_that_do_not_fit_are_told(words, told):
    with pytest.raises(config.InputError, match=told):
        serve.main(words)


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("http://a:8000", "http://a:8000/v1"),
        ("http://a:8000/", "http://a:8000/v1"),
        ("https://a/v1/", "https://a/v1"),
        ("https://a/openai/v2", "https://a/openai/v2"),
    ],
)
def test_urls(url, wanted):
    assert serve.base(url) == wanted


def test_without_httpx_the_extra_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    monkeypatch.delitem(sys.modules, "qwen_jax.bench.serve_load")
    with pytest.raises(config.InputError, match=r"pip install 'qwen_jax\[serve\]'"):
        importlib.import_module("qwen_jax.bench.serve_load")
