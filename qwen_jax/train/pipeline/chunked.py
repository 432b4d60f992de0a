# SPDX-License-Identifier: Apache-2.0
"""Documents of any length through a pipeline, in chunks: state-aware 1F1B.

    loss, grads = pipeline.chunked_value_and_grad(
        spec, params, documents, stages=4, chunk_tokens=4096, live_chunks=2
    )

gives what `chunkflow.value_and_grad` gives. A micro-batch is a chunk: one of packed
short documents, or one of a long document's, which depend on each other. Within such a
group forward passes go up and backward passes down, and every stage carries keys and
values of the group's chunks, and their cotangents, in its own layers. Of the last
`live_chunks` chunks what the backward pass needs stays; the others are computed forward
again just before it, each stage from what came in.

Source: ChunkFlow, arXiv 2503.02356, section 4.4; the order is `bubbles.one_f_one_b`'s.
Deviations: chunks of packed documents go first, as in the paper's example. Stages go
through ticks together, so 1F1B makes one that goes forward wait for one that goes
backward; in eager 1F1B all go forward in one tick and backward in the next (see `plans`
for which is taken). A stage has room for keys and values of all groups that are under
way in it at once, each as long as the longest. What routers count takes a pass of its
own, which goes through the same ticks and leaves out what is no forward pass. Held-out
text takes tables of forward passes alone, and whole rows do, too: to them a row is a
chunk by itself.

Compiled shapes: a program for each number of ticks, micro-batches, chunks of the
longest document and slots, rounded up as in `chunks.rounded`; when what happens is
data.
Shapes: rows of chunks as of `chunkflow`; [micro, rows, C] all together.
Raises: config.InputError for what `chunkflow` or `batches` refuse.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import config as config_lib
from qwen_jax import mesh
from qwen_jax.models import attention
from qwen_jax.models import spec as spec_lib
from qwen_jax.train import bubbles, step
from qwen_jax.train.chunkflow import chunks as chunks_lib
from qwen_jax.train.chunkflow import gradients as chunk_gradients
from qwen_jax.train.chunkflow import group, layers
from qwen_jax.train.pipeline import batches, ticks
from qwen_jax.train.pipeline import share as share_lib
from qwen_jax.train.pipeline import stage as stage_lib

# At a time, where no gradient is wanted: stages hardly wait, and float32 adds up well.
FORWARD_CHUNKS = 64
# Of an operation's time: a backward pass computes its stretch again.
COSTS = {bubbles.FORWARD_PASS: 1.0, bubbles.AGAIN: 1.0, bubbles.BACKWARD_PASS: 3.0}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a program is compiled for: chunks of the longest group (0: there is none),
    whether there are chunks by themselves, slots as of `ticks.Table`, micro-batches,
    ticks."""

    chunks: int
    alone: bool
    slots: tuple[tuple[str, int], ...]
    micros: int
    ticks: int

    def hold(self, other: "Sizes") -> bool:
        """Whether the other's micro-batches go through this program."""
        slots = dict(self.slots)
        return (
            self.chunks >= other.chunks
            and self.alone >= other.alone
            and self.micros >= other.micros
            and self.ticks >= other.ticks
            and all(slots[name] >= count for name, count in other.slots)
        )

    @classmethod
    def of_all(cls, every: Sequence["Sizes"]) -> "Sizes":
        """The least that hold each of them, rounded up."""

        def most(counts):
            most = max(counts)
            return chunks_lib.rounded(most) if most else 0

        names = [name for name, _ in every[0].slots]
        slots = [(name, most(dict(x.slots)[name] for x in every)) for name in names]
        return cls(
            most(x.chunks for x in every),
            any(x.alone for x in every),
            tuple(slots),
            most(x.micros for x in every),
            most(x.ticks for x in every),
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """The ticks of a round: so many chunks by themselves, then groups of so many each;
    `sizes` are exact, `seconds` as of `ticks.Table`."""

    packed: int
    groups: tuple[int, ...]
    table: ticks.Table
    sizes: Sizes
    seconds: float

    def padded(self, sizes: Sizes) -> tuple[dict[str, np.ndarray], np.int32]:
        """(the table's rows for a program of these sizes, how many of them count)."""
        count = self.sizes.ticks
        more = ((0, sizes.ticks - count), (0, 0))
        rows = {k: np.pad(x, more) for k, x in self.table.rows.items()}
        return rows, np.int32(count)


@functools.lru_cache(128)  # a table each of three ways: what comes again is small
def plans(
    packed: int, groups: tuple[int, ...], live: int, stages: int
) -> tuple[Plan, ...]:
    """What can be done with these chunks, of which the last `live` of a group stay: the
    fastest first, by COSTS. Forward passes alone, in one way, with live = 0."""
    micros = bubbles.chunks([[1.0]] * packed + [[1.0] * n for n in groups], live)
    if live:
        ways = [
            ticks.table(
                micros, bubbles.one_f_one_b(micros, stages, ahead=ahead), turns=turns
            )
            for ahead, turns in ((2, True), (1, True), (1, False))
        ]
    else:
        ops = [bubbles.Op(bubbles.FORWARD_PASS, i) for i in range(len(micros))]
        ways = [ticks.table(micros, [ops] * stages)]
    made = []
    for table in ways:
        slots, count = tuple(table.slots.items()), len(table.rows["kind"])
        longest = max(groups, default=0)
        sizes = Sizes(longest, packed > 0, slots, len(micros), count)
        made.append(Plan(packed, groups, table, sizes, table.seconds(COSTS)))
    return tuple(sorted(made, key=lambda one: one.seconds))


def plan_of(packed: int, groups: tuple[int, ...], live: int, stages: int) -> Plan:
    """Of those of `plans` that hold keys of the fewest groups at once, and of these the
    fewest chunks that wait, the fastest."""

    def held(one):
        slots = dict(one.sizes.slots)
        return slots["g"], slots["s"]

    return min(plans(packed, groups, live, stages), key=held)


def chunked_value_and_grad(
    spec: spec_lib.Spec,
    params: Any,
    documents: Sequence[np.ndarray],
    *,
    stages: int,
    chunk_tokens: int,
    live_chunks: int = 1,
    rules: mesh.Rules | None = None,
    **more: Any,
) -> tuple[jax.Array, Any]:
    """The mean next-token cross-entropy over all targets of all documents, and its
    gradient (and of what `z_coef` and `router_losses` add, where they ask for it).

    Args:
      stages: as of `pipeline.value_and_grad`.
      spec, params, documents, chunk_tokens, live_chunks, rules, more: as of
        `chunkflow.value_and_grad`.
    Returns:
      (scalar, a tree as params), float32 or wider.
    """
    settings = chunk_gradients.Settings(
        chunk_tokens, live_chunks, **{"remat": "full"} | more
    )
    rules = rules or mesh.Rules()
    share_lib.share_of(spec, stages, 1)
    with batches.on_stages(stages):
        dealt, tokens, targets = lay_out(spec, documents, settings, rules)
        counts = tuple(count for _, count in dealt.groups)
        plan = plan_of(len(dealt.packed), counts, live_chunks, stages)
        sizes = Sizes.of_all([plan.sizes])
        part = "round", (arrays(dealt, sizes.micros), *plan.padded(sizes))
        each = jitted(spec, settings, rules, {"round": sizes})
        sums = chunk_gradients.summed(params, [part], targets, tokens, each)
    return sums.nll / targets, sums.grads


def forward_parts(dealt: chunks_lib.Dealt, stages: int) -> list[chunk_gradients.Part]:
    """The chunks in parts of forward passes alone, which `chunk_scorer` takes."""
    parts = []
    for some in _blocks(dealt):
        counts = tuple(count for _, count in some.groups)
        plan = plan_of(len(some.packed), counts, 0, stages)
        sizes = Sizes.of_all([plan.sizes])
        operands = arrays(some, sizes.micros), *plan.padded(sizes), sizes
        parts.append(("forward", operands))
    return parts


def _blocks(dealt):
    """The chunks in blocks of FORWARD_CHUNKS or, of a long group, more."""
    blocks, count = [], FORWARD_CHUNKS
    units = [("packed", 1, one) for one in dealt.packed]
    units += [("groups", one[1], one) for one in dealt.groups]
    for kind, chunks, one in units:
        if count >= FORWARD_CHUNKS:
            blocks.append(chunks_lib.Dealt([], []))
            count = 0
        getattr(blocks[-1], kind).append(one)
        count += chunks
    return blocks


def chunk_scorer(
    spec: spec_lib.Spec, rules: mesh.Rules, settings: chunk_gradients.Settings
) -> Callable[..., dict[str, Any]]:
    """As `chunkflow.step.scorer`, through stages."""

    def sums(params, work, bytes_v):
        del bytes_v  # counted where the chunks were laid out
        total, how = 0.0, {"spec": spec, "rules": rules, "settings": settings}
        for _, (*operands, sizes) in work.parts:
            total += float(nll(params, *operands, sizes=sizes, **how))
        return {"nll": total, "targets": work.targets, "bytes": work.bytes}

    return sums


def scorer(
    spec: spec_lib.Spec, rules: mesh.Rules, config: step.StepConfig
) -> Callable[..., dict[str, Any]]:
    """As `eval.perplexity.make`, through stages, of batches [micro, rows, t]."""

    @jax.jit
    def counts(batch, bytes_v):
        return batch["mask_bt"].sum(), step.count_bytes(batch, bytes_v)

    def sums(params, batch, bytes_v):
        micros, _, t = batch["tokens_bt"].shape
        plan = plan_of(micros, (), 0, mesh.axis_size("stage"))
        settings = chunk_gradients.Settings(t, remat=config.remat)
        made = nll(
            *(params, batch, plan.table.rows, np.int32(plan.sizes.ticks)),
            spec=spec,
            rules=rules,
            settings=settings,
            sizes=plan.sizes,
            config=dataclasses.replace(config, mtp_coef=0.0, z_loss=0.0),
        )
        targets, size = counts(batch, bytes_v)
        return {"nll": made, "targets": targets, "bytes": size}

    return sums


def jitted(
    spec: spec_lib.Spec,
    settings: chunk_gradients.Settings,
    rules: mesh.Rules,
    sizes: Mapping[str, Sizes],
) -> dict[str, Callable[..., Any]]:
    """As `chunkflow.gradients.jitted`, of parts (micro-batches, rows of a table, ticks)
    whose programs have these sizes. What routers count takes a pass of its own even
    where no loss asks."""
    each: dict[str, Callable] = {
        "none": functools.partial(chunk_gradients.no_sums, spec)
    }
    how = {"spec": spec, "rules": rules, "settings": settings}
    if spec.moe is not None:
        quiet = spec
        if not settings.router_losses:
            routers = dataclasses.replace(spec.moe, balance_coef=0.0, z_coef=0.0)
            quiet = dataclasses.replace(spec, moe=routers)
        each["d_stats"] = functools.partial(chunk_gradients.d_stats, quiet)
    for name, one in sizes.items():
        each[name] = functools.partial(round_gradients, **how, sizes=one)
        if spec.moe is not None:
            fn = functools.partial(counted, **how, sizes=one)
            each[chunk_gradients.STATS + name] = fn
    return each


def lay_out(
    spec: spec_lib.Spec,
    documents: Sequence[np.ndarray],
    settings: chunk_gradients.Settings,
    rules: mesh.Rules,
) -> tuple[chunks_lib.Dealt, int, int]:
    """(the chunks of all documents, their tokens, targets)."""
    documents = chunks_lib.checked(documents, spec.vocab_size)
    attention.check_backend(spec, mesh.platform(), packed=True)
    t, longest = settings.chunk_tokens, max(map(len, documents), default=0)
    layers.check(spec, t, longest)
    tokens = sum(len(one) for one in documents)
    targets = tokens - len(documents)
    if targets < 1:
        raise config_lib.InputError(
            f"{len(documents)} documents have no target: wanted one of 2 tokens or more"
        )
    pieces = [chunks_lib.whole(one) for one in documents]
    dealt = chunks_lib.deal(pieces, t, mesh.axis_size(rules.batch))
    return dealt, tokens, targets


def arrays(dealt: chunks_lib.Dealt, micros: int) -> dict[str, np.ndarray]:
    """The chunks as micro-batches [micros, rows, C]; those that are left are empty."""
    parts = [{k: x[None] for k, x in part.items()} for part in dealt.packed]
    parts += [{k: x[:count] for k, x in part.items()} for part, count in dealt.groups]
    blank = micros - sum(len(part["tokens_bt"]) for part in parts)
    parts += [{k: np.zeros_like(x[:1]) for k, x in parts[0].items()}] * blank
    return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}


