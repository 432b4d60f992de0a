# SPDX-License-Identifier: Apache-2.0
"""Does Qwen3-30B-A3B train with 4,096-token rows on 64 TPU v6e chips?

Question: the published shape (128 experts, of which a token meets 8), float32 weights
and moments, bfloat16 compute, a batch of four million tokens: does the step fit a
v6e:8x8 slice?
Source: shape and global-batch balance loss, Qwen3 technical report (arXiv 2505.09388)
table 2; tokens, 20 a weight (arXiv 2203.15556).
Layout: weights are split over all chips; experts lie on an axis of eight, whose chips
exchange tokens (gathered by all eight: nothing is dropped).
Expected: peak of 19.1 GiB of 31.25 a chip (compiled, not run), 16 micro-batches a step.
Cost: 1.7e22 FLOPs. `:tiny` takes seconds on a CPU.
Run: qwen-jax run --config experiments/pretrain/qwen3_30b_a3b.py --dry_run
         --topology v6e:8x8
     launch/tpu_gke.py ... -- run --config experiments/pretrain/qwen3_30b_a3b.py
         --data PATH --config.data.tokenizer=PATH --workdir DIR
Other machines: --config.mesh.fsdp=1 --config.mesh.expert=-1, and on anything but TPUs
--config.model.attention=blockwise.
Date: 2026-11-26.
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
    "max_positions": 256,
    "eos_ids": (),
    "attention": "blockwise",
    "moe": {"num_experts": 8, "experts_per_token": 2, "ffn_width": 24},
}


def get_config(arg=None):
    tiny = config.variant(arg, "tiny") == "tiny"
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.data = {
        "sources": [PYTHON if tiny else {"path": "data/corpus"}],  # --data PATH
        "tokenizer": "" if tiny else "data/tokenizer",
        "vocab_size": 512,  # of a tokenizer that is learnt
        "seq_tokens": 64 if tiny else 4096,
        "holdout_share": 0.1 if tiny else 0.001,
    }
    c.model = {
        "base": "qwen3-30b-a3b",
        "compute_dtype": "bfloat16",
        "attention": "splash",
        **(TINY if tiny else {}),
    }
    c.optim = {"name": "adamw", "schedule": "cosine"}  # the rate is derived
    c.train = {
        "tokens": 10_240 if tiny else 600_000_000_000,
        "batch_tokens": 512 if tiny else 1 << 22,
        "micro_rows": 0 if tiny else 64,
        "remat": "full",
    }
    c.mesh = {"data": 1, "fsdp": 1 if tiny else 8, "expert": -1 if tiny else 8}
    c.rules = {"embed": ("fsdp",)}
    c.checkpoint = {"every_steps": 10 if tiny else 1000, "every_s": 1800.0}
    c.eval = {"every_steps": 10 if tiny else 1000, "max_tokens": 4096 if tiny else 4e6}
    return c


def metrics():
    return ["loss", "bits_per_byte", "eval_bits_per_byte", "tokens_per_s", "mfu"]
