# SPDX-License-Identifier: Apache-2.0
"""A small model of its own under the guard's head: no download, no tokenizer.

Tokens are pieces of folded text (`guard_text.pieces`) with every digit as 0, hashed to
ids; a GRU (arXiv 1406.1078) over their embeddings gives the hidden states that
`guard_head` judges:
    r, u = sigmoid(x W + h U + b), n = tanh(x W_n + r * (h U_n + b_n) + c_n),
    h' = (1 - u) n + u h
A conversation is one sequence: each message begins with a mark of its role, so that an
answer is judged after what was asked.

Format of a folder: see `guard_files`; its facts are sizes and what it was trained on.
Units: `Scores.start`, `stop` are code points of the text as given.
Invariants: the same text in other parts has bit for bit the same scores: all tokens go
through one compiled loop over CHUNK of them, padded with id 0, which changes nothing.
Raises: config.InputError for sizes that cannot be, and see `guard_files`.
"""

import dataclasses
import functools
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import config, rng
from qwen_jax import params as params_lib
from qwen_jax.params import Param, zeros
from qwen_jax.serve import guard_files, guard_head, guard_text, guard_verdict

FORMAT = "qwen_jax guard head with its trunk"
CHUNK = 8
MARKS = {"system": 1, "user": 2, "assistant": 3, "tool": 4}  # other roles: as user
RESERVED = 8
MAX_SIZE = 1 << 16
_DIGIT = re.compile(r"\d")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """ids of pieces, width of embeddings and states, width of the heads."""

    vocab: int = 4096
    width: int = 48
    inner: int = 32

    def __post_init__(self):
        for name in ("vocab", "width", "inner"):
            value, least = getattr(self, name), 2 * RESERVED if name == "vocab" else 1
            if not least <= value <= MAX_SIZE:
                raise config.InputError(
                    f"{name}={value}: wanted {least} to {MAX_SIZE:,}"
                )


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes, weights (see `declare`), and what it was trained on."""

    sizes: Sizes
    params: dict[str, Any]
    trained_on: dict[str, Any] = dataclasses.field(default_factory=dict)


def declare(sizes: Sizes) -> dict[str, Any]:
    """All weights as `Param`s."""
    d = sizes.width
    near = params_lib.normal(d**-0.5)
    return {
        "embed_vd": Param((sizes.vocab, d), ("vocab", "embed"), params_lib.normal(0.5)),
        "in_df": Param((d, 3 * d), ("embed", None), near),
        "state_df": Param((d, 3 * d), ("embed", None), near),
        "in_bias_f": Param((3 * d,), (None,), zeros),
        "state_bias_f": Param((3 * d,), (None,), zeros),
        "head": guard_head.declare(d, sizes.inner),
    }


def init(sizes: Sizes, seed: int) -> dict[str, Any]:
    """Random weights, float32."""
    return params_lib.init(declare(sizes), rng.key_for(seed, "guard"), jnp.float32)


def step(p: dict[str, Any], h_bd: jax.Array, ids_b: jax.Array) -> jax.Array:
    """The next states; where the id is 0 the state stays."""
    x_bd = p["embed_vd"][ids_b]
    x_bf = x_bd @ p["in_df"] + p["in_bias_f"][None]
    s_bf = h_bd @ p["state_df"] + p["state_bias_f"][None]
    x_r, x_u, x_n = jnp.split(x_bf, 3, axis=-1)
    s_r, s_u, s_n = jnp.split(s_bf, 3, axis=-1)
    u_bd = jax.nn.sigmoid(x_u + s_u)
    n_bd = jnp.tanh(x_n + jax.nn.sigmoid(x_r + s_r) * s_n)
    new_bd = (1 - u_bd) * n_bd + u_bd * h_bd
    return jnp.where((ids_b > 0)[:, None], new_bd, h_bd)


@functools.partial(jax.jit, static_argnames="role")
def _chunk(p, h_d, ids_c, role):
    """(state after, (risk [c, 3], category [c, y]) as probabilities)."""

    def one(h_bd, token):
        h_bd = step(p, h_bd, token[None])
        # Inside of the loop, so that a token's numbers do not depend on its place.
        risk, category = guard_head.head(p["head"][role], h_bd[0])
        return h_bd, (jax.nn.softmax(risk), jax.nn.softmax(category))

    h_bd, scores = jax.lax.scan(one, h_d[None], ids_c)
    return h_bd[0], scores


def ids_of(low: str, spans: list[tuple[int, int]], vocab: int) -> list[int]:
    """Ids of pieces of low text."""
    return [
        RESERVED
        + zlib.crc32(_DIGIT.sub("0", low[a:b]).encode("utf-8", "surrogatepass"))
        % (vocab - RESERVED)
        for a, b in spans
    ]


def mark(role: str) -> int:
    """The id before a message."""
    return MARKS.get(role, MARKS["user"])


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of one token: place, level (index into LEVELS), probability that it is not safe,
    probabilities of the categories where it is not."""

    start: int
    stop: int
    level: int
    risk: float
    categories: np.ndarray


