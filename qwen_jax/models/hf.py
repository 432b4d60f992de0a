# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders in and out: safetensors <-> parameters.

One table (`names.py`) maps each weight both ways, `hf_config.py` does so with
config.json; what `save` writes, transformers loads.

Formats: `model.safetensors`, or shards with `model.safetensors.index.json`.
Invariants: every tensor of the files is used once or is listed as one to ignore; every
weight of the model is filled. One stacked weight is built at a time.
Raises: config.InputError for a folder without weights, a missing, surplus or misshapen
tensor; no code from the folder is run.
"""

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from einops import rearrange

from qwen_jax import config, mesh, params
from qwen_jax.models import decoder, hf_config, hf_vision, names, names_vision
from qwen_jax.models import spec as spec_lib

# Buffers that some checkpoints carry and no model needs.
IGNORED = ("rotary_emb.inv_freq",)
# Parts of published models that are left out; counted, never silent.
OTHER_PARTS = ("mtp.", "model.visual.")
PARTS = ("all", "text")


class _Tensors:
    """The tensors of a folder's safetensors files, by name, read on demand."""

    def __init__(self, folder: pathlib.Path):
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise config.InputError(
                f"{folder} has no *.safetensors files (weights in pickle form are not "
                "read; convert them with the library that wrote them)"
            )
        self._where = {}
        self._open = {}
        for path in paths:
            try:
                handle = safetensors.safe_open(path, framework="numpy")
            except (safetensors.SafetensorError, OSError) as error:
                raise config.InputError(
                    f"{path} cannot be read as safetensors: {error}; it may be cut off "
                    "or a stand-in of a version control system: copy it anew"
                ) from error
            self._open[path] = handle
            for there in handle.keys():
                name = names_vision.known(there)
                if name in self._where:
                    raise config.InputError(
                        f"tensor {name!r} is in {self._where[name][0].name} and in "
                        f"{path.name}"
                    )
                self._where[name] = path, there
        self.names = set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, from the file's header."""
        if name not in self._where:
            raise config.InputError(
                f"the model files have no tensor {name!r}"
                f"{config.nearest(name, list(self._where)[:500])}; the folder is of "
                "another model than its config.json, or not whole"
            )
        path, there = self._where[name]
        return tuple(self._open[path].get_slice(there).get_shape())

    def get(self, name: str) -> np.ndarray:
        """The tensor."""
        path, there = self._where[name]
        return self._open[path].get_tensor(there)


def check(folder: str | pathlib.Path, spec: spec_lib.Spec) -> _Tensors:
    """Compare names and shapes of a folder's tensors with a Spec; read no weights.

    Raises:
      config.InputError: unreadable files, a missing, surplus or misshapen tensor.
    """
    folder = pathlib.Path(folder)
    tensors = _Tensors(folder)
    used = {"lm_head.weight"} if spec.tie_embedding else set()
    others = OTHER_PARTS if spec.vision is None else ("mtp.",)
    table = _table(tensors, spec)
    flat, _ = jax.tree_util.tree_flatten_with_path(
        decoder.decoder_params(spec), is_leaf=params.is_param
    )
    for path, _ in flat:
        key = _key(path)
        wanted = names.shape(table[key], spec)
        for full, _ in names.places(table[key], key, spec):
            found = tensors.shape(full)
            if found != wanted:
                raise config.InputError(
                    f"tensor {full!r} of {folder} has shape {found}, its config.json "
                    f"wants {wanted}: the two are of different models"
                )
            used.add(full)
    left = [n for n in tensors.names - used if not n.endswith(IGNORED)]
    parts = [n for n in left if n.startswith(others)]
    if parts:
        kinds = [p for p in others if any(n.startswith(p) for n in parts)]
        print(
            f"note: {folder}: {len(parts)} tensors of other parts than the "
            f"{'text ' if spec.vision is None else ''}model are left out: "
            f"{', '.join(kinds)}",
            file=sys.stderr,
        )
    left = [n for n in left if not n.startswith(others)]
    if left:
        raise config.InputError(
            f"{folder}: {len(left)} tensors belong to no weight of a "
            f"{spec.family} model: {', '.join(sorted(left)[:5])}; check model_type and "
            "tie_word_embeddings in its config.json"
        )
    return tensors


