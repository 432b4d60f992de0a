# SPDX-License-Identifier: Apache-2.0
"""config.json of a Hugging Face folder <-> Spec, for every family.

Both forms are read: `rope_theta` and `rope_scaling` as published, `rope_parameters` of
transformers 5; the text part of a larger model is found in its `text_config`. What
`config_of` writes, releases of either kind read.
Raises: config.InputError for a folder without config.json, an unknown `model_type`, a
field that is missing or says what this decoder does not do, and from `check_spec` for a
Spec that its own config.json could not tell.
"""

import dataclasses
import math
import pathlib
from typing import Any

from qwen_jax import config
from qwen_jax.models import config_checks, hf_parts, hf_vision, json_files, qwen4
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
    # The same block without Qwen's additions: Llama, SmolLM2.
    "llama": Family("LlamaForCausalLM", qk_norm=False),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, qk_norm=False),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        qkv_bias=True,
        qk_norm=False,
        sparse=True,
        shared=True,
    ),
    "qwen2_vl": Family("", qkv_bias=True, qk_norm=False),
    "qwen2_5_vl": Family("", qkv_bias=True, qk_norm=False),
    "qwen3_vl": Family(""),
    "qwen3_vl_moe": Family("", sparse=True, norm_topk=True, fused=True),
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
    qwen4.FAMILY: Family(
        "Qwen4ExpForCausalLM",
        "qwen4_exp_text",
        new=True,
        sparse=True,
        shared=True,
        fused=True,
    ),
}
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
)


# What the published file leaves to the defaults of its text part's class.
_QWEN2_AUDIO = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 22_016,
    "vocab_size": 151_936,
}


def spec_from_config(raw: dict[str, Any], **changes: Any) -> spec_lib.Spec:
    """The Spec of a published config.json.

    Raises:
      config.InputError: an architecture or option this decoder does not have.
    """
    config_checks.weights_and_code(raw)
    file, raw = raw, _text_part(raw)
    config_checks.check(raw)
    family = raw.get("model_type", "").removesuffix("_text")
    if family not in FAMILIES:
        raise config.InputError(
            f"model_type {json_files.shown(family)} in config.json is not supported"
            f"{config.nearest(family, FAMILIES)}"
        )
    known = FAMILIES[family]
    if raw.get("hidden_act", "silu") != "silu":
        raise config.InputError(f"hidden_act {raw['hidden_act']!r}: wanted 'silu'")
    _need(raw, REQUIRED)
    sparse, dense_layers = _sparse(raw, known)
    if not sparse or dense_layers:
        _need(raw, ("intermediate_size",))
    heads = raw["num_attention_heads"]
    theta, scaling = _rope(raw)
    eos = raw.get("eos_token_id")
    window, full_layers = _window(raw) if family != "llama" else (0, 0)
    mixers, delta = _mixers(raw, known)
    seen = hf_vision.vision_of(file, family, raw["hidden_size"])
    sections = hf_vision.sections_of(raw, family) if seen else {}
    values = sections | {
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
        "vision": seen,
        "dense_layers": dense_layers,
        "output_gate": known.new,
        "rotary_share": _rotary_share(raw, family) if known.new else 1.0,
        "norm_offset": known.new,
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "init_std": raw.get("initializer_range", 0.02),
        "bos_id": raw.get("bos_token_id"),
        "eos_ids": tuple(eos)
        if isinstance(eos, list)
        else (() if eos is None else (eos,)),
    }
    if not known.qkv_bias and raw.get("attention_bias"):
        raise config.InputError(
            f"attention_bias=true with {family} puts a bias on the output projection "
            "too, which this decoder does not have"
        )
    if raw.get("mlp_bias"):
        raise config.InputError("mlp_bias=true: this decoder has none in the mlp")
    values |= hf_parts.read(raw, family)
    if family == qwen4.FAMILY:
        values |= qwen4.groups(raw)
    return config.freeze(spec_lib.Spec, values | changes, at="model")


def _need(raw: dict[str, Any], fields: tuple[str, ...]) -> None:
    missing = [key for key in fields if key not in raw]
    if missing:
        raise config.InputError(
            f"config.json lacks {', '.join(missing)}: wanted whole numbers; is it the "
            "file of a whole language model?"
        )


