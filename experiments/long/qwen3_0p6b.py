# SPDX-License-Identifier: Apache-2.0
"""Does Qwen3-0.6B go on at 32K and at 128K tokens in chunks of one size?

Question: continued training or fine-tuning of the published weights on long documents,
rows of 32,768 tokens (`:32k`) or of 131,072 with YaRN (`:128k`), in chunks of 4,096 of
which two wait: does memory stay that of the chunk while the row grows fourfold?
Source: chunks, ChunkFlow (arXiv 2503.02356, K C = 8K); Qwen3's third stage, 32K with
base 1e6 (arXiv 2505.09388); YaRN with factor 4 on 32,768 (arXiv 2309.00071, as Qwen's
model cards give it), attention factor 0.1 ln 4 + 1 = 1.139. Rate a tenth of that of
pre-training.
Data: documents of --data PATH, or JSON lines of ready ids with "prompt_tokens" and
data.sources' tokens_field for fine-tuning, as `qwen-jax data preview` shows them.
Expected: beside keys, values and their cotangents (28 layers, 8 kv heads of 128: 112
KiB a token in bfloat16, 3.5 GiB of 32K and 14 GiB of 128K, and twice that of cotangents
in float32), activations of both are equal. Not run yet: this needs an accelerator.
Cost: 2e8 tokens, at most 5.2e18 FLOPs at 32K and 1.9e19 at 128K (rows of one document).
`:tiny` takes a minute on a CPU, most of it compiling.
Run: qwen-jax pull Qwen/Qwen3-0.6B models/qwen3-0.6b
     qwen-jax run --config experiments/long/qwen3_0p6b.py:128k --data PATH --workdir DIR
     qwen-jax eval needle --model DIR/export --lengths 8192,32768,131072 --html FILE
Date: 2026-11-27.
"""

import sysconfig

import ml_collections

from qwen_jax import config

PYTHON = {
    "path": sysconfig.get_paths()["stdlib"],
    "include": ["json/*.py", "email/*.py"],
}
TINY = {  # the same switches at a size for a CPU
    "vocab_size": 512,
    "width": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_width": 8,
    "ffn_width": 64,
    "eos_ids": (),
}


def get_config(arg=None):
    stage = config.variant(arg, "32k", "128k", "tiny") or "32k"
    tiny = stage == "tiny"
    base, factor = (16, 4.0) if tiny else (32_768, 4.0)
    longer = stage != "32k"
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.data = {
        "sources": [PYTHON if tiny else {"path": "data/corpus"}],  # --data PATH
        "vocab_size": 512,  # of a tokenizer that is learnt
        "seq_tokens": int(base * factor) if longer else base,
        "holdout_share": 0.1 if tiny else 0.001,
    }
    c.model = {"base": "qwen3-0.6b", "compute_dtype": "bfloat16"}
    if longer:
        c.model.max_positions = int(base * factor)
        c.model.rope_scaling = {
            "kind": "yarn",
            "factor": factor,
            "original_positions": base,
        }
    if tiny:
        c.model.update(TINY)
    c.optim = {"name": "adamw", "lr_peak": 2e-5, "schedule": "cosine"}
    c.train = {
        "tokens": 10_240 if tiny else 200_000_000,
        "batch_tokens": 512 if tiny else 1 << 20,
        "chunk_tokens": 16 if tiny else 4096,
        "live_chunks": 2,
        "init_from": "" if tiny else "models/qwen3-0.6b",
    }
    c.mesh = {"data": 1, "fsdp": -1}
    c.checkpoint = {"every_steps": 10 if tiny else 50, "every_s": 1800.0}
    c.eval = {"every_steps": 10 if tiny else 50, "max_tokens": 4096 if tiny else 4e6}
    return c


def metrics():
    return ["loss", "bits_per_byte", "eval_bits_per_byte", "tokens_per_s", "mfu"]