def _table(tensors: _Tensors, spec: spec_lib.Spec) -> dict[str, names.Tensor]:
    """The name map for the layout of experts that the files have."""
    fused = any(name.endswith("experts.gate_up_proj") for name in tensors.names)
    turned = fused and hf_vision.turned(spec, tensors.names, tensors.shape)
    return names.table(spec, fused=fused, turned=turned)


def load(
    folder: str | pathlib.Path,
    *,
    dtype: str | None = None,
    parts: str = "all",
    device_mesh: jax.sharding.Mesh | None = None,
    rules: mesh.Rules | None = None,
    **changes: Any,
) -> tuple[spec_lib.Spec, dict[str, Any]]:
    """Spec and parameters of a Hugging Face folder.

    Args:
      folder: with config.json and safetensors.
      dtype: of parameters and compute; None keeps what config.json says.
      parts: "all", or "text" for a vision-language model without its vision, which is
        then a model of the text family it was made from.
      device_mesh: lay the parameters out on it, by `rules`.
      rules: dims -> mesh axes.
      **changes: fields of the Spec to replace.
    Raises:
      config.InputError: see the module docstring.
    """
    folder = pathlib.Path(folder)
    raw = hf_config.read_config(folder)
    if parts not in PARTS:
        raise config.InputError(f"parts={parts!r}{config.nearest(parts, PARTS)}")
    text = raw.get("text_config") or {}
    dtype = dtype or next(
        (c[k] for c in (raw, text) for k in ("dtype", "torch_dtype") if c.get(k)),
        "float32",
    )
    changes = {"param_dtype": dtype, "compute_dtype": dtype} | changes
    if parts == "text":
        raw = hf_vision.text_only(raw)
    spec = hf_config.spec_from_config(raw, **changes)
    tensors = check(folder, spec)
    table = _table(tensors, spec)
    tree = decoder.decoder_params(spec)
    layout = None
    if device_mesh is not None:
        layout = params.shardings(tree, device_mesh, rules or mesh.Rules())
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=params.is_param)
    places = jax.tree.leaves(layout) if layout is not None else [None] * len(flat)
    leaves = []
    for (path, p), place in zip(flat, places, strict=True):
        host = _read(tensors, table, _key(path), p, spec)
        if place is None:
            leaves.append(jax.device_put(host))
            continue
        # device_put would compare whole arrays between processes, in device memory.
        leaves.append(jax.make_array_from_callback(host.shape, place, host.__getitem__))
    return spec, treedef.unflatten(leaves)


def _key(path: Any) -> str:
    return ".".join(str(part.key) for part in path)


def _read(
    tensors: _Tensors,
    table: dict[str, names.Tensor],
    key: str,
    p: params.Param,
    spec: spec_lib.Spec,
) -> Any:
    """One weight of ours from its tensors, stacked where ours is."""
    tensor = table[key]
    pattern = dict(tensor.parts)[key]
    known = names.axes(pattern, names.sizes(spec, key))
    cut = names.cuts(tensor, spec)[key]
    out = np.empty(p.shape, jnp.dtype(spec.param_dtype))
    for full, place in names.places(tensor, key, spec):
        there = _brought_out(tensors.get(full), tensor, spec)
        there = there[(slice(None),) * tensor.dim + (cut,)]
        out[place] = rearrange(there, pattern, **known).astype(out.dtype)
    return out


