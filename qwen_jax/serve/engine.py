# SPDX-License-Identifier: Apache-2.0
"""Answers for many requests at once: one model, one pool of pages, one thread.

    engine = Engine(spec, params, tokenizer)
    texts = engine.generate(["prompt", ...], max_tokens=32, temperature=0.0)

    engine.start(); engine.submit(request, tell); ...; engine.close()

A step computes a piece of one prompt and one token of every answer that has its prompt
in (`scheduler.py`, `device.py`); then each new id becomes text (`answer.py`) and is
told. Without `start` the caller's own thread makes the steps, in `generate` or by
`step`, which is how simulations and rollouts run it.

Shapes: programs are compiled for rows in powers of two, and for a few sizes of pieces
(`device.Settings`), all by `warm`; nothing is compiled after that.
Invariants: what an answer says does not depend on the others, nor on how its prompt was
cut, found in the cache or computed anew (up to rounding of the scores; draws are by
seed and number). A fault in one request ends that request; one of the device ends all
in flight, tells them so, and the engine goes on with empty pages.
Raises: config.InputError for what can never be answered; Overloaded when the queue is
full; Closed after `close`.
"""

import collections
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from qwen_jax import config, mesh
from qwen_jax.data import tokenizer as tokenizer_lib
from qwen_jax.models import sampling as sampling_lib
from qwen_jax.models import spec as spec_lib
from qwen_jax.serve import answer as answer_lib
from qwen_jax.serve import device as device_lib
from qwen_jax.serve import drafts as drafts_lib
from qwen_jax.serve import images, pace, programs, scheduler
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


