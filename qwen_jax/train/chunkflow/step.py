# SPDX-License-Identifier: Apache-2.0
"""One training step in chunks: what hosts lay out, the programs, the update.

    lay_out(rows) -> Work -> step(state, work) -> (state, metrics)

as `train.step` makes it of whole rows: the pieces of a batch's rows (a document, or a
part of one that is longer than a row) are cut and packed anew, in chunks of C tokens.
Every program is compiled before the first step: that of standalone chunks, those of
groups of 2, 3, 4, 6, 8, ... chunks up to the longest row (on stages those of
`train.pipeline.rounds`), that of the update; a step that would need another fails.

Shapes: rows as of `data.packing`; a process lays out those that it holds.
Metrics: those of `train.step`, forwards (passes of a batch of chunks through all
layers), and length (tokens of a piece, the mean over tokens).
Raises: config.InputError from `check`, for what cannot be trained in chunks.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qwen_jax import mesh
from qwen_jax.data import packing
from qwen_jax.models import moe
from qwen_jax.models import spec as spec_lib
from qwen_jax.train import state as state_lib
from qwen_jax.train import step as step_lib
from qwen_jax.train.chunkflow import chunks, gradients, group


@dataclasses.dataclass(frozen=True)
class Work:
    """The chunks of one step on the mesh, and numbers of all processes."""

    parts: list[gradients.Part]
    targets: float
    tokens: int
    bytes: float
    padding: int  # places of all chunks that hold no token
    length: float  # tokens of a piece, the mean over tokens


def lay_out(
    rows: packing.Rows,
    *,
    settings: gradients.Settings,
    local_rows: int,
    place: Callable[[np.ndarray], jax.Array],
    bytes_v: np.ndarray,
    gather: Callable[[Any], list[Any]],
    parts_of: Callable[[chunks.Dealt], list[gradients.Part]] = gradients.parts_of,
) -> Work:
    """The chunks of a batch's rows.

    Args:
      rows: those that this process holds.
      settings: how the step goes through them.
      local_rows: rows of this process in the arrays of chunks.
      place: lays arrays [..., local_rows, C] on the mesh.
      bytes_v: UTF-8 bytes of each id.
      gather: as of `chunks.deal`; of processes that hold the same rows one speaks.
      parts_of: makes parts of chunks, which come first in what they are given.
    """
    pieces = chunks.of_rows(rows)
    dealt = chunks.deal(pieces, settings.chunk_tokens, local_rows, gather)
    mine = [
        sum(float(one.mask.sum()) for one in pieces),
        sum(map(len, pieces)),
        sum(float(bytes_v[one.targets] @ one.mask) for one in pieces),
        sum(len(one) ** 2 for one in pieces),
    ]
    said = gather(mine)
    targets, tokens, size, squares = map(sum, zip(*said, strict=True))
    count = len(dealt.packed) + sum(len(x["tokens_bt"]) for x, _ in dealt.groups)
    places = count * local_rows * len(said) * settings.chunk_tokens

    parts = [
        (name, ({k: place(x) for k, x in part.items()}, *more))
        for name, (part, *more) in parts_of(dealt)
    ]
    length = squares / max(tokens, 1)
    return Work(parts, targets, tokens, size, places - tokens, length)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """`step(state, work, bytes_v) -> (state, metrics)`, and what it is made of."""

    each: dict[str, Any]  # jax.stages.Compiled: "update" and those of `summed`

    def __call__(self, state: state_lib.State, work: Work, bytes_v: Any = None):
        del bytes_v  # counted where the chunks were laid out
        targets, tokens = np.float32(max(work.targets, 1.0)), np.float32(work.tokens)
        sums = gradients.summed(state.params, work.parts, targets, tokens, self.each)
        state, metrics = self.each["update"](state, sums, targets, tokens)
        counts = {name: getattr(work, name) for name in ("bytes", "padding", "length")}
        return state, metrics | counts | {"places": work.tokens + work.padding}

    def largest(self) -> Any:
        """The program of gradients that works in most bytes."""
        own = {k: x for k, x in self.each.items() if k != "update"}
        return max(own.values(), key=lambda x: memory_of(x.memory_analysis()))

    def needed(self) -> int:
        """Bytes that a device needs for the step, by the compiler: those of the largest
        program, and of what it is not given and stays: the optimizer's."""
        update = self.each["update"].memory_analysis()
        beside = update.argument_size_in_bytes
        whole = [memory_of(update)]
        for name, program in self.each.items():
            if name != "update":
                found = program.memory_analysis()
                own = memory_of(found) - found.argument_size_in_bytes
                whole.append(own + max(beside, found.argument_size_in_bytes))
        return max(whole)


