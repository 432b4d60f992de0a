# SPDX-License-Identifier: Apache-2.0
"""Models by the names that clients call them.

A name is known from the start and has its model and engine when they are loaded; until
then requests are told so (503 model_loading). A name may be given another engine at any
time: requests in flight keep the one they began with.

An engine may get other weights of the same model, too; it numbers them, and says which
answer a request.

Invariants: threads may add while others look up. `Served.fingerprint` is the same for
the same weights and version of this program.
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
from qwen_jax.data import chat, multimodal, tokenizer
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
    sees: multimodal.Processor | None  # asked for where the spec has vision


class Engine(Protocol):
    """What the server asks of an engine."""

    max_tokens: int  # of a prompt and its answer
    weights: int  # how often they were exchanged
    settings: Any  # device.Settings: how many images it takes, of what size

    def submit(
        self,
        request: request_lib.Request,
        tell: Callable[[request_lib.Piece], None],
    ) -> int:
        """Take a request, or raise InputError, engine.Overloaded or engine.Closed; the
        number of the weights that answer it."""

    def swap(self, params: Any) -> int:
        """Other weights of the same model for what comes from now on; their number."""

    def refusal(self) -> Exception | None:
        """The Overloaded that `submit` would raise now for any request, if it would."""

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
    """A model with its engine. created: seconds since 1970. version: of the weights it
    began with; later: of those that the engine got since, by their number."""

    name: str
    model: Model
    engine: Engine
    created: int
    version: str = ""
    later: dict[int, str] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def grammars(self) -> grammar.Compiler:
        """What compiles grammars for its vocabulary."""
        words = self.model.tokenizer
        ends = (*self.model.stop_ids, *words.stop_ids)
        return grammar.Compiler(words, self.model.spec.vocab_size, ends)

    @functools.cached_property
    def _facts(self) -> str:
        words = self.model.tokenizer.fingerprint
        return repr((__version__, self.name, words, self.model.spec))

    def version_of(self, weights: int) -> str:
        """The version of the weights with a number."""
        return self.later.get(weights, str(weights)) if weights else self.version

    def fingerprint(self, weights: int) -> str:
        """What answers of one seed depend on, given by the weights of this number."""
        text = repr((self._facts, self.version_of(weights)))
        return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:10]

    def card(self) -> dict[str, Any]:
        """The model as /v1/models tells it."""
        sees = self.model.spec.vision is not None
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "qwen_jax",
            "max_model_len": self.engine.max_tokens,
            "max_images": self.engine.settings.images if sees else 0,
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

    def find(self, name: str) -> Served | None:
        """The model of a name, if there is one and it is loaded."""
        with self._lock:
            return self._served.get(name)

    def all(self) -> list[Served]:
        """Those that are loaded."""
        with self._lock:
            return [served for served in self._served.values() if served is not None]

    def ready(self) -> bool:
        """Whether there are models and all are loaded."""
        with self._lock:
            return bool(self._served) and None not in self._served.values()
