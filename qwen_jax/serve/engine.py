# SPDX-License-Identifier: Apache-2.0
"""Answers for many requests at once: one model, one pool of pages, one thread.

    engine = Engine(spec, params, tokenizer)
    texts = engine.generate(["prompt", ...], max_tokens=32, temperature=0.0)

    engine.start(); engine.submit(request, tell); ...; engine.close()

A step computes a piece of one prompt and one token of every answer that has its prompt
in (`scheduler.py`, `programs.py`); then each new id becomes text (`answer.py`) and is
told. Without `start` the caller's own thread makes the steps, in `generate` or by
`step`, which is how simulations and rollouts run it.

Shapes: programs are compiled for rows in powers of two up to `Settings.rows`, and for a
few sizes of pieces, all by `warm`; nothing is compiled after that.
Invariants: what an answer says does not depend on the others, nor on how its prompt was
cut, found in the cache or computed anew (up to rounding of the scores; draws are by
seed and number). A fault in one request ends that request; one of the device ends all
in flight, tells them so, and the engine goes on with empty pages.
Raises: config.InputError for what can never be answered; Overloaded when the queue is
full; Closed after `close`.
"""

import collections
import dataclasses
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import config, mesh
from qwen_jax.data import tokenizer as tokenizer_lib
from qwen_jax.models import decode, paged
from qwen_jax.models import sampling as sampling_lib
from qwen_jax.models import spec as spec_lib
from qwen_jax.serve import answer as answer_lib
from qwen_jax.serve import programs, scheduler
from qwen_jax.serve import request as request_lib

Tell = Callable[[request_lib.Piece], None]
log = logging.getLogger(__name__)


class Overloaded(RuntimeError):
    """The queue is full; retry_after_s says when to come again."""

    def __init__(self, waiting: int, retry_after_s: float):
        super().__init__(f"{waiting} requests are waiting already")
        self.retry_after_s = retry_after_s


