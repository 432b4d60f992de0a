# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders in and out: config.json <-> Spec, safetensors <-> parameters.

One table (`names.py`) maps each weight both ways; what `save` writes, transformers
loads.

Formats: `model.safetensors`, or shards with `model.safetensors.index.json`. Both config
forms are read: `rope_theta` and `rope_scaling` as published, `rope_parameters` of
transformers 5.
Invariants: every tensor of the files is used once or is listed as one to ignore; every
weight of the model is filled. One stacked weight is built at a time.
Raises: config.InputError for a folder without config.json or weights, an unknown
architecture, a missing, surplus or misshapen tensor; no code from the folder is run.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from einops import rearrange

from qwen_jax import config, mesh, params
from qwen_jax.models import decoder, names
from qwen_jax.models import spec as spec_lib


@dataclasses.dataclass(frozen=True)
class Family:
    """What a `model_type` stands for beyond the fields of its config.json."""

    architecture: str
    model_type: str = ""  # of config.json where it is not the family's name
    qkv_bias: bool = False
    qk_norm: bool = True
    new: bool = False  # from Qwen3-Next on: gates, part of a head rotated, 1 + w norms
    sparse: bool = False
    shared: bool = False  # an expert that every token meets
    norm_topk: bool | None = None  # None: config.json says
    fused: bool = False  # published with all experts in one tensor


