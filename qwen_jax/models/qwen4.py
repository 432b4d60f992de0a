# SPDX-License-Identifier: Apache-2.0
"""What files say of the preview of Qwen4 (`qwen4_exp`) and of no other family.

config.json <-> the groups streams, indexed and ngram of a Spec, for `hf_config.py`; the
tensors of their weights, for `names.py`; and the constants of the hashes that such
files carry beside the weights, for `hf.py`.

Formats: a table of n-grams is cut along its rows into `split_ngram_parts` tensors,
`shard_0`, `shard_1`, ..., or whole. Layers are counted from 1 in `ple_layer_ids`.
Source: `qwen4_exp` of transformers 5.23.
Raises: config.InputError for values that are missing or that this decoder does not do.
"""

from typing import Any

import numpy as np

from qwen_jax import config
from qwen_jax.models import ngram
from qwen_jax.models import spec as spec_lib

FAMILY = "qwen4_exp"
TABLE = "layers.ngram.table_lvk"
_INDEX = {
    "heads": "indexer_n_heads",
    "width": "indexer_head_dim",
    "budget": "indexer_budget",
    "ratio": "indexer_compress_ratio",
}
_NGRAM = {
    "size": "ngram_size",
    "heads": "heads_per_ngram",
    "width": "ple_embed_dim",
    "taps": "ple_conv_kernel_size",
    "base": "ngram_vocab_size_base",
    "multiple": "make_ngram_vocab_size_divisible_by",
    "seed": "seed",
    "shards": "split_ngram_parts",
}


