# SPDX-License-Identifier: Apache-2.0
"""TODO."""

import sysconfig

import ml_collections

from qwen_jax import config

FOLDER = "runs/needle"


def get_config(arg=None):
    stage = config.variant(arg, "short", "long", "tiny") or "long"
    tiny, short = stage == "tiny", stage == "short"
    c = ml_collections.ConfigDict()
    c.seed = 0
    names = ("first", "short") if short else ("long",)
    c.data = {
        "sources": [
            {
                "path": f"{FOLDER}/{name}/lessons.jsonl",
                "name": name,
                "tokens_field": "tokens",
            }
            for name in names
        ],
        "tokenizer": f"{FOLDER}/{names[0]}/tokenizer" if short else "",
        "seq_tokens": 512 if short else 4096,
        "holdout_share": 0.02,
    }
    if short:
        c.data.stages = ((250, {"first": 1.0}), (700, {"first": 0.2, "short": 0.8}))
    c.model = {
        "vocab_size": 384,
        "width": 64,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_width": 32,
        "ffn_width": 128,
        "rope_theta": 500.0 if short else 20_000.0,
        "max_positions": 512 if short else 4096,
    }
    c.optim = {
        "name": "muon",
        "lr_peak": 0.02 if short else 0.01,
        "schedule": "wsd",
        "warmup_steps": 10,
        "weight_decay": 0.0,
    }
    c.train = {"num_steps": 600, "batch_tokens": 4096, "loop": "unroll"}
    if stage == "long":
        c.train = {
            "num_steps": 60,
            "batch_tokens": 16384,
            "chunk_tokens": 1024,
            "live_chunks": 2,
            "loop": "unroll",
            "init_from": f"{FOLDER}/runs/short/export",
        }
    c.checkpoint = {"every_steps": 0, "every_s": 300.0}
    c.eval = {"every_steps": 50, "max_tokens": 65_536}
    return c


def metrics():
    return ["loss", "eval_loss", "tokens_per_s"]
