# SPDX-License-Identifier: Apache-2.0
"""Figures of `qwen-jax bench serve`: requests and their times -> a record, a table.

Source: names and definitions of `vllm bench serve`. ttft: to the first token; itl: of
each gap between the events of a stream (an event may carry several tokens, as with
vLLM); tpot: (end - first token) / (tokens - 1), of answers of two tokens and more;
e2el: to the end. A request is good when no limit that was given is passed by it; an
answer of one token passes no limit of tpot. Percentiles are NumPy's, linear; std is of
the population. Only completed requests have times; all others are counted by status.

Units: milliseconds in names that end in _ms, seconds, tokens. A figure of nothing is
None. Raises: config.InputError for limits that are none.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen_jax import config
from qwen_jax.bench import serve_load, table

METRICS = ("ttft", "tpot", "itl", "e2el")
LIMITED = ("ttft", "tpot", "e2el")
STATISTICS = ("mean", "median", "std", "p50", "p90", "p95", "p99")


def limits(words: Sequence[str]) -> dict[str, float]:
    """{"ttft": milliseconds, ...} of words such as ttft:200."""
    found = {}
    for word in words:
        name, colon, value = word.partition(":")
        if name not in LIMITED:
            raise config.InputError(
                f"--goodput names {name!r}{config.nearest(name, LIMITED)}; wanted "
                "NAME:MILLISECONDS"
            )
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = -1.0
        if not colon or not found[name] > 0:
            raise config.InputError(
                f"--goodput {word}: wanted {name}:MILLISECONDS above 0"
            )
    return found


def good(sent: serve_load.Sent, limits_ms: dict[str, float]) -> bool:
    """Whether a completed request is within the limits."""
    times_s = {"ttft": sent.ttft_s, "tpot": sent.tpot_s or 0.0, "e2el": sent.e2el_s}
    return all(times_s[name] * 1e3 <= most for name, most in limits_ms.items())


def statistics(values_s: Sequence[float], name: str) -> dict[str, float | None]:
    """{"mean_NAME_ms": ..., ...} of seconds."""
    if not len(values_s):
        return {f"{one}_{name}_ms": None for one in STATISTICS}
    values_ms = np.asarray(values_s, np.float64) * 1e3
    made = {
        "mean": np.mean(values_ms),
        "median": np.median(values_ms),
        "std": np.std(values_ms),
    }
    for percent in (50, 90, 95, 99):
        made[f"p{percent}"] = np.percentile(values_ms, percent)
    return {f"{one}_{name}_ms": float(made[one]) for one in STATISTICS}


def summary(
    run: serve_load.Run, limits_ms: dict[str, float] | None = None
) -> dict[str, Any]:
    """The figures of a run."""
    done = [sent for sent in run.sent if sent.ok]
    failed = [sent for sent in run.sent if not sent.ok]
    inputs = sum(sent.input_tokens for sent in done)
    outputs = sum(sent.output_tokens for sent in done)
    seconds = run.duration_s
    figures: dict[str, Any] = {
        "duration": seconds,
        "completed": len(done),
        "failed": len(failed),
        "failed_by_status": dict(collections.Counter(sent.status for sent in failed)),
        "failed_said": {sent.status: sent.said for sent in reversed(failed)},
        "short": sum(sent.output_tokens < sent.asked_tokens for sent in done),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(done) / seconds,
        "request_goodput": None,
        "output_throughput": outputs / seconds,
        "total_token_throughput": (inputs + outputs) / seconds,
        "tokens_per_event": outputs / max(1, sum(sent.events for sent in done)),
    }
    if limits_ms:
        count = sum(good(sent, limits_ms) for sent in done)
        figures["request_goodput"] = count / seconds
    values_s = {
        "ttft": [sent.ttft_s for sent in done],
        "tpot": [sent.tpot_s for sent in done if sent.tpot_s is not None],
        "itl": [gap for sent in done for gap in sent.gaps_s],
        "e2el": [sent.e2el_s for sent in done],
    }
    for name in METRICS:
        figures |= statistics(values_s[name], name)
    refused = [sent for sent in failed if sent.status in serve_load.REFUSED]
    figures["refused"] = len(refused)
    figures |= statistics([sent.e2el_s for sent in refused], "refusal")
    late = [sent.sent_s - sent.due_s for sent in run.sent]
    figures["p99_late_ms"] = statistics(late, "late")["p99_late_ms"]
    figures["p99_client_lag_ms"] = statistics(run.lags_s, "lag")["p99_lag_ms"]
    return figures


def number(value: float | None, digits: int = 1) -> str:
    """A figure as a cell; "-" for that of nothing."""
    return "-" if value is None else f"{value:,.{digits}f}"


def text(figures: dict[str, Any]) -> str:
    """The figures as aligned tables."""
    rows = [["requests and tokens", ""]]
    for name in ("completed", "failed", "short"):
        rows.append([name, f"{figures[name]:,}"])
    for status, count in sorted(figures["failed_by_status"].items()):
        rows.append([f"  failed: {status}", f"{count:,}"])
    rows.append(["duration, s", number(figures["duration"], 2)])
    for name in ("total_input_tokens", "total_output_tokens"):
        rows.append([name, f"{figures[name]:,}"])
    for name, unit in (
        ("request_throughput", "/s"),
        ("request_goodput", "/s"),
        ("output_throughput", "tokens/s"),
        ("total_token_throughput", "tokens/s"),
    ):
        rows.append([f"{name}, {unit}", number(figures[name], 2)])
    rows.append(["tokens_per_event", number(figures["tokens_per_event"], 2)])
    rows.append(["p99_client_lag_ms", number(figures["p99_client_lag_ms"])])
    times = [["ms", *STATISTICS]]
    for name in METRICS + (("refusal",) if figures["refused"] else ()):
        cells = [number(figures[f"{one}_{name}_ms"]) for one in STATISTICS]
        times.append([name, *cells])
    lines = [table.columns(rows), "", table.columns(times)]
    for status, said in figures["failed_said"].items():
        lines += [f"{status}: {said}"] if said else []
    return "\n".join(lines)


def bars(found: Sequence[dict[str, Any]]) -> str:
    """Bars of a scenario: what was wanted, what there is, whether it is met."""
    rows = [["bar", "wanted", "found", ""]]
    for bar in found:
        met = "met" if bar["met"] else "MISSED"
        rows.append([bar["name"], bar["wanted"], bar["found"], met])
    return table.columns(rows)


def bar(name: str, wanted: str, found: str, met: bool) -> dict[str, Any]:
    """One bar of a scenario."""
    return {"name": name, "wanted": wanted, "found": found, "met": bool(met)}
