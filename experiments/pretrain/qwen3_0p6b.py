# SPDX-License-Identifier: Apache-2.0
"""Is the derived learning rate right for Qwen3-0.6B?

Question: at 20 tokens a weight, how far does the rate of Step Law end from the best of
rates around it, in held-out bits per byte?
Source: shape, Qwen3 technical report (arXiv 2505.09388) table 1; Step Law (arXiv
2503.04715), fitted on 60M to 1B weights, reports its point within 0.1 % of the best
loss of a grid.
Expected: the derived rate, 1.35e-3 for batches of 262,144 tokens, within 0.5 % of the
best of the five, and the curve flat within a factor of two of it.
Cost: 5.6e19 FLOPs a point: 40 hours on one H200 or 11 on a v6e:2x2 slice at 40 % of
the peak. `:tiny` takes seconds on a CPU.
Run: launch/sweep.py --config experiments/pretrain/qwen3_0p6b.py --workdir DIR
         --data PATH --config.data.tokenizer=PATH
Date: 2026-11-22, not run at this size.
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
        "base": "qwen3-0.6b",
        "compute_dtype": "bfloat16",
        **(TINY if tiny else {}),
    }
    c.optim = {"name": "adamw", "schedule": "cosine", "lr_peak": 1.35e-3}
    c.train = {
        "tokens": 10_240 if tiny else 8_800_000_000,
        "batch_tokens": 512 if tiny else 1 << 18,
        "remat": "dots",
    }
    c.mesh = {"data": -1}
    c.checkpoint = {"every_steps": 10 if tiny else 1000, "every_s": 1800.0}
    c.eval = {"every_steps": 10 if tiny else 1000, "max_tokens": 4096 if tiny else 4e6}
    return c


def sweep(add):
    """The derived rate and four around it, each twice the one before."""
    for lr_peak in (3.4e-4, 6.75e-4, 1.35e-3, 2.7e-3, 5.4e-3):
        add({"optim.lr_peak": lr_peak})


def metrics():
    return {"eval_bits_per_byte": "min", "loss": "min", "tokens_per_s": "max"}
