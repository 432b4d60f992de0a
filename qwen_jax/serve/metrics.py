# SPDX-License-Identifier: Apache-2.0
"""Figures of a server for Prometheus, under the names that dashboards know.

Source: the names of vLLM's metrics, with the prefix `qwen_jax:` (or `vllm:`, for
dashboards made for it), and those of prometheus-fastapi-instrumentator for HTTP. The
times of queue and prefill are the engine's, of the first answer of each request that
had its first token. Deviation: cancelled requests are counted apart
(requests_cancelled_total).

Units: seconds by the monotonic clock of this process, tokens. What the engine knows is
asked of it when somebody looks. Each server has a registry of its own.
"""

from collections.abc import Iterator
from typing import Any

import prometheus_client as prometheus
from prometheus_client import core, registry

from qwen_jax import __version__
from qwen_jax.serve import request as request_lib
from qwen_jax.serve import served as served_lib

PREFIXES = ("qwen_jax:", "vllm:")
_SHORT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5)
_SHORT_S += (5, 7.5, 10, 20, 40, 80)
_LONG_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480)
_TOKENS = tuple(b * 10**e for e in range(6) for b in (1, 2, 5))
_MODEL = ("model_name",)


class _OfEngines(registry.Collector):
    """What engines know."""

    def __init__(self, prefix: str, models: served_lib.Models):
        self._prefix, self._models = prefix, models

    def collect(self) -> Iterator[core.Metric]:
        """Asked of the engines now."""
        loads = [(s.name, s.engine.load()) for s in self._models.all()]
        gauges = {
            "num_requests_running": ("requests that run", "running"),
            "num_requests_waiting": ("requests that wait", "waiting"),
            "kv_cache_usage_perc": ("share of pages in use, 1 for all", "pages_used"),
        }
        counts = {
            "prefix_cache_queries": ("prompt tokens looked up", "prefix_asked"),
            "prefix_cache_hits": ("prompt tokens found", "prefix_found"),
            "num_preemptions": ("requests put off for want of pages", "preempted"),
            "compile": ("programs compiled", "compiled"),
            "spec_decode_num_drafts": ("times that ids were drafted", "drafts"),
            "spec_decode_num_draft_tokens": ("ids drafted", "drafted"),
            "spec_decode_num_accepted_tokens": ("drafted ids accepted", "accepted"),
        }
        for kind, table in (
            (core.GaugeMetricFamily, gauges),
            (core.CounterMetricFamily, counts),
        ):
            for name, (told, field) in table.items():
                family = kind(self._prefix + name, told, labels=_MODEL)
                for model, load in loads:
                    family.add_metric([model], getattr(load, field))
                yield family
        info = core.GaugeMetricFamily(
            self._prefix + "model_version_info",
            "which model answers",
            labels=(*_MODEL, "version", "fingerprint", "program"),
        )
        for served in self._models.all():
            number = served.engine.weights
            version, print_ = served.version_of(number), served.fingerprint(number)
            info.add_metric([served.name, version, print_, __version__], 1)
        yield info


class Metrics:
    """A handle on the figures of one server."""

    def __init__(self, models: served_lib.Models, prefix: str = PREFIXES[0]):
        self.registry = prometheus.CollectorRegistry()
        self.registry.register(_OfEngines(prefix, models))
        self._prefix = prefix

        def counter(name: str, told: str, labels: tuple[str, ...] = _MODEL):
            return prometheus.Counter(
                prefix + name, told, labels, registry=self.registry
            )

        def times(name: str, told: str, buckets: tuple) -> prometheus.Histogram:
            return prometheus.Histogram(
                prefix + name, told, _MODEL, registry=self.registry, buckets=buckets
            )

        self._prompt = counter("prompt_tokens", "tokens of prompts")
        self._answer = counter("generation_tokens", "tokens of answers")
        self._success = counter(
            "request_success", "requests answered", (*_MODEL, "finished_reason")
        )
        self._cancelled = counter("requests_cancelled", "requests given up")
        self._shed = counter("requests_shed", "requests refused", ("reason",))
        self._judged = counter(
            "moderation", "texts judged by the guard", ("stage", "label")
        )
        self._prompt_of = times("request_prompt_tokens", "of one prompt", _TOKENS)
        self._answer_of = times("request_generation_tokens", "of answers", _TOKENS)
        self._most_of = times(
            "request_max_num_generation_tokens", "of the longest answer", _TOKENS
        )
        self._first_s = times("time_to_first_token_seconds", "from arrival", _SHORT_S)
        self._queue_s = times("request_queue_time_seconds", "in the queue", _LONG_S)
        self._prefill_s = times(
            "request_prefill_time_seconds", "from the queue to the first", _LONG_S
        )
        self._next_s = times(
            "inter_token_latency_seconds", "between tokens; waits count", _SHORT_S
        )
        self._whole_s = times("e2e_request_latency_seconds", "to the end", _LONG_S)
        self._decode_s = times("request_decode_time_seconds", "after first", _LONG_S)
        self._http = prometheus.Counter(
            "http_requests",
            "requests by route, method and status",
            ("handler", "method", "status"),
            registry=self.registry,
        )
        self._http_s = prometheus.Histogram(
            "http_request_duration_seconds",
            "to the last byte",
            ("handler", "method"),
            registry=self.registry,
            buckets=_LONG_S,
        )

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return prometheus.generate_latest(self.registry)

    def shed(self, reason: str) -> None:
        """A request was refused for want of room."""
        self._shed.labels(reason).inc()

    def cancelled(self, model: str) -> None:
        """A request was given up."""
        self._cancelled.labels(model).inc()

    def judged(self, stage: str, label: str) -> None:
        """The guard said something."""
        self._judged.labels(stage, label).inc()

    def first_token(self, model: str, seconds: float, piece: request_lib.Piece) -> None:
        """The first token, with this piece, came after so long."""
        self._first_s.labels(model).observe(seconds)
        if piece.queue_s is not None:
            self._queue_s.labels(model).observe(piece.queue_s)
        if piece.prefill_s is not None:
            self._prefill_s.labels(model).observe(piece.prefill_s)

    def next_tokens(self, model: str, seconds: float, count: int) -> None:
        """So many more tokens came."""
        for _ in range(count):
            self._next_s.labels(model).observe(seconds / count)

    def finished(self, flight: Any, finish: str, now_s: float) -> None:
        """A request (`flight.Flight`) is over."""
        model, usage = flight.served.name, flight.usage
        prompt = max((u.prompt for u in usage.values()), default=0)
        answers = [u.answer for u in usage.values()] or [0]
        self._prompt.labels(model).inc(prompt)
        self._answer.labels(model).inc(sum(answers))
        self._prompt_of.labels(model).observe(prompt)
        self._answer_of.labels(model).observe(sum(answers))
        self._most_of.labels(model).observe(max(answers))
        self._whole_s.labels(model).observe(now_s - flight.begun_s)
        self._decode_s.labels(model).observe(now_s - (flight.first_s or now_s))
        if finish not in (request_lib.CANCELLED, request_lib.ERROR):
            self._success.labels(model, finish).inc()

    def answered(self, handler: str, method: str, status: int, seconds: float) -> None:
        """A request of HTTP is over."""
        self._http.labels(handler, method, str(status)).inc()
        self._http_s.labels(handler, method).observe(seconds)
