# SPDX-License-Identifier: Apache-2.0
"""Which activations should Qwen3-4B keep on chips of 16 GiB?

Question: on sixteen TPU v5e chips, which `remat` gives the most tokens a second: to
keep nothing but layer inputs, to keep attention too, or every matrix product with a
smaller micro-batch?
Source: shape, Qwen3 technical report (arXiv 2505.09388) table 1; recomputing all costs
a third more FLOPs, recomputing selectively a few per cent (arXiv 2205.05198).
Expected: attention kept beats "full" by the share of its forward pass (4 % of the
FLOPs); "dots" saves more than that in FLOPs and loses it to weights gathered once for
each micro-batch.
Cost: 50 steps a point, 12 minutes each; a whole run of 20 tokens a weight is 2.3e21
FLOPs, three weeks at 40 % of the peak. `:tiny` takes seconds on a CPU.
Run: qwen-jax run --config experiments/pretrain/qwen3_4b.py --dry_run
         --topology v5e:4x4
     launch/sweep.py --config experiments/pretrain/qwen3_4b.py --workdir DIR
         --launcher tpu --data PATH --config.data.tokenizer=PATH
         --config.train.tokens=52428800
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
    "num_kv_heads": 1,
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
        "base": "qwen3-4b",
        "compute_dtype": "bfloat16",
        "attention": "splash",
        **(TINY if tiny else {}),
    }
    c.optim = {"name": "adamw", "schedule": "cosine"}  # the rate is derived
    c.train = {
        "tokens": 10_240 if tiny else 72_000_000_000,
        "batch_tokens": 512 if tiny else 1 << 20,
        "remat": "full",
    }
    # Two axes, each a ring of chips, on which gradients can be scattered.
    c.mesh = {"data": 1 if tiny else 4, "fsdp": -1 if tiny else 4}
    c.rules = {"embed": ("data", "fsdp")}
    c.checkpoint = {"every_steps": 10 if tiny else 1000, "every_s": 1800.0}
    c.eval = {"every_steps": 10 if tiny else 1000, "max_tokens": 4096 if tiny else 4e6}
    return c


def sweep(add):
    """What waits for the backward pass; the micro-batch follows from it."""
    add({"train.remat": "full"}, name="full")
    add({"train.remat": "attention,attention_lse"}, name="attention")
    add({"train.remat": "dots"}, name="dots")


def metrics():
    return {"tokens_per_s": "max", "mfu": "max", "loss": "min"}
