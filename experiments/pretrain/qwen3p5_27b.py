# SPDX-License-Identifier: Apache-2.0
"""Does Qwen3.5-27B (text) train with 4,096-token rows on 64 TPU v6e chips?

Question: the published shape (three gated delta rules to one gated attention, dense),
float32 weights and moments, bfloat16 compute, a batch of four million tokens: does the
step fit a v6e:8x8 slice with no model parallelism?
Source: shape, config.json of the published checkpoint; batch and rate near Step Law
(arXiv 2503.04715); tokens, 20 a weight (arXiv 2203.15556).
Layout: weights are split over all chips, on two axes of eight, each a ring.
Expected: 20.7 GiB of 31.25 a chip, by the compiler (64 rows a micro-batch).
Cost: 8.2e22 FLOPs. `:tiny` takes seconds on a CPU.
Run: qwen-jax run --config experiments/pretrain/qwen3p5_27b.py --dry_run
         --topology v6e:8x8
     launch/tpu_gke.py ... -- run --config experiments/pretrain/qwen3p5_27b.py
         --data PATH --config.data.tokenizer=PATH --workdir DIR
Other machines: --config.mesh.data=1 --config.mesh.fsdp=-1, and on anything but TPUs
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
    "num_layers": 4,
    "num_heads": 8,
    "num_kv_heads": 1,
    "head_width": 8,
    "ffn_width": 64,
    "max_positions": 256,
    "eos_ids": (),
    "attention": "blockwise",
    "rotary_share": 0.5,
    "delta": {"key_heads": 2, "value_heads": 4, "key_width": 8, "value_width": 8},
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
        "streams": 8 if tiny else 16,  # hosts of the slice
    }
    c.model = {
        "base": "qwen3.5-27b",
        "compute_dtype": "bfloat16",
        "attention": "splash",
        **(TINY if tiny else {}),
    }
    c.optim = {"name": "adamw", "schedule": "cosine"}  # the rate is derived
    c.train = {
        "tokens": 10_240 if tiny else 490_000_000_000,
        "batch_tokens": 512 if tiny else 1 << 22,
        "remat": "full",
    }
    c.mesh = {"data": 1 if tiny else 8, "fsdp": -1 if tiny else 8}
    c.rules = {"embed": ("data", "fsdp")}
    c.checkpoint = {"every_steps": 10 if tiny else 500, "every_s": 1800.0}
    c.eval = {"every_steps": 10 if tiny else 1000, "max_tokens": 4096 if tiny else 4e6}
    return c


def metrics():
    return ["loss", "bits_per_byte", "eval_bits_per_byte", "tokens_per_s", "mfu"]
