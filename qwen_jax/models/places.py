# SPDX-License-Identifier: Apache-2.0
"""Where tokens stand: the positions of whole rows and of new tokens of a cache.

Without positions from the caller those of a row are 0 .. t-1 (RoPE is relative: where a
document begins does not matter), those of new tokens the count of real tokens before
them. With dual chunks (see dual_chunk.py) it matters, so there they are counted inside
each document, and what is turned is the position modulo a chunk.

Tokens that are split over devices stand in the order of `mesh.zigzag`.

Shapes: positions int32 [b, t] or, with images, [3, b, t]; results (cos_btk, sin_btk)
as `rope.angles`.
Raises: ValueError for positions given to a cache of dual chunks, which counts itself.
"""

import jax
import jax.numpy as jnp

from qwen_jax import mesh
from qwen_jax.models import cache as cache_lib
from qwen_jax.models import dual_chunk, rope
from qwen_jax.models import spec as spec_lib

Angles = tuple[jax.Array, jax.Array]


def of_rows(
    spec: spec_lib.Spec,
    b: int,
    t: int,
    positions: jax.Array | None,
    segments: jax.Array | None,
    rules: mesh.Rules,
) -> tuple[Angles, jax.Array | None]:
    """(cos and sin of b rows of t tokens; the positions in their documents where dual
    chunks make a difference, else None)."""
    chunks, rows = spec.dual_chunk, rules.pspec("batch", "tokens")
    far = chunks is not None and (positions is not None or dual_chunk.needed(chunks, t))
    if positions is None and far and segments is not None:
        positions = mesh.local(dual_chunk.counted, inputs=(rows,), out=rows)(segments)
    if positions is None:
        order = mesh.zigzag(t, mesh.axis_size(rules.split or None))
        positions = jnp.broadcast_to(jnp.asarray(order, jnp.int32)[None], (b, t))
        positions = mesh.reshard(positions, rows)
    if not far:
        return rope.angles(spec, positions), None
    return rope.angles(spec, positions % chunks.stride), positions


def of_cache(
    spec: spec_lib.Spec,
    cache: cache_lib.Cache,
    positions: jax.Array | None,
    segments_bt: jax.Array,
    slots_bs: jax.Array,
    rules: mesh.Rules,
) -> tuple[Angles, tuple[jax.Array, jax.Array] | None]:
    """(cos and sin of new tokens; the positions of new tokens and of all slots where
    dual chunks make a difference, else None). `slots_bs`: segments with the new ones.
    """
    t, rows, chunks = segments_bt.shape[1], rules.pspec("batch", None), spec.dual_chunk
    if chunks is None or not dual_chunk.needed(chunks, cache.slots):
        return rope.angles(spec, _after(cache, positions, segments_bt)), None
    if positions is not None:
        raise ValueError(
            "a cache of dual chunks counts positions inside each document: leave "
            "positions out"
        )

    def run(slots_bs, start):
        at_bs = dual_chunk.counted(slots_bs)
        return at_bs, jax.lax.dynamic_slice_in_dim(at_bs, start, t, axis=1)

    run = mesh.local(run, inputs=(rows, jax.P()), out=(rows, rows))
    at_bs, at_bt = run(slots_bs, cache.length)
    return rope.angles(spec, at_bt % chunks.stride), (at_bt, at_bs)


def of_slots(
    spec: spec_lib.Spec,
    cache: cache_lib.Cache,
    positions: jax.Array | None,
    segments_bt: jax.Array,
    rules: mesh.Rules,
) -> tuple[jax.Array | None, Angles | None]:
    """(positions of the slots of a cache with the new ones in, cos and sin of all);
    None where it holds none."""
    if cache.positions_bs is None:
        return None, None
    new_bt = _after(cache, positions, segments_bt).astype(cache.positions_bs.dtype)
    at_bs = cache_lib.put(cache.positions_bs, new_bt, cache.length, rules)
    return at_bs, rope.angles(spec, at_bs)


def _after(cache, positions, segments_bt):
    """The caller's positions of new tokens, or those that follow a cache's own."""
    if positions is not None:
        return positions
    before = cache_lib.next_positions(cache)[:, None]
    count = jnp.cumsum(segments_bt > 0, axis=1)
    return jnp.maximum(jnp.broadcast_to(before, segments_bt.shape) + count - 1, 0)
