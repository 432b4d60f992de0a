# SPDX-License-Identifier: Apache-2.0
"""Does a warm-up-stable-decay schedule end where a cosine ends, on Qwen2.5-7B?

Question: same rate, same tokens, decay over the last fifth or along a cosine over all
of the run: how far apart are the held-out bits per byte at the end?
Source: shape, Qwen2.5 technical report (arXiv 2412.15115) table 1: biases on q, k, v,
no norms on heads; "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
Durations" (arXiv 2405.18392): a decay over 20 % matches the cosine.
Expected: within 0.3 % of each other; the stable part can then be continued for longer.
Cost: 6.2e21 FLOPs a point: 24 days on a v5p:2x2x4 slice (16 chips) at 40 % of the peak.
`:tiny` takes seconds on a CPU.
Run: qwen-jax run --config experiments/pretrain/qwen2p5_7b.py --dry_run
         --topology v5p:2x2x4
     launch/sweep.py --config experiments/pretrain/qwen2p5_7b.py --workdir DIR
         --launcher tpu --data PATH --config.data.tokenizer=PATH
Other machines: --config.mesh.data=1 --config.mesh.fsdp=-1, and on anything but TPUs
--config.model.attention=blockwise.
Date: 2026-11-22, compiled and not run at this size.
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
        "base": "qwen2.5-7b",
        "compute_dtype": "bfloat16",
        "attention": "splash",
        **(TINY if tiny else {}),
    }
    c.optim = {"name": "adamw", "schedule": "wsd"}  # the rate is derived
    c.train = {
        "tokens": 10_240 if tiny else 130_000_000_000,
        "batch_tokens": 512 if tiny else 1 << 20,
        "remat": "dots",
    }
    # Two axes, each a ring of chips, on which gradients can be scattered.
    c.mesh = {"data": 1 if tiny else 4, "fsdp": -1 if tiny else 4}
    c.rules = {"embed": ("data", "fsdp")}
    c.checkpoint = {"every_steps": 10 if tiny else 1000, "every_s": 1800.0}
    c.eval = {"every_steps": 10 if tiny else 1000, "max_tokens": 4096 if tiny else 4e6}
    return c


def sweep(add):
    """The two schedules."""
    for schedule in ("wsd", "cosine"):
        add({"optim.schedule": schedule}, name=schedule)


def metrics():
    return {"eval_bits_per_byte": "min", "loss": "min", "tokens_per_s": "max"}
