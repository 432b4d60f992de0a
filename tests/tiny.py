# SPDX-License-Identifier: Apache-2.0
"""The experiment of the tests of whole runs: a step takes milliseconds.

`tiny.py:adamw` or `tiny.py:muon`; the corpus comes with --data (see `runs.corpus`).
The learning rate is constant after warm-up, so that a run that was made longer has the
losses of one that was long from the start. Every dim divides by 8, for any mesh.
"""

import ml_collections


def get_config(arg=None):
    c = ml_collections.ConfigDict()
    c.seed = 3
    c.data = {
        "vocab_size": 320,
        "seq_tokens": 32,
        "holdout_share": 0.1,
        "streams": 4,
        "window_docs": 16,
    }
    c.model = {
        "vocab_size": 320,
        "width": 32,
        "num_layers": 2,
        "num_heads": 8,
        "num_kv_heads": 8,
        "head_width": 4,
        "ffn_width": 64,
        "rope_theta": 10_000.0,
        "max_positions": 128,
    }
    c.optim = {
        "name": arg or "muon",
        # AdamW is unstable at Muon's rate, which would make rounding grow.
        "lr_peak": 0.003 if arg == "adamw" else 0.01,
        "schedule": "wsd",
        "warmup_steps": 2,
        "decay_steps": 0,
    }
    c.train = {"num_steps": 40, "batch_tokens": 256, "z_loss": 1e-4}
    c.checkpoint = {"every_steps": 3, "every_s": 0.0, "keep": 2}
    c.eval = {"every_steps": 10, "max_tokens": 512}
    c.sample = {
        "every_steps": 20,
        "prompts": ["the ", "some "],
        "max_tokens": 4,
        "temperature": 0.7,
    }
    return c
