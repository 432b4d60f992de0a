# SPDX-License-Identifier: Apache-2.0
"""Scenarios of `qwen-jax bench serve`: overload and drain, with bars.

Overload: requests one after another give the time to the first token without
contention; a closed loop, in which what is refused is sent again, gives the rate that
the server sustains; then Poisson arrivals at a multiple of it. Wanted: p95 of the time
to the first token of those answered at most TTFT_TIMES the uncontended p95; p95 of the
time to refuse below REFUSAL_MS; nothing but answers and refusals (429, 503).

Drain: a chat, for which our server starts a child, then a closed loop; once as many
streams as it holds have begun, SIGTERM. Wanted: each stream that had begun ends whole;
later requests are refused, or find nobody (no connection, or one closed before a word
of an answer, as happens to what is on its way when a socket closes); exit code 0 within
the server's timeout and a second; none of the server's children left.

Units: seconds of one process's clock; milliseconds in names that end in _ms.
Invariants: the three parts of overload have different prompts.
Raises: config.InputError where nothing at all is answered.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from qwen_jax import config
from qwen_jax.bench import serve_load, serve_own, serve_report

TTFT_TIMES = 2.0
REFUSAL_MS = 50.0
SPARE_S = 1.0


async def overload(
    client: serve_load.Client,
    work: serve_load.Work,
    *,
    alone: int,
    most: int,
    times: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Figures of the three parts, and bars.

    Args:
      client: to whom.
      work: num_prompts is that of the overload.
      alone: requests one after another.
      most: requests at once of the closed loop.
      times: the arrivals' rate over the sustained one.
      say: told of each part.
    """

    def part(number: int, **how: Any) -> list[serve_load.Ask]:
        return serve_load.asks(
            dataclasses.replace(work, seed=work.seed + number, **how)
        )

    inf = float("inf")
    say(f"uncontended: {alone} requests, one after another")
    first = await serve_load.run(client, part(1, num_prompts=alone, rate=inf), most=1)
    calm = answered(first, "uncontended")
    count = max(3 * most, alone)
    say(f"sustained: {count} requests, {most} at once")
    second = await serve_load.run(
        client, part(2, num_prompts=count, rate=inf), most=most, again=True
    )
    full = answered(second, "sustained")
    rate = times * full["request_throughput"]
    say(f"overload: {work.num_prompts} requests, {rate:.1f} a second ({times:g}x)")
    third = await serve_load.run(client, part(3, rate=rate))
    figures = answered(third, "overload")
    return {
        "uncontended": calm,
        "sustained": full,
        "overload": figures,
        "rate": rate,
        "bars": overload_bars(calm, figures),
    }


def answered(run: serve_load.Run, name: str) -> dict[str, Any]:
    """The figures of a part that had answers."""
    figures = serve_report.summary(run)
    if not figures["completed"]:
        counts = figures["failed_by_status"]
        raise config.InputError(f"{name}: no request was answered, but {counts}")
    return figures


def overload_bars(calm: dict, figures: dict) -> list[dict[str, Any]]:
    """What was wanted, and what there is."""
    busy_ms, calm_ms = figures["p95_ttft_ms"], calm["p95_ttft_ms"]
    ratio = busy_ms / calm_ms
    refusal = figures["p95_refusal_ms"]
    others = figures["failed"] - figures["refused"]
    return [
        serve_report.bar(
            "p95 ttft of the answered / uncontended",
            f"at most {TTFT_TIMES:g}x",
            f"{busy_ms:.0f} / {calm_ms:.0f} ms = {ratio:.1f}x",
            ratio <= TTFT_TIMES,
        ),
        serve_report.bar(
            "p95 time to refuse",
            f"below {REFUSAL_MS:g} ms",
            f"{serve_report.number(refusal)} ms of {figures['refused']}",
            refusal is not None and refusal < REFUSAL_MS,
        ),
        serve_report.bar("failed otherwise", "0", str(others), not others),
    ]


