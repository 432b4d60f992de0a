# SPDX-License-Identifier: Apache-2.0
"""An engine's weights, pages and programs: rows in, ids out, nothing waited for.

`Settings` says how much an engine holds and so which shapes its programs are compiled
for. A `Device` turns rows of the scheduler into arrays and hands them to `programs.py`;
what it gives back are arrays that the device may still be computing.

Invariants: everything is compiled by `warm`; pages and states are changed by programs
in the order they are called, so a page may be given to another row at once.
Raises: config.InputError for settings that do not fit.
"""

import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import config, mesh
from qwen_jax.models import decode, paged
from qwen_jax.models import sampling as sampling_lib
from qwen_jax.models import spec as spec_lib
from qwen_jax.serve import programs, scheduler, sight
from qwen_jax.serve import request as request_lib

UNMEASURED = 0.5  # draft_cost
DRAFTS, MOST_DRAFTS = ("", "lookup", "mtp"), 16
log = logging.getLogger("qwen_jax.serve")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much an engine holds.

    rows: most answers at once. page_tokens: tokens of a page. pages: of the pool; 0
    for what `memory_bytes` holds, at most what all rows can fill. max_tokens: longest
    prompt and answer together; 0 for the model's positions, at most 32,768. piece: most
    tokens of a prompt in a step, a multiple of the page. max_waiting: most requests in
    the queue. max_wait_s: refuse a request that is expected to wait longer for others
    before it begins; 0 for no limit. sharing: keep pages for prompts that begin alike.
    embeddings: compile what vectors of documents need, too (for models without a head
    always). images: most of a request, for models that see; 0 leaves their eyes shut.
    image_patches: most of an image. image_bytes: pixels of all requests in flight; one
    that passes it alone is taken when no other has images. drafts: where ids to be
    checked several at once come from, "lookup" (what stood in prompt and answer before)
    or "mtp" (the model's head), "" for none; draft_tokens: most of them for a row in a
    step; draft_rows: with more rows running there are none; draft_cost: what checking
    them takes longer than a step without, in such steps, None for what is measured when
    warm. burst: steps that are given to the device at once while nothing but decoding
    is to do, so that it need not wait for the host; 0 for 8 on accelerators and 1 on a
    CPU. growth: of the numbers of rows that steps are compiled for, each to the next; 0
    for 4 on accelerators, where more rows cost little, and 2 on a CPU.
    """

    rows: int = 16
    page_tokens: int = 64
    pages: int = 0
    memory_bytes: int = 2 << 30
    max_tokens: int = 0
    piece: int = 256
    max_waiting: int = 256
    max_wait_s: float = 0.0
    sharing: bool = True
    embeddings: bool = False
    images: int = 16
    image_patches: int = 4096
    image_bytes: int = 2 << 30
    drafts: str = ""
    draft_tokens: int = 3
    draft_rows: int = 8
    draft_cost: float | None = None
    burst: int = 0
    growth: int = 0

    def __post_init__(self):
        for name in (
            *("rows", "page_tokens", "piece", "max_waiting", "image_patches"),
            *("draft_tokens", "draft_rows"),
        ):
            if (given := getattr(self, name)) < 1:
                raise config.InputError(f"{name}={given}: wanted at least 1")
        for name in ("max_wait_s", "images", "draft_cost", "burst", "growth"):
            if not ((given := getattr(self, name)) or 0) >= 0:
                raise config.InputError(f"{name}={given}: wanted 0 or more")
        if self.growth == 1:
            raise config.InputError("growth=1: wanted 2 or more, or 0 for as it comes")
        if self.draft_tokens > MOST_DRAFTS:
            raise config.InputError(
                f"draft_tokens={self.draft_tokens}: wanted at most {MOST_DRAFTS}; more "
                "are hardly ever right"
            )
        if self.drafts not in DRAFTS:
            raise config.InputError(
                f"drafts={self.drafts!r}: wanted lookup, mtp, or nothing for none"
                f"{config.nearest(self.drafts, DRAFTS[1:])}"
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
        room = self.memory_bytes // self.page_bytes(spec)
        return min(room, self.rows * -(-self.longest(spec) // self.page_tokens)) + 1

    def page_bytes(self, spec: spec_lib.Spec) -> int:
        """Bytes of a page in all layers."""
        return paged.page_bytes(spec, self.page_tokens, mtp=self.drafts == "mtp")

    def row_buckets(self) -> tuple[int, ...]:
        """Numbers of rows that decoding is compiled for."""
        growth = self.growth or (2 if mesh.platform() == "cpu" else 4)
        powers = itertools.takewhile(
            lambda b: b < self.rows, (growth**i for i in range(20))
        )
        return (*powers, self.rows)

    def full_buckets(self) -> tuple[int, ...]:
        """Likewise with `programs.Extras`, which are wanted less often: every other."""
        buckets = self.row_buckets()
        return (*buckets[:-1:2], buckets[-1])

    def draft_buckets(self) -> tuple[int, ...]:
        """Numbers of rows that checking drafts is compiled for: every other, too."""
        if not self.drafts:
            return ()
        most = min(self.rows, self.draft_rows)
        return dataclasses.replace(self, rows=most).full_buckets()

    def piece_buckets(self) -> tuple[int, ...]:
        """Sizes of pieces that prompts are computed in."""
        sizes, size = [], self.piece
        while size > self.page_tokens and size % (4 * self.page_tokens) == 0:
            sizes.append(size)
            size //= 4
        return (*sorted({self.page_tokens, *sizes, self.piece}),)

    def patch_buckets(self, vision: spec_lib.Vision) -> tuple[int, ...]:
        """Numbers of patches that images are padded to."""
        whole = vision.merge**2  # patches of a token
        most = max(self.image_patches // whole, 1) * whole
        sizes = [most // share // whole * whole for share in (16, 4)]
        return (*[size for size in sizes if size >= 4 * whole], most)


def is_full(row: scheduler.Row) -> bool:
    """Whether a row wants more than temperature and cuts."""
    request, wish = row.request, row.request.sampling
    return bool(
        request.logprobs is not None
        or request.logit_bias
        or row.answer.matcher is not None
        or wish.repetition_penalty != 1
        or wish.presence_penalty
        or wish.frequency_penalty
    )


class Device:
    """See the module docstring; arguments as of `engine.Engine`."""

    def __init__(
        self,
        spec: spec_lib.Spec,
        params: Any,
        settings: Settings,
        rules: mesh.Rules | None,
    ):
        paged.check(spec)
        if settings.drafts == "mtp" and not spec.mtp_layers:
            raise config.InputError(
                "drafts='mtp': this model has no MTP head (mtp_layers=0); use "
                "drafts='lookup', which any model can"
            )
        self.spec, self.settings = spec, settings
        self.rules = dataclasses.replace(rules or mesh.Rules(), batch=None, tokens=None)
        self.table_pages = -(-settings.longest(spec) // settings.page_tokens)
        self.pool = settings.pool(spec)
        if self.pool < 2:
            raise config.InputError(
                f"memory_bytes={settings.memory_bytes} holds no page of "
                f"{settings.page_bytes(spec):,} bytes"
            )
        self.state_units = paged.state_units(spec, settings.page_tokens)
        self.max_tokens = min(
            settings.longest(spec), (self.pool - 1) * settings.page_tokens
        )
        self._mesh = jax.sharding.get_mesh()
        self._params = decode.laid_out(spec, params)
        self._how = {"spec": spec, "rules": self.rules}
        on_cpu = mesh.platform() == "cpu"
        # A step that waits for a few steps' ids is no faster by a burst.
        self.burst = 1 if settings.drafts else settings.burst or (1 if on_cpu else 8)
        # Branches cost an accelerator more than a second set of programs.
        self._knows_uncut = not on_cpu
        self._sight = None
        if spec.vision is not None and settings.images > 0 and spec.head == "tokens":
            buckets = settings.patch_buckets(spec.vision)
            self._sight = sight.Sight(buckets, settings.piece, self._how)
        self._free_masks: dict[int, np.ndarray] = {}
        self._draft_costs: dict[int, float] = {}  # by bucket, as measured
        self.empty()

    def empty(self) -> None:
        """Pages and states of nobody, as at the start."""
        settings = self.settings
        self._pages = self._extras = self._last_s = None  # two have no room
        with jax.set_mesh(self._mesh):
            made = (
                paged.init(
                    self.spec,
                    self.pool,
                    settings.page_tokens,
                    settings.rows,
                    self.rules,
                    mtp=settings.drafts == "mtp",
                ),
                programs.extras(settings.rows, self.spec.vocab_size),
                jnp.zeros(settings.rows + 1, jnp.int32),
            )
            seen: set[int] = set()  # what is there twice is copied: each is given away
            made = jax.tree.map(
                lambda x: jnp.copy(x) if id(x) in seen else seen.add(id(x)) or x, made
            )
            self._pages, self._extras, self._last_s = made
            if self._sight is not None:
                self._sight.empty()
        self._wishes: tuple[Any, Any] = (None, None)
        self._biased: set[int] = set()  # slots

    def fitted(self, params: Any) -> Any:
        """Other weights for the same programs, laid out as those in use are.

        Raises:
          config.InputError: a weight has another shape or dtype, or is missing.
        """
        with jax.set_mesh(self._mesh):
            made = decode.laid_out(self.spec, params)
        kept, new = (dict(jax.tree.leaves_with_path(x)) for x in (self._params, made))
        for path in (*kept, *(path for path in new if path not in kept)):
            was, now = (
                f"{x[path].dtype}{list(x[path].shape)}" if path in x else "nothing"
                for x in (kept, new)
            )
            if was != now:
                raise config.InputError(
                    f"weights{jax.tree_util.keystr(path)}: {now} in place of {was}; "
                    "other weights of the same model are wanted"
                )
        # Not where it lies there already: that would bind it to its device, and the
        # programs would be compiled anew.
        return jax.tree.map(
            lambda x, old: (
                x if x.sharding == old.sharding else jax.device_put(x, old.sharding)
            ),
            made,
            self._params,
        )

    def use(self, fitted: Any) -> None:
        """Compute with these from the next program on."""
        self._params = fitted
        if self._sight is not None:
            self._sight.forget()

    def prefill(self, now: scheduler.Prefill) -> tuple[Any, programs.Told | None]:
        """A piece of a prompt: (scores after it, what its next ids were given)."""
        row, ids = now.row, now.row.ids[now.start : now.start + now.count]
        size = next(s for s in self.settings.piece_buckets() if s >= now.count)
        tokens_1t = np.zeros((1, size), np.int32)
        tokens_1t[0, : now.count] = ids
        places = paged.Places(
            row.table[None].copy(),  # the device may read it after it has changed
            np.array([now.start], np.int32),
            np.array([row.slot], np.int32),
        )
        shown = None
        if self._sight is not None:
            shown = self._sight.show(self._params, row, now.start, now.count, size)
        known_1, told = np.array([now.start > row.begins], np.int32), None
        operands = (self._params, self._pages, tokens_1t, np.int32(now.count))
        operands += (known_1, places, shown)
        if row.request.prompt_logprobs is None or row.said:
            logits_1v, self._pages = programs.prefill(*operands, **self._how)
        else:
            next_t = np.zeros(size, np.int32)
            after = row.ids[now.start + 1 : now.start + now.count + 1]
            next_t[: len(after)] = after
            logits_1v, told, self._pages = programs.prompt_scores(
                *operands, next_t, **self._how
            )
        if now.last and (is_full(row) or row.slot in self._biased):
            self._begin(row)
        return logits_1v, told

    def save(self, row: scheduler.Row, page: int) -> None:
        """The row's states into pages from `page` on."""
        where = np.int32(row.slot), np.int32(page)
        self._pages = programs.save(self._pages, *where, units=self.state_units)

    def restore(self, row: scheduler.Row) -> None:
        """The states that the row begins with into its slot."""
        where = np.int32(row.slot), np.int32(row.restore)
        self._pages = programs.restore(self._pages, *where, units=self.state_units)

    def first(self, row: scheduler.Row, logits_1v: jax.Array):
        """The first id of an answer: (ids [1], told or None)."""
        full = is_full(row)
        feed = self._feed([row], 1, full)
        return self._first(logits_1v, full, *feed, self._uncut([row]))

    def _uncut(self, rows: list[scheduler.Row]) -> bool:
        cut = any(row.request.sampling.cuts for row in rows)
        return self._knows_uncut and not cut

    def _first(self, logits_1v, full, feed, mask_bw, uncut=False):
        kept = self._extras if full else None
        token_b, told, kept, self._last_s = programs.first(
            logits_1v, kept, self._last_s, feed, mask_bw, uncut=uncut
        )
        self._extras = kept if full else self._extras
        return token_b, told

    def decode(self, rows: list[scheduler.Row], count: int = 1):
        """More ids of each row: (ids [b] or [b, count], told or None)."""
        full, settings = any(is_full(row) for row in rows), self.settings
        buckets = settings.full_buckets() if full else settings.row_buckets()
        b = next(b for b in buckets if b >= len(rows))
        uncut, feed = self._uncut(rows), self._feed(rows, b, full)
        if count > 1:
            return self._several(feed[0], uncut), None
        return self._decode(full, *feed, uncut)

    def burst_of(self, rows: list[scheduler.Row]) -> int:
        """Steps that `decode` can make of these rows at once."""
        return 1 if any(is_full(row) for row in rows) else self.burst

    def _several(self, feed, uncut):
        token_bt, self._pages, self._last_s = programs.several(
            self._params,
            self._pages,
            self._last_s,
            feed,
            uncut=uncut,
            count=self.burst,
            **self._how,
        )
        return token_bt

    def _decode(self, full, feed, mask_bw, uncut=False):
        token_b, told, self._pages, kept, self._last_s = programs.decode(
            self._params,
            self._pages,
            self._extras if full else None,
            self._last_s,
            feed,
            mask_bw,
            uncut=uncut,
            **self._how,
        )
        self._extras = kept if full else self._extras
        return token_b, told

    def verify(self, rows: list[scheduler.Row], count_b, drafts_bi):
        """Ids that were drafted for rows (None: by the MTP head now), checked: (ids
        [b, i + 1], how many of them are the next of each row [b])."""
        b = next(b for b in self.settings.draft_buckets() if b >= len(rows))
        feed, _ = self._feed(rows, b, False)
        more = b - len(rows)
        count_b = np.pad(count_b, (0, more))
        if drafts_bi is None:
            drafts_bi = self._draft(feed, count_b)
        else:
            drafts_bi = np.pad(drafts_bi, ((0, more), (0, 0)))
        return self._verify(feed, drafts_bi, count_b)

    def _draft(self, feed, count_b):
        most = self.settings.draft_tokens
        drafts_bi, self._pages = programs.draft(
            self._params, self._pages, feed, count_b, most=most, **self._how
        )
        return drafts_bi

    def _verify(self, feed, drafts_bi, count_b):
        token_bt, kept_b, self._pages, self._last_s = programs.verify(
            self._params,
            self._pages,
            self._last_s,
            feed,
            drafts_bi,
            count_b,
            **self._how,
        )
        return token_bt, kept_b

    def draft_cost(self, rows: int) -> float:
        """What checking drafts of so many rows takes longer than a step, in steps."""
        if self.settings.draft_cost is not None:
            return self.settings.draft_cost
        near = [b for b in self._draft_costs if b >= rows]
        return self._draft_costs[min(near)] if near else UNMEASURED

    def _measure_drafts(self) -> None:
        """How long steps with drafts and without take, of rows that are nobody's: what
        attention costs is about the same in both and not counted."""

        def least_s(run) -> float:
            times_s = []
            for _ in range(5):
                began = time.perf_counter()
                jax.block_until_ready(run())
                times_s.append(time.perf_counter() - began)
            return min(times_s)

        for b in self.settings.draft_buckets():
            plain_s = least_s(lambda b=b: self._decode(False, *self._feed([], b, 0)))
            ratio = least_s(lambda b=b: self._warm_drafts(b)) / plain_s
            self._draft_costs[b] = max(ratio - 1, 0.0)
            log.info("drafts of %d rows: a step takes %.2f times as long", b, ratio)

    def _begin(self, row: scheduler.Row) -> None:
        """Counts and biases of a row into its slot."""
        counts_v = np.zeros(self.spec.vocab_size, np.int32)
        counts_v[np.asarray(row.request.prompt)] = programs.PROMPT
        np.add.at(counts_v, np.asarray(row.ids[len(row.request.prompt) :], int), 1)
        bias_v = np.zeros(self.spec.vocab_size, np.float32)
        for token, bias in row.request.logit_bias.items():
            bias_v[token] = bias
        # What one leaves there would be added to the scores of the next.
        self._biased.discard(row.slot)
        if row.request.logit_bias:
            self._biased.add(row.slot)
        slot = np.int32(row.slot)
        self._extras = programs.begin(self._extras, slot, counts_v, bias_v)

    def _feed(self, rows: list[scheduler.Row], b: int, full: bool):
        """What the host tells of rows: (Feed, masks or None)."""
        token_b, real_b, step_b, known_b, length_b = np.zeros((5, b), np.int32)
        slot_b = np.full(b, self.settings.rows, np.int32)
        table_bp = np.zeros((b, self.table_pages), np.int32)
        for i, row in enumerate(rows):
            token_b[i] = -1 if row.ahead else row.ids[-1]
            real_b[i], step_b[i], known_b[i] = 1, row.said, row.length > row.begins
            length_b[i], slot_b[i], table_bp[i] = row.length, row.slot, row.table
        key = (b, *rows)  # not their ids, which may come again with other wishes
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
        shift_b = None
        if self._sight is not None:
            shift_b = np.zeros(b, np.int32)
            shift_b[: len(rows)] = [row.laid.shift if row.laid else 0 for row in rows]
        places = paged.Places(table_bp, length_b, slot_b, shift_b)
        feed = programs.Feed(token_b, real_b, step_b, known_b, places, self._wishes[1])
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

    def embed(self, ids: Sequence[int]) -> np.ndarray:
        """The vector of one document: [d], of length 1."""
        size = max(self.settings.piece, 1 << (len(ids) - 1).bit_length())
        tokens_1t = np.zeros((1, size), np.int32)
        tokens_1t[0, : len(ids)] = ids
        count = np.int32(len(ids))
        return np.asarray(
            programs.embedding(self._params, tokens_1t, count, **self._how)
        )

    def warm(self) -> int:
        """Run every program once on rows that are nobody's; how many were compiled."""
        before = compiled()
        talks = self.spec.head == "tokens"
        if self.settings.embeddings or not talks:
            size = self.settings.piece
            while size < 2 * self.max_tokens:
                self.embed([0] * min(size, self.max_tokens))
                size *= 2
        if talks:
            self._warm_talk()
        return compiled() - before

    def _warm_talk(self) -> None:
        settings, rows = self.settings, {False: self.settings.row_buckets()}
        rows[True] = settings.full_buckets()
        steps = [("a piece", settings.piece_buckets(), self._warm_piece)]
        if self._sight is not None:
            look = functools.partial(self._sight.warm, self._params)
            steps.append(("an image", self._sight.buckets, look))
        if self.state_units:
            steps.append(("a state", (self.state_units,), self._warm_state))
        steps += [
            ("a first id", (1,), lambda _: self._warm_first()),
            ("rows", rows[False], lambda b: self._warm_rows(b, False)),
            ("rows", rows[True], lambda b: self._warm_rows(b, True)),
            ("drafts", settings.draft_buckets(), self._warm_drafts),
        ]
        count, done = sum(len(sizes) for _, sizes, _ in steps), 0
        for name, sizes, run in steps:
            for size in sizes:
                done += 1
                log.info("compiling %d of %d: %s of %d", done, count, name, size)
                run(size)
        self._measure_drafts()

    def _warm_piece(self, size: int) -> None:
        places = paged.Places(
            np.zeros((1, self.table_pages), np.int32),
            np.zeros(1, np.int32),
            np.array([self.settings.rows], np.int32),  # nobody's
        )
        tokens_1t, next_t = np.zeros((1, size), np.int32), np.zeros(size, np.int32)
        shown = None
        if self._sight is not None:
            text = scheduler.Row(request_lib.Request("", (0,), 1), 0, self.table_pages)
            shown = self._sight.show(self._params, text, 0, 1, size)
        more = tokens_1t, np.int32(1), np.zeros(1, np.int32), places, shown
        _, self._pages = programs.prefill(self._params, self._pages, *more, **self._how)
        _, _, self._pages = programs.prompt_scores(
            self._params, self._pages, *more, next_t, **self._how
        )

    def _warm_drafts(self, b: int):
        drafts_bi = np.zeros((b, self.settings.draft_tokens), np.int32)
        count_b = np.zeros(b, np.int32)
        feed, _ = self._feed([], b, False)
        if self.settings.drafts == "mtp":
            # Made by the device they are another kind of array than the host's.
            drafts_bi = self._draft(feed, count_b)
        return self._verify(feed, drafts_bi, count_b)

    def _warm_state(self, units: int) -> None:
        where = np.int32(self.settings.rows), np.int32(0)
        for run in (programs.save, programs.restore):
            self._pages = run(self._pages, *where, units=units)

    def _warm_first(self) -> None:
        counts_v = np.zeros(self.spec.vocab_size, np.int32)
        bias_v = counts_v.astype(np.float32)
        slot = np.int32(self.settings.rows)
        self._extras = programs.begin(self._extras, slot, counts_v, bias_v)
        dtype = jnp.promote_types(self.spec.compute_dtype, jnp.float32)
        with jax.set_mesh(self._mesh):
            logits_1v = jnp.zeros((1, self.spec.vocab_size), dtype)
        for full, uncut in itertools.product((False, True), self._kinds()):
            self._first(logits_1v, full, *self._feed([], 1, full), uncut)

    def _kinds(self) -> tuple[bool, ...]:
        return (False, True) if self._knows_uncut else (False,)

    def _warm_rows(self, b: int, full: bool) -> None:
        for uncut in self._kinds():
            feed = self._feed([], b, full)
            self._decode(full, *feed, uncut)
            if self.burst > 1 and not full:
                self._several(feed[0], uncut)


def compiled() -> int:
    """Programs compiled so far, of all engines."""
    every = ("decode", "prefill", "prompt_scores", "first", "begin", "embedding")
    every += ("save", "restore", "look", "verify", "draft", "several")
    return sum(getattr(programs, name)._cache_size() for name in every)
