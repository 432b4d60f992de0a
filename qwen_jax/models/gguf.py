# SPDX-License-Identifier: Apache-2.0
"""GGUF files in: one file with weights, configuration, tokenizer and chat template.

Source: the tensor and key names of ggml's GGUF specification and of the `gguf` package.
Architectures llama, qwen2, qwen3 and qwen3moe; tensor types as in `gguf_file.TYPES`.
Everything is dequantized; the result is a model like any other. The `gguf` package is
not needed: reading it safely takes our own header reader anyway (see `gguf_file`), and
the block formats are a page of NumPy, equal to the package's bit for bit.

Formats: a tensor's rows are outputs, as in a Hugging Face folder. Files of the llama
architecture hold the rows of q and k such that the two numbers that turn together
follow each other; here (as in `rope`) they stand half a head apart.
Invariants: every tensor of the file is used; a fact that would change the function and
that this decoder does not know is refused. `output.weight` absent means tied.
Raises: config.InputError for a file that is damaged, of another architecture or type,
scaled in a way that is not known, or that holds tensors of another model.
"""

import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from qwen_jax import config, mesh, params
from qwen_jax.data import tokenizer as tokenizer_lib
from qwen_jax.models import (
    decoder,
    gguf_blocks,
    gguf_file,
    gguf_vocabulary,
    hf,
    hf_config,
    names,
)
from qwen_jax.models import spec as spec_lib