STATIC = ("spec", "rules", "settings", "sizes")


@functools.partial(jax.jit, static_argnames=STATIC, donate_argnames="acc")
def round_gradients(
    params, acc, batch, rows, count, targets, d_stats, *, spec, rules, settings, sizes
) -> group.Sums:
    """`acc` (donated) with the gradients of the micro-batches in `count` ticks."""
    share, config = _made(spec, settings)
    whole = {"targets": targets, "ticks": count, "d_stats": d_stats}

    def run(stage, rows):
        store = _store(stage, sizes, settings) if sizes.chunks else None
        state = stage.nothing(), store
        act = functools.partial(_act, sizes=sizes)
        how = dict(sizes.slots), state, act, stage.whole["ticks"]
        return stage_lib.through(stage, rows, *how)[0]

    how = {"spec": spec, "share": share, "rules": rules, "config": config}
    grads, sums = batches.on_each(run, params, batch, rows, whole, parts=1, **how)
    kinds = rows["kind"][:, 0]
    forwards = jnp.sum((kinds == ticks.FORWARD) | (kinds == ticks.AGAIN))
    return group.Sums(
        jax.tree.map(lambda x, d: x + d.astype(x.dtype), acc.grads, grads),
        acc.nll + sums["nll"],
        acc.z + sums["z"],
        acc.forwards + forwards.astype(acc.forwards.dtype),
        acc.stats,
    )