FAMILIES = {
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, qk_norm=False),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        qkv_bias=True,
        qk_norm=False,
        sparse=True,
        shared=True,
    ),
    "qwen3": Family("Qwen3ForCausalLM"),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", sparse=True),
    "qwen3_next": Family("Qwen3NextForCausalLM", new=True, sparse=True, shared=True),
    "qwen3_5": Family("Qwen3_5ForCausalLM", "qwen3_5_text", new=True),
    "qwen3_5_moe": Family(
        "Qwen3_5MoeForCausalLM",
        "qwen3_5_moe_text",
        new=True,
        sparse=True,
        shared=True,
        norm_topk=True,
        fused=True,
    ),
}
REQUIRED = (
    "vocab_size",
    "hidden_size",
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
    if isinstance(raw.get("text_config"), dict):  # the text part of a larger model
        raw = {"tie_word_embeddings": raw.get("tie_word_embeddings")} | {
            k: v for k, v in raw["text_config"].items() if v is not None
        }
    family = raw.get("model_type", "").removesuffix("_text")
    if family not in FAMILIES:
        raise config.InputError(
            f"model_type {family!r} in config.json is not supported"
            f"{config.nearest(family, FAMILIES)}"
        )
    known = FAMILIES[family]
    if raw.get("hidden_act", "silu") != "silu":
        raise config.InputError(f"hidden_act {raw['hidden_act']!r}: wanted 'silu'")
    sparse, dense_layers = _sparse(raw, known)
    every = not sparse or dense_layers
    required = (*REQUIRED, *(("intermediate_size",) if every else ()))
    missing = [key for key in required if not isinstance(raw.get(key), int)]
    if missing:
        raise config.InputError(
            f"config.json lacks {', '.join(missing)}: wanted whole numbers; is it the "
            "file of a whole language model?"
        )
    heads = raw["num_attention_heads"]
    theta, scaling = _rope(raw)
    eos = raw.get("eos_token_id")
    window, full_layers = _window(raw)
    mixers, delta = _mixers(raw, known)
    values = {
        "family": family,
        "vocab_size": raw["vocab_size"],
        "width": raw["hidden_size"],
        "num_layers": raw["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": raw.get("num_key_value_heads") or heads,
        "head_width": raw.get("head_dim") or raw["hidden_size"] // heads,
        "ffn_width": raw.get("intermediate_size") or 1,
        "qkv_bias": known.qkv_bias and raw.get("qkv_bias", True),
        "qk_norm": known.qk_norm,
        "tie_embedding": bool(raw.get("tie_word_embeddings", False)),
        "rope_theta": float(theta),
        "rope_scaling": scaling,
        "max_positions": raw.get("max_position_embeddings", 32_768),
        "window": window,
        "full_layers": full_layers,
        "mixers": mixers,
        "delta": delta,
        "moe": sparse,
        "dense_layers": dense_layers,
        "output_gate": known.new,
        "rotary_share": _rotary_share(raw) if known.new else 1.0,
        "norm_offset": known.new,
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "init_std": raw.get("initializer_range", 0.02),
        "bos_id": raw.get("bos_token_id"),
        "eos_ids": tuple(eos)
        if isinstance(eos, list)
        else (() if eos is None else (eos,)),
    }
    if family != "qwen2" and raw.get("attention_bias"):
        raise config.InputError(
            f"attention_bias=true with {family} puts a bias on the output projection "
            "too, which this decoder does not have"
        )
    if raw.get("output_gate_type", "silu") not in ("silu", "swish"):
        raise config.InputError(
            f"output_gate_type {raw['output_gate_type']!r}: wanted 'silu'"
        )
    return config.freeze(spec_lib.Spec, values | changes, at="model")


def _sparse(
    raw: dict[str, Any], known: Family
) -> tuple[dict[str, Any] | None, tuple[int, ...]]:
    """(the fields of the experts or None, layers that have none)."""
    if not known.sparse:
        return None, ()
    if "num_local_experts" in raw:  # as recent releases of transformers write it
        raw = raw | {"num_experts": raw["num_local_experts"]}
    if raw.get("num_experts") == 0:
        return None, ()
    keys = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
    missing = [key for key in keys if not isinstance(raw.get(key), int)]
    if missing:
        raise config.InputError(
            f"config.json lacks {', '.join(missing)}: wanted whole numbers"
        )
    step, alone = raw.get("decoder_sparse_step") or 1, raw.get("mlp_only_layers") or []
    dense = tuple(
        i for i in range(raw["num_hidden_layers"]) if i in alone or (i + 1) % step != 0
    )
    norm_topk = known.norm_topk
    if norm_topk is None:
        norm_topk = bool(raw.get("norm_topk_prob", raw["model_type"] == "qwen3_next"))
    moe = {
        "num_experts": raw["num_experts"],
        "experts_per_token": raw["num_experts_per_tok"],
        "ffn_width": raw["moe_intermediate_size"],
        "shared_width": (raw.get("shared_expert_intermediate_size") or 0)
        if known.shared
        else 0,
        "norm_topk": norm_topk,
        "balance_coef": raw.get("router_aux_loss_coef", 0.001),
    }
    return moe, dense


def _mixers(
    raw: dict[str, Any], known: Family
) -> tuple[tuple[str, ...], dict[str, int] | None]:
    """(what each layer of the shortest repeating pattern mixes with, linear sizes)."""
    if not known.new:
        return ("attention",), None
    layers = raw["num_hidden_layers"]
    every = raw.get("full_attention_interval") or 4
    kinds = raw.get("layer_types") or [
        "full_attention" if (i + 1) % every == 0 else "linear_attention"
        for i in range(layers)
    ]
    known_kinds = {"full_attention": "attention", "linear_attention": "delta"}
    wrong = [kind for kind in kinds if kind not in known_kinds]
    if wrong or len(kinds) != layers:
        raise config.InputError(
            f"layer_types {kinds}: wanted {layers} of {', '.join(known_kinds)}"
        )
    mixers = tuple(known_kinds[kind] for kind in kinds)
    period = next(
        n for n in range(1, layers + 1) if mixers == (mixers[:n] * layers)[:layers]
    )
    mixers = mixers[:period]
    if "delta" not in mixers:
        return mixers, None
    fields = {
        "key_heads": "linear_num_key_heads",
        "value_heads": "linear_num_value_heads",
        "key_width": "linear_key_head_dim",
        "value_width": "linear_value_head_dim",
        "conv_taps": "linear_conv_kernel_dim",
    }
    return mixers, {ours: raw[key] for ours, key in fields.items() if key in raw}


def _rotary_share(raw: dict[str, Any]) -> float:
    share = (raw.get("rope_parameters") or {}).get("partial_rotary_factor")
    return float(share or raw.get("partial_rotary_factor") or 0.25)


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
    known = FAMILIES[spec.family]
    raw = {
        "architectures": [known.architecture],
        "model_type": known.model_type or spec.family,
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
    if spec.family not in ("qwen2", "qwen2_moe"):
        raw["attention_bias"] = False
    if spec.family == "qwen2_moe":
        raw["qkv_bias"] = spec.qkv_bias
    if known.new:
        raw |= _new_config(spec)
    if spec.moe is not None:
        raw |= _moe_config(spec)
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


def _new_config(spec: spec_lib.Spec) -> dict[str, Any]:
    """What config.json says of gated and linear layers."""
    kinds = {"attention": "full_attention", "delta": "linear_attention"}
    rope = {"rope_type": "default", "rope_theta": spec.rope_theta}
    raw = {
        "layer_types": [kinds[kind.mixer] for kind in spec.kinds],
        "partial_rotary_factor": spec.rotary_share,
        "rope_parameters": rope | {"partial_rotary_factor": spec.rotary_share},
    }
    if spec.delta is not None:
        raw |= {
            "linear_num_key_heads": spec.delta.key_heads,
            "linear_num_value_heads": spec.delta.value_heads,
            "linear_key_head_dim": spec.delta.key_width,
            "linear_value_head_dim": spec.delta.value_width,
            "linear_conv_kernel_dim": spec.delta.conv_taps,
        }
    return raw


def _moe_config(spec: spec_lib.Spec) -> dict[str, Any]:
    """What config.json says of experts."""
    raw = {
        "num_experts": spec.moe.num_experts,
        "num_experts_per_tok": spec.moe.experts_per_token,
        "moe_intermediate_size": spec.moe.ffn_width,
        "norm_topk_prob": spec.moe.norm_topk,
        "router_aux_loss_coef": spec.moe.balance_coef,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(spec.dense_layers),
    }
    if spec.moe.shared_width:
        raw["shared_expert_intermediate_size"] = spec.moe.shared_width
    return raw


def check_spec(spec: spec_lib.Spec) -> None:
    """Refuse a Spec whose function its own config.json would not tell.

    A family stands for switches that the file does not have: what reads it would build
    another model, and leave out or miss weights.

    Raises:
      config.InputError: naming the fields, what the file says instead, and the fix.
    """
    if spec.family not in FAMILIES:
        raise config.InputError(
            f"model.family={spec.family!r} has no published form"
            f"{config.nearest(spec.family, FAMILIES)}; set --config.model.family, "
            "or --config.export=false"
        )
    wrong = _told_otherwise(spec)
    if not wrong:
        return
    fitting = [
        family
        for family in FAMILIES
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
    # Several ways to say what the layers are: window=0 and full_layers=num_layers are
    # both full attention, patterns may be written once or more often.
    kinds = {"kinds": spec.kinds, "window": 0, "full_layers": 0, "mixers": ()}
    sparse = len(spec.layers_with("mlp")) == 0
    moe = spec.moe and (spec.moe.experts_per_token, spec.moe.norm_topk)
    one = {"rope_scaling": scaling, "moe": moe, "dense_layers": ()} | kinds
    if sparse:
        one["ffn_width"] = 0
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
    raw = read_config(folder)
    dtype = dtype or raw.get("dtype") or raw.get("torch_dtype") or "float32"
    changes = {"param_dtype": dtype, "compute_dtype": dtype} | changes
    spec = spec_from_config(raw, **changes)
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
    check_spec(spec)
    folder = pathlib.Path(folder)
    fused = FAMILIES[spec.family].fused
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
    raw = config_of(spec)
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
    table = names.table(spec, fused=fused)
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
