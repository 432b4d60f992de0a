# SPDX-License-Identifier: Apache-2.0
"""Loss and gradients of documents of any length, a chunk at a time.

    loss, grads = chunkflow.value_and_grad(spec, params, documents, chunk_tokens=4096,
                                           live_chunks=2)

is the loss of the whole documents, each by itself, and its gradient: memory is set by
the chunk and by keys and values (and linear layers' states) of the longest document,
not by activations of the longest sequence.

Source: ChunkFlow, arXiv 2503.02356; deviations in `chunks.py` and `group.py`. The
balance loss of routers, where it is asked for, is that of the whole step: a pass over
all chunks counts choices first, since the loss of each chunk depends on all of them.

Compiled shapes: one program for standalone chunks, and one for groups of each number of
chunks of `chunks.rounded`; how many there are of a document is data.
Units: loss in nats a target token, a target being every token of a document but its
first. Raises: config.InputError for documents, sizes and models that cannot be.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import config, mesh
from qwen_jax.models import attention, decoder, moe
from qwen_jax.models import spec as spec_lib
from qwen_jax.plan import chips
from qwen_jax.plan import chunks as costs
from qwen_jax.train import losses
from qwen_jax.train.chunkflow import chunks as chunks_lib
from qwen_jax.train.chunkflow import group, layers

STATS = "stats/"  # before a part's name: the program that counts for its routers
Part = tuple[str, tuple[Any, ...]]  # the name of a program, and what it is given
KV_GRAD_DTYPES = ("", "bfloat16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a step goes through its chunks.

    chunk_tokens: C, most tokens of a chunk. live_chunks: K, chunks of a group that wait
    for their backward pass with what it needs. z_coef: weight of lse^2 (z-loss).
    router_losses: whether the losses of routers are part of the gradient, as their
    weights in the spec say. remat: of standalone chunks, as `decoder.hidden`.
    kv_grad_dtype: of cotangents of keys and values, "" for float32 or wider; "bfloat16"
    halves them and rounds at each of as many additions as there are chunks behind.
    """

    chunk_tokens: int
    live_chunks: int = 1
    z_coef: float = 0.0
    router_losses: bool = False
    remat: str = "none"
    kv_grad_dtype: str = ""

    def __post_init__(self):
        for name in ("chunk_tokens", "live_chunks"):
            if (given := getattr(self, name)) < 1:
                raise config.InputError(f"{name}={given}: wanted at least 1")
        decoder.saved_names(self.remat)
        if self.kv_grad_dtype not in KV_GRAD_DTYPES:
            hint = config.nearest(self.kv_grad_dtype, KV_GRAD_DTYPES)
            raise config.InputError(
                f"kv_grad_dtype={self.kv_grad_dtype!r}: wanted bfloat16, float32, "
                f"float64, or nothing{hint}"
            )


def value_and_grad(
    spec: spec_lib.Spec,
    params: Any,
    documents: Sequence[np.ndarray],
    *,
    chunk_tokens: int,
    live_chunks: int = 1,
    rules: mesh.Rules | None = None,
    **more: Any,
) -> tuple[jax.Array, Any]:
    """The mean next-token cross-entropy over all targets of all documents, and its
    gradient (and of what `z_coef` and `router_losses` add, where they ask for it).

    Args:
      spec: the model.
      params: its weights, stacked.
      documents: rows of ids, one each.
      chunk_tokens: see `Settings`, as `live_chunks` and `more`.
      rules: dims -> mesh axes.
    Returns:
      (float32 scalar, or wider; a tree as params, float32 or wider).
    """
    settings = Settings(chunk_tokens, live_chunks, **more)
    sums, targets = run(spec, params, documents, settings, rules)
    return sums.nll / targets, sums.grads


