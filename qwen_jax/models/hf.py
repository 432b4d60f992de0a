# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders in and out: config.json <-> Spec, safetensors <-> parameters.

One table, `NAMES`, maps each weight both ways; what `save` writes, transformers loads.

Formats: `model.safetensors`, or shards with `model.safetensors.index.json`; a linear
layer there is [out, in], heads joined (head-major) in one dim; here the dims are split
and the input comes first. Both config forms are read: `rope_theta` and `rope_scaling`
as published, `rope_parameters` of transformers 5.
Invariants: every tensor of the files is used once or is listed as one to ignore; every
weight of the model is filled. One stacked weight is built at a time.
Raises: config.InputError for a folder without config.json or weights, an unknown
architecture, a missing, surplus or misshapen tensor; no code from the folder is run.
"""

import dataclasses
import json
import math
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from einops import rearrange

from qwen_jax import config, mesh, params
from qwen_jax.models import decoder
from qwen_jax.models import spec as spec_lib

# Path in our tree -> (name there, einops pattern from theirs to ours).
_ATTENTION = "model.layers.{i}.self_attn."
_MLP = "model.layers.{i}.mlp."
NAMES: dict[str, tuple[str, str]] = {
    "embed_vd": ("model.embed_tokens.weight", "v d -> v d"),
    "norm_d": ("model.norm.weight", "d -> d"),
    "head_vd": ("lm_head.weight", "v d -> v d"),
    "layers.attention_norm_ld": ("model.layers.{i}.input_layernorm.weight", "d -> d"),
    "layers.mlp_norm_ld": (
        "model.layers.{i}.post_attention_layernorm.weight",
        "d -> d",
    ),
    "layers.attention.q_ldnk": (_ATTENTION + "q_proj.weight", "(n k) d -> d n k"),
    "layers.attention.k_ldhk": (_ATTENTION + "k_proj.weight", "(h k) d -> d h k"),
    "layers.attention.v_ldhk": (_ATTENTION + "v_proj.weight", "(h k) d -> d h k"),
    "layers.attention.o_lnkd": (_ATTENTION + "o_proj.weight", "d (n k) -> n k d"),
    "layers.attention.q_bias_lnk": (_ATTENTION + "q_proj.bias", "(n k) -> n k"),
    "layers.attention.k_bias_lhk": (_ATTENTION + "k_proj.bias", "(h k) -> h k"),
    "layers.attention.v_bias_lhk": (_ATTENTION + "v_proj.bias", "(h k) -> h k"),
    "layers.attention.q_norm_lk": (_ATTENTION + "q_norm.weight", "k -> k"),
    "layers.attention.k_norm_lk": (_ATTENTION + "k_norm.weight", "k -> k"),
    "layers.mlp.gate_ldf": (_MLP + "gate_proj.weight", "f d -> d f"),
    "layers.mlp.up_ldf": (_MLP + "up_proj.weight", "f d -> d f"),
    "layers.mlp.down_lfd": (_MLP + "down_proj.weight", "d f -> f d"),
}
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
# Buffers that some checkpoints carry and no model needs.
IGNORED = ("rotary_emb.inv_freq",)


def spec_from_config(raw: dict[str, Any], **changes: Any) -> spec_lib.Spec:
    """The Spec of a published config.json.

    Raises:
      config.InputError: an architecture or option this decoder does not have.
    """
    family = raw.get("model_type", "")
    if family not in ARCHITECTURES:
        raise config.InputError(
            f"model_type {family!r} in config.json is not supported"
            f"{config.nearest(family, ARCHITECTURES)}"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise config.InputError(f"hidden_act {raw['hidden_act']!r}: wanted 'silu'")
    missing = [key for key in REQUIRED if not isinstance(raw.get(key), int)]
    if missing:
        raise config.InputError(
            f"config.json lacks {', '.join(missing)}: wanted whole numbers; is it the "
            "file of a whole language model?"
        )
    heads = raw["num_attention_heads"]
    theta, scaling = _rope(raw)
    eos = raw.get("eos_token_id")
    window, full_layers = _window(raw)
    values = {
        "family": family,
        "vocab_size": raw["vocab_size"],
        "width": raw["hidden_size"],
        "num_layers": raw["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": raw.get("num_key_value_heads") or heads,
        "head_width": raw.get("head_dim") or raw["hidden_size"] // heads,
        "ffn_width": raw["intermediate_size"],
        "qkv_bias": bool(raw.get("attention_bias", family == "qwen2"))
        or family == "qwen2",
        "qk_norm": family == "qwen3",
        "tie_embedding": raw.get("tie_word_embeddings", False),
        "rope_theta": float(theta),
        "rope_scaling": scaling,
        "max_positions": raw.get("max_position_embeddings", 32_768),
        "window": window,
        "full_layers": full_layers,
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "init_std": raw.get("initializer_range", 0.02),
        "bos_id": raw.get("bos_token_id"),
        "eos_ids": tuple(eos)
        if isinstance(eos, list)
        else (() if eos is None else (eos,)),
    }
    if family == "qwen3" and raw.get("attention_bias"):
        raise config.InputError(
            "attention_bias=true with qwen3 puts a bias on the output projection too, "
            "which this decoder does not have"
        )
    return config.freeze(spec_lib.Spec, values | changes, at="model")


def _rope(raw: dict[str, Any]) -> tuple[float, spec_lib.RopeScaling | None]:
    """(theta, scaling) from either config form."""
    new = raw.get("rope_parameters") or {}
    old = raw.get("rope_scaling") or {}
    theta = new.get("rope_theta") or raw.get("rope_theta") or 10_000.0
    settings = new or old
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind not in ("linear", "yarn"):
        raise config.InputError(f"rope type {kind!r}: wanted default, linear or yarn")
    original = settings.get("original_max_position_embeddings")
    scaling = spec_lib.RopeScaling(
        kind=kind,
        factor=float(settings["factor"]),
        original_positions=original or raw.get("max_position_embeddings", 32_768),
        beta_fast=float(settings.get("beta_fast") or 32),
        beta_slow=float(settings.get("beta_slow") or 1),
        attention_factor=settings.get("attention_factor"),
        truncate=settings.get("truncate", True),
    )
    for key in ("mscale", "mscale_all_dim"):
        if settings.get(key):
            raise config.InputError(f"rope option {key} is not a Qwen option")
    return theta, scaling


def _window(raw: dict[str, Any]) -> tuple[int, int]:
    """(window, number of first layers that see everything)."""
    layers, window = raw["num_hidden_layers"], raw.get("sliding_window")
    if not raw.get("use_sliding_window") or not window:
        return 0, 0
    kinds = raw.get("layer_types")
    if not kinds:
        return window, min(raw.get("max_window_layers", layers), layers)
    full = next((i for i, x in enumerate(kinds) if x != "full_attention"), layers)
    if any(x != "sliding_attention" for x in kinds[full:]):
        raise config.InputError(
            f"layer_types {kinds}: wanted full layers first, then sliding ones"
        )
    return (window, full) if full < layers else (0, 0)


def config_of(spec: spec_lib.Spec) -> dict[str, Any]:
    """config.json of a Spec, in the published form, which every release reads."""
    raw = {
        "architectures": [ARCHITECTURES[spec.family]],
        "model_type": spec.family,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": spec.width,
        "initializer_range": spec.init_std,
        "intermediate_size": spec.ffn_width,
        "max_position_embeddings": spec.max_positions,
        "max_window_layers": spec.full_layers if spec.window else spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_hidden_layers": spec.num_layers,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_width,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_theta,
        "rope_scaling": None,
        "sliding_window": spec.window or None,
        "use_sliding_window": bool(spec.window),
        "tie_word_embeddings": spec.tie_embedding,
        "torch_dtype": spec.param_dtype,
        "use_cache": True,
        "vocab_size": spec.vocab_size,
    }
    if spec.family == "qwen3":
        raw["attention_bias"] = False
    if spec.bos_id is not None:
        raw["bos_token_id"] = spec.bos_id
    if spec.eos_ids:
        one = len(spec.eos_ids) == 1
        raw["eos_token_id"] = spec.eos_ids[0] if one else list(spec.eos_ids)
    if spec.rope_scaling is not None:
        scaling = spec.rope_scaling
        raw["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "yarn":
            raw["rope_scaling"] |= {
                "original_max_position_embeddings": scaling.original_positions,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncate,
            }
            if scaling.attention_factor is not None:
                raw["rope_scaling"]["attention_factor"] = scaling.attention_factor
    return raw


def check_spec(spec: spec_lib.Spec) -> None:
    """Refuse a Spec whose function its own config.json would not tell.

    A family stands for switches that the file does not have: what reads it would build
    another model, and leave out or miss weights.

    Raises:
      config.InputError: naming the fields, what the file says instead, and the fix.
    """
    if spec.family not in ARCHITECTURES:
        raise config.InputError(
            f"model.family={spec.family!r} has no published form"
            f"{config.nearest(spec.family, ARCHITECTURES)}; set --config.model.family, "
            "or --config.export=false"
        )
    wrong = _told_otherwise(spec)
    if not wrong:
        return
    fitting = [
        family
        for family in ARCHITECTURES
        if not _told_otherwise(dataclasses.replace(spec, family=family))
    ]
    fixes = [f"--config.model.family={family}" for family in fitting] or [
        " ".join(f"--config.model.{name}={told}" for name, (_, told) in wrong.items())
    ]
    listed = ", ".join(f"{k} is {old}, there {new}" for k, (old, new) in wrong.items())
    raise config.InputError(
        f"config.json of a {spec.family} would tell of another model than this one: "
        f"{listed}; set {' or '.join(fixes)}, or --config.export=false to train "
        "without a Hugging Face folder at the end"
    )


def _told_otherwise(spec: spec_lib.Spec) -> dict[str, tuple[Any, Any]]:
    """{field: (here, as read from config_of)} where the function differs."""
    here, there = map(_function, (spec, spec_from_config(config_of(spec))))
    return {k: (here[k], there[k]) for k in here if here[k] != there[k]}


def _function(spec: spec_lib.Spec) -> dict[str, Any]:
    """The fields that decide logits; those that say the same in two ways as one."""
    none = (
        "param_dtype",
        "compute_dtype",
        "reduce_dtype",
        "attention",
        "init_std",
        "bos_id",
        "eos_ids",
    )
    names = [f.name for f in dataclasses.fields(spec) if f.name not in none]
    scaling = spec.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        scaling = ("linear", scaling.factor)  # and nothing else of it
    # window=0 and full_layers=num_layers are both full attention.
    one = {"rope_scaling": scaling, "window": spec.windows, "full_layers": None}
    return {name: getattr(spec, name) for name in names} | one


def read_config(folder: str | pathlib.Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
      config.InputError: no such folder, no config.json in it, not JSON.
    """
    folder = pathlib.Path(folder)
    path = folder / "config.json"
    if not folder.is_dir():
        raise config.InputError(f"model folder {str(folder)!r} does not exist")
    if not path.is_file():
        raise config.InputError(
            f"{folder} has no config.json: wanted a Hugging Face model folder "
            "(config.json and *.safetensors)"
        )
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise config.InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise config.InputError(f"{path} holds no JSON object, which it should")
    return raw


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
            for name in handle.keys():
                if name in self._where:
                    raise config.InputError(
                        f"tensor {name!r} is in {self._where[name].name} and in "
                        f"{path.name}"
                    )
                self._where[name] = path
        self.names = set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, from the file's header."""
        if name not in self._where:
            raise config.InputError(
                f"the model files have no tensor {name!r}"
                f"{config.nearest(name, list(self._where)[:500])}; the folder is of "
                "another model than its config.json, or not whole"
            )
        return tuple(self._open[self._where[name]].get_slice(name).get_shape())

    def get(self, name: str) -> np.ndarray:
        """The tensor."""
        return self._open[self._where[name]].get_tensor(name)


