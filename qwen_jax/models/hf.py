# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders in and out: safetensors <-> parameters.

One table (`names.py`) maps each weight both ways, `hf_config.py` does so with
config.json; what `save` writes, transformers loads.

Formats: `model.safetensors`, or shards with `model.safetensors.index.json`.
Invariants: every tensor of the files is used once or is listed as one to ignore; every
weight of the model is filled. Reading takes no more host memory than `streaming.py`
says, writing a tensor at a time.
Raises: config.InputError for a folder without weights, a missing, surplus or misshapen
tensor; no code from the folder is run.
"""

import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from qwen_jax import config, mesh, params
from qwen_jax.models import (
    decoder,
    hf_config,
    json_files,
    names,
    streaming,
    tensor_files,
    tensor_writer,
)
from qwen_jax.models import spec as spec_lib

# Buffers that some checkpoints carry and no model needs.
IGNORED = ("rotary_emb.inv_freq",)
# Parts of published models that the text model does without; counted, never silent.
OTHER_PARTS = ("mtp.", "model.visual.", "visual.")


class _Tensors:
    """The tensors of a folder's safetensors files, by name, read on demand."""

    def __init__(self, folder: pathlib.Path):
        self.entries = {}
        for entry in tensor_files.entries(folder):
            # The text part of a vision-language model has a prefix of its own.
            name = entry.name.replace("model.language_model.", "model.", 1)
            if name in self.entries:
                raise config.InputError(
                    f"{folder} has tensor {name!r} twice, once as {entry.name!r}"
                )
            self.entries[name] = entry
        self.names = set(self.entries)

    def entry(self, name: str) -> tensor_files.Entry:
        """Where a tensor lies and what it is, from its file's header."""
        if name not in self.entries:
            short = [x for x in itertools.islice(self.entries, 500) if len(x) < 200]
            near = config.nearest(name, short)
            raise config.InputError(
                f"the model files have no tensor {name!r}"
                f"{near if 'did you mean' in near else ''}; the folder is of another "
                "model than its config.json, or not whole"
            )
        return self.entries[name]


def check(folder: str | pathlib.Path, spec: spec_lib.Spec) -> _Tensors:
    """Compare names and shapes of a folder's tensors with a Spec; read no weights.

    Raises:
      config.InputError: unreadable files, a missing, surplus or misshapen tensor.
    """
    folder = pathlib.Path(folder)
    tensors = _Tensors(folder)
    used = {"lm_head.weight"} if spec.tie_embedding else set()
    table = _table(tensors, spec)
    flat, _ = jax.tree_util.tree_flatten_with_path(
        decoder.decoder_params(spec), is_leaf=params.is_param
    )
    for path, _ in flat:
        key = _key(path)
        wanted = names.shape(table[key], spec)
        for full, _ in names.places(table[key], key, spec):
            entry = tensors.entry(full)
            entry.numpy_dtype()  # refuses what is quantized
            found = entry.shape
            if found != wanted:
                raise config.InputError(
                    f"tensor {full!r} of {folder} has shape {found}, its config.json "
                    f"wants {wanted}: the two are of different models"
                )
            used.add(full)
    left = [n for n in tensors.names - used if not n.endswith(IGNORED)]
    parts = [n for n in left if n.startswith(OTHER_PARTS)]
    if parts:
        kinds = [p for p in OTHER_PARTS if any(n.startswith(p) for n in parts)]
        print(
            f"note: {folder}: {len(parts)} tensors of other parts than the text model "
            f"are left out: {', '.join(kinds)}",
            file=sys.stderr,
        )
    left = [n for n in left if not n.startswith(OTHER_PARTS)]
    if left:
        some = ", ".join(json_files.shown(name) for name in sorted(left)[:5])
        raise config.InputError(
            f"{folder}: {len(left)} tensors belong to no weight of a {spec.family} "
            f"model: {some}; check model_type and tie_word_embeddings in its "
            "config.json"
        )
    return tensors


def _table(tensors: _Tensors, spec: spec_lib.Spec) -> dict[str, names.Tensor]:
    """The name map for the layout of experts that the files have."""
    fused = any(name.endswith("experts.gate_up_proj") for name in tensors.names)
    return names.table(spec, fused=fused)


def load(
    folder: str | pathlib.Path,
    *,
    dtype: str | None = None,
    device_mesh: jax.sharding.Mesh | None = None,
    rules: mesh.Rules | None = None,
    **changes: Any,
) -> tuple[spec_lib.Spec, dict[str, Any]]:
    """Spec and parameters of a Hugging Face folder.

    Args:
      folder: with config.json and safetensors.
      dtype: of parameters and compute; None keeps what config.json says.
      device_mesh: lay the parameters out on it, by `rules`.
      rules: dims -> mesh axes.
      **changes: fields of the Spec to replace.
    Raises:
      config.InputError: see the module docstring.
    """
    folder = pathlib.Path(folder)
    raw = hf_config.read_config(folder)
    dtype = dtype or raw.get("dtype") or raw.get("torch_dtype") or "float32"
    changes = {"param_dtype": dtype, "compute_dtype": dtype} | changes
    spec = hf_config.spec_from_config(raw, **changes)
    tensors = check(folder, spec)
    table = _table(tensors, spec)
    tree = decoder.decoder_params(spec)
    layout = None
    if device_mesh is not None:
        layout = params.shardings(tree, device_mesh, rules or mesh.Rules())
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=params.is_param)
    places = jax.tree.leaves(layout) if layout is not None else [None] * len(flat)
    stacks, jobs = [], []
    for (path, p), place in zip(flat, places, strict=True):
        key = _key(path)
        stacks.append(streaming.Stack(p.shape, spec.param_dtype, place))
        jobs += [
            streaming.Job(tensors.entry(full), table[key], key, spec, stacks[-1], at)
            for full, at in names.places(table[key], key, spec)
        ]
    streaming.fill(jobs)
    return spec, treedef.unflatten([stack.array() for stack in stacks])


