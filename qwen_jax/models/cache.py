# SPDX-License-Identifier: Apache-2.0
"""Decoding state: keys and values, linear layers' matrices, and which slots are whose.

`init` makes an empty cache; `models.forward(..., cache=cache)` writes the new tokens'
keys and values at `cache.length` and returns the cache with them in. One function
serves prefill (many tokens), decoding (one token) and chunks in between.

Shapes: keys and values in the compute dtype with s slots; segments_bs int32 (0 = empty
slot or padding); tail_segments_bj int32, the segments of the last tokens of each row;
length int32 scalar: slots written so far, the same for every row; offset_b int32, by
how much each row's next position differs from its count of real tokens (images and
videos take fewer positions than tokens, long videos more).
Rows of different prompt length are padded (segment 0) on either side; positions are
given by the caller or counted per row from the tokens that are not padding.
Raises: nothing inside jit; a write past the last slot is the caller's to prevent
(`room` tells), since a traced length cannot raise.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from qwen_jax import config, mesh
from qwen_jax.models import delta as delta_lib
from qwen_jax.models import ngram as ngram_lib
from qwen_jax.models import ring as ring_lib
from qwen_jax.models import spec as spec_lib
from qwen_jax.models import stretches


@struct.dataclass
class Cache:
    """What the layers keep of the tokens seen so far.

    attention: {"k_bhks", "v_bhsk"} with those attention layers in front that see
      everything, or None; with indexed attention also "index_bsi", and then
      positions_bs of all slots beside it.
    ring: {"k_bhks", "v_bhsk"} of the layers that have a window, or None, with the last
      min(window, slots) real tokens of each row, whose segments are ring_segments_bw:
      see `ring.py`.
    delta: {"s_bnku", "q_bjhk", "k_bjhk", "v_bjnu"}, likewise: see `delta.mix`.
    ngram: {"x_bjrd"}, likewise, and `recent` ids for the layers of n-grams: see
      `ngram.py`.

    `apart` has a list of one such dict for each layer in place of the stacks.
    """

    attention: dict[str, jax.Array] | None
    delta: dict[str, jax.Array] | None
    segments_bs: jax.Array
    tail_segments_bj: jax.Array
    length: jax.Array
    offset_b: jax.Array
    positions_bs: jax.Array | None = None
    ngram: dict[str, jax.Array] | None = None
    recent: dict[str, jax.Array] | None = None
    ring: dict[str, jax.Array] | None = None
    ring_segments_bw: jax.Array | None = None

    @property
    def slots(self) -> int:
        """Slots for tokens in each row."""
        return self.segments_bs.shape[1]


def init(
    spec: spec_lib.Spec,
    rows: int,
    slots: int,
    rules: mesh.Rules | None = None,
) -> Cache:
    """An empty cache for `rows` rows of up to `slots` tokens.

    Raises:
      config.InputError: rows or slots below 1.
    """
    if rows < 1 or slots < 1:
        raise config.InputError(
            f"cache of {rows} rows x {slots} slots: both must be >0"
        )
    rules = (rules or mesh.Rules()).whole
    dtype = jnp.dtype(spec.compute_dtype)
    counts = {stack: len(layers) for stack, layers in owners(spec).items()}
    attention, delta = (counts.get(k, 0) for k in ("attention", "delta"))
    keys, states, tail = None, None, jnp.zeros((rows, 0), jnp.int32)
    if attention:
        # As the two products of a step take them, so that no step turns the slots.
        lead, k = (attention, rows, spec.num_kv_heads), spec.head_width
        layout = rules.pspec("layers", "batch", "kv_heads", None, None)
        keys = {
            "k_bhks": mesh.reshard(jnp.zeros((*lead, k, slots), dtype), layout),
            "v_bhsk": mesh.reshard(jnp.zeros((*lead, slots, k), dtype), layout),
        }
    positions = None
    if attention and spec.indexed is not None:
        index = jnp.zeros((attention, rows, slots, spec.indexed.width), dtype)
        keys["index_bsi"] = mesh.reshard(
            index, rules.pspec("layers", "batch", None, None)
        )
        positions = jnp.zeros((rows, slots), jnp.int32)
        positions = mesh.reshard(positions, rules.pspec("batch", None))
    grams, recent = None, None
    if spec.ngram is not None:
        count = len(spec.ngram.layers)
        grams = ngram_lib.fresh(spec, rows, dtype, rules, count)
        recent = ngram_lib.fresh_recent(spec, rows, rules)
    if delta:
        states = delta_lib.fresh(spec, rows, dtype, rules, delta)
        tail = states.pop("segments_bj")[0]  # the same in every layer
    ring, ring_segments_bw = None, None
    if "ring" in counts:
        ring, ring_segments_bw = ring_lib.fresh(
            spec, rows, slots, dtype, rules, counts["ring"]
        )
    layout = rules.pspec("batch", None)
    return Cache(
        attention=keys,
        delta=states,
        segments_bs=mesh.reshard(jnp.zeros((rows, slots), jnp.int32), layout),
        tail_segments_bj=mesh.reshard(tail, layout),
        length=jnp.zeros((), jnp.int32),
        offset_b=mesh.reshard(jnp.zeros((rows,), jnp.int32), rules.pspec("batch")),
        positions_bs=positions,
        ngram=grams,
        recent=recent,
        ring=ring,
        ring_segments_bw=ring_segments_bw,
    )


STACKS = ("attention", "ring", "delta", "ngram")


def stacks(kind: spec_lib.Kind) -> tuple[str, ...]:
    """The stacks of a cache that a layer of this kind has a part in."""
    own = "ring" if kind.window else kind.mixer
    return (own, "ngram") if kind.ngram else (own,)


def owners(spec: spec_lib.Spec) -> dict[str, tuple[int, ...]]:
    """The layers whose parts each stack holds, in its order."""
    named = {
        k: tuple(i for i, kind in enumerate(spec.kinds) if k in stacks(kind))
        for k in STACKS
    }
    return {k: layers for k, layers in named.items() if layers}


def is_apart(cache: Cache) -> bool:
    """Whether each layer's part is an array of its own."""
    return any(isinstance(getattr(cache, k), list) for k in STACKS)


