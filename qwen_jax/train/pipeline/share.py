# SPDX-License-Identifier: Apache-2.0
"""The layers of a model -> the stretches of a pipeline's stages, and back.

Stretch s is layers s * n to (s + 1) * n, and belongs to device s % stages: it is part
s // stages of what the device has. All stretches have to be alike, since one program
runs them.

Shapes: a stack's leaf [layers, ...] <-> [parts, stages, layers of a stretch, ...].
With one part a device that is how `rules.layers` = "stage" lays it already; with more,
layers are gathered before they are dealt out.
Raises: config.InputError for stretches that would differ.
"""

import dataclasses
from typing import Any

import jax

from qwen_jax import config, mesh, params
from qwen_jax.models import decoder
from qwen_jax.models import spec as spec_lib


def share_of(spec: spec_lib.Spec, stages: int, parts: int) -> spec_lib.Spec:
    """The model whose layers are those of one stretch.

    Raises:
      config.InputError: stretches would differ in their number of layers or in kinds.
    """
    if parts < 1:
        raise config.InputError(f"parts={parts}: wanted at least 1")
    ways, layers = stages * parts, spec.num_layers
    if layers % ways:
        raise config.InputError(
            f"{layers} layers on {stages} stages x {parts} parts: wanted a multiple of "
            f"{ways}; choose stages x parts that divides {layers}"
        )
    if spec.ngram is not None:
        raise config.InputError(
            "this model has layers of n-grams, whose ids no stage hands on; train it "
            "without a pipeline (mesh.stage=1)"
        )
    each = layers // ways
    share = dataclasses.replace(
        spec,
        num_layers=each,
        full_layers=min(spec.full_layers, each),
        dense_layers=tuple(i for i in spec.dense_layers if i < each),
        vision=None,
    )
    for s in range(ways):
        here = spec.kinds[s * each : (s + 1) * each]
        if here != share.kinds:
            at = s * each + next(
                i
                for i, (a, b) in enumerate(zip(here, share.kinds, strict=True))
                if a != b
            )
            raise config.InputError(
                f"{layers} layers on {stages} stages x {parts} parts: layer {at} is "
                f"{_said(spec.kinds[at])}, and layer {at % each}, which has its place "
                f"in the first stretch, {_said(spec.kinds[at % each])}; choose stages "
                "x parts so that each stretch is whole repeats of the model's pattern"
            )
    return share


def _said(kind: spec_lib.Kind) -> str:
    words = [kind.mixer, "experts" if kind.sparse else "mlp"]
    return "/".join(words + ([f"window {kind.window}"] if kind.window else []))


def laid(spec: spec_lib.Spec, tree: Any, rules: mesh.Rules) -> Any:
    """The weights as rules lay them, but for the dim of layers, which stays as it is:
    gradients of blocks (`mesh.local`) lie so."""

    def one(p, w):
        if p.dims[0] != "layers":
            return mesh.reshard(w, rules.pspec(*p.dims))
        first = jax.typeof(w).sharding.spec[0]
        return mesh.reshard(w, jax.P(first, *rules.pspec(None, *p.dims[1:])[1:]))

    declared = decoder.decoder_params(spec)
    declared = {name: declared[name] for name in tree}
    return jax.tree.map(one, declared, tree, is_leaf=params.is_param)


def cut(layers: Any, stages: int, parts: int) -> Any:
    """Stacks [layers, ...] -> [parts, stages, layers of a stretch, ...]: stretch
    part * stages + stage. Stages by `stage`."""

    def one(w):
        shape = (parts, stages, w.shape[0] // (stages * parts), *w.shape[1:])
        rest = jax.typeof(w).sharding.spec[1:]
        if parts == 1:
            w = mesh.reshard(w, jax.P("stage", *rest))
            lies = jax.P(None, "stage", None, *rest)
            return jax.lax.reshape(w, shape, out_sharding=lies)
        w = mesh.split_first(mesh.reshard(w, jax.P(None, *rest)), *shape[:3])
        return mesh.reshard(w, jax.P(None, "stage", None, *rest))

    return jax.tree.map(one, layers)


def joined(layers: Any) -> Any:
    """What `cut` made, in the order of the model: by `stage`, or whole."""

    def one(x):
        rest = jax.typeof(x).sharding.spec[3:]
        if x.shape[0] == 1:
            shape = (x.shape[1] * x.shape[2], *x.shape[3:])
            return jax.lax.reshape(x, shape, out_sharding=jax.P("stage", *rest))
        x = mesh.reshard(x, jax.P(None, None, None, *rest))
        return mesh.join_first(mesh.join_first(x))

    return jax.tree.map(one, layers)