async def drain(
    client: serve_load.Client,
    work: serve_load.Work,
    own: serve_own.Own,
    *,
    most: int,
    timeout_s: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Figures and bars of a SIGTERM under load.

    Args:
      client: to whom.
      work: num_prompts of it, more than `most`.
      own: the server.
      most: requests at once.
      timeout_s: what the server gives requests in flight.
      say: told of each part.
    """
    watch = _Watch(own, most)
    chat = dataclasses.replace(work, chat=True, num_prompts=1, seed=work.seed + 1)
    await serve_load.run(client, serve_load.asks(chat))
    say(f"drain: {work.num_prompts} requests, {most} at once; SIGTERM under way")
    run = await serve_load.run(
        client, serve_load.asks(work), most=most, first=watch.first, begun=watch.begun
    )
    code = own.wait(timeout_s + 10 * SPARE_S)
    exit_s = time.perf_counter() - watch.perf_s if watch.perf_s else None
    if watch.signal_s is None or exit_s is None:
        counts = serve_report.summary(run)["failed_by_status"]
        raise config.InputError(f"no {most} streams began at once, but {counts}")
    figures = drain_figures(run, watch.signal_s)
    figures |= {"exit_code": code, "exit_s": exit_s, "timeout_s": timeout_s}
    figures |= {"children": watch.children, "children_left": own.children_left()}
    return figures | {"bars": drain_bars(figures)}


class _Watch:
    """Sends the signal once enough streams have begun."""

    def __init__(self, own: serve_own.Own, most: int):
        self._own, self._left = own, most
        self._now: Callable[[], float] = time.perf_counter
        self.signal_s: float | None = None
        self.perf_s = 0.0
        self.children = 0

    def begun(self, now: Callable[[], float]) -> None:
        """The run's clock."""
        self._now = now

    def first(self) -> None:
        """A stream has begun."""
        self._left -= 1
        if self._left == 0:
            self.children = self._own.note_children()
            self.signal_s, self.perf_s = self._now(), time.perf_counter()
            self._own.terminate()


def drain_figures(run: serve_load.Run, signal_s: float) -> dict[str, Any]:
    """Requests by what they were doing when the signal came."""
    flying = [s for s in run.sent if s.sent_s <= signal_s < s.ended_s]
    streams = [s for s in flying if s.first_s is not None and s.first_s <= signal_s]
    waiting = [s for s in flying if s not in streams]
    after = [s for s in run.sent if s.sent_s > signal_s]
    whole = [s for s in streams if s.ok and s.output_tokens == s.asked_tokens]
    nobody = (*serve_load.REFUSED, "connect", "no answer")
    refused = [s for s in after if s.status in nobody]
    return {
        "streams": len(streams),
        "streams_whole": len(whole),
        "waiting": len(waiting),
        "waiting_answered": sum(s.ok for s in waiting),
        "after": len(after),
        "after_refused": len(refused),
        "last_s": max((s.ended_s - signal_s for s in flying), default=0.0),
        "statuses": serve_report.summary(run)["failed_by_status"],
    }


def drain_bars(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """What was wanted, and what there is."""
    streams, whole = figures["streams"], figures["streams_whole"]
    after, refused = figures["after"], figures["after_refused"]
    limit_s = figures["timeout_s"] + SPARE_S
    code, exit_s = figures["exit_code"], figures["exit_s"]
    children, left = figures["children"], figures["children_left"]
    return [
        serve_report.bar(
            "streams in flight that end whole",
            "all",
            f"{whole} of {streams}",
            streams and whole == streams,
        ),
        serve_report.bar(
            "later requests refused", "all", f"{refused} of {after}", refused == after
        ),
        serve_report.bar(
            "exit",
            f"0 within {limit_s:g} s",
            f"{code} in {exit_s:.1f} s",
            code == 0 and exit_s <= limit_s,
        ),
        serve_report.bar("children left", "0", f"{left} of {children}", not left),
    ]
