# SPDX-License-Identifier: Apache-2.0
"""Models by the names that clients call them.

A name is known from the start and has its model and engine when they are loaded; until
then requests are told so (503 model_loading). A name may be given another engine at any
time: requests in flight keep the one they began with.

Invariants: threads may add while others look up. `Served.fingerprint` is the same for
the same model and version of this program.
Raises: errors.ApiError 404 model_not_found, 503 model_loading.
"""

import dataclasses
import functools
import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from qwen_jax import __version__
from qwen_jax.data import chat, tokenizer
from qwen_jax.models import spec as spec_lib
from qwen_jax.serve import errors, grammar
from qwen_jax.serve import request as request_lib


class Model(Protocol):
    """A model as `talk.load_model` gives it."""

    spec: spec_lib.Spec
    tokenizer: tokenizer.Tokenizer
    template: chat.Template | None
    advised: dict[str, Any]
    stop_ids: tuple[int, ...]


class Engine(Protocol):
    """What the server asks of an engine."""

    max_tokens: int  # of a prompt and its answer

    def submit(
        self,
        request: request_lib.Request,
        tell: Callable[[request_lib.Piece], None],
    ) -> None:
        """Take a request, or raise InputError, engine.Overloaded or engine.Closed."""

    def cancel(self, request_id: str) -> None:
        """End a request."""

    def load(self) -> request_lib.Load:
        """How busy it is."""

    def embed(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Vectors of unit length, float32 [len(prompts), d]."""

    def close(self, timeout_s: float | None = None) -> None:
        """Finish what is in flight, or cancel it at the timeout."""


@dataclasses.dataclass(frozen=True)
class Served:
    """A model with its engine. created: seconds since 1970. version: of the weights."""

    name: str
    model: Model
    engine: Engine
    created: int
    version: str = ""

    @functools.cached_property
    def grammars(self) -> grammar.Compiler:
        """What compiles grammars for its vocabulary."""
        words = self.model.tokenizer
        ends = (*self.model.stop_ids, *words.stop_ids)
        return grammar.Compiler(words, self.model.spec.vocab_size, ends)

    @functools.cached_property
    def fingerprint(self) -> str:
        """What answers of one seed depend on."""
        facts = (__version__, self.name, self.version, self.model.tokenizer.fingerprint)
        text = repr((*facts, self.model.spec))
        return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:10]

    def card(self) -> dict[str, Any]:
        """The model as /v1/models tells it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "qwen_jax",
            "max_model_len": self.engine.max_tokens,
        }


class Models:
    """A handle on the models of a server."""

    def __init__(self):
        self._lock = threading.Lock()
        self._served: dict[str, Served | None] = {}

    def expect(self, name: str) -> None:
        """A name whose model is being loaded."""
        with self._lock:
            self._served.setdefault(name, None)

    def put(self, served: Served) -> Served | None:
        """A loaded model under its name; gives the one that had the name."""
        with self._lock:
            before = self._served.get(served.name)
            self._served[served.name] = served
            return before

    def get(self, name: str) -> Served:
        """The model of a name.

        Raises:
          errors.ApiError: none, or it is being loaded.
        """
        with self._lock:
            known, found = name in self._served, self._served.get(name)
        if not known:
            said = f"The model {errors.quoted(name)} does not exist."
            raise errors.ApiError(404, "model_not_found", said, param="model")
        if found is None:
            raise errors.unavailable("model_loading", "The model is being loaded.", 2)
        return found

    def all(self) -> list[Served]:
        """Those that are loaded."""
        with self._lock:
            return [served for served in self._served.values() if served is not None]

    def ready(self) -> bool:
        """Whether there are models and all are loaded."""
        with self._lock:
            return bool(self._served) and None not in self._served.values()
