# SPDX-License-Identifier: Apache-2.0
"""What a training step holds in one device's memory, derived from shapes alone.

    state      weights, optimizer moments
    gradient   like the weights, in their dtype; twice when micro-batches are summed
    gathered   one layer's weights whole in the compute dtype, the next one's that are
               fetched meanwhile, and the gradient of one before it is scattered, in the
               dtype of that sum
    head       the output matrix whole, its gradient in float32, a chunk of logits
    kept       activations that wait for the backward pass, all layers (`remat` decides)
    working    activations of the one layer that is being differentiated

An estimate that chooses a micro-batch and finds what would fit; a dry run prints it
beside the compiler's number. Against TPU compilations of 8B and 32B it was within 15 %.

Units: bytes of one device. `sizes` maps mesh axes to device counts; nothing here needs
devices. Dims are counted as divided even where the mesh does not divide them.
Raises: nothing of its own.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax import mesh, params
from qwen_jax.models import decoder, streams
from qwen_jax.models import spec as spec_lib

CHUNK_BYTES = 3 * (32 << 20)  # logits, their exponentials and gradient in train/losses


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes of one device; see the module docstring."""

    weights: int
    optimizer: int
    gradient: int
    gathered: int
    head: int
    kept: int
    working: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    @property
    def fixed(self) -> int:
        """What does not grow with the micro-batch."""
        return self.total - self.kept - self.working


def estimate(
    spec: spec_lib.Spec,
    rules: mesh.Rules,
    sizes: Mapping[str, int],
    *,
    optimizer: str,
    remat: str,
    tokens: int,
    micro_steps: int,
) -> Estimate:
    """Bytes of one device while a micro-batch of `tokens` (its own) is differentiated.

    Args:
      spec: the model.
      rules: dims -> mesh axes.
      sizes: devices along each mesh axis.
      optimizer: "adamw" or "muon".
      remat: as in `models.decoder`.
      tokens: of one device's part of a micro-batch.
      micro_steps: micro-batches summed in a step.
    """
    tree = decoder.decoder_params(spec)
    weights = local_bytes(tree, rules, sizes, _item(spec.param_dtype))
    tables = {k: tree[k] for k in ("embed_vd", "head_vd") if k in tree}
    table = local_bytes(tables, rules, sizes, _item(spec.param_dtype))
    moments = 2 * weights if optimizer == "adamw" else weights + table
    size = _item(spec.compute_dtype)
    layer = _largest_layer(spec, tree["layers"], _without(rules, "embed"), sizes, size)
    wide = max(size, 4) if spec.reduce_dtype == "float32" else size
    head = params.Param((spec.vocab_size, spec.width), ("vocab", "embed"))
    whole = local_bytes({"head": head}, _without(rules, "embed"), sizes, 1)
    kept, working = activation_bytes_per_token(spec, rules, sizes, remat)
    return Estimate(
        weights=weights,
        optimizer=moments,
        gradient=weights * (2 if micro_steps > 1 else 1),
        gathered=2 * layer + layer * wide // size,
        head=whole * (size + 4) + CHUNK_BYTES,
        kept=kept * tokens,
        working=working * tokens,
    )


