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
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import config, mesh
from qwen_jax.models import attention, decoder, moe
from qwen_jax.models import spec as spec_lib
from qwen_jax.train import losses
from qwen_jax.train.chunkflow import chunks as chunks_lib
from qwen_jax.train.chunkflow import group, layers

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
    rules, t = rules or mesh.Rules(), settings.chunk_tokens
    documents = chunks_lib.checked(documents, spec.vocab_size)
    attention.check_backend(spec, mesh.platform(), packed=True)
    plan = chunks_lib.build([len(one) for one in documents], t)
    longest = max((len(one) for one in documents), default=0)
    layers.check(spec, t, longest)
    targets = sum(len(one) - 1 for one in documents)
    if not targets:
        raise config.InputError(
            f"{len(documents)} documents have no target: wanted one of 2 tokens or more"
        )
    rows = mesh.axis_size(rules.batch)
    how = {"spec": spec, "rules": rules}
    laid = functools.partial(_laid, rules=rules)
    packed = [laid(part) for part in _standalone(documents, plan, rows)]
    groups = [(laid(part), n) for part, n in _groups(documents, plan, rows)]
    d_stats = None
    if spec.moe is not None:
        tokens = sum(len(one) for one in documents)
        d_stats = _router_cotangents(params, packed, groups, settings, tokens, how)
    sums = no_sums(params)
    whole = np.float32(targets)
    for part in packed:
        sums = packed_gradients(
            *(params, sums, part, whole, d_stats),
            **how,
            z_coef=settings.z_coef,
            remat=settings.remat,
        )
    for part, count in groups:
        sums = group_gradients(
            *(params, sums, part, np.int32(count), whole, d_stats),
            **how,
            live=settings.live_chunks,
            z_coef=settings.z_coef,
            kv_grad_dtype=settings.kv_grad_dtype or None,
        )
    return sums, targets


def _laid(part, rules):
    """Arrays of a batch on the mesh."""
    if not mesh.active():
        return {k: jnp.asarray(x) for k, x in part.items()}
    out = {}
    for k, x in part.items():
        lead = (None,) * (x.ndim - 2)
        out[k] = mesh.reshard(jnp.asarray(x), rules.pspec(*lead, "batch", None))
    return out


def _standalone(documents, plan, rows):
    """Batches [rows, C] of standalone chunks, the last one filled up with padding."""
    for first in range(0, len(plan.bins), rows):
        bins = plan.bins[first : first + rows]
        bins += ((),) * (rows - len(bins))
        yield chunks_lib.standalone(documents, bins, plan.chunk_tokens)


def _groups(documents, plan, rows):
    """(arrays [n, rows, C] of a few groups, their chunks). Groups of about the same
    length go beside each other."""
    for first in range(0, len(plan.groups), rows):
        some = plan.groups[first : first + rows]
        count = some[0].chunks
        n = chunks_lib.rounded(count)
        ids = [documents[one.document] for one in some]
        yield chunks_lib.dependent(ids, plan.chunk_tokens, n, rows), count


no_sums = jax.jit(group.no_sums)


group_gradients = jax.jit(
    group.gradients,
    static_argnames=("spec", "rules", "live", "z_coef", "kv_grad_dtype"),
    donate_argnames="acc",
)
_counted = jax.jit(group.counted, static_argnames=("spec", "rules"))


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
        hidden_btd, stats = _hidden(params, part, spec, rules, remat)
        total, sums = losses.cross_entropy(
            hidden_btd,
            decoder.head_vd(spec, params),
            part["targets_bt"],
            part["mask_bt"],
            z_coef=z_coef,
            rules=rules,
        )
        total = total / targets.astype(total.dtype)
        for name, d in (d_stats or {}).items():
            total += jnp.sum(d * stats[name])
        lost = 0.0 if stats is None else jnp.sum(stats["dropped"])
        return total, sums | {"dropped": lost}

    (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return group.Sums(
        jax.tree.map(lambda x, d: x + d.astype(x.dtype), acc.grads, grads),
        acc.nll + sums["nll"],
        acc.z + sums["z"],
        acc.forwards + 1,
        acc.dropped + sums["dropped"],
    )


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
def _packed_counts(params, part, *, spec, rules):
    stats = _hidden(params, part, spec, rules, "none")[1]
    return {k: stats[k] for k in group.no_cotangents(spec)}


def _router_cotangents(params, packed, groups, settings, tokens, how):
    """Cotangents of what routers count, of the whole step's losses: those of `moe`."""
    spec = how["spec"]
    zero = group.no_cotangents(spec)
    if not settings.router_losses:
        return zero
    sums = zero
    if spec.moe.balance_coef:
        parts = [_packed_counts(params, part, **how) for part in packed]
        parts += [_counted(params, part, np.int32(n), **how) for part, n in groups]
        for part in parts:
            sums = jax.tree.map(jnp.add, sums, part)

    def losses_of(made):
        balance = moe.balance_loss(sums["counts_e"], tokens, made["probs_e"], tokens)
        z = jnp.mean(made["z"]) / tokens
        return spec.moe.balance_coef * balance + spec.moe.z_coef * z

    return jax.grad(losses_of)(zero)
