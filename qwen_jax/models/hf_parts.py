# SPDX-License-Identifier: Apache-2.0
"""What config.json and tensor names say beside the layers: heads, dual chunks.

    architectures                        head
    Qwen3ForCausalLM and the like        tokens
    Qwen3Model                           none; names of tensors lack "model."
    Qwen3ForSequenceClassification       classes, of the last token of a document
    Qwen3ForTokenClassification          token_classes
    Qwen2ForRewardModel                  reward with 1 class
    Qwen2ForProcessRewardModel           reward with 2 classes

Source: transformers' classes for all but the last two, which are those of
Qwen2.5-Math-RM and -PRM. The number of classes is that of `id2label`, or `num_labels`,
which transformers leaves out when it is 2.
The head for further tokens (MTP) has `mtp_num_hidden_layers` layers in Qwen3.5 and
`num_nextn_predict_layers` in Qwen3-Next, whose published config.json leaves the number
out; tensors are `mtp.*`. Libraries drop them and keep the number, so files decide.
Dual chunk attention is `dual_chunk_attention_config`, as in Qwen2.5-1M.
Raises: config.InputError from `check` for a head that the family has no class for.
"""

import re
from collections.abc import Iterable
from typing import Any

from qwen_jax import config
from qwen_jax.models import spec as spec_lib

ENDINGS = {
    "tokens": "ForCausalLM",
    "none": "Model",
    "classes": "ForSequenceClassification",
    "token_classes": "ForTokenClassification",
}
REWARDS = {"ForRewardModel": 1, "ForProcessRewardModel": 2}
# Heads that transformers, or for rewards the published code, has no class for.
WITHOUT = {
    "qwen2": (),
    "qwen3_5": ("token_classes", "reward"),
    "qwen3_5_moe": ("classes", "token_classes", "reward"),
    "qwen4_exp": ("classes", "token_classes", "reward"),
}


CHUNKS = {
    "chunk_size": "chunk_size",
    "local_size": "local_size",
    "original_positions": "original_max_position_embeddings",
}
MTP = {"qwen3_next": "num_nextn_predict_layers"}
MTP |= dict.fromkeys(("qwen3_5", "qwen3_5_moe"), "mtp_num_hidden_layers")


def mtp_layers(names: Iterable[str]) -> int:
    """Layers of the MTP head of which there are tensors."""
    found = (re.match(r"mtp\.layers\.(\d+)\.", name) for name in names)
    return len({match[1] for match in found if match})


def read(raw: dict[str, Any], family: str) -> dict[str, Any]:
    """Fields of the Spec that say what the heads are."""
    name = (raw.get("architectures") or [""])[0]
    out = {"pad_id": raw.get("pad_token_id"), "dual_chunk": None}
    if chunks := raw.get("dual_chunk_attention_config"):
        out["dual_chunk"] = {ours: chunks.get(key) or 0 for ours, key in CHUNKS.items()}
    if name.endswith((ENDINGS["tokens"], "ForConditionalGeneration")) or not name:
        out["mtp_layers"] = raw.get(MTP.get(family, ""), 0) or 0
    for ending, classes in REWARDS.items():
        if name.endswith(ending):
            return out | {"head": "reward", "num_classes": classes}
    for head in ("classes", "token_classes"):
        if name.endswith(ENDINGS[head]):
            labels = raw.get("id2label")
            bias = head == "token_classes" and raw.get("token_classification_bias", 1)
            return out | {
                "head": head,
                "num_classes": len(labels) if labels else raw.get("num_labels", 2),
                "head_bias": bool(bias),
            }
    return out | {"head": "none" if name.endswith(ENDINGS["none"]) else "tokens"}


def write(spec: spec_lib.Spec, architecture: str) -> dict[str, Any]:
    """What config.json says of the head; `architecture` is that of the family with
    tokens."""
    ending = ENDINGS.get(spec.head)
    if spec.head == "reward":
        ending = next((k for k, n in REWARDS.items() if n == spec.num_classes), "")
    stem = architecture.removesuffix(ENDINGS["tokens"])
    whole = ("qwen3_5", "qwen3_5_moe", "qwen4_exp")
    if spec.family in whole and spec.head != "tokens":
        stem += "Text"  # the bare name is that of the model with vision
    raw = {"architectures": [stem + ending]}
    if spec.pad_id is not None:
        raw["pad_token_id"] = spec.pad_id
    if spec.dual_chunk is not None:
        chunks = {key: getattr(spec.dual_chunk, ours) for ours, key in CHUNKS.items()}
        raw["dual_chunk_attention_config"] = chunks
    if spec.mtp_layers and spec.family in MTP:
        raw[MTP[spec.family]] = spec.mtp_layers
    if spec.head in ("classes", "token_classes"):
        names = {str(i): f"LABEL_{i}" for i in range(spec.num_classes)}
        raw["id2label"] = names
        raw["label2id"] = {name: int(i) for i, name in names.items()}
    if spec.head == "token_classes" and not spec.head_bias:
        raw["token_classification_bias"] = False
    return raw


def check(spec: spec_lib.Spec) -> None:
    """Refuse a head that nothing else would read.

    Raises:
      config.InputError: naming the head, the family and the fix.
    """
    if spec.head in WITHOUT.get(spec.family, ("reward",)):
        raise config.InputError(
            f"there is no published form of a {spec.family} with head={spec.head!r}: "
            "set --config.model.head=tokens, or --config.export=false"
        )


def whole_name(name: str) -> str:
    """A tensor of a folder without "model." in its names, as in other folders."""
    own = ("lm_head.", "score.", "mtp.", "model.", "visual.")
    return name if name.startswith(own) else f"model.{name}"


def saved_name(spec: spec_lib.Spec, name: str) -> str:
    """The name of a tensor in the folder of this model."""
    return name.removeprefix("model.") if spec.head == "none" else name