def check(folder: str | pathlib.Path, spec: spec_lib.Spec) -> _Tensors:
    """Compare names and shapes of a folder's tensors with a Spec; read no weights.

    Raises:
      config.InputError: unreadable files, a missing, surplus or misshapen tensor.
    """
    folder = pathlib.Path(folder)
    tensors = _Tensors(folder)
    used = {"lm_head.weight"} if spec.tie_embedding else set()
    flat, _ = jax.tree_util.tree_flatten_with_path(
        decoder.decoder_params(spec), is_leaf=params.is_param
    )
    for path, _ in flat:
        name, pattern = NAMES[_key(path)]
        wanted = _shape_there(pattern, spec)
        for full in _names_there(name, spec):
            found = tensors.shape(full)
            if found != wanted:
                raise config.InputError(
                    f"tensor {full!r} of {folder} has shape {found}, its config.json "
                    f"wants {wanted}: the two are of different models"
                )
            used.add(full)
    left = [n for n in tensors.names - used if not n.endswith(IGNORED)]
    if left:
        raise config.InputError(
            f"{folder}: {len(left)} tensors belong to no weight of a "
            f"{spec.family} model: {', '.join(sorted(left)[:5])}; check model_type and "
            "tie_word_embeddings in its config.json"
        )
    return tensors


