# SPDX-License-Identifier: Apache-2.0
"""Rows whose tokens are split over devices: what a model must be, what pieces hand on.

With `mesh.Rules.tokens` on an axis of P devices a row of t tokens is 2 P pieces in the
order of `mesh.zigzag`. Most of a layer takes each token by itself. Attention exchanges
keys (kernels/ring_attention.py); the linear layers need what stood before a piece: the
last inputs of their convolution, and their state. Each piece says what it adds, all of
them are gathered (a few numbers a head, whatever the length), and every device goes
through them in the order of the row: `before`.

Shapes: inside `mesh.local`, [b, t, ...] of two pieces <-> [2 b, c, ...], a piece a row.
Raises: config.InputError from `check`, with what to set instead.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax import config, mesh
from qwen_jax.models import spec as spec_lib
from qwen_jax.models.kernels import ring_attention


def check(
    spec: spec_lib.Spec,
    seq_tokens: int,
    ways: int,
    *,
    see: bool = False,
    depths: int = 0,
) -> None:
    """Refuse what does not go with the tokens of a row on `ways` devices.

    `see`: there are images or videos; `depths`: layers of the MTP head that are
    trained.
    """
    if ways == 1:
        return
    if seq_tokens % (2 * ways):
        near = max(seq_tokens // (2 * ways), 1) * 2 * ways
        raise config.InputError(
            f"data.seq_tokens={seq_tokens} over mesh.context={ways} devices: wanted a "
            f"multiple of {2 * ways}, as each has two pieces of a row; the nearest is "
            f"--config.data.seq_tokens={near}"
        )
    ring_attention.block_for(seq_tokens // (2 * ways))
    whole = "; set --config.mesh.context=1"
    if spec.attention != "blockwise":
        raise config.InputError(
            f"model.attention={spec.attention!r} takes whole rows, and "
            f"mesh.context={ways} splits them: set --config.model.attention=blockwise, "
            "with which keys go round"
        )
    if spec.dual_chunk is not None:
        raise config.InputError(
            f"mesh.context={ways} splits rows, and dual chunk attention "
            f"(model.dual_chunk) takes whole ones{whole}"
        )
    if spec.indexed is not None:
        raise config.InputError(
            f"mesh.context={ways} splits rows, and attention that chooses its keys "
            f"(model.indexed) takes whole ones{whole}"
        )
    if any(kind.ngram for kind in spec.kinds):
        raise config.InputError(
            f"mesh.context={ways} splits rows, and embeddings of n-grams (model.ngram) "
            f"take whole ones{whole}"
        )

    if see:
        raise config.InputError(
            f"mesh.context={ways} splits rows, and features of images and videos go to "
            f"whole ones{whole}"
        )
    if depths:
        raise config.InputError(
            f"mesh.context={ways} splits rows, and the {depths} layers for further "
            "tokens (model.mtp_layers) look at the next token, which may be elsewhere; "
            "set --config.train.mtp_coef=0 to leave them untrained"
        )


def cut(x: jax.Array) -> jax.Array:
    """[b, 2 c, ...] -> [2 b, c, ...]."""
    return x.reshape(2 * x.shape[0], x.shape[1] // 2, *x.shape[2:])


def join(x: jax.Array) -> jax.Array:
    """The way back."""
    return x.reshape(x.shape[0] // 2, 2 * x.shape[1], *x.shape[2:])


def before(
    after: Callable[[Any, Any], Any], start: Any, parts: Any, axes: tuple[str, ...]
) -> Any:
    """What stands before each of a device's pieces, [2 b, ...] as `parts`.

    Args:
      after: (what stood before a piece, its part) -> what stands behind it.
      start: before the first piece, [b, ...].
      parts: what this device's pieces say, [2 b, ...].
      axes: over which tokens are split.
    """
    ways, device = jax.lax.axis_size(axes), jax.lax.axis_index(axes)

    def in_order(x):
        each = jax.lax.all_gather(x, axes, axis=0)
        each = each.reshape(ways, -1, 2, *x.shape[1:])
        return jnp.concatenate([each[:, :, 0], each[::-1, :, 1]])

    def own(x):
        two = [
            jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
            for i in (device, 2 * ways - 1 - device)
        ]
        return jnp.stack(two, axis=1).reshape(-1, *x.shape[2:])

    near = frozenset(axes).union(*map(mesh.varying, jax.tree.leaves(parts)))
    start = jax.tree.map(lambda x: mesh.vary(x, near), start)
    _, held = jax.lax.scan(
        lambda held, part: (after(held, part), held),
        start,
        jax.tree.map(in_order, parts),
    )
    return jax.tree.map(own, held)