class Reader:
    """The state after what was read, from which more can be read."""

    def __init__(self, model: Model, state: Any = None):
        self._model = model
        self.state = np.zeros(model.sizes.width, np.float32) if state is None else state

    def read(
        self, ids: list[int], role: str = guard_head.QUERY
    ) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities [n, 3] and [n, y] after each of the tokens."""
        risks, categories = [], []
        for begin in range(0, len(ids), CHUNK):
            some = ids[begin : begin + CHUNK]
            ids_c = np.zeros(CHUNK, np.int32)
            ids_c[: len(some)] = some
            self.state, (risk, category) = _chunk(
                self._model.params, self.state, ids_c, role
            )
            risks.append(np.asarray(risk)[: len(some)])
            categories.append(np.asarray(category)[: len(some)])
        num_categories = len(guard_head.CATEGORIES[role])
        none = [np.zeros((0, 3), np.float32)], [np.zeros((0, num_categories))]
        return np.concatenate(risks or none[0]), np.concatenate(categories or none[1])


class Judge:
    """The head on one text that comes in parts: `feed` gives the new tokens' scores,
    `finding` what is to be said of all."""

    def __init__(self, model: Model, reader: Reader, role: str, message: int):
        self._model, self._reader, self._role = model, reader, role
        self._message = message
        self._fold = guard_text.Fold()
        self._low, self._origin = "", []
        self._before: Scores | None = None
        self._risks: dict[str, int] = {}
        self._scores = np.zeros(len(guard_head.CATEGORIES[role]))
        self._spans: list[guard_verdict.Span] = []

    def feed(self, text: str, over: bool = False) -> list[Scores]:
        """More of the text; the last word waits for its end."""
        new = self._fold.feed(text)
        low, origin = self._low + new.low, [*self._origin, *new.origin]
        spans, rest = guard_text.pieces(low, over)
        ids = ids_of(low, spans, self._model.sizes.vocab)
        risk_cy, category_cy = self._reader.read(ids, self._role)
        made = []
        for (a, b), risk_y, category_y in zip(spans, risk_cy, category_cy, strict=True):
            level = int(guard_head.severity(risk_y))
            unsafe = 1.0 - float(risk_y[guard_head.RISKS.index(guard_verdict.SAFE)])
            place = origin[a], origin[b - 1] + 1
            made.append(Scores(*place, level, min(max(unsafe, 0.0), 1.0), category_y))
            self._take(made[-1])
        self._low, self._origin = low[rest:], origin[rest:]
        return made

    def _take(self, now: Scores) -> None:
        self._scores = np.maximum(self._scores, now.risk * now.categories)
        before, self._before = self._before, now
        level = int(guard_head.debounce(before.level if before else 0, now.level))
        if not level:
            return
        # The category is debounced, too; a first pair that disagrees has to have one.
        kinds = [int(np.argmax(x.categories)) for x in (before, now)]
        if kinds[0] != kinds[1]:
            if level <= max(self._risks.values(), default=0):
                return
            kinds[1] = int(np.argmax(before.categories + now.categories))
        category = guard_head.CATEGORIES[self._role][kinds[1]]
        if level > self._risks.get(category, 0):
            self._risks[category] = level
            self._spans.append(
                guard_verdict.Span(
                    before.start, now.stop, category, "head", self._message
                )
            )

    def finding(self, over: bool = False) -> guard_verdict.Finding:
        """On all that came."""
        names = guard_head.CATEGORIES[self._role]
        scores = zip(names, self._scores, strict=True)
        begin = self._origin[0] if self._low else self._fold.num_fed
        if self._before and self._before.level and not self._risks:
            begin = min(begin, self._before.start)  # the next token may flag it
        return guard_verdict.Finding(
            {c: guard_verdict.LEVELS[level] for c, level in self._risks.items()},
            {name: min(float(score), 1.0) for name, score in scores},
            None,
            tuple(self._spans),
            0 if over else self._fold.num_fed - begin,
        )


class HeadChecker:
    """The checker of `guard.Guard` that asks a trained head."""

    name = "head"

    def __init__(self, model: Model):
        self._model = model

    def prompt(self, messages: Any) -> guard_verdict.Finding:
        """Every text but those of the assistant, each after those before it."""
        return guard_verdict.worst(self._read(messages)[1])

    def response(self, messages: Any, text: str) -> guard_verdict.Finding:
        """A whole answer, after its prompt."""
        return self.stream(messages).end(text)

    def stream(self, messages: Any) -> "HeadListener":
        """An answer while it comes."""
        reader, _ = self._read(messages)
        reader.read([mark("assistant")])
        return HeadListener(
            Judge(self._model, reader, guard_head.RESPONSE, guard_verdict.RESPONSE)
        )

    def _read(self, messages: Any) -> tuple[Reader, list[guard_verdict.Finding]]:
        reader, found = Reader(self._model), []
        for i, role, text in guard_verdict.texts_of(messages):
            reader.read([mark(role)])
            judge = Judge(self._model, reader, guard_head.QUERY, i)
            judge.feed(text, over=True)
            if role != "assistant":
                found.append(judge.finding(over=True))
        return reader, found


class HeadListener:
    """The head on one answer."""

    def __init__(self, judge: Judge):
        self._judge = judge

    def push(self, text: str) -> guard_verdict.Finding:
        """See guard.Listener."""
        self._judge.feed(text)
        return self._judge.finding()

    def end(self, text: str = "") -> guard_verdict.Finding:
        """See guard.Listener; `text` is the last of the answer."""
        self._judge.feed(text, over=True)
        return self._judge.finding(over=True)


# --- files ---


def save(model: Model, folder: str) -> None:
    """Write the folder; one that was there is replaced as a whole."""
    facts = {"sizes": config.thaw(model.sizes), "trained_on": model.trained_on}
    guard_files.save(folder, FORMAT, facts, model.params)


def load(folder: str) -> Model:
    """What `save` wrote.

    Raises:
      config.InputError: see `guard_files`.
    """
    held = guard_files.facts_of(folder, FORMAT)
    sizes = config.freeze(Sizes, held.get("sizes"), at=f"sizes of {folder}")
    trained_on = held.get("trained_on")
    return Model(
        sizes,
        guard_files.params_of(folder, declare(sizes)),
        trained_on if isinstance(trained_on, dict) else {},
    )