def run(
    spec: spec_lib.Spec,
    params: Any,
    documents: Sequence[np.ndarray],
    settings: Settings,
    rules: mesh.Rules | None = None,
) -> tuple[group.Sums, float]:
    """(sums of the step, targets that gradients are divided by already); arguments as
    of `value_and_grad`.

    Raises:
      config.InputError: naming the document, the size or the part of the model.
    """
    rules, t = (rules or mesh.Rules()).whole, settings.chunk_tokens
    documents = chunks_lib.checked(documents, spec.vocab_size)
    pieces = [chunks_lib.whole(one) for one in documents]
    attention.check_backend(spec, mesh.platform(), packed=True)
    longest = max((len(one) for one in documents), default=0)
    layers.check(spec, t, longest)
    _check_memory(spec, settings, longest, rules)
    dealt = chunks_lib.deal(pieces, t, mesh.axis_size(rules.batch))
    tokens = sum(len(one) for one in documents)
    targets = tokens - len(documents)
    if not targets:
        raise config.InputError(
            f"{len(documents)} documents have no target: wanted one of 2 tokens or more"
        )
    laid = functools.partial(_laid, rules=rules)
    parts = [(name, (laid(x), *more)) for name, (x, *more) in parts_of(dealt)]
    each = jitted(spec, settings, rules, [name for name, _ in parts])
    return summed(params, parts, targets, tokens, each), targets