@functools.partial(jax.jit, static_argnames=STATIC)
def counted(params, stats, batch, rows, count, *, spec, rules, settings, sizes):
    """What routers count (`group.no_stats`), with that of the micro-batches."""
    share, config = _made(spec, settings)

    def run(stage, rows):
        def see(row, seen, y, routed):
            del row, y
            return group.added(seen, routed)

        return _all_ahead(stage, rows, group.no_stats(share), see, sizes, settings)

    how = {"spec": spec, "share": share, "rules": rules, "config": config}
    whole, each = {"ticks": count}, jax.P("stage")
    made = batches.seen_by_each(run, params, batch, rows, whole, out=each, **how)
    return group.added(stats, jax.tree.map(lambda x: mesh.reshard(x, jax.P()), made))


@functools.partial(jax.jit, static_argnames=(*STATIC, "config"))
def nll(params, batch, rows, count, *, spec, rules, settings, sizes, config=None):
    """The sum of -ln p over the targets of the micro-batches; config: of whole rows."""
    share, chunked = _made(spec, settings)

    def run(stage, rows):
        def see(row, seen, y, routed):
            del routed
            more = functools.partial(stage.cross_entropy, row, stage.rest, y)
            last = stage.at(row)["last"]
            return stage_lib.when(last, lambda seen: seen + more()[1]["nll"], seen)

        none = stage.nothing()["sums"]["nll"]
        made = _all_ahead(stage, rows, none, see, sizes, settings)
        return jax.lax.psum(made, "stage")

    how = {"spec": spec, "share": share, "rules": rules, "config": config or chunked}
    whole = {"ticks": count}
    return batches.seen_by_each(run, params, batch, rows, whole, out=jax.P(), **how)