def _text_part(raw: dict[str, Any]) -> dict[str, Any]:
    """What the file says of the text model, without what it leaves open."""
    tie = hf_vision.tied(raw)
    if isinstance(raw.get("text_config"), dict):  # the text part of a larger model
        known = _QWEN2_AUDIO if raw.get("model_type") == "qwen2_audio" else {}
        whole = {k: raw.get(k) for k in ("architectures", "pad_token_id")}
        text = {k: v for k, v in raw["text_config"].items() if v is not None}
        raw = known | whole | text
    if tie is not None:
        raw = raw | {"tie_word_embeddings": tie}
    return {k: v for k, v in raw.items() if v is not None}


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
    _need(raw, keys)
    step, alone = raw.get("decoder_sparse_step") or 1, raw.get("mlp_only_layers") or []
    dense = tuple(
        i for i in range(raw["num_hidden_layers"]) if i in alone or (i + 1) % step != 0
    )
    norm_topk = known.norm_topk
    if norm_topk is None:
        norm_topk = bool(raw.get("norm_topk_prob", known.new))
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
    gates = ("silu",)
    if known.model_type == "qwen4_exp_text":
        known_kinds["indexed_attention"] = "attention"
        gates = ("silu", "sigmoid")
    wrong = [kind for kind in kinds if kind not in known_kinds]
    if wrong or len(kinds) != layers:
        raise config.InputError(
            f"layer_types {json_files.shown(kinds)}: wanted {layers} of "
            f"{', '.join(known_kinds)}"
        )
    mixers = tuple(known_kinds[kind] for kind in kinds)
    period = next(
        n for n in range(1, layers + 1) if mixers == (mixers[:n] * layers)[:layers]
    )
    mixers = mixers[:period]
    gate = raw.get("output_gate_type") or "silu"
    gate = "silu" if gate == "swish" else gate
    if gate not in gates:
        raise config.InputError(
            f"output_gate_type {gate!r}: wanted {' or '.join(map(repr, gates))}"
        )
    if "delta" not in mixers:
        return mixers, None
    fields = {
        "key_heads": "linear_num_key_heads",
        "value_heads": "linear_num_value_heads",
        "key_width": "linear_key_head_dim",
        "value_width": "linear_value_head_dim",
        "conv_taps": "linear_conv_kernel_dim",
    }
    sizes = {ours: raw[key] for ours, key in fields.items() if key in raw}
    return mixers, sizes | {"gate": gate}


def _rotary_share(raw: dict[str, Any], family: str) -> float:
    share = (raw.get("rope_parameters") or {}).get("partial_rotary_factor")
    unsaid = 1.0 if family == qwen4.FAMILY else 0.25
    return float(share or raw.get("partial_rotary_factor") or unsaid)


def _rope(raw: dict[str, Any]) -> tuple[float, spec_lib.RopeScaling | None]:
    """(theta, scaling) from either config form."""
    new = raw.get("rope_parameters") or {}
    old = raw.get("rope_scaling") or {}
    theta = new.get("rope_theta") or raw.get("rope_theta") or 10_000.0
    settings = new or old
    settings = {k: v for k, v in settings.items() if v is not None}
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind in ("default", "mrope"):  # mrope: three positions, of the usual scale
        return theta, None
    if kind not in ("linear", "yarn"):
        raise config.InputError(f"rope type {kind!r}: wanted default, linear or yarn")
    longest = raw.get("max_position_embeddings", 32_768)
    original = settings.get("original_max_position_embeddings") or longest
    factor = settings.get("factor") or (longest / original if kind == "yarn" else 0)
    if factor < 1:
        raise config.InputError(
            f"rope_scaling of kind {kind!r} in config.json has factor="
            f"{settings.get('factor')}: wanted a number of at least 1"
        )
    scaling = spec_lib.RopeScaling(
        kind=kind,
        factor=float(factor),
        original_positions=original,
        beta_fast=float(settings.get("beta_fast") or 32),
        beta_slow=float(settings.get("beta_slow") or 1),
        attention_factor=_attention_factor(settings, factor),
        truncate=settings.get("truncate", True),
    )
    return theta, scaling


def _attention_factor(settings: dict[str, Any], factor: float) -> float | None:
    """What YaRN multiplies cos and sin by where config.json says: the number itself, or
    (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1) where it has both.
    """
    told = settings.get("attention_factor")
    scales = [settings.get(key) for key in ("mscale", "mscale_all_dim")]
    if told is not None or not all(scales):
        return told
    above, below = (0.1 * scale * math.log(factor) + 1 for scale in scales)
    return above / below


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
            f"layer_types {json_files.shown(kinds)}: wanted full layers first, "
            "then sliding ones"
        )
    return (window, full) if full < layers else (0, 0)


def config_of(spec: spec_lib.Spec) -> dict[str, Any]:
    """config.json of a Spec, in the published form, which every release reads."""
    known = FAMILIES[spec.family]
    raw = {
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
    if not known.qkv_bias:
        raw["attention_bias"] = False
    if spec.family == "qwen2_moe":
        raw["qkv_bias"] = spec.qkv_bias
    if spec.moe is not None:
        raw |= _moe_config(spec)
    elif known.sparse:
        raw["num_experts"] = 0  # what has none there is asked how many it has
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
    if known.new:
        raw |= _new_config(spec, raw["rope_scaling"])
    if spec.family == qwen4.FAMILY:
        raw |= qwen4.config_of(spec)
    parts = hf_parts.write(spec, known.architecture)
    if spec.vision is None:
        return raw | parts
    del parts["architectures"]  # that of the model with its tower
    return hf_vision.whole(spec, raw | parts)


def _new_config(spec: spec_lib.Spec, scaling: dict[str, Any] | None) -> dict[str, Any]:
    """What config.json says of gated and linear layers."""
    kinds = {"attention": "full_attention", "delta": "linear_attention"}
    rope = {"rope_type": "default", "rope_theta": spec.rope_theta} | (scaling or {})
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
    hf_parts.check(spec)
    wrong = _told_otherwise(spec)
    if not wrong:
        return
    fitting = [
        family
        for family, known in FAMILIES.items()
        if known.sparse == (spec.moe is not None)
        and _fits(dataclasses.replace(spec, family=family))
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


def same_function(one: spec_lib.Spec, other: spec_lib.Spec) -> bool:
    """Whether two Specs compute the same of the same weights."""
    return _function(one) == _function(other)


def _fits(spec: spec_lib.Spec) -> bool:
    try:
        return not _told_otherwise(spec)
    except config.InputError:  # not even a model
        return False


def _told_otherwise(spec: spec_lib.Spec) -> dict[str, tuple[Any, Any]]:
    """{field: (here, as read from config_of)} where the function differs."""
    if spec.vision is None and spec.family in hf_vision.ONLY_WHOLE:
        return {"vision": (None, "given")}
    if spec.vision is not None and spec.family not in hf_vision.TEXT:
        return {"vision": ("given", None)}
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
        "pad_id",
    )
    names = [f.name for f in dataclasses.fields(spec) if f.name not in none]
    scaling = spec.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        scaling = ("linear", scaling.factor)  # and nothing else of it
    # Several ways to say what the layers are: window=0 and full_layers=num_layers are
    # both full attention, patterns may be written once or more often.
    kinds = {"kinds": spec.kinds, "window": 0, "full_layers": 0, "mixers": ()}
    sparse = len(spec.layers_with("mlp")) == 0
    moe = spec.moe and (
        spec.moe.experts_per_token,
        spec.moe.norm_topk,
        spec.moe.shared_width,
    )
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
    if folder.is_file():
        raise config.InputError(
            f"{folder} is a file where a model folder is wanted; if it is a GGUF file, "
            f"`qwen-jax convert {folder} DIR` makes a folder of it"
        )
    if not folder.is_dir():
        raise config.InputError(f"model folder {str(folder)!r} does not exist")
    if not path.is_file():
        single = sorted(x.name for x in folder.glob("*.gguf"))
        hint = f"; or give one of its GGUF files: {', '.join(single[:9])}"
        begun = any(folder.glob("*.partial"))
        raise config.InputError(
            f"{folder} has no config.json: wanted a Hugging Face model folder "
            f"(config.json and *.safetensors){hint if single else ''}"
            + ("; one was being written here: write it again" if begun else "")
        )
    return json_files.read(path)
