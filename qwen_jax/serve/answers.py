# SPDX-License-Identifier: Apache-2.0
"""Pieces of an engine -> what clients are told of each answer, streamed or not.

`steps` is the one way an answer is read: the guard looks at each piece, thinking and
calls are taken apart, ids are counted. A client that does not stream gets the same
steps, joined, so both see the same answer.

Invariants: finish reasons are stop, length, tool_calls and content_filter alone; what a
guard blocked is in no step. Reasoning tokens are those up to the end of thinking.
"""

import dataclasses
from collections.abc import AsyncIterator
from typing import Any

from qwen_jax.data import reply
from qwen_jax.serve import flight as flight_lib
from qwen_jax.serve import guarding, parts
from qwen_jax.serve import request as request_lib

STOP, LENGTH, CALLS, FILTER = "stop", "length", "tool_calls", "content_filter"


@dataclasses.dataclass(frozen=True)
class Step:
    """What has come of one answer: parts, log-probabilities, and why it is over."""

    index: int
    told: tuple[parts.Part, ...] = ()
    logprobs: tuple[request_lib.Logprob, ...] = ()
    finish: str | None = None
    prompt_logprobs: tuple[request_lib.Logprob, ...] | None = None


class Answer:
    """One answer being read; parts is None where its text is not taken apart."""

    def __init__(
        self,
        watch: guarding.Watch,
        split: parts.Parts | None = None,
        *,
        many_calls: bool = True,
        thought_id: int | None = None,
    ):
        self._watch, self._split, self._many = watch, split, many_calls
        self._thought_id, self._over = thought_id, False
        self.calls = self.reasoning_ids = 0

    @property
    def over(self) -> bool:
        """Whether nothing more is told of it."""
        return self._over

    async def read(self, piece: request_lib.Piece) -> Step | None:
        """The step that a piece makes."""
        if self._over:
            return None
        index, finish = piece.index, piece.finish
        passed = await self._watch.passed(
            piece.text, _without_end(piece), finish is not None
        )
        if passed is None:
            self._over = True
            return Step(index, finish=FILTER)
        text, logprobs = passed
        if self._split is None:
            told = ((parts.CONTENT, text),) if text else ()
        else:
            if self._split.thinking:
                self.reasoning_ids += self._counted(piece.ids)
            told = tuple(self._split.push(text))
            if finish is not None:
                told += tuple(self._split.end())
            told = self._cut(told)
        if finish is not None or self._over:
            self._over, finish = True, self._why(finish)
        return Step(index, told, logprobs, finish, piece.prompt_logprobs)

    def _cut(self, told: tuple[parts.Part, ...]) -> tuple[parts.Part, ...]:
        """Without what comes after the one call that may be."""
        kept = []
        for kind, part in told:
            self.calls += kind == parts.CALL
            if self.calls and not self._many:
                self._over = True
                if kind == parts.CALL and self.calls == 1:
                    kept.append((kind, part))
                continue
            kept.append((kind, part))
        return tuple(kept)

    def _counted(self, ids: tuple[int, ...]) -> int:
        if self._thought_id in ids:
            return ids.index(self._thought_id) + 1
        return len(ids)

    def _why(self, finish: str | None) -> str:
        if finish in (LENGTH, FILTER):
            return finish
        return CALLS if self.calls else STOP


def _without_end(piece: request_lib.Piece) -> tuple[request_lib.Logprob, ...]:
    """The log-probabilities but of the id that ended the answer."""
    if piece.finish == request_lib.STOP and isinstance(piece.stopped_by, int):
        if piece.logprobs and piece.logprobs[-1].token == piece.stopped_by:
            return piece.logprobs[:-1]
    return piece.logprobs


async def steps(
    flight: flight_lib.Flight, answers: list[Answer]
) -> AsyncIterator[Step]:
    """The steps of all answers of a request, in the order they come.

    A request whose answers are all over before the engine knows (a guard, the one call
    that may be) is cancelled in it; an answer of several runs on unseen.
    """
    async for pieces in flight:
        made: dict[int, Step] = {}
        for piece in pieces:
            step = await answers[piece.index].read(piece)
            if step is not None:
                before = made.get(step.index)
                made[step.index] = step if before is None else _both(before, step)
        for step in made.values():
            yield step
        if all(answer.over for answer in answers):
            flight.cancel()


def _both(first: Step, second: Step) -> Step:
    """Two steps of an answer as one."""
    told = list(first.told)
    for kind, part in second.told:
        if told and kind == told[-1][0] != parts.CALL:
            told[-1] = (kind, told[-1][1] + part)
        else:
            told.append((kind, part))
    return Step(
        first.index,
        tuple(told),
        first.logprobs + second.logprobs,
        second.finish,
        first.prompt_logprobs or second.prompt_logprobs,
    )


def usage(flight: flight_lib.Flight, reasoning: int | None = None) -> dict[str, Any]:
    """Tokens of one request: its prompt once, all its answers, as far as they came."""
    of = list(flight.usage.values())
    prompt = max((u.prompt for u in of), default=len(flight.request.prompt))
    cached = min((u.cached for u in of), default=0)
    made: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": sum(u.answer for u in of)
        if len(of) == flight.request.n
        else flight.answer_ids,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    made["total_tokens"] = prompt + made["completion_tokens"]
    if reasoning is not None:
        made["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return made


def joined(told: list[parts.Part]) -> tuple[str, str, list[reply.Call]]:
    """(thinking, content, calls) of an answer's parts."""
    texts = {
        kind: "".join(part for k, part in told if k == kind)
        for kind in (parts.THINKING, parts.CONTENT)
    }
    calls = [part for kind, part in told if kind == parts.CALL]
    return texts[parts.THINKING], texts[parts.CONTENT], calls
