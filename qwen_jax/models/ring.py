# SPDX-License-Identifier: Apache-2.0
"""What layers with a window keep in a cache: the last real tokens of each row.

    slot of a token = rank % w,    rank: how many real tokens of its row are before it
    w = min(window, slots of the cache)

A token that comes w later takes the slot, and no token that is yet to come sees what
was there: it is w or more away. Padding has no rank and is not kept, so it stretches no
window. While w is below the window the cache has no more slots than that, no rank
reaches w, and slot and rank are one: such a ring grows by copying its front.

Shapes: k_bhks and v_bhsk with w slots for s, layers in front; segments_bw int32, one
for all of those layers, since they all have the same window: 0 = empty; new tokens are
[b, t], their slot_bt is w or more where they are not kept.
Invariant: the slots of a row hold its last w real tokens, or all that there are; the
w-th last may be gone where padding came by itself (nothing to come can see it).
Raises: nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax import mesh
from qwen_jax.models import spec as spec_lib


class Places(NamedTuple):
    """Where tokens lie before and after new ones come; the same in every layer. Ranks
    mean something where segments are above 0."""

    slot_bt: jax.Array
    rank_bt: jax.Array
    held_segments_bw: jax.Array
    held_rank_bw: jax.Array
    segments_bw: jax.Array
    rank_bw: jax.Array


def fresh(
    spec: spec_lib.Spec,
    rows: int,
    slots: int,
    dtype: jnp.dtype,
    rules: mesh.Rules,
    layers: int,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """(empty slots of `layers` layers, segments_bw of all)."""
    w = min(spec.window, slots)
    lead, k = (layers, rows, spec.num_kv_heads), spec.head_width
    layout = rules.pspec("layers", "batch", "kv_heads", None, None)
    held = {
        "k_bhks": mesh.reshard(jnp.zeros((*lead, k, w), dtype), layout),
        "v_bhsk": mesh.reshard(jnp.zeros((*lead, w, k), dtype), layout),
    }
    segments_bw = jnp.zeros((rows, w), jnp.int32)
    return held, mesh.reshard(segments_bw, rules.pspec("batch", None))


def places(
    held_bw: jax.Array, before_bs: jax.Array, new_bt: jax.Array, rules: mesh.Rules
) -> Places:
    """Places of new tokens, from the segments of the ring, of all slots of the cache
    before them, and of the new tokens."""
    rows = rules.pspec("batch", None)
    out = Places(*(rows for _ in Places._fields))
    return mesh.local(_places, inputs=(rows, rows, rows), out=out)(
        held_bw, before_bs, new_bt
    )


def _places(held_bw, before_bs, new_bt):
    (b, w), t = held_bw.shape, new_bt.shape[1]
    real_bt = new_bt > 0
    before_b1 = jnp.sum(before_bs > 0, axis=1, keepdims=True)
    rank_bt = before_b1 + jnp.cumsum(real_bt, axis=1) - 1
    count_b1 = before_b1 + jnp.sum(real_bt, axis=1, keepdims=True)
    # Those that are dropped have slots of their own behind the last, so that no two
    # tokens share one and the writes may go in any order.
    kept_bt = real_bt & (rank_bt >= count_b1 - w)
    slot_bt = jnp.where(kept_bt, rank_bt % w, w + jnp.arange(t)[None])
    if t == 1:
        # One that is padding empties the slot of the next real token, which none will
        # see again: a write that may not happen costs a CPU a copy of all slots.
        slot_bt = before_b1 % w
    segments_bw = held_bw.at[jnp.arange(b)[:, None], slot_bt].set(
        new_bt, mode="drop", unique_indices=True
    )
    return Places(
        slot_bt,
        rank_bt,
        held_bw,
        _ranks(before_b1, w),
        segments_bw,
        _ranks(count_b1, w),
    )


def _ranks(count_b1, w):
    """The rank of the newest token that slot j of a row of `count` may hold: below the
    count, and j modulo w. Below 0 where there is none yet."""
    last_b1 = count_b1 - 1
    return last_b1 - (last_b1 - jnp.arange(w)[None]) % w


def put(
    held: dict[str, jax.Array], new: dict[str, jax.Array], slot_bt: jax.Array
) -> dict[str, jax.Array]:
    """One layer's slots with new tokens [b, t, h, k] in; on one device's block."""
    if slot_bt.shape == (1, 1):  # a CPU would scatter one row into a copy of the slots
        put = jax.lax.dynamic_update_slice_in_dim
        k_bhkt = new["k_bhks"].transpose(0, 2, 3, 1)
        v_bhtk = new["v_bhsk"].transpose(0, 2, 1, 3)
        return {
            "k_bhks": put(held["k_bhks"], k_bhkt, slot_bt[0, 0], axis=3),
            "v_bhsk": put(held["v_bhsk"], v_bhtk, slot_bt[0, 0], axis=2),
        }
    row_b1 = jnp.arange(slot_bt.shape[0])[:, None]
    how = {"mode": "drop", "unique_indices": True}
    return {
        "k_bhks": held["k_bhks"].at[row_b1, :, :, slot_bt].set(new["k_bhks"], **how),
        "v_bhsk": held["v_bhsk"].at[row_b1, :, slot_bt].set(new["v_bhsk"], **how),
    }
