# SPDX-License-Identifier: Apache-2.0
"""What an engine is asked and what it answers: the records between it and its callers.

A caller makes a `Request` of token ids, hands it to `Engine.submit` with a function
that takes `Piece`s, and gets one or more of them for each of the request's `n` answers.
The last piece of an answer has `finish`; after n of those the request is over.

Invariants: the texts of an answer's pieces, joined, are the answer without the stop
string that ended it, and each is whole code points; ids are in the order they were
drawn, the id that ended the answer included. A request that fails or is cancelled ends
each unfinished answer with a piece, too: nobody waits for what will not come.
Raises: config.InputError naming the field, in `Request` and `check`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from qwen_jax import config
from qwen_jax.models import sampling as sampling_lib
from qwen_jax.serve import images as images_lib

# Why an answer ended. The last two are not the model's doing.
STOP, LENGTH, CANCELLED, ERROR = "stop", "length", "cancelled", "error"
MAX_LOGPROBS = 20


class Matcher(Protocol):
    """Where one answer stands in a grammar."""

    def allowed(self) -> np.ndarray:
        """Ids that may come next: uint32 words, bit id % 32 of word id // 32."""

    def accept(self, token: int) -> None:
        """One more id of the answer."""

    def done(self) -> bool:
        """Whether nothing may come but the end."""


class Grammar(Protocol):
    """What answers must look like, compiled once; each answer has its own matcher."""

    def start(self) -> Matcher:
        """A matcher before the first id."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and how it is to be answered.

    id: the caller's, unique among those in flight. prompt: token ids. max_tokens: most
    ids of each answer. n: answers; their seeds are sampling.seed + index. stop: texts
    that end an answer and are left out of it. stop_ids: ids that do; None for the
    model's own. logprobs: None, or how many of the likeliest ids to tell beside each
    chosen one. prompt_logprobs: likewise for the ids of the prompt but the first.
    logit_bias: added to an id's score. grammar: what the answer must match. salt:
    prompts share cached pages only with those of the same salt. images: in the order
    of their placeholders in the prompt, see `images`.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: sampling_lib.Sampling = sampling_lib.Sampling()
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    grammar: Grammar | None = None
    salt: str = ""
    images: tuple[images_lib.Image, ...] = ()

    def __post_init__(self):
        if not self.prompt:
            raise config.InputError("the prompt is empty: give at least one token")
        for name in ("max_tokens", "n"):
            if getattr(self, name) < 1:
                raise config.InputError(
                    f"{name}={getattr(self, name)}: wanted at least 1"
                )
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and not 0 <= count <= MAX_LOGPROBS:
                raise config.InputError(
                    f"{name}={count}: wanted 0 to {MAX_LOGPROBS}, or none"
                )


def alike(
    name: str,
    prompts: Sequence[Sequence[int]],
    images: Sequence[Sequence[images_lib.Image]] | None = None,
    **fields: Any,
) -> list[Request]:
    """A request, "NAME-i", for each prompt, with its images and the same `fields`.

    Raises:
      config.InputError: images of another number of prompts.
    """
    shown = [()] * len(prompts) if images is None else images
    if len(shown) != len(prompts):
        raise config.InputError(
            f"images of {len(shown)} prompts for {len(prompts)}: wanted a sequence of "
            "images, which may be empty, for each prompt"
        )
    parts = enumerate(zip(prompts, shown, strict=True))
    return [
        Request(f"{name}-{i}", tuple(map(int, ids)), images=tuple(mine), **fields)
        for i, (ids, mine) in parts
    ]


def check(request: Request, *, vocab_size: int, max_tokens: int, texts: bool) -> None:
    """Refuse what an engine can never answer: more than fits, ids that the model has
    not, stop texts where there are no `texts`.

    Raises:
      config.InputError: naming what does not fit.
    """
    if len(request.prompt) + request.max_tokens > max_tokens:
        raise config.InputError(
            f"a prompt of {len(request.prompt)} tokens and max_tokens="
            f"{request.max_tokens} pass the {max_tokens} that fit here"
        )
    check_ids(request.prompt, "the prompt", vocab_size)
    check_ids(tuple(request.logit_bias), "logit_bias", vocab_size)
    if request.stop and not texts:
        raise config.InputError("stop texts need an engine with a tokenizer")


def check_ids(ids: Sequence[int], name: str, vocab_size: int) -> None:
    """Refuse ids that the model has not."""
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise config.InputError(
            f"{name} holds id {wrong}, the model's ids are 0 to {vocab_size - 1}"
        )


@dataclasses.dataclass(frozen=True)
class Logprob:
    """Log-probabilities (natural) at one place: of the id that is there, and of the
    likeliest ids, most likely first. They are the model's own: before temperature,
    penalties and cuts."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Usage:
    """Ids counted: of the prompt, those of them that were cached, of the answer."""

    prompt: int
    cached: int
    answer: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """What has come of one answer since its last piece.

    index: which of the request's answers. logprobs: one for each of `ids`, where asked
    for. prompt_logprobs: with the first piece of answer 0, where asked for. finish: why
    the answer is over, with its last piece; then `usage` is there, and `stopped_by` is
    the text or the id that ended it. error: what is to be told, with finish "error".
    queue_s, prefill_s: with the first id, from `submit` until the answer had a place
    among those that run, and from there until that id was known.
    """

    request: str
    index: int
    text: str = ""
    ids: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    prompt_logprobs: tuple[Logprob, ...] | None = None
    finish: str | None = None
    stopped_by: str | int | None = None
    usage: Usage | None = None
    error: str | None = None
    queue_s: float | None = None
    prefill_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Load:
    """How busy an engine is: requests that run and that wait, the share of pages in
    use (by requests; what is only cached is free), and counts since its start: `drafts`
    of how many times ids were drafted for a row, `drafted` of those ids, `accepted` of
    those that turned out to be its next. wait_s: how long one more is expected to wait
    for them."""

    running: int
    waiting: int
    pages_used: float
    prefix_asked: int  # prompt ids looked up in the cache
    prefix_found: int
    preempted: int
    compiled: int
    wait_s: float = 0.0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