def _check_memory(spec, settings, longest, rules):
    """Refuse a document whose keys and values alone are more than a device has."""
    sizes = dict(jax.sharding.get_mesh().shape) if mesh.active() else {}
    held = costs.estimate(
        spec,
        rules,
        dict.fromkeys(mesh.AXES, 1) | sizes,
        optimizer="adamw",
        remat=settings.remat,
        chunk_tokens=settings.chunk_tokens,
        live_chunks=settings.live_chunks,
        chunks=chunks_lib.rounded(-(-longest // settings.chunk_tokens)),
        kv_grad_bytes=jnp.dtype(settings.kv_grad_dtype or "float32").itemsize,
    )
    needed, there = held.keys + held.key_grads, chips.memory_bytes(jax.devices()[0])
    if needed > there:
        gib = 1 << 30
        raise config.InputError(
            f"a document of {longest} tokens needs {needed / gib:.1f} GiB of a device "
            "for its keys, values and their cotangents, linear states included, and "
            f"{there / gib:.1f} GiB are there; split heads over more devices (mesh "
            'axis tensor), take kv_grad_dtype="bfloat16", or cut the document'
        )


def parts_of(dealt: chunks_lib.Dealt) -> list[Part]:
    """The parts of a step, arrays as they are here: standalone chunks, and groups,
    whose program depends on how many chunks their arrays have room for."""
    parts: list[Part] = [("packed", (part,)) for part in dealt.packed]
    for part, count in dealt.groups:
        operands = part, np.int32(count)
        parts.append((f"group/{len(part['tokens_bt'])}", operands))
    return parts


def jitted(
    spec: spec_lib.Spec, settings: Settings, rules: mesh.Rules, names: Iterable[str]
) -> dict[str, Callable[..., Any]]:
    """What `summed` calls for parts of these names; each is compiled when it is called
    with new shapes."""
    how = {"spec": spec, "rules": rules}
    deep = functools.partial(
        group_gradients,
        **how,
        live=settings.live_chunks,
        z_coef=settings.z_coef,
        kv_grad_dtype=settings.kv_grad_dtype or None,
    )
    flat = functools.partial(
        packed_gradients, **how, z_coef=settings.z_coef, remat=settings.remat
    )
    kinds = {"packed": flat, "group": deep}
    counting = {"packed": packed_stats, "group": group_stats}
    each: dict[str, Callable] = {"none": functools.partial(no_sums, spec)}
    asked = spec.moe is not None and settings.router_losses
    if asked:
        each["d_stats"] = functools.partial(d_stats, spec)
    for name in names:
        kind = name.partition("/")[0]
        each[name] = kinds[kind]
        if asked:
            each[STATS + name] = functools.partial(counting[kind], **how)
    return each


def summed(
    params: Any,
    parts: Sequence[Part],
    targets: float,
    tokens: int,
    each: Mapping[str, Callable[..., Any]],
) -> group.Sums:
    """The sums of a step whose parts lie on the mesh.

    Args:
      params: the weights.
      parts: of the step.
      targets, tokens: of the whole step, in all processes.
      each: by name, "none" (params) -> sums of nothing, and the program of each part
        (params, sums, *operands, targets, d_stats) -> sums. Where losses of routers are
        asked for, also "d_stats" (stats, tokens) -> cotangents of what routers counted,
        and with STATS before its name (params, stats, *operands) -> stats.
    """
    sums, whole, asked = each["none"](params), np.float32(targets), None
    stats = sums.stats
    if "d_stats" in each:
        for name, operands in parts:
            stats = each[STATS + name](params, stats, *operands)
        asked = each["d_stats"](stats, np.float32(tokens))
    for name, operands in parts:
        sums = each[name](params, sums, *operands, whole, asked)
    return sums if asked is None else sums.replace(stats=stats)


def _laid(part, rules):
    """Arrays of a batch on the mesh."""
    if not mesh.active():
        return {k: jnp.asarray(x) for k, x in part.items()}
    out = {}
    for k, x in part.items():
        lead = (None,) * (x.ndim - 2)
        out[k] = mesh.reshard(jnp.asarray(x), rules.pspec(*lead, "batch", None))
    return out


no_sums = jax.jit(group.no_sums, static_argnums=0)


group_gradients = jax.jit(
    group.gradients,
    static_argnames=("spec", "rules", "live", "z_coef", "kv_grad_dtype"),
    donate_argnames="acc",
)


@functools.partial(
    jax.jit,
    static_argnames=("spec", "rules", "z_coef", "remat"),
    donate_argnames="acc",
)
def packed_gradients(
    params, acc, part, targets, d_stats, *, spec, rules, z_coef, remat
):
    """`acc` (donated) with the gradients of standalone chunks [b, C]; arguments as of
    `group.gradients`, remat as of `decoder.hidden`."""

    def loss(params):
        total, sums, stats = _loss(params, part, spec, rules, z_coef, remat)
        total = total / targets.astype(total.dtype)
        for name, d in (d_stats or {}).items():
            total += jnp.sum(d * stats[name])
        return total, (sums, stats)

    (_, (sums, stats)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return group.Sums(
        jax.tree.map(lambda x, d: x + d.astype(x.dtype), acc.grads, grads),
        acc.nll + sums["nll"],
        acc.z + sums["z"],
        acc.forwards + 1,
        group.added(acc.stats, stats),
    )


def _loss(params, part, spec, rules, z_coef=0.0, remat="none"):
    """(*`losses.of_rows` of standalone chunks, what routers counted)."""
    hidden_btd, stats = _hidden(params, part, spec, rules, remat)
    made = losses.of_rows(spec, params, hidden_btd, part, z_coef=z_coef, rules=rules)
    return *made, stats


@functools.partial(jax.jit, static_argnames=("spec", "rules"))
def packed_nll(params, part, *, spec, rules):
    """The sum of -ln p over the targets of standalone chunks [b, C]."""
    return _loss(params, part, spec, rules)[1]["nll"]


group_nll = jax.jit(group.nll, static_argnames=("spec", "rules"))


def _hidden(params, part, spec, rules, remat):
    return decoder.hidden(
        spec,
        params,
        part["tokens_bt"],
        positions=None if spec.dual_chunk is not None else part["positions_bt"],
        segments=part["segments_bt"],
        rules=rules,
        remat=remat,
    )


@functools.partial(jax.jit, static_argnames=("spec", "rules"))
def packed_stats(params, stats, part, *, spec, rules):
    """What routers count (`group.no_stats`), with that of standalone chunks [b, C]."""
    return group.added(stats, _hidden(params, part, spec, rules, "none")[1])


@functools.partial(jax.jit, static_argnames=("spec", "rules"))
def group_stats(params, stats, part, count, *, spec, rules):
    """The same with that of `count` chunks of groups [n, b, C]."""
    counted = group.counted(params, part, count, spec=spec, rules=rules)
    return group.added(stats, counted)


@functools.partial(jax.jit, static_argnums=0)
def d_stats(spec, stats, tokens):
    """Cotangents of what routers count, of the losses of a whole step in whose `tokens`
    they counted `stats`: those of `moe`."""

    def losses_of(made):
        balance = moe.balance_loss(stats["counts_e"], tokens, made["probs_e"], tokens)
        z = jnp.mean(made["z"]) / tokens
        return spec.moe.balance_coef * balance + spec.moe.z_coef * z

    return jax.grad(losses_of)(group.no_stats(spec))
