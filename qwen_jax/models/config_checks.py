# SPDX-License-Identifier: Apache-2.0
"""What the fields of a config.json may be, before anything is made of them.

A folder comes from a stranger: a number may be text, true, negative, NaN or 10^9. Each
known field has a kind and a range, far above every published model and low enough that
nothing downstream takes long or much memory. `check` looks at the fields that are
there; which ones must be is said where they are used.

Formats: `raw` is the parsed file, with the fields of the text part at the top.
Raises: config.InputError naming the field, its value and what was wanted.
"""

import sys
from typing import Any

from qwen_jax import config
from qwen_jax.models import json_files

# {field: (least, most)} of whole numbers; a model has more of none of them.
COUNTS = {
    "vocab_size": (1, 1 << 24),
    "hidden_size": (1, 1 << 20),
    "intermediate_size": (0, 1 << 22),
    "num_hidden_layers": (1, 2048),
    "num_attention_heads": (1, 1 << 14),
    "num_key_value_heads": (1, 1 << 14),
    "head_dim": (1, 1 << 14),
    "max_position_embeddings": (1, 1 << 30),
    "max_window_layers": (0, 1 << 20),
    "sliding_window": (0, 1 << 30),
    "num_experts": (0, 1 << 14),
    "num_local_experts": (0, 1 << 14),
    "num_experts_per_tok": (1, 1 << 14),
    "moe_intermediate_size": (1, 1 << 22),
    "shared_expert_intermediate_size": (0, 1 << 22),
    "decoder_sparse_step": (0, 2048),
    "full_attention_interval": (1, 2048),
    "linear_num_key_heads": (1, 1 << 14),
    "linear_num_value_heads": (1, 1 << 14),
    "linear_key_head_dim": (1, 1 << 14),
    "linear_value_head_dim": (1, 1 << 14),
    "linear_conv_kernel_dim": (2, 1024),
    "bos_token_id": (0, 1 << 31),
    "pad_token_id": (-1, 1 << 31),
    "num_labels": (1, 1 << 20),
    "mtp_num_hidden_layers": (0, 64),
    "num_nextn_predict_layers": (0, 64),
    "hc_count": (1, 1024),
    "hc_lowrank": (1, 1 << 20),
    "indexer_n_heads": (1, 1 << 14),
    "indexer_kv_heads": (1, 1 << 14),
    "indexer_head_dim": (1, 1 << 14),
    "indexer_budget": (1, 1 << 30),
    "indexer_compress_ratio": (1, 1 << 20),
    "ngram_size": (1, 8),
    "heads_per_ngram": (1, 64),
    "ple_embed_dim": (1, 1 << 20),
    "ple_conv_kernel_size": (1, 1024),
    "ngram_vocab_size_base": (1, 1 << 60),
    "make_ngram_vocab_size_divisible_by": (1, 1 << 24),
    "split_ngram_parts": (1, 4096),
    "seed": (0, 1 << 62),
}
CHUNKS = ("chunk_size", "local_size", "original_max_position_embeddings")
NUMBERS = {
    "rope_theta": (1e-3, 1e15),
    "rms_norm_eps": (0.0, 1.0),
    "initializer_range": (0.0, 1e3),
    "partial_rotary_factor": (1e-6, 1.0),
    "router_aux_loss_coef": (0.0, 1e3),
}
ROPE = {
    "rope_theta": NUMBERS["rope_theta"],
    "factor": (1.0, 1e6),
    "beta_fast": (1e-3, 1e6),
    "beta_slow": (1e-6, 1e6),
    "attention_factor": (1e-6, 1e6),
    "partial_rotary_factor": NUMBERS["partial_rotary_factor"],
}
ROPE_COUNTS = {"original_max_position_embeddings": (1, 1 << 30)}
SWITCHES = (
    "tie_word_embeddings",
    "use_sliding_window",
    "norm_topk_prob",
    "attention_bias",
    "qkv_bias",
    "token_classification_bias",
)
WORDS = ("model_type", "hidden_act", "dtype", "torch_dtype", "output_gate_type")
MAX_EXPERTS = 1 << 18  # of all layers together
MAX_WEIGHTS = 1 << 50