# Architecture -> family; both name the sizes in the same way.
ARCHITECTURES = {
    **{"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe"}
}
# Facts that would change the function, and the values with which they do not.
NEUTRAL = {
    "expert_shared_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_gating_func": (1,),  # softmax
    "expert_group_count": (0, 1),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "use_parallel_residual": (False,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.scale": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "rope.scaling.alpha": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}

_B, _A, _M = "blk.{i}.", "layers.attention.", "layers.moe."
_TABLE = {
    "embed_vd": ("token_embd.weight", "v d -> v d"),
    "norm_d": ("output_norm.weight", "d -> d"),
    "head_vd": ("output.weight", "v d -> v d"),
    "layers.attention_norm_ld": (_B + "attn_norm.weight", "d -> d"),
    "layers.mlp_norm_ld": (_B + "ffn_norm.weight", "d -> d"),
    _A + "q_ldnk": (_B + "attn_q.weight", "(n k) d -> d n k"),
    _A + "k_ldhk": (_B + "attn_k.weight", "(h k) d -> d h k"),
    _A + "v_ldhk": (_B + "attn_v.weight", "(h k) d -> d h k"),
    _A + "o_lnkd": (_B + "attn_output.weight", "d (n k) -> n k d"),
    _A + "q_bias_lnk": (_B + "attn_q.bias", "(n k) -> n k"),
    _A + "k_bias_lhk": (_B + "attn_k.bias", "(h k) -> h k"),
    _A + "v_bias_lhk": (_B + "attn_v.bias", "(h k) -> h k"),
    _A + "q_norm_lk": (_B + "attn_q_norm.weight", "k -> k"),
    _A + "k_norm_lk": (_B + "attn_k_norm.weight", "k -> k"),
    "layers.mlp.gate_ldf": (_B + "ffn_gate.weight", "f d -> d f"),
    "layers.mlp.up_ldf": (_B + "ffn_up.weight", "f d -> d f"),
    "layers.mlp.down_lfd": (_B + "ffn_down.weight", "d f -> f d"),
    _M + "router_lde": (_B + "ffn_gate_inp.weight", "e d -> d e"),
    _M + "gate_ledf": (_B + "ffn_gate_exps.weight", "e f d -> e d f"),
    _M + "up_ledf": (_B + "ffn_up_exps.weight", "e f d -> e d f"),
    _M + "down_lefd": (_B + "ffn_down_exps.weight", "e d f -> e f d"),
}
_INTERLEAVED = {
    _A + "q_ldnk": (_B + "attn_q.weight", "(n r x) d -> d n (x r)"),
    _A + "k_ldhk": (_B + "attn_k.weight", "(h r x) d -> d h (x r)"),
}


def table(spec: spec_lib.Spec) -> dict[str, names.Tensor]:
    """{path in our tree: the tensor that holds it}; see `names`."""
    both = _TABLE | (_INTERLEAVED if spec.family == "llama" else {})
    return {k: names.Tensor(name, ((k, how),)) for k, (name, how) in both.items()}


def is_gguf(path: str | os.PathLike) -> bool:
    """Whether a path is to be read as a GGUF file: a file, or so named."""
    return gguf_file.is_gguf(path)


def load(
    path: str | os.PathLike,
    *,
    dtype: str | None = None,
    device_mesh: jax.sharding.Mesh | None = None,
    rules: mesh.Rules | None = None,
    **changes: Any,
) -> tuple[spec_lib.Spec, dict[str, Any]]:
    """Spec and parameters of a GGUF file.

    Args:
      path: the file.
      dtype: of parameters and compute; None takes that of a file in half precision, and
        float32 where weights are quantized.
      device_mesh: lay the parameters out on it, by `rules`.
      rules: dims -> mesh axes.
      **changes: fields of the Spec to replace.
    Raises:
      config.InputError: see the module docstring.
    """
    header = gguf_file.read(path)
    dtype = dtype or _own_dtype(header)
    changes = {"param_dtype": dtype, "compute_dtype": dtype} | changes
    spec = hf_config.spec_from_config(config_of(header), **changes)
    tensors = _Tensors(header)
    used = hf.match(spec, tensors, table(spec), header.path, "its header")
    left = sorted(set(header.tensors) - used)
    if left:
        raise config.InputError(
            f"{header.path}: {len(left)} tensors belong to no weight of a "
            f"{spec.family} model that this decoder knows: {', '.join(left[:5])[:200]}"
        )
    return spec, _fill(spec, tensors, device_mesh, rules)


def tokenizer(path: str | os.PathLike) -> tokenizer_lib.Tokenizer:
    """The tokenizer of a GGUF file, with its chat template.

    Raises:
      config.InputError: no byte-level BPE, or cut by rules that are not known.
    """
    return gguf_vocabulary.tokenizer(gguf_file.read(path))


def template(path: str | os.PathLike) -> str | None:
    """The chat template of a GGUF file: Jinja, not to be trusted. None without one."""
    return gguf_file.read(path).fact("tokenizer.chat_template", str)


def _fill(
    spec: spec_lib.Spec,
    tensors: "_Tensors",
    device_mesh: jax.sharding.Mesh | None,
    rules: mesh.Rules | None,
) -> dict[str, Any]:
    """Parameters from the file's tensors, one weight of ours at a time."""
    tree, layout = decoder.decoder_params(spec), None
    if device_mesh is not None:
        layout = params.shardings(tree, device_mesh, rules or mesh.Rules())
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=params.is_param)
    places = jax.tree.leaves(layout) if layout is not None else [None] * len(flat)
    leaves, known = [], table(spec)
    for (path, p), place in zip(flat, places, strict=True):
        key = ".".join(str(part.key) for part in path)
        host = _read(tensors, known, key, p, spec)
        if place is None:
            leaves.append(jax.device_put(host))
            continue
        # device_put would compare whole arrays between processes, in device memory.
        leaves.append(jax.make_array_from_callback(host.shape, place, host.__getitem__))
    return treedef.unflatten(leaves)


def _read(
    tensors: "_Tensors",
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
    dtype = jnp.dtype(spec.param_dtype)
    places = names.places(tensor, key, spec)
    if places == [(tensor.name, ())] and not tensor.view and len(tensor.parts) == 1:
        whole = rearrange(tensors.get(tensor.name), pattern, **known)
        return whole.astype(dtype, copy=False)  # the tables: no second copy of them
    out = np.empty(p.shape, dtype)
    for full, place in places:
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


class _Tensors:
    """The tensors of a file by name, dequantized on demand."""

    def __init__(self, header: gguf_file.Header):
        self.header = header

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.header.tensors:
            raise config.InputError(
                f"{self.header.path} has no tensor {name!r}"
                f"{config.nearest(name, list(self.header.tensors)[:500])}"
            )
        return self.header.tensors[name].shape

    def get(self, name: str) -> np.ndarray:
        """The tensor, float32."""
        tensor = self.header.tensors[name]
        with open(self.header.path, "rb") as file:
            file.seek(tensor.start)
            raw = np.fromfile(file, np.uint8, tensor.nbytes)
        if raw.size != tensor.nbytes:
            raise config.InputError(f"{self.header.path} was cut off while it was read")
        return gguf_blocks.dequantize(raw, tensor.type).reshape(tensor.shape)


def _own_dtype(header: gguf_file.Header) -> str:
    types = {t.type.name for t in header.tensors.values() if len(t.shape) > 1}
    return {("F16",): "float16", ("BF16",): "bfloat16"}.get((*types,), "float32")


def config_of(header: gguf_file.Header) -> dict[str, Any]:
    """The facts of a file in the words of a config.json.

    Raises:
      config.InputError: a fact is missing, or says what this decoder does not do.
    """
    path = header.path
    architecture = header.fact("general.architecture", str, "")
    if architecture not in ARCHITECTURES:
        raise config.InputError(
            f"{path}: general.architecture is {architecture[:80]!r}"
            f"{config.nearest(architecture[:80], ARCHITECTURES)}"
        )
    if header.fact("split.count", int, 1) > 1:
        raise config.InputError(
            f"{path} is one of {header.fact('split.count', int)} parts; join them with "
            "`llama-gguf-split --merge FIRST_PART OUT.gguf`"
        )
    facts = _Facts(header, architecture)
    facts.check_neutral()
    layers, heads = facts.size("block_count"), facts.size("attention.head_count")
    if layers > len(header.tensors):  # before anything is made for each of them
        raise config.InputError(
            f"{path}: {architecture}.block_count is {layers:,} and there are "
            f"{len(header.tensors):,} tensors"
        )
    width = facts.size("embedding_length")
    head_width = facts.size("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if facts.size(key, head_width) != head_width:
            raise config.InputError(
                f"{path}: {architecture}.{key} is {facts.size(key)}; wanted the head "
                f"width, {head_width}"
            )
    vocab_size = _Tensors(header).shape("token_embd.weight")[0]
    eos = [facts.token(f"{key}_token_id", vocab_size) for key in ("eos", "eot")]
    return {
        "model_type": ARCHITECTURES[architecture],
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": facts.size("attention.head_count_kv", heads),
        "head_dim": head_width,
        "intermediate_size": facts.size("feed_forward_length", 1),
        "rms_norm_eps": facts.number("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": facts.number("rope.freq_base", 10_000.0),
        "rope_scaling": facts.scaling(),
        "max_position_embeddings": facts.size("context_length", 32_768),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": facts.token("bos_token_id", vocab_size),
        "eos_token_id": list(dict.fromkeys(i for i in eos if i is not None)) or None,
        **facts.experts(),
    }


class _Facts:
    """The facts of one architecture, by their names without its prefix."""

    def __init__(self, header: gguf_file.Header, architecture: str):
        self.header, self.prefix = header, architecture + "."

    def wrong(self, key: str, wanted: str) -> config.InputError:
        value = repr(self.header.facts.get(self.prefix + key))[:80]
        return config.InputError(
            f"{self.header.path}: {self.prefix}{key} is {value}; wanted {wanted}"
        )

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self.header.fact(self.prefix + key, int, default)
        if value is None or value < 1:
            raise self.wrong(key, "a whole number of at least 1")
        return value

    def number(self, key: str, default: float) -> float:
        """A positive number; as short as float32, in which it is stored, can be told
        (1e-05 and not 9.999999747378752e-06)."""
        value = self.header.fact(self.prefix + key, float, default)
        if not 0 < value < float(np.finfo(np.float32).max):
            raise self.wrong(key, "a number above 0")
        return float(str(np.float32(value)))

    def token(self, key: str, vocab_size: int) -> int | None:
        """The id of a named token."""
        value = self.header.fact("tokenizer.ggml." + key, int)
        if value is not None and not 0 <= value < vocab_size:
            raise config.InputError(
                f"{self.header.path}: tokenizer.ggml.{key} is {value}; the vocabulary "
                f"has {vocab_size:,} tokens"
            )
        return value

    def check_neutral(self) -> None:
        """Refuse facts that would change the function; tell of those never heard of."""
        for key, values in NEUTRAL.items():
            if self.header.facts.get(self.prefix + key, values[0]) not in values:
                raise self.wrong(key, f"{values[0]}: this decoder knows no other")
        unknown = [
            key
            for key in self.header.facts
            if key.startswith(self.prefix)
            and key.removeprefix(self.prefix) not in NEUTRAL | READ
        ]
        if unknown:
            print(
                f"note: {self.header.path}: not read: {', '.join(unknown)[:400]}",
                file=sys.stderr,
            )

    def scaling(self) -> dict[str, Any] | None:
        """rope_scaling of config.json."""
        if "rope_freqs.weight" in self.header.tensors:
            raise config.InputError(
                f"{self.header.path}: its tensor rope_freqs.weight scales positions as "
                "Llama 3.1 does, which this decoder does not; wanted none, linear or "
                "yarn"
            )
        key = "rope.scaling."
        old = self.header.fact(self.prefix + "rope.scale_linear", float, 1.0)
        kind = self.header.fact(
            self.prefix + key + "type", str, "none" if old == 1 else "linear"
        )
        if kind == "none":
            return None
        if kind not in ("linear", "yarn"):
            raise self.wrong(key + "type", "none, linear or yarn")
        out = {"rope_type": kind, "factor": self.number(key + "factor", old)}
        if kind == "yarn":
            place = "original_context_length"
            out |= {
                "original_max_position_embeddings": self.size(key + place),
                "beta_fast": self.number(key + "yarn_beta_fast", 32.0),
                "beta_slow": self.number(key + "yarn_beta_slow", 1.0),
            }
        return out

    def experts(self) -> dict[str, Any]:
        """The fields of experts in config.json."""
        count = self.header.fact(self.prefix + "expert_count", int, 0)
        if ARCHITECTURES[self.prefix[:-1]] != "qwen3_moe":
            if count:
                raise self.wrong("expert_count", "0 for this architecture")
            return {}
        gate = self.header.tensors.get("blk.0.ffn_gate_exps.weight")
        there = gate.shape[-2] if gate is not None and len(gate.shape) > 1 else None
        norm = self.header.fact(self.prefix + "expert_weights_norm", bool, True)
        return {
            "num_experts": self.size("expert_count"),
            "num_experts_per_tok": self.size("expert_used_count"),
            "moe_intermediate_size": self.size("expert_feed_forward_length", there),
            "norm_topk_prob": norm,  # without the key, its runtime divides too
        }


# Facts that are used above, and those that say nothing about the function.
READ = dict.fromkeys(
    (
        *("block_count", "attention.head_count", "attention.head_count_kv"),
        *("embedding_length", "attention.key_length", "attention.value_length"),
        *("feed_forward_length", "attention.layer_norm_rms_epsilon", "context_length"),
        *("rope.freq_base", "rope.dimension_count", "rope.scale_linear"),
        *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.finetuned"),
        *("rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast"),
        *("rope.scaling.yarn_beta_slow", "expert_count", "expert_used_count"),
        *("expert_feed_forward_length", "expert_weights_norm", "vocab_size"),
    )
)
