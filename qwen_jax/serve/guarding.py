# SPDX-License-Identifier: Apache-2.0
"""What a server asks of a guard, and the route that asks it directly.

A guard judges prompts whole and answers as they come. What it blocks is not answered
(400 content_filter), or ends there (finish_reason "content_filter"): the piece in which
it was seen is not sent. A guard that raises lets nothing through.

Formats: /v1/moderations answers with OpenAI's categories and the guard's own.
Raises: errors.ApiError.
"""

import asyncio
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from qwen_jax.serve import errors, metrics, protocol

# The categories that OpenAI's clients look for.
CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)


class Verdict(Protocol):
    """blocked: it must not pass. flagged: worth telling. label: one word, such as
    "unsafe". scores: 0 to 1 by category, OpenAI's names or the guard's own."""

    blocked: bool
    flagged: bool
    label: str
    scores: Mapping[str, float]


class Guard(Protocol):
    """What judges texts; called from several threads."""

    name: str

    def check_prompt(self, said: str | list[dict[str, Any]]) -> Verdict:
        """Judge a text, or a conversation ({role, content} each)."""

    def stream(self) -> Callable[[str], Verdict]:
        """A judge of one answer, given its pieces in order."""


def check_prompt(
    guard: Guard | None,
    told: metrics.Metrics,
    said: str | list[dict[str, Any]],
    param: str,
) -> None:
    """Refuse what the guard blocks.

    Raises:
      errors.ApiError: 400 content_filter.
    """
    if guard is None:
        return
    verdict = guard.check_prompt(said)
    told.judged("input", verdict.label)
    if verdict.blocked:
        raise errors.ApiError(
            400,
            "content_filter",
            "The request was refused by the content policy of this server.",
            param=param,
            type="content_policy_violation",
        )


class Watch:
    """The guard on one answer."""

    def __init__(self, guard: Guard | None, told: metrics.Metrics):
        self._push = None if guard is None else guard.stream()
        self._told = told

    async def passes(self, text: str) -> bool:
        """Whether a piece may be sent."""
        if self._push is None or not text:
            return True
        verdict = await asyncio.to_thread(self._push, text)
        if verdict.blocked or verdict.flagged:
            self._told.judged("output", verdict.label)
        return not verdict.blocked


async def moderations(
    guard: Guard | None, told: metrics.Metrics, wanted: protocol.Moderation
) -> dict[str, Any]:
    """The answer of /v1/moderations.

    Raises:
      errors.ApiError: 404, there is no guard.
    """
    if guard is None:
        said = "This server has no guard, so it cannot judge texts."
        raise errors.ApiError(404, "unsupported_endpoint", said)
    results = []
    for text in wanted.texts:
        verdict = await asyncio.to_thread(guard.check_prompt, text)
        told.judged("moderation", verdict.label)
        scores = dict.fromkeys(CATEGORIES, 0.0) | dict(verdict.scores)
        results.append(
            {
                "flagged": bool(verdict.flagged or verdict.blocked),
                "categories": {name: score >= 0.5 for name, score in scores.items()},
                "category_scores": scores,
                "category_applied_input_types": {name: ["text"] for name in scores},
            }
        )
    return {"id": f"modr-{uuid.uuid4().hex}", "model": guard.name, "results": results}