def check(raw: dict[str, Any]) -> None:
    """Refuse a config.json with a field that no model of ours can have.

    Raises:
      config.InputError: see the module docstring.
    """
    for field, (least, most) in COUNTS.items():
        _whole(raw.get(field), least, most, field)
    for field, (least, most) in NUMBERS.items():
        _number(raw.get(field), least, most, field)
    for field in SWITCHES:
        if not isinstance(raw.get(field), bool | None):
            raise _refused(raw[field], field, "true or false")
    for field in WORDS:
        _word(raw.get(field), field)
    for field in ("rope_parameters", "rope_scaling"):
        _rope(raw.get(field), field)
    for field in ("dual_chunk_attention_config", "id2label"):
        _group(raw.get(field), field)
    for key in CHUNKS:
        value = (raw.get("dual_chunk_attention_config") or {}).get(key)
        _whole(value, 0, 1 << 30, f"dual_chunk_attention_config.{key}")
    _list(raw.get("architectures"), str, 16, "architectures")
    layers = raw.get("num_hidden_layers") or 1
    most = COUNTS["num_hidden_layers"][1]
    _list(raw.get("layer_types"), str, most, "layer_types")
    _list(raw.get("mlp_only_layers"), int, most, "mlp_only_layers")
    _list(raw.get("ple_layer_ids"), int, 64, "ple_layer_ids")
    eos = raw.get("eos_token_id")
    if isinstance(eos, list):
        _list(eos, int, 4096, "eos_token_id")
    for i in eos if isinstance(eos, list) else [eos]:
        _whole(i, 0, 1 << 31, "eos_token_id")
    _together(raw, layers)


def _together(raw: dict[str, Any], layers: int) -> None:
    """Fields that have to fit each other."""
    width, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
    if width and heads and not raw.get("head_dim") and width % heads:
        raise config.InputError(
            f"config.json: hidden_size={width} is no multiple of num_attention_heads="
            f"{heads}, and no head_dim is given"
        )
    experts = raw.get("num_experts") or raw.get("num_local_experts") or 0
    if layers * experts > MAX_EXPERTS:
        raise config.InputError(
            f"config.json: num_hidden_layers={layers} with num_experts={experts} are "
            f"more experts than the {MAX_EXPERTS:,} that a model may have"
        )
    feed = max(
        raw.get("intermediate_size") or 0,
        experts * (raw.get("moe_intermediate_size") or 0),
    )
    weights = (width or 0) * (layers * feed + 2 * (raw.get("vocab_size") or 0))
    if weights > MAX_WEIGHTS:
        raise config.InputError(
            f"config.json tells of {weights:,} weights, more than the "
            f"{MAX_WEIGHTS:,} that a model may have"
        )


def weights_and_code(raw: dict[str, Any]) -> None:
    """Refuse quantized weights by the name of their method; note code of the folder.

    Raises:
      config.InputError: there is a quantization_config.
    """
    told = raw.get("quantization_config")
    if told is not None:
        method = told.get("quant_method") if isinstance(told, dict) else told
        raise config.InputError(
            f"config.json has quantization_config ({json_files.shown(method)}): its "
            "weights are stored in that form, which is not read; take the model that "
            "it was made from"
        )
    if raw.get("auto_map") is not None:
        print(
            "note: config.json names code of its folder (auto_map), which is not run",
            file=sys.stderr,
        )


def _rope(settings: Any, field: str) -> None:
    _group(settings, field)
    for key, (least, most) in ROPE.items():
        _number((settings or {}).get(key), least, most, f"{field}.{key}")
    for key, (least, most) in ROPE_COUNTS.items():
        _whole((settings or {}).get(key), least, most, f"{field}.{key}")
    for key in ("rope_type", "type"):
        _word((settings or {}).get(key), f"{field}.{key}")
    if not isinstance((settings or {}).get("truncate"), bool | None):
        raise _refused(settings["truncate"], f"{field}.truncate", "true or false")


def _group(value: Any, field: str) -> None:
    if not isinstance(value, dict | None):
        raise _refused(value, field, "a group of keys")


def _word(value: Any, field: str) -> None:
    if value is not None and not (isinstance(value, str) and len(value) < 100):
        raise _refused(value, field, "a word")


def _whole(value: Any, least: int, most: int, field: str) -> None:
    """Nothing, or a whole number of this range; true and 3.0 are none."""
    if value is None or (type(value) is int and least <= value <= most):
        return
    raise _refused(value, field, f"a whole number of {least:,} to {most:,}")


def _number(value: Any, least: float, most: float, field: str) -> None:
    if value is None:
        return
    if isinstance(value, int | float) and not isinstance(value, bool):
        # Not by `math.isfinite`, which cannot take a whole number of 1,000 digits.
        if least <= value <= most:
            return
    raise _refused(value, field, f"a number of {least:g} to {most:g}")


def _list(values: Any, kind: type, most: int, field: str) -> None:
    if values is None:
        return
    if not isinstance(values, list) or len(values) > most:
        raise _refused(values, field, f"a list of at most {most}")
    for value in values:
        if type(value) is not kind:
            raise _refused(value, field, f"a list of {kind.__name__}")


def _refused(value: Any, field: str, wanted: str) -> config.InputError:
    return config.InputError(
        f"config.json: {field}={json_files.shown(value)}: wanted {wanted}"
    )