def _names_there(name: str, spec: spec_lib.Spec) -> list[str]:
    """Names of the tensors that one weight of ours is made of."""
    count = spec.num_layers if "{i}" in name else 1
    return [name.format(i=i) for i in range(count)]


def _shape_there(pattern: str, spec: spec_lib.Spec) -> tuple[int, ...]:
    """(heads * head width, width) for the pattern "(n k) d -> d n k"."""
    sizes = _sizes(spec)
    dims = re.findall(r"\(([^)]*)\)|(\w)", pattern.partition(" -> ")[0])
    return tuple(
        math.prod(sizes[one] for one in (group or single).split())
        for group, single in dims
    )


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
    raw = read_config(folder)
    dtype = dtype or raw.get("dtype") or raw.get("torch_dtype") or "float32"
    changes = {"param_dtype": dtype, "compute_dtype": dtype} | changes
    spec = spec_from_config(raw, **changes)
    tensors = check(folder, spec)
    tree = decoder.decoder_params(spec)
    layout = None
    if device_mesh is not None:
        layout = params.shardings(tree, device_mesh, rules or mesh.Rules())
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=params.is_param)
    places = jax.tree.leaves(layout) if layout is not None else [None] * len(flat)
    leaves = []
    for (path, p), place in zip(flat, places, strict=True):
        host = _read(tensors, _key(path), p, spec)
        if place is None:
            leaves.append(jax.device_put(host))
            continue
        # device_put would compare whole arrays between processes, in device memory.
        leaves.append(jax.make_array_from_callback(host.shape, place, host.__getitem__))
    return spec, treedef.unflatten(leaves)