def _all_ahead(stage, rows, none, see, sizes, settings):
    """`none` with what `see` gives of each forward pass of a stage."""
    store = None
    if sizes.chunks:  # and no cotangents
        store = {"chunks": _store(stage, sizes, settings)["chunks"]}
    act = functools.partial(_ahead, sizes=sizes, see=see)
    how = dict(sizes.slots), (none, store), act, stage.whole["ticks"]
    return stage_lib.through(stage, rows, *how)[0]


def _made(spec, settings):
    """(the model of a stretch, how stages compute)."""
    share = share_lib.share_of(spec, mesh.axis_size("stage"), 1)
    return share, step.StepConfig(settings.z_coef, remat=settings.remat)


def _ahead(stage, row, x, d, state, *, sizes, see):
    """A tick of forward passes alone: those of the table, its others left out. `see`
    gives what is seen of one: (row, seen so far, the residual, what routers counted).
    """
    seen, store = state
    grouped, forward = row["grouped"] == 1, row["kind"] == ticks.FORWARD
    up = x
    if sizes.alone:

        def alone(carry):
            y, routed = stage.through(row, stage.own(row), carry[0])
            return y.astype(x.dtype), see(row, carry[1], y, routed)

        up, seen = stage_lib.when(forward & ~grouped, alone, (up, seen))
    if sizes.chunks:

        def chunk(carry):
            up, seen, store = carry
            (up, store), counts = _forward(stage, row, sizes, x, (up, store))
            return up, see(row, seen, up, counts), store

        up, seen, store = stage_lib.when(forward & grouped, chunk, (up, seen, store))
    return up, d, (seen, store)


