# SPDX-License-Identifier: Apache-2.0
"""Which tensor of a Hugging Face folder is which weight of a vision tower.

Formats: entries as in `names`: a name there, and the weights it holds with the pattern
from theirs to ours. Names here begin as releases of transformers since 4.52 have them,
`model.visual.` beside `model.language_model.`; folders of Qwen2-VL and Qwen2.5-VL are
published with `visual.` beside `model.`. Both are read (`known`), and a folder is
written as its family was published (`published`).
The patch embedding is a convolution there whose kernel is its stride: [d, channels,
frames, rows, columns] is our matrix, numbers of a patch in the order of the processor.
"""

from typing import Any

from qwen_jax.models import spec as spec_lib

PREFIX = "model.visual."
TEXT = "model.language_model."
# Families that were published before both parts moved below `model.`.
FLAT = ("qwen2_vl", "qwen2_5_vl")
# Of modules in the families of each kind.
_OLD = {"up": "mlp.0", "down": "mlp.2", "norm": "ln_q"}
_NEW = {"up": "linear_fc1", "down": "linear_fc2", "norm": "norm"}
_MLPS = {
    "quick_gelu": {"up": "fc1", "down": "fc2"},
    "gelu_tanh": {"up": "linear_fc1", "down": "linear_fc2"},
    "swiglu": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
}
Entry = tuple[str, tuple[tuple[str, str], ...]]


def known(name: str) -> str:
    """A tensor's name in any published folder -> the name in the tables."""
    if name.startswith("visual."):
        return "model." + name
    return name.replace(TEXT, "model.", 1) if name.startswith(TEXT) else name


def published(spec: spec_lib.Spec, name: str) -> str:
    """The name in the tables -> the tensor's name as its family was published."""
    if spec.vision is None:
        return name
    if spec.family in FLAT:
        return name.removeprefix("model.") if name.startswith(PREFIX) else name
    if name.startswith(PREFIX) or not name.startswith("model."):
        return name
    return TEXT + name.removeprefix("model.")


def _pair(name: str, key: str, weight: str, bias: str, pattern: str) -> list[Entry]:
    """Weight and bias of a linear layer."""
    letter = pattern.split()[0]
    return [
        (f"{name}.weight", ((key + weight, pattern),)),
        (f"{name}.bias", ((key + bias, f"{letter} -> {letter}"),)),
    ]


def table(spec: spec_lib.Spec) -> list[Entry]:
    """The entries of a model's tower, none without one."""
    v = spec.vision
    if v is None:
        return []
    kernel = "d c t y x -> (c t y x) d"
    out: list[Entry] = [
        (f"{PREFIX}patch_embed.proj.weight", (("vision.patch_yd", kernel),)),
        (f"{PREFIX}patch_embed.proj.bias", (("vision.patch_bias_d", "d -> d"),)),
        (f"{PREFIX}pos_embed.weight", (("vision.place_vd", "v d -> v d"),)),
    ]
    block, layers = f"{PREFIX}blocks.{{i}}.", "vision.layers."
    for there, ours in (("norm1", "attention_norm"), ("norm2", "mlp_norm")):
        key = layers + ours
        out += _pair(block + there, key, "_ld", "_bias_ld", "d -> d")
    a = layers + "attention."
    split = [
        ("(n k) d -> d n k", "_ldnk", "weight"),
        ("(n k) -> n k", "_bias_lnk", "bias"),
    ]
    for pattern, end, kind in split:
        parts = tuple((f"{a}{letter}{end}", pattern) for letter in "qkv")
        out.append((f"{block}attn.qkv.{kind}", parts))
    out.append((f"{block}attn.proj.weight", ((a + "o_lnkd", "d (n k) -> n k d"),)))
    out.append((f"{block}attn.proj.bias", ((a + "o_bias_ld", "d -> d"),)))
    m = layers + "mlp."
    for ours, there in _MLPS[v.mlp].items():
        ends, pattern = ("_ldf", "_bias_lf"), "f d -> d f"
        if ours == "down":
            ends, pattern = ("_lfd", "_bias_ld"), "d f -> f d"
        out += _pair(f"{block}mlp.{there}", m + ours, *ends, pattern)
    modules = _NEW if v.mlp == "gelu_tanh" else _OLD
    out += _merger(f"{PREFIX}merger.", "vision.merger.", modules, "", "d")
    deep = f"{PREFIX}deepstack_merger_list.{{i}}."
    return out + _merger(deep, "vision.deepstack.", modules, "l", "w")


def _merger(name: str, key: str, modules, stacked: str, width: str) -> list[Entry]:
    ends = (f"_{stacked}{width}", f"_bias_{stacked}{width}")
    out = _pair(name + modules["norm"], f"{key}norm", *ends, f"{width} -> {width}")
    ends = (f"_{stacked}wf", f"_bias_{stacked}f")
    out += _pair(name + modules["up"], f"{key}up", *ends, "f w -> w f")
    ends = (f"_{stacked}fo", f"_bias_{stacked}o")
    return out + _pair(name + modules["down"], f"{key}down", *ends, "o f -> f o")


def sizes(spec: spec_lib.Spec, key: str) -> dict[str, int]:
    """What the letters of the patterns of a tower's weight stand for."""
    v: Any = spec.vision
    merged = v.width * v.merge**2
    return {
        "d": v.width,
        "v": v.places,
        "c": v.channels,
        "t": v.temporal_patch,
        "y": v.patch,
        "x": v.patch,
        "n": v.num_heads,
        "k": v.head_width,
        "w": merged,
        "o": spec.width,
        "f": v.ffn_width if key.startswith("vision.layers.") else merged,
    }


def owners(spec: spec_lib.Spec, key: str) -> tuple[int, ...]:
    """The numbers there of the modules that a stacked weight is made of."""
    if key.startswith("vision.deepstack."):
        return tuple(range(len(spec.vision.deepstack)))
    return tuple(range(spec.vision.num_layers))
