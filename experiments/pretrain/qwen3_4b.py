# SPDX-License-Identifier: Apache-2.0
"""Does Qwen3-4B reach the expected loss at 20 tokens a weight?

Question: with 4,096-token packed rows, bfloat16 compute and float32 weights, does the
loss follow the fit of arXiv 2203.15556 for this size and length?
Source: sizes, arXiv 2505.09388, table 1; learning rate, the rules printed at start.
Expected: 2.28 nats a token at the end on web text (the fit, L = 1.69 + 406.4 /
N^0.34 + 410.7 / D^0.28, of another vocabulary and corpus: a direction, no promise).
Cost: `--dry_run --topology v6e:4x4` prints memory and hours. `:tiny` takes seconds.
Status: not run at this size.
Run: qwen-jax run --config experiments/pretrain/qwen3_4b.py --workdir DIR --data TEXT
"""

import sysconfig

import ml_collections


def get_config(arg=None):
    tiny = arg == "tiny"
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.data = {
        # A real run names its corpus and tokenizer: --data, --config.data.tokenizer.
        "sources": [{"path": "corpus"}],
        "tokenizer": "tokenizer",
        "seq_tokens": 4096,
        "holdout_share": 0.001,
    }
    c.model = {"base": "qwen3-4b", "compute_dtype": "bfloat16"}
    c.optim = {"name": "adamw", "schedule": "wsd"}
    c.train = {"tokens": 80_000_000_000, "batch_tokens": 1_048_576, "remat": "full"}
    c.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    c.checkpoint = {
        "every_steps": 1000,
        "every_s": 0.0,
        "keep": 3,
        "keep_every": 10_000,
    }
    c.eval = {"every_steps": 1000, "max_tokens": 4_194_304}
    return shrink(c) if tiny else c


def shrink(c):
    """The same switches at a size for a CPU, on this machine's Python library."""
    stdlib = sysconfig.get_paths()["stdlib"]
    c.data.sources = [{"path": stdlib, "name": "python", "include": ["json/*.py"]}]
    c.data.update(tokenizer="", vocab_size=512, seq_tokens=64, holdout_share=0.2)
    c.model.update(
        vocab_size=512,
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_width=8,
        ffn_width=64,
        max_positions=256,
    )
    c.train = {"num_steps": 6, "batch_tokens": 512, "remat": c.train.remat}
    c.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    c.checkpoint.every_steps = 3
    c.eval = {"every_steps": 6, "max_tokens": 2048}
    return c


def metrics():
    return ["loss", "eval_bits_per_byte", "tokens_per_s", "mfu"]
