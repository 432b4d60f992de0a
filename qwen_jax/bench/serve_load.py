# SPDX-License-Identifier: Apache-2.0
"""Requests of `qwen-jax bench serve`: what is asked, when it is sent, what comes back.

Source: the method of `vllm bench serve`. Lengths are drawn evenly from n(1 - r) to
n(1 + r), a shared prefix comes on top of them; gaps between arrivals are exponential
(Poisson), none with a rate of inf. Deviations: the drawn gaps are not stretched to the
rate's mean; a first token is the first event that carries text, a call, a
log-probability or the end, and not a chunk that names the role alone; lengths, contents
and arrivals have random streams of their own, so another rate has the same prompts.

Formats: streams of /v1/completions (ids, or texts of words where no vocabulary is
given) or /v1/chat/completions, with usage. Units: seconds of `time.perf_counter` in
this process alone, from the begin of the run; tokens as the server's usage counts them.
Invariants: each Ask gives one Sent, whatever happens; its status is OK or what failed.
Raises: config.InputError without httpx.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from qwen_jax import config

try:
    import httpx
except ModuleNotFoundError:
    raise config.InputError(
        "bench serve needs httpx: pip install 'qwen_jax[serve]'"
    ) from None

OK = "ok"
MAX_SAID = 200
IDLE_S = 2.0
WARM_SEED = 1_000_003
LAG_EVERY_S, AGAIN_S = 0.01, 0.05
REFUSED = ("429", "503")
# Short English words that most vocabularies have as one token, with the blank.
WORDS = "the of and to in is was for on with as by at from that it are be this have"
WORDS += " one two time year people way day man thing world life hand part place case"


@dataclasses.dataclass(frozen=True)
class Work:
    """What is asked: see the flags of the command. rate: requests a second, inf for
    all at once. vocab: ids are drawn below it; 0 for texts of words. chat: a text is a
    user's message."""

    num_prompts: int
    input_tokens: int
    output_tokens: int
    range_ratio: float = 0.0
    prefix_tokens: int = 0
    rate: float = math.inf
    vocab: int = 0
    chat: bool = False
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request to come: when it is due, ids or a text, lengths in tokens, and whether
    it is a chat."""

    number: int
    due_s: float
    prompt: list[int] | str
    input_tokens: int
    output_tokens: int
    chat: bool = False


@dataclasses.dataclass
class Sent:
    """What became of a request.

    gaps_s: between its events with something in them, the first one not counted.
    events: how many there were. input_tokens, output_tokens: by the server's usage,
    or as asked and as many as events where it tells none. headed: the head of an answer
    has come.
    """

    number: int
    due_s: float
    sent_s: float = math.nan
    first_s: float | None = None
    ended_s: float = math.nan
    gaps_s: list[float] = dataclasses.field(default_factory=list)
    events: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    asked_tokens: int = 0
    headed: bool = False
    status: str = "not sent"
    said: str = ""

    @property
    def ok(self) -> bool:
        """Whether it was answered to its end."""
        return self.status == OK

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return (self.ended_s if self.first_s is None else self.first_s) - self.sent_s

    @property
    def e2el_s(self) -> float:
        """Seconds to the end."""
        return self.ended_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token after the first; None for an answer of one."""
        if self.output_tokens < 2:
            return None
        return (self.e2el_s - self.ttft_s) / (self.output_tokens - 1)


@dataclasses.dataclass
class Run:
    """All requests of a run. lags_s: how late this process woke when it wanted to,
    every LAG_EVERY_S: what it could not see is not the server's."""

    sent: list[Sent]
    duration_s: float
    lags_s: list[float]


def lengths(draw: np.random.Generator, mean: int, ratio: float, count: int) -> Any:
    """`count` lengths, evenly from mean (1 - ratio) to mean (1 + ratio), at least 1."""
    low = max(1, math.floor(mean * (1 - ratio)))
    return draw.integers(low, math.ceil(mean * (1 + ratio)) + 1, count)


def arrivals(draw: np.random.Generator, rate: float, count: int) -> Any:
    """Seconds at which requests are due: a Poisson process from 0."""
    if math.isinf(rate):
        return np.zeros(count)
    return np.cumsum(draw.exponential(1 / rate, count))


def asks(work: Work) -> list[Ask]:
    """The requests of a run, by its seed."""
    sizes, contents, times = (np.random.default_rng([work.seed, i]) for i in range(3))
    count = work.num_prompts
    inputs = lengths(sizes, work.input_tokens, work.range_ratio, count)
    outputs = lengths(sizes, work.output_tokens, work.range_ratio, count)
    due = arrivals(times, work.rate, count)
    prefix = _content(contents, work, work.prefix_tokens)
    return [
        Ask(
            number=i,
            due_s=float(due[i]),
            prompt=_joined(prefix, _content(contents, work, int(inputs[i]))),
            input_tokens=work.prefix_tokens + int(inputs[i]),
            output_tokens=int(outputs[i]),
            chat=work.chat,
        )
        for i in range(count)
    ]