def memory_of(found: Any) -> int:
    """Bytes that a program is given, makes and works in."""
    made = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + made + found.temp_size_in_bytes


def compiled(
    spec: spec_lib.Spec,
    tx: optax.GradientTransformation,
    config: step_lib.StepConfig,
    *,
    each: Mapping[str, functools.partial],
    parts: Mapping[str, tuple[Any, ...]],
    state: state_lib.State,
) -> Compiled:
    """The step compiled for parts of these names, on the mesh in use.

    Args:
      spec, tx, config: as of `train.step.compile_step`.
      each: as of `gradients.summed`.
      parts: the shapes of what each is given.
      state: its shapes and shardings.
    """
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    lowered = {"none": _lower(each["none"], state.params)}
    sums = _abstract(lowered["none"])
    asked = None
    if "d_stats" in each:
        lowered["d_stats"] = _lower(each["d_stats"], sums.stats, scalar)
        asked = _abstract(lowered["d_stats"])
    for name, part in parts.items():
        lowered[name] = _lower(each[name], state.params, sums, *part, scalar, asked)
        if asked is not None:
            name = gradients.STATS + name
            lowered[name] = _lower(each[name], state.params, sums.stats, *part)
    fn = functools.partial(_update, spec=spec, tx=tx, config=config)
    fn = jax.jit(fn, donate_argnums=0)
    lowered["update"] = fn.lower(state, sums, scalar, scalar)
    device_mesh = jax.sharding.get_mesh()

    def finished(one):
        with jax.set_mesh(device_mesh):
            return one.compile()

    with futures.ThreadPoolExecutor(4) as pool:
        made = pool.map(finished, lowered.values())
        return Compiled(dict(zip(lowered, made, strict=True)))


def shapes(
    settings: gradients.Settings, longest: int, chunk: Callable[..., Any]
) -> dict[str, tuple[Any, ...]]:
    """By name, what programs are given for rows of at most `longest` tokens; `chunk`
    gives the shapes of the arrays [*lead, rows, C] of a chunk, for `lead`."""
    count = jax.ShapeDtypeStruct((), jnp.int32)
    sizes = {f"group/{n}": (chunk(n), count) for n in group_sizes(settings, longest)}
    return {"packed": (chunk(),)} | sizes


def scorer(spec: spec_lib.Spec, rules: mesh.Rules) -> Callable[..., dict]:
    """As `eval.perplexity.make` for what `lay_out` gives: by forward passes a chunk at
    a time, compiled when they are first called, each added on the host in float64."""
    how = {"spec": spec, "rules": rules}
    nll = {"packed": gradients.packed_nll, "group": gradients.group_nll}

    def sums(params, work: Work, bytes_v):
        del bytes_v  # counted where the chunks were laid out
        made = []
        for name, operands in work.parts:
            fn = nll[name.partition("/")[0]]
            made.append(fn(params, *operands, **how))
        total = sum(map(float, jax.device_get(made)))
        return {"nll": total, "targets": work.targets, "bytes": work.bytes}

    return sums


def group_sizes(settings: gradients.Settings, longest: int) -> list[int]:
    """Numbers of chunks that programs of groups are compiled for."""
    most = -(-longest // settings.chunk_tokens)
    return sorted({chunks.rounded(n) for n in range(2, most + 1)})


def _lower(fn: functools.partial, *operands: Any) -> Any:
    return fn.func.lower(*fn.args, *operands, **fn.keywords)


def _abstract(lowered: Any) -> Any:
    """What a program makes: shapes, dtypes and shardings."""
    return jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        lowered.out_info,
        lowered.compile().output_shardings,
    )


def _update(state, sums: group.Sums, targets, tokens, *, spec, tx, config):
    """(the state with the update of these sums in, metrics)."""
    parts = {"nll": sums.nll, "z": sums.z, "targets": targets}
    if spec.moe is not None:
        made, seen = sums.stats, jnp.maximum(tokens, 1.0)
        counts_le, probs_le = made["counts_e"], made["probs_e"]
        parts |= {
            "balance": moe.balance_loss(counts_le, seen, probs_le, seen),
            "router_z": jnp.mean(made["z"]) / seen,
            "counts_le": counts_le,
            "dropped": jnp.sum(made["dropped"]),
            "tokens": seen,
        }
    state, metrics = step_lib.updated(
        state, sums.grads, parts, spec=spec, tx=tx, config=config
    )
    return state, metrics | {"forwards": sums.forwards}