def _key(path: Any) -> str:
    return ".".join(str(part.key) for part in path)


def _sizes(spec: spec_lib.Spec) -> dict[str, int]:
    return {
        "n": spec.num_heads,
        "h": spec.num_kv_heads,
        "k": spec.head_width,
        "d": spec.width,
        "f": spec.ffn_width,
        "v": spec.vocab_size,
    }


def _axes_of(pattern: str, spec: spec_lib.Spec) -> dict[str, int]:
    return {
        k: v for k, v in _sizes(spec).items() if k in pattern.split(" -> ")[1].split()
    }


def _read(tensors: _Tensors, key: str, p: params.Param, spec: spec_lib.Spec) -> Any:
    """One weight of ours from its tensors, stacked where ours is."""
    name, pattern = NAMES[key]
    dtype = jnp.dtype(spec.param_dtype)
    sizes = _axes_of(pattern, spec)
    out = np.empty(p.shape, dtype)
    for i, full in enumerate(_names_there(name, spec)):
        target = out[i] if "{i}" in name else out
        target[...] = rearrange(tensors.get(full), pattern, **sizes).astype(dtype)
    return out


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
    check_spec(spec)
    folder = pathlib.Path(folder)
    named = _named(spec, weights, dtype)
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
        for i, (temporary, names) in enumerate(shards):
            final = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            (folder / temporary).rename(folder / final)
            index["weight_map"] |= dict.fromkeys(names, final)
        text = json.dumps(index, indent=1, sort_keys=True)
        (folder / "model.safetensors.index.json").write_text(text)
    raw = config_of(spec)
    raw["torch_dtype"] = dtype or spec.param_dtype
    (folder / "config.json").write_text(
        json.dumps(raw, indent=2, sort_keys=True) + "\n"
    )


def _named(spec, weights, dtype):
    """(name there, tensor) one at a time."""
    flat, _ = jax.tree_util.tree_flatten_with_path(weights)
    for path, leaf in flat:
        name, pattern = NAMES[_key(path)]
        back = " -> ".join(reversed(pattern.split(" -> ")))
        stacked = "{i}" in name
        for i in range(spec.num_layers if stacked else 1):
            part = leaf[i] if stacked else leaf
            host = _to_host(part)
            if dtype:
                host = host.astype(jnp.dtype(dtype))
            yield name.format(i=i), np.ascontiguousarray(rearrange(host, back))


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