def _content(draw: np.random.Generator, work: Work, count: int) -> list[Any]:
    if work.vocab and not work.chat:
        return draw.integers(0, work.vocab, count).tolist()
    return draw.choice(WORDS.split(), count).tolist()


def _joined(prefix: list[Any], own: list[Any]) -> list[int] | str:
    both = prefix + own
    return " ".join(both) if isinstance(both[0], str) else both


class Events:
    """Bytes of a stream of server-sent events, cut anywhere -> the data of each."""

    def __init__(self):
        self._rest, self._data = b"", []

    def push(self, more: bytes) -> list[str]:
        """The events that these bytes complete."""
        *lines, self._rest = (self._rest + more).split(b"\n")
        found = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if not line and self._data:
                found.append(b"\n".join(self._data).decode("utf-8", "replace"))
                self._data = []
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
        return found


def printable(text: str) -> str:
    """What a server said, on one line of a terminal and no longer than MAX_SAID."""
    text = " ".join(text[: 2 * MAX_SAID].split())[:MAX_SAID]
    return "".join(letter if letter.isprintable() else "?" for letter in text)


class _Failed(Exception):
    """A request that was not answered to its end."""

    def __init__(self, status: str, said: str = ""):
        super().__init__(status)
        self.status, self.said = printable(status), printable(said)


def _http(url: str, key: str, timeout_s: float) -> httpx.AsyncClient:
    """No bound on connections; to this machine itself without a proxy. Those that idle
    are closed before a server does (uvicorn: 5 s), which would fail what is sent then.
    """
    return httpx.AsyncClient(
        headers={"authorization": f"Bearer {key}"} if key else {},
        limits=httpx.Limits(
            max_connections=None,
            max_keepalive_connections=None,
            keepalive_expiry=IDLE_S,
        ),
        timeout=httpx.Timeout(timeout_s),
        trust_env=httpx.URL(url).host not in ("127.0.0.1", "localhost", "::1"),
    )


class Client:
    """A handle on connections to one server.

    Args:
      url: up to and with /v1.
      model: the name that it is asked for.
      key: sent as a bearer token, if any.
      fields: more of each request's body.
      timeout_s: of a whole request.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str = "",
        fields: dict[str, Any] | None = None,
        timeout_s: float = 600.0,
    ):
        self._model, self._url, self._fields = model, url, fields or {}
        self._timeout_s = timeout_s
        self._http = _http(url, key, timeout_s)

    async def close(self) -> None:
        """Hang up."""
        await self._http.aclose()

    def body(self, ask: Ask) -> dict[str, Any]:
        """What is sent."""
        prompt: dict[str, Any] = {"prompt": ask.prompt}
        if ask.chat:
            prompt = {"messages": [{"role": "user", "content": ask.prompt}]}
        return {
            "model": self._model,
            **prompt,
            "max_tokens": ask.output_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._fields,
        }

    async def send(self, ask: Ask, now: Callable[[], float], first: Any = None) -> Sent:
        """Ask, and wait for all of the answer.

        Args:
          ask: what.
          now: seconds of the run.
          first: called when the first token has come.
        """
        sent = Sent(ask.number, ask.due_s, asked_tokens=ask.output_tokens)
        sent.input_tokens = ask.input_tokens
        content = json.dumps(self.body(ask)).encode()
        url = self._url + ("/chat/completions" if ask.chat else "/completions")
        sent.sent_s = now()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._stream(url, content, sent, now, first)
            sent.status = OK
        except _Failed as error:
            sent.status, sent.said = error.status, error.said
        except (TimeoutError, httpx.TimeoutException):
            sent.status = "timeout"
        except (httpx.ConnectError, httpx.UnsupportedProtocol) as error:
            sent.status, sent.said = "connect", printable(str(error))
        except (httpx.HTTPError, httpx.StreamError) as error:
            sent.status = "cut" if sent.headed else "no answer"
            sent.said = printable(str(error))
        sent.ended_s = now()
        return sent

    async def _stream(self, url: str, content: bytes, sent: Sent, now, first) -> None:
        head = {"content-type": "application/json"}
        async with self._http.stream(
            "POST", url, content=content, headers=head
        ) as answer:
            sent.headed = True
            if answer.status_code != 200:
                raise _Failed(str(answer.status_code), _message(await answer.aread()))
            kind = answer.headers.get("content-type", "")
            if not kind.startswith("text/event-stream"):
                raise _Failed("no stream", f"the answer is {kind or 'of no type'}")
            events, last_s = Events(), 0.0
            async for more in answer.aiter_bytes():
                for data in events.push(more):
                    if data.strip() == "[DONE]":
                        return
                    if not _read(data, sent):
                        continue
                    came_s = now()
                    sent.events += 1
                    if sent.first_s is None:
                        sent.first_s = came_s
                        if first is not None:
                            first()
                    else:
                        sent.gaps_s.append(came_s - last_s)
                    last_s = came_s
        raise _Failed("cut", "the stream ended without [DONE]")


def _message(body: bytes) -> str:
    """What a body says of an error; its beginning where it is not OpenAI's shape."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:MAX_SAID].decode("utf-8", "replace")


