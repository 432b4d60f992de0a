# SPDX-License-Identifier: Apache-2.0
"""The guard between clients and engine: prompts before, answers while they come.

What the guard blocks is not answered (400 content_filter), or ends there (finish_reason
"content_filter"). Texts are judged, images are not. Of an answer no more is sent than
the guard has passed: what may yet become part of a finding is kept back (`hold`), and
so are the log-probabilities of what is kept back, which would tell it.

Formats: /v1/moderations answers as `guard.moderation_results` has it.
Invariants: a guard that raises lets nothing through.
Raises: errors.ApiError.
"""

import asyncio
import uuid
from typing import Any

from qwen_jax.serve import errors, guard_verdict, metrics, protocol
from qwen_jax.serve import guard as guard_lib
from qwen_jax.serve import request as request_lib

Logprobs = tuple[request_lib.Logprob, ...]


def check_prompt(
    guard: guard_lib.Guard | None,
    told: metrics.Metrics,
    said: str | list[dict[str, Any]],
    param: str,
    request_id: str,
) -> None:
    """Refuse what the guard blocks.

    Raises:
      errors.ApiError: 400 content_filter.
    """
    if guard is None:
        return
    verdict = guard.check_prompt(said, request_id)
    told.judged("input", verdict.level)
    if verdict.action == guard_verdict.BLOCK:
        raise errors.ApiError(
            400,
            "content_filter",
            "The request was refused by the content policy of this server.",
            param=param,
            type="content_policy_violation",
        )


class Watch:
    """The guard on one answer; without a guard, everything passes.

    said: what is answered, a text or messages.
    """

    def __init__(
        self,
        guard: guard_lib.Guard | None,
        told: metrics.Metrics,
        said: str | list[dict[str, Any]],
        request_id: str,
    ):
        self._watch = None if guard is None else guard.stream(said, request_id)
        self._told, self._text = told, ""
        self._logprobs: Logprobs = ()

    async def passed(
        self, text: str, logprobs: Logprobs, over: bool
    ) -> tuple[str, Logprobs] | None:
        """What may be sent with one more piece; None where the answer is blocked."""
        if self._watch is None:
            return text, logprobs
        verdict, self._text = None, self._text + text
        self._logprobs += logprobs
        if text:
            verdict = await asyncio.to_thread(self._watch.push, text)
        if over and not _blocks(verdict):
            verdict = await asyncio.to_thread(self._watch.end)
        blocked = _blocks(verdict)
        if over or blocked:
            self._told.judged("output", verdict.level)
        if blocked:
            return None
        held = 0 if over else verdict.hold if verdict else len(self._text)
        cut = max(0, len(self._text) - held)
        sent, self._text = self._text[:cut], self._text[cut:]
        logprobs = () if self._text else self._logprobs
        self._logprobs = self._logprobs if self._text else ()
        return sent, logprobs


def _blocks(verdict: guard_verdict.Verdict | None) -> bool:
    return verdict is not None and verdict.action == guard_verdict.BLOCK


async def moderations(
    guard: guard_lib.Guard | None,
    told: metrics.Metrics,
    wanted: protocol.Moderation,
) -> dict[str, Any]:
    """The answer of /v1/moderations.

    Raises:
      errors.ApiError: 404, there is no guard.
    """
    if guard is None:
        said = "This server has no guard, so it cannot judge texts."
        raise errors.ApiError(404, "unsupported_endpoint", said)
    request_id, results = f"modr-{uuid.uuid4().hex}", []
    for text in wanted.texts:
        verdict = await asyncio.to_thread(guard.check_prompt, text, request_id)
        told.judged("moderation", verdict.level)
        results.append(guard_lib.moderation_results(verdict))
    name = "+".join(checker.name for checker in guard.checkers)
    return {"id": request_id, "model": name, "results": results}
