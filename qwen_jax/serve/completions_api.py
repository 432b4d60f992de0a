# SPDX-License-Identifier: Apache-2.0
"""/v1/completions: flights of an engine -> a text_completion, or its chunks.

A completion may have several prompts, each a flight of its own; choices are numbered
prompt by prompt. `echo` puts the prompt's text before the answer, and its
log-probabilities before those of the answer. Offsets are in letters of the choice's
text.

Raises: errors.ApiError of the flights.
"""

import time
from collections.abc import AsyncIterator
from typing import Any

from qwen_jax.serve import answers, guarding, protocol
from qwen_jax.serve import flight as flight_lib
from qwen_jax.serve import guard as guard_lib
from qwen_jax.serve import request as request_lib


class _Logprobs:
    """The arrays of log-probabilities of one choice, as they grow."""

    def __init__(self, words: Any, most: int | None):
        self._words, self._most, self._at = words, most, 0

    def arrays(self, given: Any, first: int | None = None) -> dict[str, Any] | None:
        """Of some more places; first: an id before them of which nothing is known."""
        if self._most is None:
            return None
        made: dict[str, list] = {
            name: []
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        rows = [] if first is None else [(first, None, None)]
        rows += [(one.token, one.logprob, one.top) for one in given]
        for token, logprob, top in rows:
            text = self._text(token)
            made["tokens"].append(text)
            made["token_logprobs"].append(
                None if logprob is None else max(logprob, -9999.0)
            )
            pairs = None if top is None else top[: self._most]
            made["top_logprobs"].append(
                pairs and {self._text(i): max(x, -9999.0) for i, x in pairs}
            )
            made["text_offset"].append(self._at)
            self._at += len(text)
        return made

    def _text(self, token: int) -> str:
        return self._words.decode([token])


class Completion:
    """One completions request with its flights, one for each prompt."""

    def __init__(
        self,
        wanted: protocol.Completion,
        flights: list[flight_lib.Flight],
        guard: guard_lib.Guard | None,
        board: flight_lib.Board,
        request_id: str,
    ):
        self._wanted, self._flights = wanted, flights
        served = flights[0].served
        self._words = served.model.tokenizer
        self._answers = [
            [
                answers.Answer(
                    guarding.Watch(
                        guard,
                        board.told,
                        self._words.decode(flight.request.prompt),
                        flight.request.id,
                    )
                )
                for _ in range(wanted.n)
            ]
            for flight in flights
        ]
        self._logprobs = [
            [_Logprobs(self._words, wanted.logprobs) for _ in range(wanted.n)]
            for _ in flights
        ]
        self._head = {
            "id": request_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
            # Prompts of one request may come before and behind a swap of weights.
            "system_fingerprint": "+".join(
                dict.fromkeys(flight.fingerprint for flight in flights)
            ),
        }

    async def whole(self) -> dict[str, Any]:
        """All choices."""
        total = len(self._flights) * self._wanted.n
        choices: list[dict[str, Any]] = [
            {"index": i, "text": "", "logprobs": None, "finish_reason": "stop"}
            for i in range(total)
        ]
        async for more in self._choices():
            choice = choices[more["index"]]
            choice["text"] += more["text"]
            choice["finish_reason"] = more["finish_reason"] or choice["finish_reason"]
            if more["logprobs"] is not None:
                before = choice["logprobs"] or {name: [] for name in more["logprobs"]}
                choice["logprobs"] = {
                    k: before[k] + more["logprobs"][k] for k in before
                }
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The choices as they come."""
        usage: dict[str, Any] = {"usage": None} if self._wanted.include_usage else {}
        async for choice in self._choices():
            if self._wanted.usage_so_far:
                usage = {"usage": self._usage()}
            yield {**self._head, "choices": [choice], **usage}
        if self._wanted.include_usage:
            yield {**self._head, "choices": [], "usage": self._usage()}

    async def _choices(self) -> AsyncIterator[dict[str, Any]]:
        """Changes of all choices; one prompt after another, which all run meanwhile."""
        for i, flight in enumerate(self._flights):
            echoed: set[int] = set()
            async for step, told in self._with_prompt(flight, self._answers[i]):
                index = i * self._wanted.n + step.index
                if self._wanted.echo and step.index not in echoed:
                    echoed.add(step.index)
                    yield self._echo(index, flight, told)
                text = "".join(part for _, part in step.told)
                if text or step.logprobs or step.finish is not None:
                    arrays = self._logprobs[i][step.index].arrays(step.logprobs)
                    yield _choice(index, text, arrays, step.finish)

    async def _with_prompt(
        self, flight: flight_lib.Flight, of: list[answers.Answer]
    ) -> AsyncIterator[tuple[answers.Step, tuple[request_lib.Logprob, ...]]]:
        """Steps with what is known of the prompt, which comes with the first answer's
        first step; those of others wait for it."""
        asked = flight.request.prompt_logprobs is not None
        known = None if asked and len(flight.request.prompt) > 1 else ()
        held = []
        async for step in answers.steps(flight, of):
            known = step.prompt_logprobs if known is None else known
            held.append(step)
            while held and known is not None:
                yield held.pop(0), known
        for step in held:
            yield step, ()

    def _echo(self, index: int, flight: flight_lib.Flight, told: Any) -> dict[str, Any]:
        ids, n = flight.request.prompt, self._wanted.n
        arrays = self._logprobs[index // n][index % n].arrays(told, first=ids[0])
        return _choice(index, self._words.decode(ids), arrays, None)

    def _usage(self) -> dict[str, Any]:
        made = [answers.usage(flight) for flight in self._flights]
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        cached = [one["prompt_tokens_details"]["cached_tokens"] for one in made]
        return {
            **{name: sum(one[name] for one in made) for name in names},
            "prompt_tokens_details": {"cached_tokens": sum(cached)},
        }


def _choice(i: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
    return {"index": i, "text": text, "logprobs": logprobs, "finish_reason": finish}
