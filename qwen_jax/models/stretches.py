# SPDX-License-Identifier: Apache-2.0
"""Layers stored in stacks -> loops over repeating patterns, and back.

`layers` of a model has a stack for each thing that layers are made of (see `decoder`);
every leaf has those layers in front that have the thing, in order. A `Stretch` is a
pattern of kinds that repeats: one for uniform models, one for hybrid ones, two where
the first layers differ. `repeats_of` gives its part of every stack as a loop takes it.

Shapes: a stack's leaf [layers, ...] -> [repeats, layers of the pattern, ...].
Invariant: the stretches of a model cover its layers once, in order.
Raises: nothing.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax import mesh
from qwen_jax.models import spec as spec_lib
from qwen_jax.models import streams

DEEP = "deep_lbtd"


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def layers_of(stacked, count):
    """Stacked leaves -> list of layers. The backward pass stacks the cotangents once;
    autodiff of slices would add `count` full-size arrays."""
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count)]


layers_of.defvjp(
    lambda stacked, count: (layers_of(stacked, count), None),
    lambda count, _, parts: (jax.tree.map(lambda *xs: jnp.stack(xs), *parts),),
)


def owners(spec: spec_lib.Spec, deep: int = 0) -> dict[str, tuple[int, ...]]:
    """The layers whose weights each stack holds, in its order."""
    every = tuple(range(spec.num_layers))
    named = {k: spec.layers_with(k) for k in spec_lib.STACKS}
    named[DEEP] = every[:deep]
    return dict.fromkeys(streams.names(spec), every) | {
        k: layers for k, layers in named.items() if layers
    }


def with_deep(layers: Any, deep_lbtd: jax.Array | None) -> Any:
    """`layers` with what DeepStack adds behind the first ones among their weights."""
    if deep_lbtd is None:
        return layers
    if not isinstance(layers, list):
        return layers | {DEEP: deep_lbtd}
    count = len(deep_lbtd)
    first = [p | {DEEP: x} for p, x in zip(layers[:count], deep_lbtd, strict=True)]
    return first + layers[count:]


def kinds(spec: spec_lib.Spec, deep: int) -> tuple[spec_lib.Kind, ...]:
    """`spec.kinds`, the first ones marked as those that DeepStack adds to."""
    return tuple(
        dataclasses.replace(kind, deep=i < deep) for i, kind in enumerate(spec.kinds)
    )


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Layers start .. start + len(kinds) * repeats: the pattern `kinds`, repeated."""

    start: int
    kinds: tuple[spec_lib.Kind, ...]
    repeats: int

    @property
    def stop(self) -> int:
        return self.start + len(self.kinds) * self.repeats


def stretches(kinds: tuple[spec_lib.Kind, ...]) -> list[Stretch]:
    """The layers as few repeated patterns: one for uniform and for hybrid models."""
    out, start = [], 0
    while start < len(kinds):
        left = len(kinds) - start
        best = Stretch(start, kinds[start : start + 1], 1)
        for period in range(1, left // 2 + 1):
            pattern = kinds[start : start + period]
            repeats = 1
            while kinds[start + repeats * period :][:period] == pattern:
                repeats += 1
            found = Stretch(start, pattern, repeats)
            if repeats > 1 and found.stop > best.stop:
                best = found
        out.append(best)
        start = best.stop
    return out


def repeats_of(layers: dict[str, Any], stretch: Stretch, owners) -> dict[str, Any]:
    """The stretch's part of every stack, [repeats, layers of the pattern, ...]."""
    parts = {}
    for stack, held in owners.items():
        mine = [i for i in held if stretch.start <= i < stretch.stop]
        if not mine:
            continue
        first, count = held.index(mine[0]), len(mine)

        def cut(x, first=first, count=count):
            if count != x.shape[0]:
                x = x[first : first + count]
            return mesh.split_first(x, stretch.repeats, count // stretch.repeats)

        parts[stack] = jax.tree.map(cut, layers[stack])
    return parts


def layers_in(part: dict[str, Any], stretch: Stretch) -> list[dict[str, Any]]:
    """One repeat's weights -> those of each layer of the pattern."""
    used = dict.fromkeys(part, 0)
    every = [name for name in part if name not in (*spec_lib.STACKS, DEEP)]
    out = []
    for kind in stretch.kinds:
        mine = {}
        deep = (DEEP,) if kind.deep else ()
        for stack in (*every, *spec_lib.stacks(kind), *deep):
            i = used[stack]
            mine[stack] = jax.tree.map(lambda x, i=i: x[i], part[stack])
            used[stack] += 1
        out.append(mine)
    return out


def stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees) if trees else None
