# SPDX-License-Identifier: Apache-2.0
"""Does Qwen3-Next-80B-A3B train with 4,096-token rows on 128 TPU v6e chips?

Question: the published shape (three gated delta rules to one gated attention, 512
experts of which a token meets 10 and a shared one), float32 weights and moments,
bfloat16 compute, a batch of four million tokens: does the step fit a v6e:8x16 slice?
Source: shape, config.json of the published checkpoint; tokens, 20 a weight
(arXiv 2203.15556).
Layout: experts lie on an axis of eight, whose chips gather their tokens, in four
pieces, since the rows of one are what is in memory; the other weights are split over
the axis of sixteen.
Expected: yes. By the compiler a chip needs 25.3 GiB of 31.25 (33.2 with one piece).
Cost: 4.6e22 FLOPs. `:tiny` takes seconds on a CPU.
Run: qwen-jax run --config experiments/pretrain/qwen3_next_80b_a3b.py --dry_run
         --topology v6e:8x16
     launch/tpu_gke.py ... -- run --config experiments/pretrain/qwen3_next_80b_a3b.py
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
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_width": 8,
    "ffn_width": 64,
    "max_positions": 256,
    "eos_ids": (),
    "attention": "blockwise",
    "rotary_share": 0.5,
    "moe": {
        "num_experts": 8,
        "experts_per_token": 2,
        "ffn_width": 24,
        "shared_width": 24,
        "pieces": 4,
    },
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
    }
    c.model = {
        "base": "qwen3-next-80b-a3b",
        "compute_dtype": "bfloat16",
        "attention": "splash",
        "moe": {"pieces": 4},
        **(TINY if tiny else {}),
    }
    c.optim = {"name": "adamw", "schedule": "cosine"}  # the rate is derived
    c.train = {
        "tokens": 10_240 if tiny else 1_600_000_000_000,
        "batch_tokens": 512 if tiny else 1 << 22,
        "micro_rows": 0 if tiny else 128,
        "remat": "full",
    }
    c.mesh = {"data": 1, "fsdp": 1 if tiny else 16, "expert": -1 if tiny else 8}
    c.rules = {"embed": ("fsdp",)}
    c.checkpoint = {"every_steps": 10 if tiny else 1000, "every_s": 1800.0}
    c.eval = {"every_steps": 10 if tiny else 1000, "max_tokens": 4096 if tiny else 4e6}
    return c


def metrics():
    return ["loss", "bits_per_byte", "eval_bits_per_byte", "tokens_per_s", "mfu"]