def _brought_out(there: np.ndarray, tensor: names.Tensor, spec: spec_lib.Spec) -> Any:
    """A tensor in the form that its parts are cut from."""
    if not tensor.view:
        return there
    key, pattern = tensor.parts[0]
    left = tensor.view.partition(" -> ")[2].split()
    known = names.axes(pattern, names.sizes(spec, key))
    return rearrange(there, tensor.view, **{x: known[x] for x in left if x in known})


def save(
    spec: spec_lib.Spec,
    weights: dict[str, Any],
    folder: str | pathlib.Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write config.json and safetensors that transformers loads.

    Args:
      spec: the model.
      weights: stacked parameters, on any mesh; every process calls, the first writes.
      folder: made if missing; files of the same names are replaced.
      dtype: of the tensors; None keeps the parameters' own.
      shard_bytes: largest file; above it the weights go to several with an index.
    Raises:
      config.InputError: config.json cannot tell what the Spec computes.
    """
    hf_config.check_spec(spec)
    folder = pathlib.Path(folder)
    fused = hf_config.FAMILIES[spec.family].fused
    named = named_tensors(spec, weights, fused=fused, dtype=dtype)
    if jax.process_index() != 0:
        for _ in named:  # takes part in the gathers
            continue
        return
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("model*.safetensors*"):
        stale.unlink()
    shards, total = _write_shards(named, folder, shard_bytes)
    if len(shards) == 1:
        (folder / shards[0][0]).rename(folder / "model.safetensors")
    else:
        index = {"metadata": {"total_size": total}, "weight_map": {}}
        for i, (temporary, held) in enumerate(shards):
            final = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            (folder / temporary).rename(folder / final)
            index["weight_map"] |= dict.fromkeys(held, final)
        text = json.dumps(index, indent=1, sort_keys=True)
        (folder / "model.safetensors.index.json").write_text(text)
    raw = hf_config.config_of(spec)
    raw["torch_dtype"] = dtype or spec.param_dtype
    (folder / "config.json").write_text(
        json.dumps(raw, indent=2, sort_keys=True) + "\n"
    )


def named_tensors(
    spec: spec_lib.Spec, weights: Any, *, fused: bool, dtype: str | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """(name there, tensor) one at a time; `fused`: all experts in one tensor."""
    flat, _ = jax.tree_util.tree_flatten_with_path(weights)
    leaves = {_key(path): leaf for path, leaf in flat}
    table = names.table(spec, fused=fused, turned=fused and names.turns(spec))
    done = set()
    for key in leaves:
        tensor = table[key]
        if tensor.name in done:
            continue
        done.add(tensor.name)
        for full, place in names.places(tensor, key, spec):
            parts = [
                _back(_to_host(leaves[part][place]), pattern, names.sizes(spec, part))
                for part, pattern in tensor.parts
            ]
            host = parts[0] if len(parts) == 1 else np.concatenate(parts, tensor.dim)
            if tensor.view:
                host = rearrange(host, " -> ".join(reversed(tensor.view.split(" -> "))))
            if dtype:
                host = host.astype(jnp.dtype(dtype))
            yield names_vision.published(spec, full), np.ascontiguousarray(host)


def _back(part: np.ndarray, pattern: str, known: dict[str, int]) -> np.ndarray:
    """A weight of ours (of one layer) in the form that it has there."""
    pattern = " -> ".join(reversed(pattern.split(" -> ")))
    return rearrange(part, pattern, **names.axes(pattern, known))


def _to_host(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def _write_shards(named, folder, shard_bytes):
    """Safetensors files of at most shard_bytes: [(file, names)], total bytes."""
    shards, pending, size, total = [], {}, 0, 0

    def flush():
        nonlocal pending, size
        name = f"model-{len(shards):05d}.safetensors.partial"
        safetensors.numpy.save_file(pending, folder / name, metadata={"format": "pt"})
        shards.append((name, list(pending)))
        pending, size = {}, 0

    for name, tensor in named:
        if pending and size + tensor.nbytes > shard_bytes:
            flush()
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    return shards, total