def _read(data: str, sent: Sent) -> bool:
    """Take in one event; whether it has something of the answer in it."""
    try:
        chunk = json.loads(data)
        error = chunk.get("error")
        if error is not None:
            code = error.get("code") if isinstance(error, dict) else None
            raise _Failed(f"error frame {code or ''}".strip(), _message(data.encode()))
        usage = chunk.get("usage")
        if usage:
            sent.input_tokens = int(usage["prompt_tokens"])
            sent.output_tokens = int(usage["completion_tokens"])
        some = any(_something(choice) for choice in chunk.get("choices") or [])
        if some and not usage and sent.output_tokens <= sent.events:
            sent.output_tokens = sent.events + 1
        return some
    except (ValueError, KeyError, TypeError, AttributeError) as wrong:
        said = f"{type(wrong).__name__} in {data[:80]!r}"
        raise _Failed("no chunk", said) from None


def _something(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    names = ("content", "reasoning_content", "reasoning", "tool_calls")
    return bool(
        choice.get("text")
        or choice.get("logprobs")
        or choice.get("finish_reason")
        or any(delta.get(name) for name in names)
    )


async def run(
    client: Client,
    todo: list[Ask],
    *,
    most: int = 0,
    first: Callable[[], None] | None = None,
    begun: Callable[[Callable[[], float]], None] | None = None,
    again: bool = False,
) -> Run:
    """Send each request when it is due, or, with `most` in flight, when one is over.

    Args:
      client: to whom.
      todo: what, in the order of time.
      most: requests at once; 0 for any number.
      first: called at each first token.
      begun: called with the clock of the run.
      again: send what was refused again, AGAIN_S later, until it is answered; a closed
        loop of clients that hang up would not show what a server can do.
    """
    gate = asyncio.Semaphore(most) if most else contextlib.nullcontext()
    zero_s = time.perf_counter()

    def now() -> float:
        return time.perf_counter() - zero_s

    if begun is not None:
        begun(now)

    async def one(ask: Ask) -> Sent:
        async with gate:
            while True:
                sent = await client.send(ask, now, first)
                if not again or sent.status not in REFUSED:
                    return sent
                await asyncio.sleep(AGAIN_S)

    lags_s: list[float] = []
    watch = asyncio.create_task(_lag(lags_s))
    tasks = []
    try:
        for ask in todo:
            if ask.due_s > now():
                await asyncio.sleep(ask.due_s - now())
            tasks.append(asyncio.create_task(one(ask)))
        sent = list(await asyncio.gather(*tasks))
    finally:
        for task in (watch, *tasks):
            task.cancel()
        await asyncio.gather(watch, *tasks, return_exceptions=True)
    return Run(sent, now(), lags_s)


async def _lag(lags_s: list[float]) -> None:
    """For ever: how much later than wanted this process goes on."""
    while True:
        begun_s = time.perf_counter()
        await asyncio.sleep(LAG_EVERY_S)
        lags_s.append(time.perf_counter() - begun_s - LAG_EVERY_S)


async def warm(client: Client, work: Work, count: int) -> None:
    """Requests before the run, one after another, with prompts of their own.

    Raises:
      config.InputError: one of them is not answered.
    """
    other = dataclasses.replace(
        work, num_prompts=count, rate=math.inf, seed=work.seed + WARM_SEED
    )
    for sent in (await run(client, asks(other), most=1)).sent:
        if not sent.ok:
            said = f": {sent.said}" if sent.said else ""
            raise config.InputError(
                f"a request before the run failed ({sent.status}{said}); give a prompt "
                "and an answer that the server takes, or --num_warmups 0"
            )


async def first_model(url: str, key: str) -> str:
    """The first model that a server names.

    Raises:
      config.InputError: it names none.
    """
    async with _http(url, key, 30.0) as http:
        try:
            answer = await http.get(url + "/models")
            answer.raise_for_status()
            return str(answer.json()["data"][0]["id"])
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise config.InputError(
                f"{url}/models names no model ({type(error).__name__}: {error}); "
                "check --url and --api_key_env, or give --model"
            ) from None
