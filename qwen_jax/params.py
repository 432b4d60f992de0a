# SPDX-License-Identifier: Apache-2.0
"""A weight is declared once; everything else is a view of the tree of `Param`.

A `Param` is a weight before it has bytes: shape, the name of each dim, initializer.
From a tree of them come the arrays (`init`), shapes for tracing (`abstract`), layouts
(`shardings`), counts and bytes.

Shapes: any; `dims` names one word of `dims.ALL` or None for each dim.
Invariants: `init` gives the same bits on every mesh and process count: each leaf has
its own key, folded from the leaf's path, and threefry is counter-based.
Raises: ValueError when dims and shape differ in rank.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qwen_jax import config, dims, mesh


def normal(stddev: float) -> Callable:
    """N(0, stddev^2)."""
    return jax.nn.initializers.normal(stddev)


ones = jax.nn.initializers.ones
zeros = jax.nn.initializers.zeros


@dataclasses.dataclass(frozen=True)
class Param:
    """One weight before it has bytes."""

    shape: tuple[int, ...]
    dims: tuple[str | None, ...]
    init: Callable = normal(0.02)

    def __post_init__(self):
        if len(self.shape) != len(self.dims):
            raise ValueError(f"shape {self.shape} and dims {self.dims} differ in rank")
        unknown = [d for d in self.dims if d is not None and d not in dims.ALL]
        if unknown:
            raise ValueError(f"unknown dims {unknown}; dims.ALL lists them")


def is_param(x: Any) -> bool:
    """Whether `x` is a `Param` (the leaf of a declaration tree)."""
    return isinstance(x, Param)


def tree_map(fn: Callable, tree: Any) -> Any:
    """jax.tree.map over the `Param` leaves."""
    return jax.tree.map(fn, tree, is_leaf=is_param)


def count(tree: Any) -> int:
    """Number of weights in a tree of `Param` or arrays."""
    return sum(math.prod(p.shape) for p in jax.tree.leaves(tree, is_leaf=is_param))


def shardings(tree: Any, device_mesh: Mesh, rules: mesh.Rules) -> Any:
    """NamedSharding of every weight.

    Raises:
      config.InputError: a dim that its mesh axes do not divide.
    """

    def one(path, p: Param):
        spec = rules.pspec(*p.dims)
        for size, dim, axes in zip(p.shape, p.dims, spec, strict=True):
            names = (axes,) if isinstance(axes, str) else (axes or ())
            ways = math.prod(device_mesh.shape[name] for name in names)
            if size % ways:
                raise config.InputError(
                    f"{jax.tree_util.keystr(path)}: dim {dim!r} of {size} is not "
                    f"divisible by mesh axis {'*'.join(names)} of {ways}; choose "
                    f"--config.mesh.{names[0]} that divides {size}"
                )
        return mesh.sharding(device_mesh, spec)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_param)


def abstract(tree: Any, dtype: Any, layout: Any | None = None) -> Any:
    """ShapeDtypeStruct of every weight, with shardings when a layout is given."""
    if layout is None:
        return tree_map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), tree)
    return jax.tree.map(
        lambda p, s: jax.ShapeDtypeStruct(p.shape, dtype, sharding=s),
        tree,
        layout,
        is_leaf=is_param,
    )


def init(tree: Any, key: jax.Array, dtype: Any, layout: Any | None = None) -> Any:
    """Every weight drawn in place, already laid out as `layout` says.

    Args:
      tree: declaration tree.
      key: typed key; each leaf's key is this one folded with a hash of the leaf's path,
        so adding a weight does not change the others.
      dtype: of the weights.
      layout: tree of shardings, or None for the default device.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_param)

    @functools.partial(jax.jit, out_shardings=layout)
    def make(key):
        leaves = []
        for path, p in flat:
            name = jax.tree_util.keystr(path).encode()
            digest = hashlib.blake2b(name, digest_size=4).digest()
            leaf_key = jax.random.fold_in(key, int.from_bytes(digest, "little"))
            leaves.append(p.init(leaf_key, p.shape, jnp.float32).astype(dtype))
        return treedef.unflatten(leaves)

    return make(key)