def apart(cache: Cache) -> Cache:
    """The cache with an array for each layer. A loop over unrolled layers then writes
    new tokens where they go, and copies no layer out of a stack and back."""

    def split(stack):
        return stretches.layers_of(stack, len(jax.tree.leaves(stack)[0]))

    return cache.replace(**{k: split(x) for k, x in _held(cache, dict)})


def together(cache: Cache) -> Cache:
    """The cache with its layers stacked."""
    return cache.replace(**{k: stretches.stacked(x) for k, x in _held(cache, list)})


def _held(cache: Cache, kind: type) -> list[tuple[str, Any]]:
    every = [(k, getattr(cache, k)) for k in STACKS]
    return [(k, x) for k, x in every if isinstance(x, kind)]


def put(
    held_bs: jax.Array, new_bt: jax.Array, length: jax.Array, rules: mesh.Rules
) -> jax.Array:
    """What slots hold, with that of new tokens in from slot `length` on."""
    rows = rules.pspec("batch", None)
    run = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
    return mesh.local(run, inputs=(rows, rows, jax.P()), out=rows)(
        held_bs, new_bt, length
    )


def next_positions(cache: Cache) -> jax.Array:
    """The position of the next token of each row: [b]."""
    return jnp.sum(cache.segments_bs > 0, axis=1) + cache.offset_b


def offsets(
    cache: Cache, positions: jax.Array | None, segments_bt: jax.Array
) -> jax.Array:
    """`offset_b` once tokens with these positions are in: where they are threefold, the
    next one follows the largest of all."""
    if positions is None or positions.ndim == 2:
        return cache.offset_b
    real_bt = segments_bt > 0
    top_b = jnp.max(jnp.where(real_bt[None], positions, -1), axis=(0, 2))
    count_b = jnp.sum(cache.segments_bs > 0, axis=1) + jnp.sum(real_bt, axis=1)
    return jnp.where(top_b < 0, cache.offset_b, top_b + 1 - count_b)


def room(cache: Cache) -> int:
    """Slots left (a host read)."""
    return cache.slots - int(cache.length)
