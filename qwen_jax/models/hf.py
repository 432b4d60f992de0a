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
    hf_parts,
    hf_vision,
    json_files,
    names,
    names_vision,
    qwen4,
    streaming,
    tensor_files,
    tensor_writer,
)
from qwen_jax.models import spec as spec_lib

# Buffers that some checkpoints carry and no model needs.
IGNORED = ("rotary_emb.inv_freq",)
# Parts of published models that are left out; counted, never silent.
OTHER_PARTS = ("mtp.", "model.visual.", "audio_tower.", "multi_modal_projector.")
PARTS = ("all", "text")


class _Tensors:
    """The tensors of a folder's safetensors files, by name, read on demand."""

    def __init__(self, folder: pathlib.Path):
        self.entries, self.bare = {}, False
        for entry in tensor_files.entries(folder):
            name = names_vision.known(entry.name)
            name = name.removeprefix("language_model.")  # as in Qwen2-Audio
            if name in self.entries:
                raise config.InputError(
                    f"{folder} has tensor {name!r} twice, once as {entry.name!r}"
                )
            self.entries[name] = entry
        if "embed_tokens.weight" in self.entries:  # of a model without head
            whole = hf_parts.whole_name
            self.entries = {whole(k): v for k, v in self.entries.items()}
            self.bare = True
        self.names = set(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape; refuses what is quantized."""
        entry = self.entry(name)
        entry.numpy_dtype()
        return entry.shape

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


def read_spec(
    folder: str | pathlib.Path, *, parts: str = "all", **changes: Any
) -> spec_lib.Spec:
    """What the model of a folder is, by its config.json and the names of its tensors;
    with parts="text" what its text part is.

    Raises:
      config.InputError: see `hf_config.spec_from_config` and `check`.
    """
    folder = pathlib.Path(folder)
    raw = hf_config.read_config(folder)
    text = raw.get("text_config") if isinstance(raw.get("text_config"), dict) else {}
    told = [(c, k) for c in (raw, text) for k in ("dtype", "torch_dtype")]
    dtype = next((c[k] for c, k in told if c.get(k)), "float32")
    changes = {"param_dtype": dtype, "compute_dtype": dtype} | changes
    raw = hf_vision.text_only(raw) if parts == "text" else raw
    spec = hf_config.spec_from_config(raw, **changes)
    return _as_in_files(spec, _Tensors(folder), changes)


def _as_in_files(
    spec: spec_lib.Spec, tensors: _Tensors, changes: dict[str, Any]
) -> spec_lib.Spec:
    """The Spec with what files tell and config.json may not."""
    more = {}
    if tensors.bare and spec.head == "tokens" and not spec.tie_embedding:
        more["head"] = "none"  # an embedding model, under the name of one with logits
    told, there = spec.mtp_layers, hf_parts.mtp_layers(tensors.names)
    if spec.streams is not None:
        there = 0  # a head of another kind, left out with the other parts
    more["mtp_layers"] = there if more.get("head", spec.head) == "tokens" else 0
    if told and not there and "mtp_layers" not in changes:
        print(
            f"note: config.json tells of {told} layers of an MTP head, the files have "
            "none: the model is loaded without it",
            file=sys.stderr,
        )
    more = {k: v for k, v in more.items() if k not in changes}
    return dataclasses.replace(spec, **more) if more else spec


def check(folder: str | pathlib.Path, spec: spec_lib.Spec) -> _Tensors:
    """Compare names and shapes of a folder's tensors with a Spec; read no weights.

    Raises:
      config.InputError: unreadable files, a missing, surplus or misshapen tensor.
    """
    folder = pathlib.Path(folder)
    tensors = _Tensors(folder)
    tied = spec.head == "tokens" and spec.tie_embedding
    used = {"lm_head.weight"} if tied else set()
    others = OTHER_PARTS + (() if spec.head == "tokens" else ("lm_head.",))
    held = (bool(spec.mtp_layers), "mtp."), (spec.vision is not None, "model.visual.")
    others = tuple(part for part in others if (True, part) not in held)
    used |= match(spec, tensors, _table(tensors, spec), folder, "its config.json")
    used |= _constants(spec, tensors, folder)
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
        some = ", ".join(json_files.shown(name) for name in sorted(left)[:5])
        raise config.InputError(
            f"{folder}: {len(left)} tensors belong to no weight of a {spec.family} "
            f"model: {some}; check model_type and tie_word_embeddings in its "
            "config.json"
        )
    return tensors


def match(
    spec: spec_lib.Spec,
    tensors: Any,
    table: dict[str, names.Tensor],
    where: pathlib.Path,
    wanting: str,
) -> set[str]:
    """Names of the tensors that a Spec's weights are made of, each of the right shape.

    Raises:
      config.InputError: one is misshapen, or (from `tensors.shape`) missing.
    """
    used = set()
    flat, _ = jax.tree_util.tree_flatten_with_path(
        decoder.decoder_params(spec), is_leaf=params.is_param
    )
    for path, _ in flat:
        key = _key(path)
        whole = names.shape(table[key], spec)
        for full, place in names.places(table[key], key, spec):
            wanted = names.part(whole, place)
            found = tensors.shape(full)
            if found != wanted:
                raise config.InputError(
                    f"tensor {full!r} of {where} has shape {found}, {wanting} "
                    f"wants {wanted}: the two are of different models"
                )
            used.add(full)
    return used


def _constants(
    spec: spec_lib.Spec, tensors: _Tensors, folder: pathlib.Path
) -> set[str]:
    """Names of the tensors that are no weights but follow from config.json.

    Raises:
      config.InputError: one that is there holds other numbers.
    """
    wanted = qwen4.constants(spec)
    for name, array in wanted.items():
        entry = tensors.entries.get(name)
        if entry is None:
            continue
        told = None
        if (entry.dtype, entry.shape) == ("I64", array.shape):
            told = np.fromfile(entry.path, "<i8", array.size, offset=entry.start)
        if told is None or not np.array_equal(told.reshape(array.shape), array):
            raise config.InputError(
                f"tensor {name!r} of {folder} holds other hashes than its config.json "
                "makes: the two are of different models"
            )
    return set(wanted)


def _table(tensors: _Tensors, spec: spec_lib.Spec) -> dict[str, names.Tensor]:
    """The name map for the layout of experts and tables that the files have."""
    fused = [name for name in tensors.names if name.endswith("experts.gate_up_proj")]
    mtp = [name for name in fused if name.startswith("mtp.")]
    return names.table(
        spec,
        fused=len(fused) > len(mtp),
        turned=bool(fused) and hf_vision.turned(spec, tensors.names, tensors.shape),
        mtp_fused=bool(mtp),
        whole=any(name.endswith("ngram_embedding.weight") for name in tensors.names),
    )


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
    if parts not in PARTS:
        raise config.InputError(f"parts={parts!r}{config.nearest(parts, PARTS)}")
    if dtype:
        changes = {"param_dtype": dtype, "compute_dtype": dtype} | changes
    spec = read_spec(folder, parts=parts, **changes)
    tensors = check(folder, spec)
    table = _table(tensors, spec)
    return spec, _fill(spec, tensors, table, device_mesh, rules)


def _fill(
    spec: spec_lib.Spec,
    tensors: _Tensors,
    table: dict[str, names.Tensor],
    device_mesh: jax.sharding.Mesh | None = None,
    rules: mesh.Rules | None = None,
) -> dict[str, Any]:
    """Parameters from files by a name map, streamed onto their devices."""
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
    return treedef.unflatten([stack.array() for stack in stacks])


class Lazy:
    """A weight that stays in its files: `weight[place]` reads that one tensor of it."""

    def __init__(self, p: params.Param, dtype: str, jobs: dict[str, streaming.Job]):
        self.shape, self.dtype, self._jobs = p.shape, jnp.dtype(dtype), jobs

    def __getitem__(self, place: streaming.Place) -> jax.Array:
        shape = streaming.shape_at(self.shape, place)
        stack = streaming.Stack(shape, self.dtype, None)
        job = dataclasses.replace(self._jobs[str(place)], stack=stack, place=())
        streaming.fill([job])
        return stack.array()


def lazily(folder: str | pathlib.Path) -> tuple[spec_lib.Spec, dict[str, Any]]:
    """Spec and parameters of a folder as `load` gives them, each a `Lazy`, for `save`.

    Raises:
      config.InputError: see the module docstring.
    """
    spec = read_spec(folder)
    tensors = check(folder, spec)
    table = _table(tensors, spec)

    def one(path: Any, p: params.Param) -> Lazy:
        key = _key(path)
        jobs = {
            str(at): streaming.Job(tensors.entry(full), table[key], key, spec)
            for full, at in names.places(table[key], key, spec)
        }
        return Lazy(p, spec.param_dtype, jobs)

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
    named = (
        (hf_parts.saved_name(spec, name), tensor)
        for name, tensor in named_tensors(spec, weights, fused=fused, dtype=dtype)
    )
    if jax.process_index() != 0:
        for _ in named:  # takes part in the gathers
            continue
        return
    leaves = _leaves(weights)
    planned = [
        tensor_writer.Planned(
            hf_parts.saved_name(spec, names_vision.published(spec, full)),
            names.part(names.shape(tensor, spec), place),
            dtype or jnp.dtype(leaves[tensor.parts[0][0]].dtype).name,
        )
        for tensor, full, place in _order(leaves, spec, fused)
    ]
    planned += [
        tensor_writer.Planned(hf_parts.saved_name(spec, name), array.shape, "int64")
        for name, array in qwen4.constants(spec).items()
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
    table = names.table(spec, fused=fused, turned=fused and names.turns(spec))
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
        yield names_vision.published(spec, full), np.ascontiguousarray(host)
    yield from qwen4.constants(spec).items()


def _back(part: np.ndarray, pattern: str, known: dict[str, int]) -> np.ndarray:
    """A weight of ours (of one layer) in the form that it has there."""
    pattern = " -> ".join(reversed(pattern.split(" -> ")))
    return rearrange(part, pattern, **names.axes(pattern, known))


def _to_host(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)
