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
Deviations: chunks of packed documents go first, as in the paper's example. A stage has
room for keys and values of all groups that are under way in it at once, each as long as
the longest. Of chunks on stages the losses of routers are not computed.

Compiled shapes: a program for each number of ticks, micro-batches, chunks of the
longest document and slots, rounded up as in `chunks.rounded`; when what happens is
data.
Shapes: rows of chunks as of `chunkflow`; [micro, rows, C] all together.
Raises: config.InputError for what `chunkflow` or `batches` refuse, and for losses of
routers.
"""

import dataclasses
import functools
from collections.abc import Sequence
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


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a program is compiled for: chunks of the longest group (0: there is none),
    whether there are chunks by themselves, slots as of `ticks.Table`."""

    chunks: int
    alone: bool
    slots: tuple[tuple[str, int], ...]


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
    gradient (and of what `z_coef` adds).

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
    if settings.router_losses:
        raise config_lib.InputError(
            "router_losses=True: losses of routers are of the whole step, which no "
            "stage has seen when it goes backward; set it to False, or use chunkflow "
            "without stages"
        )
    with batches.on_stages(stages):
        micros, batch, targets = lay_out(spec, documents, settings, rules)
        plan = table(micros, stages)
        groups = {one.group for one in micros} - {None}
        most = max(
            (one.number + 1 for one in micros if one.group is not None), default=0
        )
        sizes = Sizes(
            chunks_lib.rounded(most) if groups else 0,
            any(one.group is None for one in micros),
            tuple(plan.slots.items()),
        )
        grads, sums = _jitted(
            *(params, batch, plan.rows, np.float32(targets)),
            spec=spec,
            rules=rules,
            settings=settings,
            sizes=sizes,
        )
    return sums["nll"] / targets, grads


def lay_out(
    spec: spec_lib.Spec,
    documents: Sequence[np.ndarray],
    settings: chunk_gradients.Settings,
    rules: mesh.Rules,
) -> tuple[list[bubbles.Micro], dict[str, np.ndarray], int]:
    """(micro-batches, their arrays [micro, rows, C], targets)."""
    documents = chunks_lib.checked(documents, spec.vocab_size)
    attention.check_backend(spec, mesh.platform(), packed=True)
    t, longest = settings.chunk_tokens, max(map(len, documents), default=0)
    layers.check(spec, t, longest)
    targets = sum(len(one) for one in documents) - len(documents)
    if targets < 1:
        raise config_lib.InputError(
            f"{len(documents)} documents have no target: wanted one of 2 tokens or more"
        )
    pieces = [chunks_lib.whole(one) for one in documents]
    dealt = chunks_lib.deal(pieces, t, mesh.axis_size(rules.batch))
    parts = [{k: x[None] for k, x in part.items()} for part in dealt.packed]
    parts += [{k: x[:count] for k, x in part.items()} for part, count in dealt.groups]
    costs = [[1.0]] * len(dealt.packed) + [[1.0] * count for _, count in dealt.groups]
    micros = bubbles.chunks(costs, settings.live_chunks)
    blank = chunks_lib.rounded(len(micros)) - len(micros)
    empty = {k: np.zeros_like(x[:1]) for k, x in parts[0].items()}
    parts += [empty] * blank
    batch = {k: np.concatenate([part[k] for part in parts]) for k in empty}
    return micros, batch, targets


def table(micros: Sequence[bubbles.Micro], stages: int) -> ticks.Table:
    """The ticks of chunks."""
    order = bubbles.one_f_one_b(micros, stages)
    return ticks.table(micros, order, size=chunks_lib.rounded)


def _gradients(params, batch, rows, targets, *, spec, rules, settings, sizes):
    """(gradients, sums) of chunks; arguments as of `batches.on_each`."""
    if spec.moe is not None:  # its losses are left out
        quiet = dataclasses.replace(spec.moe, balance_coef=0.0, z_coef=0.0)
        spec = dataclasses.replace(spec, moe=quiet)
    share = share_lib.share_of(spec, mesh.axis_size("stage"), 1)
    config = step.StepConfig(settings.z_coef, remat=settings.remat)
    lies = rules.pspec(None, "batch", None)
    batch = {k: mesh.reshard(x, lies) for k, x in batch.items()}
    whole = {"targets": targets, "tokens": jnp.float32(batch["tokens_bt"].size)}

    def run(stage, rows):
        store = _store(stage, sizes, settings) if sizes.chunks else None
        state = stage.nothing(), store
        act = functools.partial(_act, sizes=sizes)
        return stage_lib.through(stage, rows, dict(sizes.slots), state, act)[0]

    how = {"spec": spec, "share": share, "rules": rules, "config": config}
    return batches.on_each(run, params, batch, rows, whole, parts=1, **how)


_jitted = jax.jit(_gradients, static_argnames=("spec", "rules", "settings", "sizes"))


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
        ahead = functools.partial(_forward, stage, row, sizes, x)
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
        *(settings.kv_grad_dtype or None, stage.rules, slots["g"] + 1),
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
    """(the residual behind the stretch, the store with the chunk in)."""
    up, store = carry
    chunk, states, first = _places(stage, row, sizes)
    params = {"layers": stage.own(row)}
    chunks, _ = group.forward(
        *(stage.share, params, chunk, store["chunks"], states, stage.rules),
        *(x, row["s"], first),
    )
    up = chunks.ring["last_btd"][row["s"]].astype(up.dtype)
    return up, store | {"chunks": chunks}


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
    cotangents["stats"] = group.no_stats(stage.share)
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
