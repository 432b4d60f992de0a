# SPDX-License-Identifier: Apache-2.0
"""The guard between clients and engine: prompts before, answers while they come.

What the guard blocks is not answered (400 content_filter), or ends there (finish_reason
"content_filter"). Texts are judged, images are not. Of an answer no more is sent than
the guard has passed: what may yet become part of a finding is kept back (`hold`), and
so are the log-probabilities of what is kept back, which would tell it.

Clients made for DashScope ask for its inspection with a header; those get its code and
its words (data_inspection_failed). What is inspected is the server's policy alone.

Formats: X-DashScope-DataInspection: {"input": "cip", "output": "cip"}; /v1/moderations
answers as `guard.moderation_results` has it.
Invariants: a guard that raises lets nothing through.
Raises: errors.ApiError.
"""

import asyncio
import uuid
from typing import Any

from qwen_jax.serve import errors, guard_verdict, json_body, metrics, protocol
from qwen_jax.serve import guard as guard_lib
from qwen_jax.serve import request as request_lib

INSPECTION = b"x-dashscope-datainspection"
SAID = {
    "content_filter": "The request was refused by the content policy of this server.",
    "data_inspection_failed": "Input data may contain inappropriate content.",
}
Logprobs = tuple[request_lib.Logprob, ...]


def code_of(guard: guard_lib.Guard | None, header: bytes | None) -> str:
    """The code of refusals; header: of INSPECTION, where it was sent.

    Raises:
      errors.ApiError: 400, what the header asks for cannot be done.
    """
    if header is None:
        return "content_filter"
    try:
        asked = json_body.parse(header)
    except errors.ApiError:
        asked = {"": ""}
    name, fits = "X-DashScope-DataInspection", set(asked) <= {"input", "output"}
    if not fits or any(value != "cip" for value in asked.values()):
        said = f'Invalid {name}: wanted {{"input": "cip", "output": "cip"}}.'
        raise errors.invalid(name, "invalid_value", said)
    if guard is None:
        said = f"{name}: this server has no guard, so it cannot inspect."
        raise errors.invalid(name, "invalid_value", said)
    return "data_inspection_failed"


def check_prompt(
    guard: guard_lib.Guard | None,
    told: metrics.Metrics,
    said: str | list[dict[str, Any]],
    param: str,
    request_id: str,
    code: str = "content_filter",
) -> None:
    """Refuse what the guard blocks, with a code of SAID.

    Raises:
      errors.ApiError: 400.
    """
    if guard is None:
        return
    verdict = guard.check_prompt(said, request_id)
    told.judged("input", verdict.level)
    if verdict.action == guard_verdict.BLOCK:
        raise errors.ApiError(
            400,
            code,
            SAID[code],
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