def groups(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of a Spec that the config.json of this family alone has.

    Raises:
      config.InputError: an index that is not whole or has several key heads, n-gram
        embeddings without an end-of-text id.
    """
    layers = sorted(set(raw.get("ple_layer_ids") or []))
    return {
        "streams": {
            "count": raw.get("hc_count", 4),
            "rank": raw.get("hc_lowrank", 320),
        },
        "indexed": _indexed(raw),
        "ngram": _ngram(raw, layers) if layers else None,
    }


def _indexed(raw: dict[str, Any]) -> dict[str, int] | None:
    if all(raw.get(key) is None for key in (*_INDEX.values(), "indexer_kv_heads")):
        return None
    missing = [key for key in _INDEX.values() if not isinstance(raw.get(key), int)]
    if missing:
        raise config.InputError(
            f"config.json lacks {', '.join(missing)}: wanted whole numbers"
        )
    if raw.get("indexer_kv_heads") != 1:
        raise config.InputError(
            f"indexer_kv_heads={raw.get('indexer_kv_heads')} in config.json: wanted 1"
        )
    return {ours: raw[key] for ours, key in _INDEX.items()}


def _ngram(raw: dict[str, Any], layers: list[int]) -> dict[str, Any]:
    eos = raw.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    if not isinstance(eos, int):
        raise config.InputError(
            f"eos_token_id={eos!r} in config.json: wanted an id, which the n-gram "
            "embeddings of ple_layer_ids need"
        )
    if not 1 <= layers[0] <= layers[-1] <= raw["num_hidden_layers"]:
        raise config.InputError(
            f"ple_layer_ids={layers} in config.json: wanted layers from 1 to "
            f"num_hidden_layers={raw['num_hidden_layers']}"
        )
    published = {"shards": 512} | {
        ours: raw[key] for ours, key in _NGRAM.items() if raw.get(key) is not None
    }
    width = {"width": raw["hidden_size"]}
    return width | published | {"layers": [i - 1 for i in layers], "eos_id": eos}


def config_of(spec: spec_lib.Spec) -> dict[str, Any]:
    """What config.json says of these groups, of the gate and of the end of text."""
    raw = {"ple_layer_ids": []}
    if spec.streams is not None:
        raw |= {"hc_count": spec.streams.count, "hc_lowrank": spec.streams.rank}
    if spec.indexed is not None:
        raw |= {key: getattr(spec.indexed, ours) for ours, key in _INDEX.items()}
        raw["indexer_kv_heads"] = 1
    if spec.delta is not None:
        raw["output_gate_type"] = spec.delta.gate
    if spec.ngram is None:
        return raw
    raw |= {key: getattr(spec.ngram, ours) for ours, key in _NGRAM.items()}
    raw["ple_layer_ids"] = [i + 1 for i in spec.ngram.layers]
    if not spec.eos_ids:
        raw["eos_token_id"] = spec.ngram.eos_id
    return raw


_LAYER = "model.layers.{i}."
_HYPER = (
    ("hc_norm.weight", "norm_lrd", "(r d) -> {l}r d"),
    ("input_mix_weight_down.weight", "down_lrdq", "q (r d) -> {l}r d q"),
    ("input_mix_weight_up.weight", "up_lqrd", "(r d) q -> {l}q r d"),
    ("block_inject_weight.weight", "inject_lrdo", "o (r d) -> {l}r d o"),
)
_INDEXER = _LAYER + "self_attn.indexer."
_A = "layers.attention.indexer."
_PLE = _LAYER + "ple."
_N = "layers.ngram."
_EMBEDDING = _PLE + "ple_embedding."


def tensors(*, whole: bool) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """(name there, ((weight here, einops pattern), ...)) of each, see `names.Tensor`;
    `whole`: tables of n-grams are not cut."""
    mixers = (
        (_LAYER + "attn_hyper_connection.", "layers.attention_streams.", ""),
        (_LAYER + "mlp_hyper_connection.", "layers.mlp_streams.", ""),
        ("model.hyper_connection_mixer.", "streams.", "1 "),
    )
    table = "weight" if whole else "shard_{s}.weight"
    return (
        *(
            (there + name, ((key + weight, pattern.replace("{l}", one)),))
            for there, key, one in mixers
            for name, weight, pattern in _HYPER
        ),
        (
            _INDEXER + "index_qk_proj.weight",
            ((_A + "q_ldni", "(n i) d -> d n i"), (_A + "k_ldi", "i d -> d i")),
        ),
        (_INDEXER + "q_layernorm.weight", ((_A + "q_norm_li", "i -> i"),)),
        (_INDEXER + "k_layernorm.weight", ((_A + "k_norm_li", "i -> i"),)),
        (_EMBEDDING + "ngram_embedding." + table, ((TABLE, "v k -> v k"),)),
        (_PLE + "key_proj.weight", ((_N + "key_lprd", "(r d) p -> p r d"),)),
        (_PLE + "value_proj.weight", ((_N + "value_lpd", "d p -> p d"),)),
        (_PLE + "norm_key.weight", ((_N + "norm_key_lrd", "(r d) -> r d"),)),
        (_PLE + "norm_query.weight", ((_N + "norm_query_lrd", "(r d) -> r d"),)),
        (_PLE + "norm_conv.weight", ((_N + "norm_conv_lrd", "(r d) -> r d"),)),
        (_PLE + "conv1d.weight", ((_N + "conv_ljrd", "(r d) 1 j -> j r d"),)),
    )


def sizes(spec: spec_lib.Spec, key: str) -> dict[str, int] | None:
    """What the letters of patterns stand for; None for weights of other families."""
    if key.startswith(_A):
        return {"n": spec.indexed.heads, "i": spec.indexed.width}
    if key.startswith(_N):
        grams = spec.ngram
        rows = max(x.rows for x in ngram.tables(grams, spec.vocab_size))
        return {
            "r": spec.streams.count,
            "p": grams.width,
            "j": grams.taps,
            "v": rows,
            "k": grams.width // grams.tables,
        }
    if "streams." in key:
        streams = spec.streams
        return {"r": streams.count, "o": streams.count, "q": streams.rank}
    return None


def shards(spec: spec_lib.Spec, row: int, *, whole: bool) -> list[slice]:
    """The rows of a layer's table that each tensor holds: equal parts, the last less;
    files have fewer than they should where rows do not reach for all."""
    rows = ngram.tables(spec.ngram, spec.vocab_size)[row].rows
    each = -(-rows // (1 if whole else spec.ngram.shards))
    return [slice(i, min(i + each, rows)) for i in range(0, rows, each)]


def constants(spec: spec_lib.Spec) -> dict[str, np.ndarray]:
    """{name there: what a hash is made of}; files have them beside the weights."""
    if spec.ngram is None:
        return {}
    out = {}
    for layer, table in zip(
        spec.ngram.layers, ngram.tables(spec.ngram, spec.vocab_size), strict=True
    ):
        name = _EMBEDDING.replace("{i}", str(layer))
        out |= {
            name + "layer_multipliers": np.array(table.multipliers, np.int64),
            name + "ngram_heads_vocab_sizes": np.array(table.primes, np.int64),
            name + "ngram_heads_offsets": np.array(table.offsets, np.int64),
        }
    return out