class Lazy:
    """A weight that stays in its files: `weight[place]` reads that one tensor of it."""

    def __init__(self, p: params.Param, dtype: str, jobs: dict[tuple, streaming.Job]):
        self.shape, self.dtype, self._jobs = p.shape, jnp.dtype(dtype), jobs

    def __getitem__(self, place: tuple[int, ...]) -> jax.Array:
        shape = self.shape[len(place) :]
        stack = streaming.Stack(shape, self.dtype, None)
        job = dataclasses.replace(self._jobs[place], stack=stack, place=())
        streaming.fill([job])
        return stack.array()


def lazily(folder: str | pathlib.Path) -> tuple[spec_lib.Spec, dict[str, Any]]:
    """Spec and parameters of a folder as `load` gives them, each a `Lazy`, for `save`.

    Raises:
      config.InputError: see the module docstring.
    """
    folder = pathlib.Path(folder)
    raw = hf_config.read_config(folder)
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    spec = hf_config.spec_from_config(raw, param_dtype=dtype, compute_dtype=dtype)
    tensors = check(folder, spec)
    table = _table(tensors, spec)

    def one(path: Any, p: params.Param) -> Lazy:
        key = _key(path)
        jobs = {
            at: streaming.Job(tensors.entry(full), table[key], key, spec)
            for full, at in names.places(table[key], key, spec)
        }
        return Lazy(p, dtype, jobs)

    tree = decoder.decoder_params(spec)
    return spec, jax.tree_util.tree_map_with_path(one, tree, is_leaf=params.is_param)


def _key(path: Any) -> str:
    return ".".join(str(part.key) for part in path)


def save(
    spec: spec_lib.Spec,
    weights: dict[str, Any],
    folder: str | pathlib.Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = 5_000_000_000,
    say: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write config.json and safetensors that transformers loads.

    Args:
      spec: the model.
      weights: stacked parameters, on any mesh; every process calls, the first writes.
      folder: made if missing; files of the same names are replaced, all at the end.
      dtype: of the tensors; None keeps the parameters' own.
      shard_bytes: largest file; above it the weights go to several with an index.
      say: told the bytes written and their sum as they grow.
    Raises:
      config.InputError: config.json cannot tell what the Spec computes.
      OSError: from the disk; the folder is then as it was.
    """
    hf_config.check_spec(spec)
    fused = hf_config.FAMILIES[spec.family].fused
    named = named_tensors(spec, weights, fused=fused, dtype=dtype)
    if jax.process_index() != 0:
        for _ in named:  # takes part in the gathers
            continue
        return
    leaves = _leaves(weights)
    planned = [
        tensor_writer.Planned(
            full,
            names.shape(tensor, spec),
            dtype or jnp.dtype(leaves[tensor.parts[0][0]].dtype).name,
        )
        for tensor, full, _ in _order(leaves, spec, fused)
    ]
    raw = hf_config.config_of(spec) | {"torch_dtype": dtype or spec.param_dtype}
    try:
        tensor_writer.publish(
            pathlib.Path(folder), planned, named, raw, shard_bytes=shard_bytes, say=say
        )
    except OSError:
        if jax.process_count() > 1:
            for _ in named:  # the others wait in the gathers
                continue
        raise


def _leaves(weights: Any) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(weights)
    return {_key(path): leaf for path, leaf in flat}


def _order(
    leaves: dict[str, Any], spec: spec_lib.Spec, fused: bool
) -> list[tuple[names.Tensor, str, tuple]]:
    """[(tensor, name there, place in ours)] in the order of a folder's files."""
    table = names.table(spec, fused=fused)
    tensors = dict.fromkeys(table[key] for key in leaves)  # some hold several weights
    return [
        (tensor, full, place)
        for tensor in tensors
        for full, place in names.places(tensor, tensor.parts[0][0], spec)
    ]


def named_tensors(
    spec: spec_lib.Spec, weights: Any, *, fused: bool, dtype: str | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """(name there, tensor) one at a time; `fused`: all experts in one tensor."""
    leaves = _leaves(weights)
    for tensor, full, place in _order(leaves, spec, fused):
        parts = [
            _back(_to_host(leaves[part][place]), pattern, names.sizes(spec, part))
            for part, pattern in tensor.parts
        ]
        host = parts[0] if len(parts) == 1 else np.concatenate(parts, tensor.dim)
        if tensor.view:
            host = rearrange(host, " -> ".join(reversed(tensor.view.split(" -> "))))
        if dtype:
            host = host.astype(jnp.dtype(dtype))
        yield full, np.ascontiguousarray(host)


def _back(part: np.ndarray, pattern: str, known: dict[str, int]) -> np.ndarray:
    """A weight of ours (of one layer) in the form that it has there."""
    pattern = " -> ".join(reversed(pattern.split(" -> ")))
    return rearrange(part, pattern, **names.axes(pattern, known))


def _to_host(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)