class Closed(RuntimeError):
    """The engine takes no more requests."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much an engine holds.

    rows: most answers at once. page_tokens: tokens of a page. pages: of the pool; 0
    for what `memory_bytes` holds, at most what all rows can fill. max_tokens: longest
    prompt and answer together; 0 for the model's positions, at most 32,768. piece: most
    tokens of a prompt in a step, a multiple of the page. max_waiting: most requests in
    the queue. sharing: keep pages for prompts that begin alike.
    """

    rows: int = 16
    page_tokens: int = 32
    pages: int = 0
    memory_bytes: int = 2 << 30
    max_tokens: int = 0
    piece: int = 256
    max_waiting: int = 256
    sharing: bool = True

    def __post_init__(self):
        for name in ("rows", "page_tokens", "piece", "max_waiting"):
            if getattr(self, name) < 1:
                raise config.InputError(
                    f"{name}={getattr(self, name)}: wanted at least 1"
                )
        if self.piece % self.page_tokens:
            raise config.InputError(
                f"piece={self.piece}: wanted a multiple of page_tokens="
                f"{self.page_tokens}"
            )

    def longest(self, spec: spec_lib.Spec) -> int:
        """The longest prompt and answer of a model."""
        most = self.max_tokens or min(spec.max_positions, 32_768)
        if most > spec.max_positions:
            raise config.InputError(
                f"max_tokens={most}: the model has {spec.max_positions} positions"
            )
        return most

    def pool(self, spec: spec_lib.Spec) -> int:
        """Pages of the pool, page 0 among them."""
        if self.pages:
            return self.pages
        room = self.memory_bytes // paged.page_bytes(spec, self.page_tokens)
        return min(room, self.rows * -(-self.longest(spec) // self.page_tokens)) + 1

    def row_buckets(self) -> tuple[int, ...]:
        """Numbers of rows that decoding is compiled for."""
        powers = itertools.takewhile(
            lambda b: b < self.rows, (1 << i for i in range(20))
        )
        return (*powers, self.rows)

    def piece_buckets(self) -> tuple[int, ...]:
        """Sizes of pieces that prompts are computed in."""
        sizes, size = [], self.piece
        while size > self.page_tokens and size % (4 * self.page_tokens) == 0:
            sizes.append(size)
            size //= 4
        return (*sorted({self.page_tokens, *sizes, self.piece}),)


class Engine:
    """See the module docstring.

    Args:
      spec: the model.
      params: its weights, as `models.load` or training gives them.
      tokenizer: makes text of ids; None where only ids are wanted.
      settings: how much it holds.
      rules: dims -> mesh axes; the mesh is the one set when the engine is made.
      stop_ids: ids that end an answer; None for the model's `eos_ids`.
    """

    def __init__(
        self,
        spec: spec_lib.Spec,
        params: Any,
        tokenizer: tokenizer_lib.Tokenizer | None = None,
        *,
        settings: Settings | None = None,
        rules: mesh.Rules | None = None,
        stop_ids: Sequence[int] | None = None,
    ):
        paged.check(spec)
        self.spec, self.tokenizer = spec, tokenizer
        self.settings = settings or Settings()
        self.rules = dataclasses.replace(rules or mesh.Rules(), batch=None)
        self.stop_ids = tuple(spec.eos_ids if stop_ids is None else stop_ids)
        self._mesh = jax.sharding.get_mesh()
        self._table = -(-self.settings.longest(spec) // self.settings.page_tokens)
        pool = self.settings.pool(spec)
        # What one answer may take: all pages but page 0, one left for its next token.
        self.max_tokens = min(
            self.settings.longest(spec), (pool - 1) * self.settings.page_tokens
        )
        if pool < 2:
            raise config.InputError(
                f"memory_bytes={self.settings.memory_bytes} holds no page of "
                f"{paged.page_bytes(spec, self.settings.page_tokens):,} bytes"
            )
        self._pool = pool
        self._params = decode.laid_out(spec, params)
        self._lock = threading.Condition()
        self._new: collections.deque[tuple[request_lib.Request, Tell]] = (
            collections.deque()
        )
        self._cancelled: set[str] = set()
        self._tells: dict[str, tuple[Tell, int]] = {}  # request: (tell, answers left)
        self._thread: threading.Thread | None = None
        self._closing = False
        self._warm = 0
        self.steps = 0
        self._empty()

    def _empty(self) -> None:
        """Pages and queue as at the start."""
        self._pages = paged.init(
            self.spec,
            self._pool,
            self.settings.page_tokens,
            self.settings.rows,
            self.rules,
        )
        self._extras = programs.extras(self.settings.rows, self.spec.vocab_size)
        # Copied: parts of what is empty may be one array, to be given away only once.
        self._pages, self._extras = jax.tree.map(jnp.copy, (self._pages, self._extras))
        recurrent = any(kind.mixer == "delta" for kind in self.spec.kinds)
        self._scheduler = scheduler.Scheduler(
            rows=self.settings.rows,
            pages=self._pool,
            page_tokens=self.settings.page_tokens,
            piece=self.settings.piece,
            sharing=self.settings.sharing and not recurrent,
        )
        self._wishes: tuple[Any, Any] = (None, None)
        self._free_masks: dict[int, np.ndarray] = {}

    # ---- callers' side

    def submit(self, request: request_lib.Request, tell: Tell) -> None:
        """Queue a request; `tell` gets its pieces from the engine's thread.

        Raises:
          config.InputError: it can never be answered.
          Overloaded: too many wait.
          Closed: after `close`.
        """
        self.check(request)
        with self._lock:
            if self._closing:
                raise Closed("the engine is closing")
            waiting = len(self._new) + len(self._scheduler.waiting)
            if waiting >= self.settings.max_waiting:
                raise Overloaded(waiting, retry_after_s=1.0)
            if request.id in self._tells:
                raise config.InputError(f"request {request.id!r} is in flight already")
            self._tells[request.id] = (tell, request.n)
            self._new.append((request, tell))
            self._lock.notify()

    def check(self, request: request_lib.Request) -> None:
        """Refuse what can never be answered.

        Raises:
          config.InputError: naming what does not fit.
        """
        most = len(request.prompt) + request.max_tokens
        if most > self.max_tokens:
            raise config.InputError(
                f"a prompt of {len(request.prompt)} tokens and max_tokens="
                f"{request.max_tokens} pass the {self.max_tokens} that fit here"
            )
        bias = tuple(request.logit_bias)
        for ids, name in ((request.prompt, "the prompt"), (bias, "logit_bias")):
            if ids and not 0 <= min(ids) <= max(ids) < self.spec.vocab_size:
                wrong = min(ids) if min(ids) < 0 else max(ids)
                raise config.InputError(
                    f"{name} holds id {wrong}, the model's ids are 0 to "
                    f"{self.spec.vocab_size - 1}"
                )
        if request.stop and self.tokenizer is None:
            raise config.InputError("stop texts need an engine with a tokenizer")

    def cancel(self, request_id: str) -> None:
        """End a request; its unfinished answers end as "cancelled" at the next step."""
        with self._lock:
            if request_id in self._tells:
                self._cancelled.add(request_id)
                self._lock.notify()

    def load(self) -> request_lib.Load:
        """How busy the engine is."""
        with self._lock:
            plan = self._scheduler
            return request_lib.Load(
                running=len(plan.running),
                waiting=len(plan.waiting) + len(self._new),
                pages_used=plan.used / plan.total,
                prefix_asked=plan.asked,
                prefix_found=plan.found,
                preempted=plan.preempted,
                compiled=_compiled(),
            )

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> list[str]:
        """The answer to each prompt, a text (with its marks read) or ids.

        Args:
          prompts: any number; more than fit wait for their turn.
          max_tokens: most ids of an answer.
          stop: texts that end an answer.
          **sampling: fields of `sampling.Sampling`; greedy without.
        """
        ids = [
            self.tokenizer.encode(one, allow_special=True)
            if isinstance(one, str)
            else one
            for one in prompts
        ]
        wish = sampling_lib.Sampling(**sampling)
        requests = [
            request_lib.Request(
                id=f"generate-{i}",
                prompt=tuple(map(int, one)),
                max_tokens=max_tokens,
                sampling=wish,
                stop=tuple(stop),
            )
            for i, one in enumerate(ids)
        ]
        pieces = self.run(requests)
        return ["".join(piece.text for piece in pieces[r.id]) for r in requests]

    def run(
        self, requests: Sequence[request_lib.Request]
    ) -> dict[str, list[request_lib.Piece]]:
        """All pieces of each request, by its id; waits until they are over."""
        told: dict[str, list[request_lib.Piece]] = {r.id: [] for r in requests}
        left = {r.id: r.n for r in requests}
        over = threading.Event()

        def tell(piece: request_lib.Piece) -> None:
            told[piece.request].append(piece)
            if piece.finish:
                left[piece.request] -= 1
                if not any(left.values()):
                    over.set()

        for request in requests:
            self.check(request)
        room = threading.Semaphore(self.settings.max_waiting)
        for request in requests:
            while True:
                try:
                    self.submit(request, tell)
                    break
                except Overloaded:
                    self.step() if self._thread is None else room.acquire(timeout=0.01)
        while requests and not over.is_set():
            if self._thread is None:
                self.step()
            else:
                over.wait(0.05)
        return told

    # ---- the thread

    def start(self) -> None:
        """Compile what serving needs, then make steps in a thread of the engine's."""
        self.warm()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float | None = None) -> None:
        """No new requests; those in flight end by themselves within `timeout_s` (None:
        however long it takes), or are cancelled."""
        with self._lock:
            self._closing = True
            self._lock.notify()
        thread, self._thread = self._thread, None
        if thread is None:
            return
        thread.join(timeout_s)
        if thread.is_alive():
            with self._lock:
                self._cancelled |= set(self._tells)
                self._lock.notify()
            thread.join()

    def _loop(self) -> None:
        while True:
            with self._lock:
                while not (self._new or self._cancelled or self._busy()):
                    if self._closing:
                        return
                    self._lock.wait()
            self.step()

    def _busy(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting)

    def step(self) -> bool:
        """One step; False when there was nothing to do. Called by one thread only."""
        with self._lock:
            self._take_in()
            plan = self._scheduler.plan()
        if not plan:
            return False
        self.steps += 1
        with _set(self._mesh):
            try:
                if plan.prefill is not None:
                    self._prefill(plan.prefill)
                if plan.decode:
                    self._decode(plan.decode)
            except Exception as error:  # noqa: BLE001 - whatever it is, callers are told
                self._fail(error)
        return True

    def _take_in(self) -> None:
        """New requests into the queue, cancelled ones out of everything."""
        while self._new:
            request, _ = self._new.popleft()
            for index in range(request.n):
                row = scheduler.Row(request, index, self._table)
                stop_ids = request.stop_ids
                stop_ids = self.stop_ids if stop_ids is None else stop_ids
                try:
                    row.answer = answer_lib.Answer(request, stop_ids, self.tokenizer)
                except Exception as error:  # noqa: BLE001 - a grammar of the caller's
                    self._end(row, request_lib.ERROR, error=_told(error))
                    continue
                self._scheduler.add(row)
        for name in self._cancelled:
            for row in self._scheduler.rows(lambda row, n=name: row.request.id == n):
                self._end(row, request_lib.CANCELLED)
        self._cancelled.clear()

    # ---- the device's side

    def _prefill(self, now: scheduler.Prefill) -> None:
        """A piece of a prompt; after the last one, the first id of its answer."""
        row, ids = now.row, now.row.ids[now.start : now.start + now.count]
        size = next(s for s in self.settings.piece_buckets() if s >= now.count)
        tokens_1t = np.zeros((1, size), np.int32)
        tokens_1t[0, : now.count] = ids
        places = paged.Places(
            row.table[None],
            np.array([now.start], np.int32),
            np.array([row.slot], np.int32),
        )
        count = np.int32(now.count)
        how = {"spec": self.spec, "rules": self.rules}
        if row.request.prompt_logprobs is None or row.said:
            logits_1v, self._pages = programs.prefill(
                self._params, self._pages, tokens_1t, count, places, **how
            )
        else:
            next_t = np.zeros(size, np.int32)
            after = row.ids[now.start + 1 : now.start + now.count + 1]
            next_t[: len(after)] = after
            logits_1v, told, self._pages = programs.prompt_scores(
                self._params, self._pages, tokens_1t, next_t, count, places, **how
            )
            row.answer.prompt += _logprobs(
                told, after, row.request.prompt_logprobs, len(after)
            )
        with self._lock:
            self._scheduler.wrote(row, now.count)
        if now.last and not row.said:
            full = self._is_full(row)
            if full:
                self._begin(row)
            feed, mask_bw = self._feed([row], 1, full)
            token_b, told, kept = programs.first(
                logits_1v, self._extras if full else None, feed, mask_bw
            )
            self._extras = kept if full else self._extras
            self._told([row], np.asarray(token_b), told)
        elif now.last and self._is_full(row):
            self._begin(row)

    def _decode(self, rows: list[scheduler.Row]) -> None:
        """One token of each row."""
        b = next(b for b in self.settings.row_buckets() if b >= len(rows))
        full = any(self._is_full(row) for row in rows)
        feed, mask_bw = self._feed(rows, b, full)
        token_b, told, self._pages, kept = programs.decode(
            self._params,
            self._pages,
            self._extras if full else None,
            feed,
            mask_bw,
            spec=self.spec,
            rules=self.rules,
        )
        self._extras = kept if full else self._extras
        token_b = np.asarray(token_b)
        with self._lock:
            for row in rows:
                self._scheduler.wrote(row, 1)
        self._told(rows, token_b, told)

    def _is_full(self, row: scheduler.Row) -> bool:
        """Whether the row wants more than temperature and cuts."""
        request, wish = row.request, row.request.sampling
        return bool(
            request.logprobs is not None
            or request.logit_bias
            or row.answer.matcher is not None
            or wish.repetition_penalty != 1
            or wish.presence_penalty
            or wish.frequency_penalty
        )

    def _begin(self, row: scheduler.Row) -> None:
        """Counts and biases of a row into its slot."""
        counts_v = np.zeros(self.spec.vocab_size, np.int32)
        counts_v[np.asarray(row.request.prompt)] = programs.PROMPT
        np.add.at(counts_v, np.asarray(row.ids[len(row.request.prompt) :], int), 1)
        bias_v = np.zeros(self.spec.vocab_size, np.float32)
        for token, bias in row.request.logit_bias.items():
            bias_v[token] = bias
        slot = np.int32(row.slot)
        self._extras = programs.begin(self._extras, slot, counts_v, bias_v)

    def _feed(self, rows: list[scheduler.Row], b: int, full: bool):
        """What the host tells of rows: (Feed, masks or None)."""
        token_b, real_b, step_b, length_b = np.zeros((4, b), np.int32)
        slot_b = np.full(b, self.settings.rows, np.int32)
        table_bp = np.zeros((b, self._table), np.int32)
        for i, row in enumerate(rows):
            token_b[i], real_b[i], step_b[i] = row.ids[-1], 1, row.said
            length_b[i], slot_b[i], table_bp[i] = row.length, row.slot, row.table
        key = (b, *((row.request.id, row.index) for row in rows))
        if self._wishes[0] != key:
            wishes = [
                dataclasses.replace(
                    row.request.sampling,
                    seed=(row.request.sampling.seed + row.index) % 2**64,
                )
                for row in rows
            ]
            wishes += [sampling_lib.Sampling()] * (b - len(rows))
            self._wishes = key, jax.tree.map(jnp.asarray, sampling_lib.stack(wishes))
        places = paged.Places(table_bp, length_b, slot_b)
        feed = programs.Feed(token_b, real_b, step_b, places, self._wishes[1])
        return feed, self._masks(rows, b) if full else None

    def _masks(self, rows: list[scheduler.Row], b: int) -> np.ndarray:
        words = -(-self.spec.vocab_size // 32)
        if b not in self._free_masks:
            self._free_masks[b] = np.full((b, words), 0xFFFFFFFF, np.uint32)
        if all(row.answer.matcher is None for row in rows):
            return self._free_masks[b]
        mask_bw = self._free_masks[b].copy()
        for i, row in enumerate(rows):
            if row.answer.matcher is not None:
                told = row.answer.matcher.allowed()
                mask_bw[i, : len(told)] = told[:words]
                mask_bw[i, len(told) :] = 0
        return mask_bw

    # ---- telling

    def _told(self, rows, token_b: np.ndarray, told: programs.Told | None) -> None:
        """New ids of rows: into their answers, and to their callers."""
        told = jax.tree.map(np.asarray, told)
        for i, row in enumerate(rows):
            token = int(token_b[i])
            row.ids.append(token)
            logprobs = ()
            if told is not None and row.request.logprobs is not None:
                part = jax.tree.map(lambda x, i=i: x[i : i + 1], told)
                logprobs = tuple(_logprobs(part, [token], row.request.logprobs, 1))
            try:
                text, finish, by = row.answer.push(token)
            except Exception as error:  # noqa: BLE001 - one row's fault ends that row
                with self._lock:
                    self._end(row, request_lib.ERROR, error=_told(error))
                continue
            more = {"text": text, "ids": (token,), "logprobs": logprobs}
            if row.said == 1 and row.index == 0 and row.answer.prompt:
                more["prompt_logprobs"] = tuple(row.answer.prompt)
            if finish is None:
                self._say(row, request_lib.Piece(row.request.id, row.index, **more))
            else:
                with self._lock:
                    self._end(row, finish, stopped_by=by, **more)

    def _say(self, row: scheduler.Row, piece: request_lib.Piece) -> None:
        tell = self._tells.get(row.request.id)
        if tell is None:
            return
        try:
            tell[0](piece)
        except Exception:
            log.exception("a caller's function failed; its request is cancelled")
            self._cancelled.add(row.request.id)

    def _end(self, row: scheduler.Row, finish: str, **more: Any) -> None:
        """The last piece of a row, with the lock held."""
        self._scheduler.end(row)
        usage = request_lib.Usage(len(row.request.prompt), row.cached, row.said)
        name = row.request.id
        piece = request_lib.Piece(name, row.index, finish=finish, usage=usage, **more)
        self._say(row, piece)
        tell, left = self._tells.get(name, (None, 0))
        if left > 1:
            self._tells[name] = (tell, left - 1)
        else:
            self._tells.pop(name, None)

    def _fail(self, error: Exception) -> None:
        """All in flight end; pages that a broken step may have spoilt are made anew."""
        log.exception("a step failed; all requests in flight end")
        with self._lock:
            for row in self._scheduler.rows(lambda _: True):
                self._end(row, request_lib.ERROR, error=_told(error))
            self._empty()

    def warm(self) -> int:
        """Run every program once on rows that are nobody's; how many were compiled."""
        before = _compiled()
        how = {"spec": self.spec, "rules": self.rules}
        nobody = np.array([self.settings.rows], np.int32)
        table = np.zeros((1, self._table), np.int32)
        places = paged.Places(table, np.zeros(1, np.int32), nobody)
        with _set(self._mesh):
            for size in self.settings.piece_buckets():
                tokens_1t, count = np.zeros((1, size), np.int32), np.int32(1)
                logits_1v, self._pages = programs.prefill(
                    self._params, self._pages, tokens_1t, count, places, **how
                )
                logits_1v, _, self._pages = programs.prompt_scores(
                    self._params,
                    self._pages,
                    tokens_1t,
                    np.zeros(size, np.int32),
                    count,
                    places,
                    **how,
                )
            zeros_v = np.zeros(self.spec.vocab_size)
            self._extras = programs.begin(
                self._extras,
                nobody[0],
                zeros_v.astype(np.int32),
                zeros_v.astype(np.float32),
            )
            for full in (False, True):
                feed, mask_bw = self._feed([], 1, full)
                _, _, kept = programs.first(
                    logits_1v, self._extras if full else None, feed, mask_bw
                )
                self._extras = kept if full else self._extras
                for b in self.settings.row_buckets():
                    feed, mask_bw = self._feed([], b, full)
                    _, _, self._pages, kept = programs.decode(
                        self._params,
                        self._pages,
                        self._extras if full else None,
                        feed,
                        mask_bw,
                        **how,
                    )
                    self._extras = kept if full else self._extras
        return _compiled() - before


def _set(device_mesh):
    return jax.set_mesh(device_mesh)


def _compiled() -> int:
    """Programs compiled so far, of all engines."""
    every = (
        programs.decode,
        programs.prefill,
        programs.prompt_scores,
        programs.first,
        programs.begin,
    )
    return sum(one._cache_size() for one in every)


def _logprobs(told, ids, top: int, count: int) -> list[request_lib.Logprob]:
    """Records of `count` places."""
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


def _told(error: Exception) -> str:
    """What callers are told of an error: no path, no stack."""
    return f"{type(error).__name__} while answering"
