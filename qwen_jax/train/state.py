# SPDX-License-Identifier: Apache-2.0
"""What a step changes: the step number, the weights, the optimizer, the skip count.

Shapes: `params` and `opt` are trees laid out over the mesh, `step` and `skipped` int32
scalars. Weights are float32 (`param_dtype`); compute casts them.
Invariants: a State and the data position are all a resumed run needs; random keys are
derived from the step (`rng.key_for`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from qwen_jax import mesh, params, rng
from qwen_jax.models import decoder
from qwen_jax.models import spec as spec_lib


@struct.dataclass
class State:
    """All that a training step reads and replaces."""

    step: jax.Array
    params: Any
    opt: Any
    skipped: jax.Array


def create(
    spec: spec_lib.Spec,
    tx: optax.GradientTransformation,
    device_mesh: Mesh,
    rules: mesh.Rules,
    seed: int,
    weights: Any | None = None,
) -> State:
    """A fresh state on the mesh: random or given weights, empty optimizer."""
    tree = decoder.decoder_params(spec)
    layout = params.shardings(tree, device_mesh, rules)
    with jax.set_mesh(device_mesh):
        if weights is None:
            key = rng.key_for(seed, "params")
            weights = params.init(tree, key, spec.param_dtype, layout)
        return _rest(tx, weights)


def abstract(
    spec: spec_lib.Spec,
    tx: optax.GradientTransformation,
    device_mesh: Mesh,
    rules: mesh.Rules,
) -> State:
    """The state's shapes, dtypes and shardings; nothing is allocated."""
    tree = decoder.decoder_params(spec)
    layout = params.shardings(tree, device_mesh, rules)
    weights = params.abstract(tree, spec.param_dtype, layout)
    with jax.set_mesh(device_mesh):
        shapes = jax.eval_shape(lambda w: _new(tx, w), weights)

    def placed(x):
        spec = jax.P() if x.sharding is None else x.sharding.spec  # scalars have none
        layout = mesh.sharding(device_mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)

    return jax.tree.map(placed, shapes)


def _new(tx, weights):
    zero = jnp.zeros((), jnp.int32)
    return State(step=zero, params=weights, opt=tx.init(weights), skipped=zero)


def _rest(tx, weights):
    # The weights pass through untouched: donated, not copied.
    return jax.jit(lambda w: _new(tx, w), donate_argnums=0)(weights)
