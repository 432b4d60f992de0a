# SPDX-License-Identifier: Apache-2.0
"""The chunks of long documents, one after another: ChunkFlow's algorithm 2 in one jit.

    forward:   i = 0 .. N-1, each chunk over the keys of those before it; what its
               backward pass needs stays for the last K of them
    backward:  i = N-1 .. 0; chunks whose part did not stay are computed forward again.
               Keys and values of chunk i get cotangents from chunks i .. N-1, so theirs
               are whole when its turn comes

so there are N + max(0, N - K) forward passes through all layers, and memory is keys and
values of the whole documents, their cotangents, and K chunks; of linear layers, the
state before each chunk.

Source: arXiv 2503.02356, section 4.2, with the backward pass in descending order (the
circulating pseudocode, ascending, gives other gradients). Deviations: the last K are
kept by a ring of K places that every forward pass writes to; what is kept of a chunk
are the inputs of its layers and what attention gives, so that each layer but its
attention is computed once more in the backward pass, as with full recomputation; N is
data, so one program serves all documents up to its number of chunks; documents of
several rows go beside each other, as many chunks as the longest has.

Shapes: arrays of a batch [n, b, C], see `chunks.dependent`. Gradients are those of
sum(nll + z_coef lse^2) / targets plus what `weights` asks of routers, added to `acc`.
Raises: nothing; `layers.check` comes before.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from qwen_jax import mesh
from qwen_jax.models import delta as delta_lib
from qwen_jax.models import spec as spec_lib
from qwen_jax.models import streams
from qwen_jax.train import losses
from qwen_jax.train.chunkflow import layers as layers_lib


@struct.dataclass
class Sums:
    """What a step adds up: gradients as the weights; float32 sums of the loss (nats and
    lse^2 of targets); forward passes that were made for them; what routers counted (of
    a chunk computed again once), as `no_stats`."""

    grads: Any
    nll: jax.Array
    z: jax.Array
    forwards: jax.Array
    stats: Any


def no_sums(spec: spec_lib.Spec, params: Any) -> Sums:
    """Of nothing yet. Gradients lie as the weights do."""

    def zeros(w):
        return jnp.zeros_like(w, dtype=jnp.promote_types(w.dtype, jnp.float32))

    dtype = jnp.promote_types(jax.tree.leaves(params)[0].dtype, spec.compute_dtype)
    zero = jnp.zeros((), jnp.promote_types(dtype, jnp.float32))
    none = jnp.zeros((), jnp.int32)
    return Sums(jax.tree.map(zeros, params), zero, zero, none, no_stats(spec))


@struct.dataclass
class Store:
    """What goes from chunk to chunk: the buffers; states and tail segments before each
    chunk; the ring of what waits for its backward pass; forward passes so far."""

    held: layers_lib.Held
    states: Any
    tail_nbj: jax.Array
    ring: Any
    forwards: jax.Array


def gradients(
    params: Any,
    acc: Sums,
    batch: dict[str, jax.Array],
    count: jax.Array,
    targets: jax.Array,
    d_stats: Any,
    *,
    spec: spec_lib.Spec,
    rules: mesh.Rules,
    live: int,
    z_coef: float = 0.0,
    kv_grad_dtype: Any = None,
) -> Sums:
    """`acc` with the gradients of `count` chunks of the batch.

    Args:
      params: the weights.
      acc: sums so far; donate them.
      batch: see the module docstring.
      count: chunks of the longest document, int32.
      targets: of the whole step, by which the loss is divided.
      d_stats: cotangents of what routers count, [sparse layers, ...] of each name: see
        `no_stats`; None where no loss asks.
      live: K.
      z_coef: weight of lse^2.
      kv_grad_dtype: of the cotangents of keys and values; None for float32.
    """
    n, b, t = batch["tokens_bt"].shape
    d_stats = no_stats(spec) if d_stats is None else d_stats
    k = min(live, n)
    store, d_held = fresh(spec, n, b, t, k, kv_grad_dtype, rules)

    def through(i, store):
        here = chunk(batch, i)
        x = layers_lib.embedded(spec, params, here, rules)
        return forward(spec, params, here, store, i, rules, x, i % k)

    def first(i, carry):
        store, counts = through(i, carry[0])
        return store, added(carry[1], counts)

    store, stats = jax.lax.fori_loop(0, count, first, (store, acc.stats))

    def backward(m, carry):
        acc, store, d_held, d_states = carry
        i = count - 1 - m
        # A loop of none or one turn: a branch would copy the buffers.
        again = jnp.where(i < count - live, 1, 0)
        store = jax.lax.fori_loop(0, again, lambda _, s: through(i, s)[0], store)
        here, part = chunk(batch, i), jax.tree.map(lambda x: x[i], batch)
        states, saved, x = before(store, i, i % k)
        (nll, z), d_end, dx = _head(spec, params, x, part, targets, z_coef, rules)
        d = {"x": dx, "held": d_held, "states": d_states, "stats": d_stats}
        dx, d_layers, d_held, d_states = layers_lib.backward(
            *(spec, params, here, store.held, states, store.tail_nbj[i]),
            *(saved, d, rules),
        )
        d_embed = _embed_back(spec, params, here, dx, rules)
        grads = _added(acc.grads, d_end, {"layers": d_layers}, d_embed)
        acc = acc.replace(grads=grads, nll=acc.nll + nll, z=acc.z + z)
        return acc, store, d_held, d_states

    d_states = jax.tree.map(lambda x: jnp.zeros_like(x[0]), store.states)
    carry = acc, store, d_held, d_states
    acc, store, *_ = jax.lax.fori_loop(0, count, backward, carry)
    return acc.replace(forwards=acc.forwards + store.forwards, stats=stats)


def added(stats: Any, counts: Any) -> Any:
    """What routers counted so far, with more of it (as `decoder.hidden` gives it)."""
    return stats and {k: x + counts[k].astype(x.dtype) for k, x in stats.items()}


def no_stats(spec: spec_lib.Spec) -> dict[str, jax.Array] | None:
    """What routers count in no token, and cotangents of that where no loss asks: zeros,
    [sparse layers, ...]; None for models without routers."""
    if spec.moe is None:
        return None
    each = len(spec.layers_with("moe")), spec.moe.num_experts
    wide = jnp.promote_types(spec.compute_dtype, jnp.float32)
    return {
        "counts_e": jnp.zeros(each, jnp.float32),
        "probs_e": jnp.zeros(each, wide),
        "z": jnp.zeros(each[:1], wide),
        "dropped": jnp.zeros(each[:1], jnp.float32),
    }


def counted(
    params: Any,
    batch: dict[str, jax.Array],
    count: jax.Array,
    *,
    spec: spec_lib.Spec,
    rules: mesh.Rules,
) -> dict[str, jax.Array]:
    """What routers count in all tokens of `count` chunks of a batch [n, b, C], by
    forward passes alone: as `no_stats`."""

    def see(stats, x, counts, i):
        del x, i
        return added(stats, counts)

    return _forwards(params, batch, count, no_stats(spec), see, spec, rules)


def nll(
    params: Any,
    batch: dict[str, jax.Array],
    count: jax.Array,
    *,
    spec: spec_lib.Spec,
    rules: mesh.Rules,
) -> jax.Array:
    """The sum of -ln p over the targets of `count` chunks of a batch [n, b, C], by
    forward passes alone: memory is keys and values, and one chunk."""

    def see(total, x, counts, i):
        del counts
        part = jax.tree.map(lambda x: x[i], batch)
        return total + _cross_entropy(spec, params, x, part, 0.0, rules)[1]["nll"]

    zero = no_sums(spec, params).nll
    return _forwards(params, batch, count, zero, see, spec, rules)


def _forwards(params, batch, count, none, see, spec, rules):
    """`none`, with what `see(seen, residual behind the layers, counts of routers, i)`
    makes of the forward pass of one chunk after another."""
    n, b, t = batch["tokens_bt"].shape
    store, _ = fresh(spec, n, b, t, 1, None, rules)

    def one(i, carry):
        store, seen = carry
        here = chunk(batch, i)
        x = layers_lib.embedded(spec, params, here, rules)
        store, counts = forward(spec, params, here, store, i, rules, x, 0)
        return store, see(seen, store.ring["last_btd"][0], counts, i)

    return jax.lax.fori_loop(0, count, one, (store, none))[1]


def chunk(batch, i) -> layers_lib.Chunk:
    """Chunk i of arrays [n, b, C]."""
    tokens, segments, positions = (
        jax.lax.dynamic_index_in_dim(batch[k], i, keepdims=False)
        for k in ("tokens_bt", "segments_bt", "positions_bt")
    )
    start = jnp.asarray(i * tokens.shape[1], jnp.int32)
    return layers_lib.Chunk(tokens, segments, positions, start)


def fresh(spec, n, b, t, live, kv_grad_dtype, rules, groups=1):
    """(the store before the first chunk, cotangents of its buffers): for several groups
    of n chunks beside each other, those of one after those of another."""
    dtype = jnp.dtype(spec.compute_dtype)
    wide = kv_grad_dtype or jnp.promote_types(dtype, jnp.float32)
    held = layers_lib.held(spec, b, n * t, dtype, rules, groups)
    states, tail_nbj = None, jnp.zeros((groups * (n + 1), b, 0), jnp.int32)
    tail_nbj = mesh.reshard(tail_nbj, rules.pspec(None, "batch", None))
    delta = sum(kind.mixer == "delta" for kind in spec.kinds)
    if delta:
        states = delta_lib.fresh(spec, b, dtype, rules, groups * (n + 1), delta)
        tail_nbj = states.pop("segments_bj")[:, 0]
    x = jax.ShapeDtypeStruct((b, t, spec.width), dtype)
    x = jax.eval_shape(lambda x: streams.start(x, spec), x)
    attention = sum(kind.mixer == "attention" for kind in spec.kinds)
    layers, heads = len(spec.kinds), (spec.num_kv_heads, spec.num_heads)
    lead, rest = ("layers", "batch"), (None,) * (len(x.shape) - 1)

    def zeros(shape, dims, dtype=dtype):
        made = jnp.zeros((live, *shape), dtype)
        return mesh.reshard(made, rules.pspec(None, *dims))

    ring = {
        "x_lbtd": zeros((layers, *x.shape), (*lead, *rest)),
        "last_btd": zeros(x.shape, ("batch", *rest)),
    }
    if attention:
        h, heads_n = heads
        out = (attention, b, t, heads_n, spec.head_width)
        lse = (attention, b, h, heads_n // h, t)
        ring["out_lbtnk"] = zeros(out, (*lead, None, "heads", None))
        lse_dims = (*lead, "kv_heads", None, None)
        ring["lse_lbhgt"] = zeros(lse, lse_dims, jnp.promote_types(dtype, jnp.float32))
    store = Store(held, states, tail_nbj, ring, jnp.zeros((), jnp.int32))
    return store, layers_lib.held(spec, b, n * t, wide, rules, groups)


def forward(spec, params, chunk, store: Store, i, rules, x, slot, at=0):
    """(the store with chunk i in, what routers counted).

    Args:
      x: the residual before the layers of `spec`.
      slot: of the ring, for what the backward pass needs.
      at: where the group has its first layer in the buffers.
    """
    states = jax.tree.map(lambda x: x[i], store.states)
    tail_bj = store.tail_nbj[i]
    x, held, states, saved, counts = layers_lib.forward(
        spec, params, chunk, store.held, states, tail_bj, rules, x, at
    )

    def put(every, one, at):
        return jax.lax.dynamic_update_index_in_dim(
            every, one.astype(every.dtype), at, 0
        )

    ring = {k: put(store.ring[k], v, slot) for k, v in saved.items()}
    ring["last_btd"] = put(store.ring["last_btd"], x, slot)
    rows = rules.pspec("batch", None)
    tail = mesh.local(delta_lib.tail_segments, inputs=(rows, rows), out=rows)
    tail_nbj = put(store.tail_nbj, tail(tail_bj, chunk.segments_bt), i + 1)
    every = jax.tree.map(lambda x, one: put(x, one, i + 1), store.states, states)
    return Store(held, every, tail_nbj, ring, store.forwards + 1), counts


def before(store: Store, i, slot):
    """(states before chunk i, what was saved of it, the residual behind its layers)."""
    saved = {k: x[slot] for k, x in store.ring.items()}
    states = jax.tree.map(lambda x: x[i], store.states)
    return states, saved, saved.pop("last_btd")


def _head(spec, params, x, part, targets, z_coef, rules):
    """((sums of nll and lse^2), gradients of what is behind the layers, and of x)."""
    names = [k for k in ("norm_d", "streams", "head_vd", "embed_vd") if k in params]
    if not spec.tie_embedding:
        names.remove("embed_vd")

    def loss(mine, x):
        total, sums = _cross_entropy(spec, mine, x, part, z_coef, rules)
        return total / targets.astype(total.dtype), sums

    mine = {k: params[k] for k in names}
    (_, sums), (d_end, dx) = jax.value_and_grad(loss, (0, 1), has_aux=True)(mine, x)
    return (sums["nll"], sums["z"]), d_end, dx


def _cross_entropy(spec, params, x, part, z_coef, rules):
    """`losses.of_rows` of the residual behind the layers."""
    hidden_btd = streams.end(params, x, spec, rules)
    return losses.of_rows(spec, params, hidden_btd, part, z_coef=z_coef, rules=rules)


def _embed_back(spec, params, chunk, dx, rules):
    def embed(table_vd):
        tree = params | {"embed_vd": table_vd}
        return layers_lib.embedded(spec, tree, chunk, rules)

    _, pull = jax.vjp(embed, params["embed_vd"])
    return {"embed_vd": pull(dx)[0]}


def _added(grads: dict, *more: dict) -> dict:
    """Gradients of the parts of a tree, added to those of the whole."""
    grads = dict(grads)
    for part in more:
        for name, new in part.items():
            grads[name] = jax.tree.map(
                lambda x, d: x + d.astype(x.dtype), grads[name], new
            )
    return grads