class Engine:
    """See the module docstring.

    Args:
      spec: the model.
      params: its weights, as `models.load` or training gives them.
      tokenizer: makes text of ids; None where only ids are wanted.
      settings: how much it holds.
      rules: dims -> mesh axes; the mesh is the one set when the engine is made.
      stop_ids: ids that end an answer; None for the model's `eos_ids`.
      clock: seconds, from any begin.
    """

    def __init__(
        self,
        spec: spec_lib.Spec,
        params: Any,
        tokenizer: tokenizer_lib.Tokenizer | None = None,
        *,
        settings: device_lib.Settings | None = None,
        rules: mesh.Rules | None = None,
        stop_ids: Sequence[int] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.spec, self.tokenizer = spec, tokenizer
        self.settings = settings or device_lib.Settings()
        self.stop_ids = tuple(spec.eos_ids if stop_ids is None else stop_ids)
        self._mesh = jax.sharding.get_mesh()
        self._device = device_lib.Device(spec, params, self.settings, rules)
        self.max_tokens = self._device.max_tokens
        self._drafts = drafts_lib.Drafts(self.settings, self._device.draft_cost)
        self._lock = threading.Condition()
        self._clock = clock
        # Requests that came since the last step, and when.
        self._new: collections.deque[tuple[request_lib.Request, float]]
        self._new = collections.deque()
        self._cancelled: set[str] = set()
        self._tells: dict[str, tuple[Tell, int]] = {}  # request: (tell, answers left)
        self.weights = 0  # swaps so far
        # Weights to come, and who waits for them.
        self._swap: tuple[Any, threading.Event] | None = None
        self._thread: threading.Thread | None = None
        self._closing = self._warm = False
        self._calls = itertools.count()  # of `generate`, which may be called at once
        self.steps = 0
        self.plan_s = self.busy_s = 0.0  # in the scheduler, in steps at all
        self._pace = pace.Pace(self.settings.rows)
        self._pieced = 0  # tokens of prompts in the step that is being made
        self._empty()

    def _empty(self) -> None:
        """Queue and rows as at the start."""
        # Steps whose ids are not known yet: (rows, ids, told, and where drafts were
        # checked how many of the ids are the rows' and how many were drafted).
        self._flying: collections.deque[tuple] = collections.deque()
        units = self._device.state_units
        recurrent = any(kind.mixer == "delta" for kind in self.spec.kinds)
        self._scheduler = scheduler.Scheduler(
            rows=self.settings.rows,
            pages=self._device.pool,
            page_tokens=self.settings.page_tokens,
            piece=self.settings.piece,
            sharing=self.settings.sharing and (units > 0 or not recurrent),
            state_units=units,
        )
        self.max_tokens = min(
            self.max_tokens, self._scheduler.total * self.settings.page_tokens
        )

    # ---- callers' side

    def submit(self, request: request_lib.Request, tell: Tell) -> int:
        """Queue a request; `tell` gets its pieces from the engine's thread. Returns the
        number of the weights that answer it, `swap`s before it.

        Raises:
          config.InputError: it can never be answered.
          Overloaded: too many wait.
          Closed: after `close`.
        """
        self.check(request)
        with self._lock:
            if self._closing:
                raise Closed("the engine is closing")
            refused = self._refusal(request.n) or self._crowd(request)
            if refused is not None:
                raise refused
            if request.id in self._tells:
                raise config.InputError(f"request {request.id!r} is in flight already")
            self._tells[request.id] = (tell, request.n)
            self._new.append((request, self._clock()))
            self._lock.notify()
            return self.weights

    def refusal(self) -> Overloaded | None:
        """What `submit` would raise now, whatever the request; None if it might not."""
        with self._lock:
            return self._refusal(1)

    def _refusal(self, n: int) -> Overloaded | None:
        waiting, settings = len(self._new) + len(self._scheduler.waiting), self.settings
        wait_s = self._wait_s(n)
        if waiting >= settings.max_waiting or 0 < settings.max_wait_s < wait_s:
            return Overloaded(waiting, retry_after_s=wait_s)
        return None

    def _crowd(self, request: request_lib.Request) -> Overloaded | None:
        """The refusal where images of requests in flight would take too much."""
        here = [one for one, _ in self._new]
        here += [row.request for row in self._scheduler.rows(lambda _: True)]
        if images.crowd(request, here) <= self.settings.image_bytes:
            return None
        return Overloaded(len(here), retry_after_s=1.0)

    def check(self, request: request_lib.Request) -> None:
        """Refuse what can never be answered.

        Raises:
          config.InputError: naming what does not fit.
        """
        if self.spec.head != "tokens":
            raise config.InputError(
                "this model has no head for tokens: it embeds and does not answer"
            )
        fits = {"vocab_size": self.spec.vocab_size, "max_tokens": self.max_tokens}
        request_lib.check(request, **fits, texts=self.tokenizer is not None)
        images.check(self.spec, request, self.settings)

    def _wait_s(self, n: int) -> float:
        plan, new = self._scheduler, [request for request, _ in self._new]
        rows = [*plan.running, *plan.waiting]
        return self._pace.wait_s(n, computing=self._pieced, new=new, rows=rows)

    def embed(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """The vector of each document's ids, of length 1: float32 [documents, d].

        Any thread may call it; it waits for its result.

        Raises:
          config.InputError: an empty document, or one that is too long.
        """
        for ids in prompts:
            if not 0 < len(ids) <= self.max_tokens:
                raise config.InputError(
                    f"a document of {len(ids)} tokens: wanted 1 to {self.max_tokens}"
                )
            request_lib.check_ids(ids, "the document", self.spec.vocab_size)
        with jax.set_mesh(self._mesh):
            made = [self._device.embed(ids) for ids in prompts]
        return np.array(made, np.float32).reshape(len(made), self.spec.width)

    def cancel(self, request_id: str) -> None:
        """End a request; its unfinished answers end as "cancelled" at the next step."""
        with self._lock:
            if request_id in self._tells:
                self._cancelled.add(request_id)
                self._lock.notify()

    def swap(self, params: Any) -> int:
        """Answer with other weights of the same model from now on, and wait until it
        is so. Returns their number.

        What was submitted before is answered with the old weights to its end, what
        comes later waits for that; nothing is compiled, nothing is dropped. Both sets
        are in memory meanwhile. Called by the thread that makes the steps where there
        is no engine's thread (rollouts between updates), else by any.

        Raises:
          config.InputError: the weights do not fit, or others are on their way.
          Closed: after `close`.
        """
        fitted, over = self._device.fitted(params), threading.Event()
        with self._lock:
            if self._closing:
                raise Closed("the engine is closing")
            if self._swap is not None:
                raise config.InputError("other weights are on their way already")
            self._take_in()
            self._swap = fitted, over
            self.weights = number = self.weights + 1
            self._lock.notify()
        while not over.is_set():
            if self._thread is None:
                self.step()
            else:
                over.wait(0.05)
        return number

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
                compiled=device_lib.compiled(),
                wait_s=self._wait_s(1),
                **self._drafts.counts(),
            )

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
        images: Sequence[Sequence[images.Image]] | None = None,
        **sampling: Any,
    ) -> list[str]:
        """The answer to each prompt, a text (with its marks read) or ids.

        Args:
          prompts: any number; more than fit wait for their turn.
          max_tokens: most ids of an answer.
          stop: texts that end an answer.
          images: those of each prompt, for models that see: `images.py`.
          **sampling: fields of `sampling.Sampling`; greedy without.
        """
        ids = [
            self.tokenizer.encode(one, allow_special=True)
            if isinstance(one, str)
            else one
            for one in prompts
        ]
        requests = request_lib.alike(
            f"generate-{next(self._calls)}",
            ids,
            images,
            max_tokens=max_tokens,
            sampling=sampling_lib.Sampling(**sampling),
            stop=tuple(stop),
        )
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
        for request in requests:
            while True:
                try:
                    self.submit(request, tell)
                    break
                except Overloaded:
                    self.step() if self._thread is None else time.sleep(0.01)
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
                while not (self._new or self._cancelled or self._tells or self._swap):
                    if self._closing:
                        return
                    self._lock.wait()
            self.step()

    def step(self) -> bool:
        """One step; False when there was nothing to do. Called by one thread only."""
        began = self._clock()
        with jax.set_mesh(self._mesh):
            try:
                return self._step()
            except Exception as error:  # noqa: BLE001 - whatever it is, callers are told
                self._fail(error)
                return True
            finally:
                took_s = self._clock() - began
                self.busy_s += took_s
                if self._pieced:
                    self._pace.stepped(took_s, self._pieced)
                    self._pieced = 0

    def _step(self) -> bool:
        began = self._clock()
        with self._lock:
            self._take_in()
            self._swapped()
            running = self._scheduler.running
            masked = any(row.answer.matcher for row in running)
            hopes = self._drafts.hopes(running)
        # What may come next depends on what came: masks, drafts, how many were right.
        if masked or hopes or any(flight[3] for flight in self._flying):
            self._land(0)
        with self._lock:
            plan = self._scheduler.plan()
        self.plan_s += self._clock() - began
        if plan is None:
            self._land(0)
            with self._lock:
                plan = self._scheduler.plan()
        for row in self._scheduler.running:
            if row.begun_s is None:
                row.begun_s = began
        if not plan:
            self._land(0)
            return bool(self.in_flight)
        self.steps += 1
        for row in plan.restore:
            self._device.restore(row)
        if plan.prefill is not None:
            self._prefill(plan.prefill)
        before = len(self._flying)
        if plan.decode:
            self._decode(plan.decode, plan.prefill is None)
        # Ids of this step's decoding are looked at when the next one is under way.
        self._land(len(self._flying) - before)
        return True

    @property
    def in_flight(self) -> int:
        """Requests that are not over."""
        return len(self._tells)

    def _land(self, left: int) -> None:
        """Ids of all steps but the last `left` become known and are told."""
        while len(self._flying) > left:
            self._told(*self._flying.popleft())

    def _take_in(self) -> None:
        """New requests into the queue, cancelled ones out of everything."""
        # While weights are to come, what is new waits for them.
        while self._new and self._swap is None:
            request, come_s = self._new.popleft()
            laid = images.lay(self.spec, request.prompt, request.images)
            for index in range(request.n):
                row = scheduler.Row(request, index, self._device.table_pages)
                row.come_s, row.laid = come_s, laid
                stop_ids = request.stop_ids
                stop_ids = self.stop_ids if stop_ids is None else stop_ids
                try:
                    row.answer = answer_lib.Answer(request, stop_ids, self.tokenizer)
                except Exception as error:  # noqa: BLE001 - a grammar of the caller's
                    self._end(row, request_lib.ERROR, error=answer_lib.fault(error))
                    continue
                self._scheduler.add(row)
        for name in self._cancelled:
            for row in self._scheduler.rows(lambda row, n=name: row.request.id == n):
                self._end(row, request_lib.CANCELLED)
        for item in [one for one in self._new if one[0].id in self._cancelled]:
            self._new.remove(item)
            request = item[0]
            for index in range(request.n):
                row = scheduler.Row(request, index, self._device.table_pages)
                self._end(row, request_lib.CANCELLED)
        self._cancelled.clear()

    def _swapped(self) -> None:
        """Weights that are to come are used once nobody needs the old ones."""
        if self._swap is None or self._scheduler.rows(lambda _: True):
            return
        self._land(0)
        (fitted, over), self._swap = self._swap, None
        self._device.use(fitted)
        self._scheduler.forget()
        over.set()
        self._take_in()

    # ---- the device's side

    def _prefill(self, now: scheduler.Prefill) -> None:
        """A piece of a prompt; after the last one, the first id of its answer."""
        row = now.row
        logits_1v, told = self._device.prefill(now)
        if told is not None:
            after = row.ids[now.start + 1 : now.start + now.count + 1]
            top = row.request.prompt_logprobs
            row.answer.prompt += answer_lib.logprobs(told, after, top, len(after))
        row.length, self._pieced = row.length + now.count, now.count
        with self._lock:
            self._scheduler.share(row)
            state = self._scheduler.state_page(row)
        if state is not None:
            self._device.save(row, state)
        if now.last and not row.said:
            self._flies([row], *self._device.first(row, logits_1v))

    def _decode(self, rows: list[scheduler.Row], alone: bool) -> None:
        """One token of each row, or with drafts of some rows several; or a burst."""
        with self._lock:
            checked = self._drafts.plan(rows, self._scheduler.reach)
        if checked is not None:
            some, count_b, drafts_bi = checked
            token_bt, kept_b = self._device.verify(some, count_b, drafts_bi)
            self._flies(some, token_bt, None, (kept_b, count_b))
            rows = [row for row in rows if row not in some]
        if rows:
            count = self._device.burst_of(rows) if alone else 1
            with self._lock:
                count = self._scheduler.together(rows, count)
            ids = self._device.decode(rows, count)
            for row in rows:
                row.length += count
            self._flies(rows, *ids, count=count)

    def _flies(self, rows, token_b, told, checked=None, *, count: int = 1) -> None:
        """Ids of each row are on their way: `count`, or as many as are right."""
        for row in rows:
            row.ahead += count
        self._flying.append((rows, token_b, told, checked))

    # ---- telling

    def _told(self, rows, token_b, told: programs.Told | None, checked) -> None:
        """New ids of rows: into their answers, and to their callers."""
        token_b, told, checked = jax.tree.map(np.asarray, (token_b, told, checked))
        for i, row in enumerate(rows):
            if row.over:  # what came after its end was drawn for nothing
                continue
            ids, drafted = token_b[i].reshape(-1), 0
            row.ahead -= 1 if checked is not None else len(ids)
            if checked is not None:
                ids, drafted = ids[: checked[0][i]], int(checked[1][i])
                row.length += len(ids)
            self._drafts.came(row, drafted, len(ids) - 1)
            logprobs = ()
            if told is not None and row.request.logprobs is not None:
                part, top = jax.tree.map(lambda x, i=i: x[i : i + 1], told), row.request
                logprobs = tuple(answer_lib.logprobs(part, ids, top.logprobs, 1))
            for token in map(int, ids):
                if not row.over:
                    self._one(row, token, logprobs)

    def _one(self, row: scheduler.Row, token: int, logprobs: tuple) -> None:
        """One more id of a row."""
        row.ids.append(token)
        with self._lock:
            self._scheduler.share(row)
        try:
            text, finish, by = row.answer.push(token)
        except Exception as error:  # noqa: BLE001 - one row's fault ends that row
            with self._lock:
                self._end(row, request_lib.ERROR, error=answer_lib.fault(error))
            return
        more = {"text": text, "ids": (token,), "logprobs": logprobs}
        if row.answer.count == 1:
            more["queue_s"] = row.begun_s - row.come_s
            more["prefill_s"] = self._clock() - row.begun_s
            if row.index == 0 and row.answer.prompt:
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
        if row.slot >= 0:
            full = len(self._scheduler.running) == self.settings.rows
            self._pace.ended(self._clock(), full)
        self._scheduler.end(row)
        said = len(row.ids) - len(row.request.prompt)
        usage = request_lib.Usage(len(row.request.prompt), row.cached, said)
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
                self._end(row, request_lib.ERROR, error=answer_lib.fault(error))
            try:
                self._device.empty()
                self._empty()
            except Exception:
                log.exception("no pages can be had anew: no more requests are taken")
                self._closing = True

    def warm(self) -> int:
        """Compile every program, the first time and before `start`; how many."""
        if self._warm:
            return 0
        self._warm = True
        with jax.set_mesh(self._mesh):
            return self._device.warm()
