# SPDX-License-Identifier: Apache-2.0
"""Ids of an answer as they come -> text that may be told, and whether it is over.

Whole code points only, no control tokens (marks of thinking and tools are text), and
nothing that may be the beginning of a stop text. The first of these ends an answer: an
id that does, a stop text that is whole, a grammar that wants no more, the most ids that
were asked for.
Raises: nothing.
"""

import numpy as np

from qwen_jax.data import reply, tokenizer
from qwen_jax.serve import request as request_lib


class Answer:
    """The text of one answer; `stop_ids` are those of the request or the model."""

    def __init__(
        self,
        request: request_lib.Request,
        stop_ids: tuple[int, ...],
        vocabulary: tokenizer.Tokenizer | None,
    ):
        self._most, self._stop_ids = request.max_tokens, frozenset(stop_ids)
        self._text = self._watch = None
        if vocabulary is not None:
            self._text = tokenizer.Detokenizer(vocabulary, skip_special=True)
            self._watch = reply.Watch(request.stop) if request.stop else None
        self.matcher = request.grammar.start() if request.grammar else None
        self.count = 0
        self.prompt: list[request_lib.Logprob] = []  # of the prompt, where asked for

    def push(self, token: int) -> tuple[str, str | None, str | int | None]:
        """(text, why it is over or None, the text or id that ended it)."""
        self.count += 1
        if token in self._stop_ids:
            return self._rest(), request_lib.STOP, token
        text = self._text.push([token]) if self._text else ""
        if self._watch:
            told = ""
            for before, word in self._watch.push(text):
                told += before
                if word is not None:
                    return told, request_lib.STOP, word
            text = told
        if self.matcher is not None:
            self.matcher.accept(token)
            if self.matcher.done():
                return text + self._rest(), request_lib.STOP, None
        if self.count == self._most:
            return text + self._rest(), request_lib.LENGTH, None
        return text, None, None

    def _rest(self) -> str:
        """What was kept back."""
        if self._text is None:
            return ""
        end = self._text.end()
        if self._watch is None:
            return end
        told = ""
        for before, word in self._watch.push(end):
            told += before
            if word is not None:
                return told
        return told + self._watch.end()


def logprobs(told, ids, top: int, count: int) -> list[request_lib.Logprob]:
    """Records of `count` places, of what a program told of them."""
    chosen, best, names = (
        np.asarray(x) for x in (told.chosen_b, told.top_bk, told.ids_bk)
    )
    return [
        request_lib.Logprob(
            int(ids[i]),
            float(chosen[i]),
            tuple(
                (int(k), float(x))
                for k, x in zip(names[i, :top], best[i, :top], strict=True)
            ),
        )
        for i in range(count)
    ]


def fault(error: Exception) -> str:
    """What callers are told of an error: no path, no stack."""
    return f"{type(error).__name__} while answering"
