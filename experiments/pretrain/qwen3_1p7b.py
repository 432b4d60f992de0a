# SPDX-License-Identifier: Apache-2.0
"""How far ahead of AdamW does Muon end on Qwen3-1.7B?

Question: at 20 tokens a weight, same derived rate, same order of data: what are the
final held-out losses of the two?
Source: shape, Qwen3 technical report (arXiv 2505.09388) table 1; "Muon is Scalable for
LLM Training" (arXiv 2502.16982) reports AdamW's loss for 52 % of its FLOPs.
Expected: Muon lower by what AdamW would gain from 1.9 times the tokens: 0.08 nats a
token by the fit of arXiv 2203.15556 (410.7 / tokens^0.28).
Cost: 3.7e20 FLOPs a point: 35 hours on a v6e:2x4 slice or eight H100 at 40 % of the
peak. `:tiny` takes seconds on a CPU.
Run: launch/sweep.py --config experiments/pretrain/qwen3_1p7b.py --workdir DIR
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
        "base": "qwen3-1.7b",
        "compute_dtype": "bfloat16",
        **(TINY if tiny else {}),
    }
    c.optim = {"name": "muon", "schedule": "cosine"}  # the rate is derived
    c.train = {
        "tokens": 10_240 if tiny else 28_000_000_000,
        "batch_tokens": 512 if tiny else 1 << 19,
        "remat": "dots",
    }
    c.mesh = {"data": 1, "fsdp": -1}
    c.checkpoint = {"every_steps": 10 if tiny else 1000, "every_s": 1800.0}
    c.eval = {"every_steps": 10 if tiny else 1000, "max_tokens": 4096 if tiny else 4e6}
    return c


def sweep(add):
    """The two optimizers."""
    for name in ("adamw", "muon"):
        add({"optim.name": name}, name=name)


def metrics():
    return {"eval_loss": "min", "loss": "min", "tokens_per_s": "max"}