def activation_bytes_per_token(
    spec: spec_lib.Spec, rules: mesh.Rules, sizes: Mapping[str, int], remat: str
) -> tuple[int, int]:
    """(kept by all layers, working set of one) for one token of one device."""
    names = decoder.saved_names(remat)
    kept, working = 0, 0
    for kind in (*spec.kinds, *spec.mtp_kinds):
        mixer, mixing = _mixer(spec, kind.mixer, rules, sizes)
        fed, feeding = _feed_forward(spec, kind.sparse, rules, sizes)
        each, width = mixer | fed, residual_bytes(spec)
        if spec.streams is not None:
            low = spec.streams.rank * _item(spec.compute_dtype)
            each |= {"mix": 2 * low // ways(rules.ffn, sizes)}
        # Autodiff left alone keeps the inputs of products and of attention, too.
        layer = (
            sum(each.values()) + each.get("q", 0) + each.get("k", 0) + 3 * width
            if names is None
            else sum(each.get(name, 0) for name in names)
        )
        kept += layer + width
        working = max(working, mixing + feeding)
    return kept, working


def residual_bytes(spec: spec_lib.Spec) -> int:
    """Of one token, in all streams."""
    count = spec.streams.count if spec.streams is not None else 1
    return count * spec.width * _item(spec.compute_dtype)


def _mixer(
    spec: spec_lib.Spec, mixer: str, rules: mesh.Rules, sizes: Mapping[str, int]
) -> tuple[dict[str, int], int]:
    """({activation that can be kept: bytes}, working set) of one token.

    The working set of the backward pass: queries, keys and values, their gradients
    (float32 inside attention), the residual stream in float32 around the norms.
    """
    size = _item(spec.compute_dtype)
    heads, kv_heads = ways(rules.heads, sizes), ways(rules.kv_heads, sizes)
    wide, width = (4 // size if size < 4 else 1), residual_bytes(spec)
    if mixer == "delta":
        delta = spec.delta
        keys = delta.key_heads * delta.key_width * size // kv_heads
        values = delta.value_heads * delta.value_width * size // heads
        scalar = delta.value_heads * size // heads
        each = {"q": keys, "k": keys, "v": values, "z": values}
        # Keys and queries of the rule are repeated to value heads, all in float32.
        repeated = delta.value_heads * delta.key_width * 4 // heads
        inner = 4 * (2 * repeated + 2 * values * wide)
        return each | {"b": scalar, "a": scalar}, inner + (4 + 2 * wide) * width
    q = spec.num_heads * spec.head_width * size // heads
    kv = spec.num_kv_heads * spec.head_width * size // kv_heads
    each = {
        "q": q,
        "k": kv,
        "v": kv,
        "attention": q,
        "attention_lse": 4 * spec.num_heads // heads,
    }
    gate = q if spec.output_gate else 0
    inner = (4 + wide) * (q + 2 * kv) + 2 * q + 2 * gate + (4 + 2 * wide) * width
    return each | {"gate": gate}, inner


def _feed_forward(
    spec: spec_lib.Spec, sparse: bool, rules: mesh.Rules, sizes: Mapping[str, int]
) -> tuple[dict[str, int], int]:
    """As `_mixer`: gate, up, their product and the gradients of these."""
    size = _item(spec.compute_dtype)
    split = ways(rules.ffn, sizes)
    if not sparse:
        ffn = spec.ffn_width * size // split
        return {"mlp_gate": ffn, "mlp_up": ffn}, 6 * ffn
    moe, width = spec.moe, spec.width * size
    shared = moe.shared_width * size // split
    picked = moe.experts_per_token * (6 * moe.ffn_width * size // split + 3 * width)
    around = ways(rules.experts, sizes)
    if moe.exchange == "gather":
        # Every device has the rows of its whole group, those of others' experts, too.
        picked = around * picked + (2 * width * around if around > 1 else 0)
    elif around > 1:
        picked = int(moe.capacity_factor * picked)
    picked //= moe.pieces
    each = {"mlp_gate": shared, "mlp_up": shared, "experts": width}
    return each, 6 * shared + picked + 4 * moe.num_experts * 4


def _largest_layer(
    spec: spec_lib.Spec,
    layers: dict[str, Any],
    rules: mesh.Rules,
    sizes: Mapping[str, int],
    itemsize: int,
) -> int:
    """Bytes of one layer's weights, of the kind of layer that has most; without tables
    of n-grams, which stay where they lie."""
    used = {
        stack: {k: x for k, x in layers[stack].items() if k != "table_lvk"}
        for stack in spec_lib.STACKS
        if stack in layers
    }
    each = {
        stack: local_bytes(tree, rules, sizes, itemsize) // len(spec.layers_with(stack))
        for stack, tree in used.items()
    }
    around = 0
    if spec.streams is not None:
        around = sum(
            local_bytes(layers[name], rules, sizes, itemsize) // spec.num_layers
            for name in streams.names(spec)
        )
    largest = max(sum(each[stack] for stack in spec_lib.stacks(k)) for k in spec.kinds)
    return largest + around


def local_bytes(
    tree: Any, rules: mesh.Rules, sizes: Mapping[str, int], itemsize: int
) -> int:
    """Bytes of one device's part of a tree of `Param`."""

    def one(p: params.Param) -> int:
        split = [ways(axes, sizes) for axes in rules.pspec(*p.dims)]
        parts = [-(-n // w) for n, w in zip(p.shape, split, strict=True)]
        return math.prod(parts) * itemsize

    return sum(jax.tree.leaves(params.tree_map(one, tree)))


def _without(rules: mesh.Rules, dim: str) -> mesh.Rules:
    return dataclasses.replace(rules, **{dim: None})


def ways(axes: mesh.Axes, sizes: Mapping[str, int]) -> int:
    names = (axes,) if isinstance(axes, str) else (axes or ())
    return math.prod(sizes[name] for name in names)


def _item(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize
