# SPDX-License-Identifier: Apache-2.0
"""The vision part of config.json <-> `spec.Vision`, and the file of a whole model.

Two forms: Qwen2-VL and Qwen2.5-VL are published flat, the text part's fields beside
`vision_config`; from Qwen3-VL on (and as transformers saves all of them now) there is a
`text_config`, too. Both are read; a family is written as it was published.
A field that a `vision_config` leaves out has the default of its family's class there.
Raises: config.InputError for a vision part that this tower is not.
"""

from collections.abc import Callable, Iterable
from typing import Any

from qwen_jax import config
from qwen_jax.models import names_vision
from qwen_jax.models import spec as spec_lib

# What a text model of the same function is called, and what the whole is built by.
TEXT = {
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    "qwen3_5": "qwen3_5",
    "qwen3_5_moe": "qwen3_5_moe",
}
ARCHITECTURES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
}
# Those that always have vision: their text part alone is a model of another family.
ONLY_WHOLE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
SECTIONS = {"qwen2": (16, 24, 24), "qwen3": (24, 20, 20), "qwen3_5": (11, 11, 10)}
_ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "swiglu",
}
_IDS = {
    "image_id": "image_token_id",
    "video_id": "video_token_id",
    "start_id": "vision_start_token_id",
    "end_id": "vision_end_token_id",
}
# Ours -> theirs; the widths of Qwen2-VL have names of their own.
_FIELDS = {
    "num_layers": "depth",
    "width": "hidden_size",
    "num_heads": "num_heads",
    "ffn_width": "intermediate_size",
    "patch": "patch_size",
    "temporal_patch": "temporal_patch_size",
    "channels": "in_channels",
    "merge": "spatial_merge_size",
}


def _defaults(family: str) -> dict[str, Any]:
    """What a tower of this family is where its `vision_config` does not say."""
    if family == "qwen2_vl":
        old = {"num_layers": 32, "width": 1280, "patch": 14, "norm": "layer"}
        alone = {"patch_bias": False, "places": 0, "frame_blocks": False}
        return old | alone | {"mlp": "quick_gelu"}
    if family == "qwen2_5_vl":
        mine = {"ffn_width": 3420, "norm": "rms", "mlp": "swiglu", "window": 112}
        mine |= {"full_layers": (7, 15, 23, 31), "tokens_per_second": 4}
        return _defaults("qwen2_vl") | mine | {"width": 3584}
    if family.startswith("qwen3_vl"):
        return {"deepstack": (8, 16, 24)}
    ids = {"image_id": 248_056, "video_id": 248_057}
    return ids | {"start_id": 248_053, "end_id": 248_054}


def _activation(mlp: str) -> str:
    return next(there for there, ours in _ACTIVATIONS.items() if ours == mlp)


def _side(vision: dict[str, Any], key: str) -> Any:
    """A size that may be given as one for each dim."""
    size = vision[key]
    if isinstance(size, list):
        if len(set(size)) != 1:
            raise config.InputError(
                f"vision_config.{key} is {size}: wanted equal sides, or one number"
            )
        return size[0]
    return size


def vision_of(raw: dict[str, Any], family: str, width: int) -> dict[str, Any] | None:
    """The fields of `spec.Vision` that a whole model's config.json tells, or None.

    Args:
      raw: the file.
      family: of the model.
      width: of its text part, which the tower must end in.
    Raises:
      config.InputError: see the module docstring.
    """
    if family not in TEXT or (
        family not in ONLY_WHOLE and not raw.get("vision_config")
    ):
        return None
    vision = dict(raw.get("vision_config") or {})
    vision.setdefault("in_channels", vision.get("in_chans", 3))
    fields = dict(_FIELDS)
    if family == "qwen2_vl":
        fields["width"] = "embed_dim"
        out = vision.get("hidden_size", width)
    else:
        out = vision.get("out_hidden_size", width)
    if out != width:
        raise config.InputError(
            f"the vision part of config.json ends in {out} numbers for each token, the "
            f"text part begins with {width}"
        )
    values = _defaults(family)
    values |= {o: _side(vision, t) for o, t in fields.items() if vision.get(t)}
    if family == "qwen2_vl":
        values["ffn_width"] = int(values["width"] * (vision.get("mlp_ratio") or 4))
    extra = {}
    if family == "qwen2_5_vl":
        extra = {"window": "window_size", "full_layers": "fullatt_block_indexes"}
        extra["tokens_per_second"] = "tokens_per_second"
    elif family != "qwen2_vl":
        extra = {"places": "num_position_embeddings"}
        if family.startswith("qwen3_vl"):
            extra["deepstack"] = "deepstack_visual_indexes"
    values |= {o: vision[t] for o, t in extra.items() if vision.get(t) is not None}
    act, mlp = vision.get("hidden_act"), values.get("mlp", "gelu_tanh")
    if act is not None and _ACTIVATIONS.get(act) != mlp:
        raise config.InputError(
            f"vision_config.hidden_act {act!r} in a {family} model: wanted "
            f"{_activation(mlp)!r}"
        )
    theta = (vision.get("rope_parameters") or {}).get("rope_theta")
    if theta:
        values["rope_theta"] = float(theta)
    ids = {o: raw[t] for o, t in _IDS.items() if raw.get(t) is not None}
    return values | ids


def sections_of(raw: dict[str, Any], family: str) -> dict[str, Any]:
    """The fields of Spec for three positions, from the text part."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    known = SECTIONS["qwen3_5" if family.startswith("qwen3_5") else family[:5]]
    return {
        "mrope_sections": tuple(rope.get("mrope_section") or known),
        "mrope_interleaved": not family.startswith("qwen2"),
    }


def tied(raw: dict[str, Any]) -> bool | None:
    """Whether head and embedding are one, as the outer part of the file says it; None
    where it leaves that to the text part."""
    outer = raw.get("tie_word_embeddings")
    text = raw.get("text_config") or {}
    if raw.get("model_type") in names_vision.FLAT and text.get("tie_word_embeddings"):
        return True  # older releases wrote it there alone
    return outer


def text_only(raw: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a model's text part, as a model of its text family."""
    family = raw.get("model_type", "")
    if family not in TEXT:
        return raw
    text = raw.get("text_config") or raw
    text = {k: v for k, v in text.items() if k not in ("vision_config", *_IDS.values())}
    rope = {}
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(text.get(key), dict):
            rope[key] = dict(text[key])
            if rope[key].get("type") == "mrope":
                del rope[key]["type"]
    tie = tied(raw)
    if tie is None:
        tie = bool(text.get("tie_word_embeddings"))
    name = TEXT[family] + ("_text" if family.startswith("qwen3_5") else "")
    more = {"model_type": name, "tie_word_embeddings": tie}
    if family == "qwen3_vl_moe":
        more["norm_topk_prob"] = True
    return text | rope | more


def whole(spec: spec_lib.Spec, raw: dict[str, Any]) -> dict[str, Any]:
    """config.json of a vision-language Spec from that of its text part."""
    v = spec.vision
    vision = {theirs: getattr(v, ours) for ours, theirs in _FIELDS.items()}
    vision |= {
        "hidden_act": _activation(v.mlp),
        "initializer_range": spec.init_std,
        "model_type": spec.family,
        "out_hidden_size": spec.width,
    }
    if v.rope_theta != 10_000:
        rope = {"rope_type": "axial", "rope_theta": v.rope_theta}
        vision["rope_parameters"] = rope
    if spec.family == "qwen2_vl":
        del vision["out_hidden_size"], vision["intermediate_size"]
        vision |= {"embed_dim": v.width, "hidden_size": spec.width}
        vision |= {"mlp_ratio": v.ffn_width // v.width}
    elif spec.family == "qwen2_5_vl":
        vision |= {
            "fullatt_block_indexes": list(v.full_layers),
            "tokens_per_second": v.tokens_per_second,
            "window_size": v.window,
        }
    else:
        vision["num_position_embeddings"] = v.places
        if spec.family.startswith("qwen3_vl"):
            vision["deepstack_visual_indexes"] = list(v.deepstack)
    if _flat(spec):  # old releases know the sizes of these by other names only
        vision |= {"in_chans": v.channels, "spatial_patch_size": v.patch}
    rope = {"mrope_section": list(spec.mrope_sections)}
    if spec.mrope_interleaved:
        rope["mrope_interleaved"] = True
    kind = (raw["rope_scaling"] or {}).get("rope_type")
    rope |= raw["rope_scaling"] or {}
    rope |= (
        {"type": kind or "mrope"} if _flat(spec) else {"rope_type": kind or "default"}
    )
    if "rope_parameters" in raw:
        raw = raw | {"rope_parameters": raw["rope_parameters"] | rope}
    else:
        raw = raw | {"rope_scaling": rope}
    outer = {
        "architectures": [ARCHITECTURES[spec.family]],
        "model_type": spec.family,
        "tie_word_embeddings": spec.tie_embedding,
        "vision_config": vision,
        **{theirs: getattr(v, ours) for ours, theirs in _IDS.items()},
    }
    if _flat(spec):
        # Heads of these have width / heads numbers, there is no field to say otherwise.
        return {k: x for k, x in raw.items() if k != "head_dim"} | outer
    # Windows are no part of these text models.
    out = ("architectures", "torch_dtype", "use_sliding_window", "sliding_window")
    text = {k: x for k, x in raw.items() if k not in (*out, "max_window_layers")}
    text["model_type"] = f"{spec.family}_text"
    return outer | {"text_config": text, "torch_dtype": raw["torch_dtype"]}


def _flat(spec: spec_lib.Spec) -> bool:
    return spec.family in names_vision.FLAT


def turned(
    spec: spec_lib.Spec,
    names: Iterable[str],
    shape: Callable[[str], tuple[int, ...]],
) -> bool:
    """Whether a folder's fused experts have their inputs first: [expert, in, out] as
    Qwen3-VL was published, not [expert, out, in] as transformers 5 saves it.

    One of the two tensors of a layer may be square, both cannot; a folder is of one
    form, so the other tells.
    """
    if spec.family != "qwen3_vl_moe":
        return False
    d, f = spec.width, spec.moe.ffn_width
    end, told = ("down_proj", (f, d)) if d != f else ("gate_up_proj", (d, 2 * f))
    found = (name for name in names if name.endswith(f"mlp.experts.{end}"))
    return any(shape(name)[1:] == told for name in found)
