# SPDX-License-Identifier: Apache-2.0
"""/v1/chat/completions: a flight of an engine -> a chat.completion, or its chunks.

Source: OpenAI's interface, with `reasoning_content` for thinking as Qwen's own servers
give it. A chunk carries one kind of change; a tool call comes as its id and name, then
its arguments. The last chunk of an answer has its finish_reason, the last of all the
usage where it is asked for.

Invariants: `Chat.whole` is what `Chat.chunks` would have told, joined.
Raises: errors.ApiError of the flight.
"""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from qwen_jax.data import reply
from qwen_jax.serve import answers, guarding, parts, prompts, protocol
from qwen_jax.serve import flight as flight_lib
from qwen_jax.serve import guard as guard_lib
from qwen_jax.serve import request as request_lib


class Chat:
    """One chat request with its flight."""

    def __init__(
        self,
        wanted: protocol.Chat,
        prompt: prompts.ChatPrompt,
        flight: flight_lib.Flight,
        guard: guard_lib.Guard | None,
        board: flight_lib.Board,
    ):
        self._wanted, self._flight = wanted, flight
        self._words = flight.served.model.tokenizer
        self._answers = [
            answers.Answer(
                guarding.Watch(
                    guard, board.told, wanted.given.messages, flight.request.id
                ),
                parts.Parts(thinks=prompt.thinks, tools=prompt.tools),
                many_calls=wanted.parallel,
                thought_id=self._words.specials.get(reply.THOUGHT),
            )
            for _ in range(wanted.n)
        ]
        self._calls = [0] * wanted.n
        self._head = {
            "id": flight.request.id,
            "created": int(time.time()),
            "model": flight.served.name,
            "system_fingerprint": flight.fingerprint,
            "service_tier": "default",
        }

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        told: list[list[parts.Part]] = [[] for _ in self._answers]
        logprobs: list[list[dict]] = [[] for _ in self._answers]
        finish = ["stop"] * len(self._answers)
        async for step in answers.steps(self._flight, self._answers):
            told[step.index] += step.told
            logprobs[step.index] += self._logprobs(step.logprobs)
            finish[step.index] = step.finish or finish[step.index]
        choices = [
            {
                "index": i,
                "message": self._message(told[i]),
                "logprobs": self._listed(logprobs[i]),
                "finish_reason": finish[i],
            }
            for i in range(len(self._answers))
        ]
        made = {**self._head, "object": "chat.completion", "choices": choices}
        return made | {"usage": self._usage()}

    def _message(self, told: list[parts.Part]) -> dict[str, Any]:
        thinking, content, calls = answers.joined(told)
        message: dict[str, Any] = {"role": "assistant", "refusal": None}
        message["content"] = content if content or not calls else None
        if thinking:
            message["reasoning_content"] = thinking
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        return message

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The answer as it comes."""
        for i in range(len(self._answers)):
            yield self._chunk(i, {"role": "assistant", "content": "", "refusal": None})
        waiting: list[list[dict]] = [[] for _ in self._answers]
        async for step in answers.steps(self._flight, self._answers):
            i = step.index
            waiting[i] += self._logprobs(step.logprobs)
            for kind, part in step.told:
                for delta in self._deltas(i, kind, part):
                    logprobs, waiting[i] = waiting[i], []
                    yield self._chunk(i, delta, logprobs)
            if step.finish is not None:
                logprobs, waiting[i] = waiting[i], []
                yield self._chunk(i, {}, logprobs, step.finish)
        if self._wanted.include_usage:
            last = {**self._head, "object": "chat.completion.chunk", "choices": []}
            yield last | {"usage": self._usage()}

    def _deltas(self, i: int, kind: str, part: Any) -> list[dict[str, Any]]:
        if kind == parts.THINKING:
            return [{"reasoning_content": part}]
        if kind == parts.CONTENT:
            return [{"content": part}]
        at, whole = self._calls[i], _call(part)
        self._calls[i] += 1
        first = whole | {"function": whole["function"] | {"arguments": ""}}
        rest = {"function": {"arguments": whole["function"]["arguments"]}}
        return [{"tool_calls": [{"index": at} | one]} for one in (first, rest)]

    def _chunk(
        self,
        i: int,
        delta: dict[str, Any],
        logprobs: list[dict] | None = None,
        finish: str | None = None,
    ) -> dict[str, Any]:
        choice = {"index": i, "delta": delta, "finish_reason": finish}
        choice["logprobs"] = self._listed(logprobs) if logprobs else None
        made = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        if not self._wanted.include_usage:
            return made
        return made | {"usage": self._usage() if self._wanted.usage_so_far else None}

    def _listed(self, logprobs: list[dict]) -> dict[str, Any] | None:
        if self._wanted.logprobs is None:
            return None
        return {"content": logprobs, "refusal": None}

    def _logprobs(self, given: tuple[request_lib.Logprob, ...]) -> list[dict[str, Any]]:
        most = self._wanted.logprobs
        if most is None:
            return []
        return [
            {
                **self._token(one.token, one.logprob),
                "top_logprobs": [self._token(*pair) for pair in one.top[:most]],
            }
            for one in given
        ]

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._words.decode_bytes([token])
        text = data.decode("utf-8", "replace")
        # JSON has no infinity; this is what OpenAI's own servers give for "never".
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(data)}

    def _usage(self) -> dict[str, Any]:
        reasoning = sum(answer.reasoning_ids for answer in self._answers)
        return answers.usage(self._flight, reasoning)


def _call(call: reply.Call) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }
