# SPDX-License-Identifier: Apache-2.0
"""/v1/completions and /v1/embeddings.

A completion may have several prompts, each a flight of its own; choices are numbered
prompt by prompt. `echo` puts the prompt's text before the answer, and its
log-probabilities before those of the answer. Offsets are in letters of the choice's
text. Embeddings are of unit length; with `dimensions`, the first of them, made of unit
length again (Matryoshka).

Formats: base64 is of little-endian float32.
Raises: errors.ApiError of the flights; 400 for inputs that do not fit.
"""

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from qwen_jax.serve import answers, errors, fields, guarding, prompts, protocol
from qwen_jax.serve import flight as flight_lib
from qwen_jax.serve import request as request_lib
from qwen_jax.serve import served as served_lib


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
        guard: guarding.Guard | None,
        board: flight_lib.Board,
        request_id: str,
    ):
        self._wanted, self._flights = wanted, flights
        served = flights[0].served
        self._words = served.model.tokenizer
        self._answers = [
            [answers.Answer(guarding.Watch(guard, board.told)) for _ in range(wanted.n)]
            for _ in flights
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
            "system_fingerprint": served.fingerprint,
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
        usage = {"usage": None} if self._wanted.include_usage else {}
        async for choice in self._choices():
            yield {**self._head, "choices": [choice], **usage}
        if self._wanted.include_usage:
            yield {**self._head, "choices": [], "usage": self._usage()}

    async def _choices(self) -> AsyncIterator[dict[str, Any]]:
        """Changes of all choices; one prompt after another, which all run meanwhile."""
        for i, flight in enumerate(self._flights):
            echoed: set[int] = set()
            prompt_logprobs: tuple[request_lib.Logprob, ...] | None = None
            async for step in answers.steps(flight, self._answers[i]):
                index = i * self._wanted.n + step.index
                if step.prompt_logprobs is not None:
                    prompt_logprobs = step.prompt_logprobs
                if self._wanted.echo and step.index not in echoed:
                    echoed.add(step.index)
                    yield self._echo(index, flight, prompt_logprobs or ())
                text = "".join(part for _, part in step.told)
                if text or step.logprobs or step.finish is not None:
                    arrays = self._logprobs[i][step.index].arrays(step.logprobs)
                    yield _choice(index, text, arrays, step.finish)

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


async def embeddings(
    wanted: protocol.Embedding, served: served_lib.Served
) -> dict[str, Any]:
    """The answer of /v1/embeddings.

    Raises:
      errors.ApiError: an input that does not fit, or more dimensions than there are.
    """
    width = served.model.spec.width
    if wanted.dimensions is not None and wanted.dimensions > width:
        said = f"Invalid dimensions: {wanted.dimensions}; wanted at most {width}."
        raise errors.invalid("dimensions", "integer_above_max_value", said)
    inputs = await asyncio.to_thread(_inputs, wanted, served)
    vectors_nd = await asyncio.to_thread(served.engine.embed, inputs)
    if wanted.dimensions is not None:
        vectors_nd = vectors_nd[:, : wanted.dimensions]
        norms_n1 = np.linalg.norm(vectors_nd, axis=1, keepdims=True)
        vectors_nd = vectors_nd / np.maximum(norms_n1, 1e-12)
    vectors_nd = np.asarray(vectors_nd, "<f4")
    data = [
        {
            "object": "embedding",
            "index": i,
            "embedding": base64.b64encode(vector_d.tobytes()).decode()
            if wanted.base64
            else vector_d.tolist(),
        }
        for i, vector_d in enumerate(vectors_nd)
    ]
    count = sum(map(len, inputs))
    usage = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "data": data, "model": served.name, "usage": usage}


def _inputs(
    wanted: protocol.Embedding, served: served_lib.Served
) -> list[tuple[int, ...]]:
    limit, made = served.engine.max_tokens, []
    for one in wanted.inputs:
        if isinstance(one, str):
            prompts.check_length(one, served, "input")
        ids = served.model.tokenizer.encode(one) if isinstance(one, str) else one
        if len(ids) > limit:
            said = f"This model's maximum context length is {limit} tokens, and an "
            said += f"input has {len(ids)}; shorten it."
            raise errors.invalid("input", "context_length_exceeded", said)
        if max(ids) >= served.model.spec.vocab_size:
            said = f"ids below {served.model.spec.vocab_size}"
            raise fields.wrong_value("input", said, max(ids))
        made.append(tuple(ids))
    return made
