# SPDX-License-Identifier: Apache-2.0
"""..."""

import ml_collections

from qwen_jax import config


def get_config(arg=None):
    stage = config.variant(arg, "short", "tiny")
    short = stage == "short"
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.data = {
        "sources": [{"path": "/tmp/nd/a/lessons.jsonl", "tokens_field": "tokens"}],
        "tokenizer": "/tmp/nd/a/tokenizer",
        "seq_tokens": 512,
        "holdout_share": 0.01,
    }
    c.model = {
        "vocab_size": 464,
        "width": 128,
        "num_layers": 3,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_width": 64,
        "ffn_width": 256,
        "rope_theta": 500.0,
        "max_positions": 512,
    }
    c.optim = {
        "name": "muon",
        "lr_peak": 0.02,
        "schedule": "wsd",
        "warmup_steps": 10,
        "weight_decay": 0.0,
    }
    c.train = {"num_steps": 400, "batch_tokens": 8192, "loop": "unroll"}
    c.checkpoint = {"every_steps": 1000, "every_s": 600.0}
    c.eval = {"every_steps": 50, "max_tokens": 32768}
    return c


def metrics():
    return ["loss", "eval_loss", "tokens_per_s"]
