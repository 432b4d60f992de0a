# SPDX-License-Identifier: Apache-2.0
"""Muon for stacked, sharded weights: momentum, then each layer's matrix orthogonalised.

    m <- b m + (1 - b) g
    u  = b m' + (1 - b) g'          Nesterov; ' is Adam's bias correction of each
    X0 = u / |u|_F
    X <- a X + (b A + c A A) X,  A = X X^T       five times (Newton-Schulz, quintic)
    update = 0.2 sqrt(max(rows, columns)) X5

Source: Jordan et al., Muon (2024), coefficients (3.4445, -4.7750, 2.0315); the scale is
that of Liu et al., "Muon is Scalable for LLM Training" (arXiv 2502.16982, section 2.2),
which gives the update the RMS that AdamW has, so both share one lr and weight decay.
Same numbers as `optax.contrib.muon(consistent_rms=0.2)`, which the tests compare with.
Differs from it: layouts. A Newton-Schulz step needs whole matrices, and under Explicit
mesh axes optax's `x @ x.T` of a sharded matrix is a type error. Here the momentum stays
where the weight lies; for the iteration layers are dealt to devices with one all-to-all
and come back with another, so nothing is communicated inside the loop.

Shapes: leaves [..., m, n], everything before the last two dims is stacked (layers,
experts): each [m, n] is a matrix of its own. `split` tells where a side of the matrix
is several dims (heads and their width).
Invariants: float32; one state array per weight (AdamW has two).
Raises: config.InputError for a leaf without two dims.
"""

import math
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from qwen_jax import config, mesh

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-8


class State(typing.NamedTuple):
    """Updates made, and the momentum of each weight."""

    count: jax.Array
    momentum: typing.Any


def orthogonalize(x_bmn: jax.Array, num_iters: int = 5) -> jax.Array:
    """Each [m, n] with its singular values pushed towards one (0.7 to 1.2)."""
    a, b, c = COEFFICIENTS
    tall = x_bmn.shape[1] > x_bmn.shape[2]
    if tall:  # the products below are [m, m]: take the short side
        x_bmn = x_bmn.swapaxes(1, 2)
    norm_b11 = jnp.sqrt(jnp.sum(x_bmn**2, axis=(1, 2), keepdims=True))
    x_bmn = x_bmn / (norm_b11 + EPS)
    for _ in range(num_iters):
        gram_bmm = jnp.einsum("bmn,bkn->bmk", x_bmn, x_bmn)
        poly_bmm = b * gram_bmm + c * jnp.einsum("bmk,bkj->bmj", gram_bmm, gram_bmm)
        x_bmn = a * x_bmn + jnp.einsum("bmk,bkn->bmn", poly_bmm, x_bmn)
    return x_bmn.swapaxes(1, 2) if tall else x_bmn


def scale_by_muon(
    beta: float = 0.95,
    num_iters: int = 5,
    rms: float = 0.2,
    split: Callable[[typing.Any, jax.Array], tuple[int, int]] | None = None,
) -> optax.GradientTransformation:
    """Gradients -> orthogonalised momentum with root mean square near `rms`.

    `split(path, leaf)` gives (stacked dims, dims of the rows); by default all but the
    last two, and one.
    """
    split = split or (lambda path, leaf: (leaf.ndim - 2, 1))

    def init(params):
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if leaf.ndim < 2:
                raise config.InputError(
                    f"{jax.tree_util.keystr(path)} of shape {leaf.shape} is labelled "
                    "'matrix'; Muon wants two dims or more: label it 'vector'"
                )
        return State(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params))

    def update(grads, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        steps = count.astype(jnp.float32)
        now, ahead = 1 - beta**steps, 1 - beta ** (steps + 1)
        momentum = jax.tree.map(
            lambda m, g: beta * m + (1 - beta) * g, state.momentum, grads
        )
        updates = jax.tree_util.tree_map_with_path(
            lambda path, m, g: _one(
                (beta / ahead) * m + ((1 - beta) / now) * g,
                num_iters,
                rms,
                split(path, m),
            ),
            momentum,
            grads,
        )
        return updates, State(count, momentum)

    return optax.GradientTransformation(init, update)


def _one(x: jax.Array, num_iters: int, rms: float, split: tuple[int, int]) -> jax.Array:
    """One leaf: deal whole matrices to devices, orthogonalise, lay out as before."""
    stacked, rows = split
    home = jax.typeof(x).sharding.spec if mesh.active() else None
    x = mesh.reshard(x, dealt(x.shape, stacked))
    sides = x.shape[stacked : stacked + rows], x.shape[stacked + rows :]
    m, n = map(math.prod, sides)
    # Only the first stacked dim is split between devices, so the others fold freely.
    x_bmn = orthogonalize(x.reshape(math.prod(x.shape[:stacked]), m, n), num_iters)
    whole = ((rms * math.sqrt(max(m, n))) * x_bmn).reshape(x.shape)
    return whole if home is None else mesh.reshard(whole, home)


def dealt(shape: tuple[int, ...], stacked: int | None = None) -> P:
    """Whole matrices, their first stacked dim dealt to as many devices as divide it.

    What no axis divides is computed by every device of that axis alike.
    """
    stacked = len(shape) - 2 if stacked is None else stacked
    if stacked < 1 or not mesh.active():
        return P(*(None,) * len(shape))
    axes, left = [], shape[0]
    for name, size in jax.sharding.get_abstract_mesh().shape.items():
        if size > 1 and left % size == 0:
            axes.append(name)
            left //= size
    return P(tuple(axes) or None, *(None,) * (len(shape) - 1))