def _act(stage, row, x, d, state, *, sizes):
    """A tick of chunks by themselves and of groups."""
    acc, store = state
    at, grouped = stage.at(row), row["grouped"] == 1
    backward = row["kind"] == ticks.BACKWARD
    forward = (row["kind"] != ticks.IDLE) & ~backward
    up = x
    if sizes.alone:
        here = forward & ~grouped & ~at["last"]
        up = stage_lib.when(here, lambda x: stage.forward(row, x), up)
    if sizes.chunks:

        def ahead(carry):
            return _forward(stage, row, sizes, x, carry)[0]

        up, store = stage_lib.when(forward & grouped, ahead, (up, store))
    down = d
    if sizes.alone:
        back = functools.partial(stage.backward, row, at, x)
        down, acc = stage_lib.when(backward & ~grouped, lambda c: back(*c), (down, acc))
    if sizes.chunks:
        back = functools.partial(_backward, stage, row, at, sizes)
        down, acc, store = stage_lib.when(backward & grouped, back, (down, acc, store))
    return up, down, (acc, store)


def _store(stage, sizes, settings):
    """What a stage carries of its groups: the store of chunkflow, the cotangents of its
    buffers and of the states."""
    slots, (b, t) = dict(sizes.slots), stage.batch["tokens_bt"].shape[1:]
    store, d_held = group.fresh(
        *(stage.share, sizes.chunks, b, t, slots["s"] + 1),
        # An operation that is of no group does not look at their keys.
        *(settings.kv_grad_dtype or None, stage.rules, slots["g"]),
    )
    d_states = jax.tree.map(lambda x: jnp.zeros_like(x[0]), store.states)
    return {"chunks": store, "d_held": d_held, "d_states": d_states}


def _places(stage, row, sizes):
    """(the chunk; where its states stand, where its group has its first layer)."""
    chunk = group.chunk(stage.batch, row["micro"])
    start = row["number"] * chunk.tokens_bt.shape[1]
    attention = sum(kind.mixer == "attention" for kind in stage.share.kinds)
    states = row["g"] * (sizes.chunks + 1) + row["number"]
    return chunk.replace(start=start), states, row["g"] * attention


def _forward(stage, row, sizes, x, carry):
    """((the residual behind the stretch, the store with the chunk in), what routers
    counted)."""
    up, store = carry
    chunk, states, first = _places(stage, row, sizes)
    params = {"layers": stage.own(row)}
    chunks, counts = group.forward(
        *(stage.share, params, chunk, store["chunks"], states, stage.rules),
        *(x, row["s"], first),
    )
    up = chunks.ring["last_btd"][row["s"]].astype(up.dtype)
    return (up, store | {"chunks": chunks}), counts


def _backward(stage, row, at, sizes, carry):
    """(cotangent of the residual before the stretch, what is added up, the store)."""
    d, acc, store = carry
    chunk, states, first = _places(stage, row, sizes)
    params, chunks = {"layers": stage.own(row)}, store["chunks"]
    before, saved, y = group.before(chunks, states, row["s"])
    acc, d = stage_lib.when(at["last"], lambda c: stage.end(row, y, *c), (acc, d))
    ends = row["ends"] == 1
    d_held = stage_lib.when(
        ends, lambda held: _cleared(stage.share, held, first), store["d_held"]
    )
    d_states = jax.tree.map(lambda x: jnp.where(ends, 0, x), store["d_states"])
    cotangents = {"x": d, "held": d_held, "states": d_states}
    cotangents["stats"] = stage.d_stats()
    dx, d_layers, d_held, d_states = layers.backward(
        *(stage.share, params, chunk, chunks.held, before, chunks.tail_nbj[states]),
        *(saved, cotangents, stage.rules, first),
    )
    more = stage_lib.added_at(acc["layers"], row["part"], d_layers)
    acc = acc | {"layers": more}
    acc = stage_lib.when(at["first"], lambda acc: stage.start_back(row, dx, acc), acc)
    return dx, acc, store | {"d_held": d_held, "d_states": d_states}


def _cleared(share, held, first):
    """Buffers with zeros in the layers of a group."""
    count = sum(kind.mixer == "attention" for kind in share.kinds)

    def one(x):
        zeros = jnp.zeros((count, *x.shape[1:]), x.dtype)
        zeros = mesh.reshard(zeros, jax.typeof(x).sharding.spec)
        return jax.lax.dynamic_update_slice_in_dim(x, zeros, first, 0)

    return jax.tree.map(one, held)
