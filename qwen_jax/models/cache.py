# SPDX-License-Identifier: Apache-2.0
"""Decoding state: keys and values of every layer, and which slots are whose.

`init` makes an empty cache; `models.forward(..., cache=cache)` writes the new tokens'
keys and values at `cache.length` and returns the cache with them in. One function
serves prefill (many tokens), decoding (one token) and chunks in between.

Shapes: k_lbshk, v_lbshk in the compute dtype with s slots; segments_bs int32 (0 = empty
slot or padding); length int32 scalar: slots written so far, the same for every row.
Rows of different prompt length are padded (segment 0) on either side; positions are
given by the caller or counted per row from the tokens that are not padding.
Raises: nothing inside jit; a write past the last slot is the caller's to prevent
(`room` tells), since a traced length cannot raise.
"""

import jax
import jax.numpy as jnp
from flax import struct

from qwen_jax import config, mesh
from qwen_jax.models import spec as spec_lib


@struct.dataclass
class Cache:
    """Keys, values and segment numbers of the tokens seen so far."""

    k_lbshk: jax.Array
    v_lbshk: jax.Array
    segments_bs: jax.Array
    length: jax.Array

    @property
    def slots(self) -> int:
        """Slots for tokens in each row."""
        return self.k_lbshk.shape[2]


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
    rules = rules or mesh.Rules()
    shape = (spec.num_layers, rows, slots, spec.num_kv_heads, spec.head_width)
    layout = rules.pspec("layers", "batch", None, "kv_heads", None)
    zeros = jnp.zeros(shape, spec.compute_dtype)
    return Cache(
        k_lbshk=mesh.reshard(zeros, layout),
        v_lbshk=mesh.reshard(zeros, layout),
        segments_bs=mesh.reshard(
            jnp.zeros((rows, slots), jnp.int32), rules.pspec("batch", None)
        ),
        length=jnp.zeros((), jnp.int32),
    )


def room(cache: Cache) -> int:
    """Slots left (a host read)."""
    return cache.slots - int(cache.length)
