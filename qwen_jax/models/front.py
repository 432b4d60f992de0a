# SPDX-License-Identifier: Apache-2.0
"""Real tokens of each row to its front: padding may stand anywhere in a row.

Filters and linear layers look at neighbours: with the real tokens in front, neighbours
in a document are neighbours in the row, also where padding lies between the tokens of
this call and those of the last. Counting, not sorting: a TPU's compiler takes half a
minute for a sort.

Shapes: segments_bt int32 with 0 for padding; an index is int32 [b, t].
"""

import jax
import jax.numpy as jnp

from qwen_jax import mesh


def order(segments_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(real tokens first, then padding, each as they stood; the way back)."""
    real_bt = (segments_bt > 0).astype(jnp.int32)
    first_bt = jnp.cumsum(real_bt, axis=1)
    behind_bt = first_bt[:, -1:] + jnp.cumsum(1 - real_bt, axis=1)
    back_bt = jnp.where(real_bt > 0, first_bt, behind_bt) - 1
    b, t = segments_bt.shape
    near = mesh.varying(segments_bt)
    empty = mesh.vary(jnp.zeros((b, t), jnp.int32), near)
    index = mesh.vary(jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t)), near)
    order_bt = empty.at[jnp.arange(b)[:, None], back_bt].set(index, unique_indices=True)
    return order_bt, back_bt


def take(x: jax.Array, index_bt: jax.Array) -> jax.Array:
    """x [b, t, ...] at the places `index_bt` of each row."""
    index = index_bt.reshape(index_bt.shape + (1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)


def last(x: jax.Array, segments_bt: jax.Array, kept: int) -> jax.Array:
    """Of what is held (`kept` tokens) and new ordered ones, the last `kept` real."""
    real = jnp.sum(segments_bt > 0, axis=1, keepdims=True)
    return take(x, real + jnp.arange(kept)[None])
