# SPDX-License-Identifier: Apache-2.0
"""Does a model trained at 512 tokens find facts at 4,096 after a short stage in chunks?

Question: the recipe of long-context Qwen at a size for a CPU: weights of a stage of
short rows (`:short`), a larger RoPE base, some rows of the new length in chunks. Are
needles found at every depth and length, and were they not before?
Source: staged lengths and base, Qwen2.5-1M (arXiv 2501.15383: 4K to 256K, base 1e4 to
1e7); base by ABF (arXiv 2309.16039); chunks, ChunkFlow (arXiv 2503.02356). The longest
wave, 2 pi base, is 6 rows of 512 and 31 of 4,096; theirs is 15 of 4K and 240 of 256K.
Data: made-up facts and questions by `qwen-jax eval lessons`; see eval/haystack.py.
Expected: before, above 0.9 up to 512 tokens and none at 4,096; after, at least 0.95 in
every cell of 256 to 4,096 tokens and nine depths. Found: 0.97 at 512, 0.41 at 1,024,
none at 4,096; YaRN with factor 8 and no training, 0.93 at 4,096; after the stage 1.00
in every cell (needle.json beside this file).
Cost: 7.5 minutes of processor time, all questions among it. `:tiny` takes seconds.
Run: launch/needle.sh, of which the stages are
     qwen-jax run --config experiments/long/needle.py:short --workdir runs/needle/short
     qwen-jax run --config experiments/long/needle.py --workdir runs/needle/long
Date: 2026-11-27.
"""

import sysconfig

import ml_collections

from qwen_jax import config

FOLDER = "runs/needle"
PYTHON = {
    "path": sysconfig.get_paths()["stdlib"],
    "include": ["json/*.py", "email/*.py"],
}


def lessons(name):
    path = f"{FOLDER}/lessons/{name}/lessons.jsonl"
    return {"path": path, "name": name, "tokens_field": "tokens"}


def get_config(arg=None):
    stage = config.variant(arg, "short", "long", "tiny")
    tiny, short = stage == "tiny", stage == "short"
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.data = {"seq_tokens": 512 if short else 4096, "holdout_share": 0.02}
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
    c.train = {"loop": "unroll"}
    if short:
        c.data.sources = [lessons("first"), lessons("short")]
        c.data.tokenizer = f"{FOLDER}/lessons/first/tokenizer"
        # Documents of 48 tokens until look-ups are learnt, which is sudden and comes
        # before step 230; in long ones alone it takes far longer.
        c.data.stages = ((275, {"first": 1.0}), (700, {"first": 0.2, "short": 0.8}))
        c.train.update({"num_steps": 700, "batch_tokens": 4096})
    else:
        c.data.sources = [lessons("long")]
        c.train.update({"num_steps": 60, "batch_tokens": 16_384, "chunk_tokens": 1024})
        c.train.update({"live_chunks": 2, "init_from": f"{FOLDER}/short/export"})
    c.checkpoint = {"every_steps": 0, "every_s": 120.0}
    c.eval = {"every_steps": 100 if short else 20, "max_tokens": 65_536}
    if tiny:  # the same stage on text that is there, from random weights
        c.data.update({"sources": [PYTHON], "vocab_size": 384, "seq_tokens": 128})
        c.data.holdout_share = 0.1
        c.train.update({"num_steps": 12, "batch_tokens": 1024, "chunk_tokens": 64})
        c.train.init_from = ""
        c.eval.max_tokens = 4096
    return c


def metrics():
    return ["loss", "eval_loss", "tokens_per_s"]
