# SPDX-License-Identifier: Apache-2.0
"""GGUF files of tiny random models, written with the `gguf` package.

The model is drawn in transformers; names of tensors are those of the package's own map,
and rows of q and k are put into the order of llama files by the formula of llama.cpp's
converter, so nothing here shares code with what reads the files.
"""

import gguf
import numpy as np
import torch
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 10_000.0,
    "attn_implementation": "eager",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Architecture -> class in transformers, sizes that it alone has.
KINDS = {
    "llama": ("Llama", {"rms_norm_eps": 1e-5}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3moe": (
        "Qwen3Moe",
        {
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "norm_topk_prob": True,
        },
    ),
}


def model(architecture, **changes):
    """A random model in transformers: fan-in matrices, norms off one, biases off 0."""
    kind, own = KINDS[architecture]
    settings = SIZES | own | changes
    made = getattr(transformers, f"{kind}Config")(**settings)
    torch.manual_seed(len(architecture))
    out = getattr(transformers, f"{kind}ForCausalLM")(made).eval().float()
    with torch.no_grad():
        for key, weight in out.named_parameters():
            noise = torch.randn_like(weight)
            if weight.ndim == 1:
                weight.copy_(1 + 0.2 * noise if "norm" in key else 0.3 * noise)
            else:
                weight.copy_(noise * weight.shape[-1] ** -0.5)
    return out


def interleaved(rows, heads):
    """Rows of q or k in the order of llama files."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def tensors(made, architecture):
    """{name in the file: float32 weight} of a model in transformers."""
    number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    layers = made.config.num_hidden_layers
    known = gguf.get_tensor_name_map(number, layers)
    out = {}
    for key, weight in made.state_dict().items():
        there, host = key, weight.numpy()
        if key == "lm_head.weight" and made.config.tie_word_embeddings:
            continue
        if key.endswith("experts.gate_up_proj"):
            block = key.split(".")[2]
            gate, up = np.split(host, 2, axis=1)
            out[f"blk.{block}.ffn_gate_exps.weight"] = gate
            out[f"blk.{block}.ffn_up_exps.weight"] = up
            continue
        stem, dot, suffix = there.rpartition(".")
        if suffix not in ("weight", "bias"):
            stem, suffix = there, "weight"
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            config = made.config
            heads = config.num_attention_heads
            heads = heads if stem.endswith("q_proj") else config.num_key_value_heads
            host = interleaved(host, heads)
        out[f"{known.get_name(stem)}.{suffix}"] = host
    return out


def write(path, architecture, weights, config, facts=(), kinds=None):
    """Write a file; returns {name: the weights that it stands for}.

    Args:
      weights: {name: float32}.
      config: of transformers.
      facts: functions that get the writer, for more key-value pairs.
      kinds: {name: gguf.GGMLQuantizationType}; float32 by default. K-quants, which the
        package does not write, get random blocks.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    if architecture in ("qwen3", "qwen3moe"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    else:
        head_width = config.hidden_size // config.num_attention_heads
        writer.add_rope_dimension_count(head_width)
    if architecture == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    for add in facts:
        add(writer)
    truth = {}
    for name, weight in weights.items():
        kind = (kinds or {}).get(name, gguf.GGMLQuantizationType.F32)
        raw = stored(weight, kind)
        truth[name] = gguf.dequantize(raw, kind).reshape(weight.shape)
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return truth


def stored(weight, kind):
    """A weight in a type; random blocks where the package cannot write it."""
    try:
        return gguf.quants.quantize(np.ascontiguousarray(weight), kind)
    except NotImplementedError:
        shape = gguf.quant_shape_to_byte_shape(weight.shape, kind)
        return blocks(kind, np.prod(shape, dtype=int)).reshape(shape)


# Where in a block its float16 numbers stand, which random bytes could make infinite.
HALVES = {
    **{"F16": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2)},
    **{"Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)},
}


def blocks(kind, nbytes, seed=0):
    """Random blocks of a type, uint8, whose numbers are finite."""
    draw = np.random.default_rng(seed)
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    out = draw.integers(0, 256, (nbytes // block_bytes, block_bytes), np.uint8)
    for at in HALVES.get(kind.name, ()):
        numbers = draw.standard_normal(len(out)).astype(np.float16) / 64
        out[:, at : at + 2] = numbers[:, None].view(np.uint8)
    if kind.name in ("F32", "BF16"):
        numbers = draw.standard_normal(len(out)).astype(np.float32)
        out[:] = numbers[:, None].view(np.uint8)[:, -block_bytes:]
    return out.reshape(-1)


def add_tokenizer(
    writer,
    merges,
    *,
    pre="qwen2",
    added=(),
    unused=0,
    begins=False,
    kind="gpt2",
    kinds=None,
):
    """A byte-level vocabulary: 256 bytes, the merges, then added tokens.

    Args:
      writer: of a file.
      merges: pairs of tokens in the byte alphabet.
      pre: the name of the rules by which text is cut.
      added: texts and kinds of tokens after those of the merges.
      unused: ids that pad the table.
      begins: whether a text begins with the token that is named for it.
      kind: of vocabulary.
      kinds: of the tokens, instead of those that they are of.
    """
    alphabet = sorted(bytes_to_unicode().values())
    tokens = [*alphabet, *("".join(pair) for pair in merges)]
    added = added or [("<|endoftext|>", 3), ("<|im_start|>", 3), ("<|im_end|>", 3)]
    kinds = kinds or [1] * len(tokens) + [k for _, k in added] + [5] * unused
    tokens += [token for token, _ in added]
    tokens += [f"[PAD{len(tokens) + i}]" for i in range(unused)]
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_pad_token_id(tokens.index(added[0][0]))
    writer.add_add_bos_token(begins)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
