# SPDX-License-Identifier: Apache-2.0
"""Answers for many at once: an engine with paged memory, and servers in front of it.

engine = Engine(spec, params, tokenizer)
texts = engine.generate(["prompt", ...], max_tokens=32, temperature=0.0)
"""

from qwen_jax.serve.device import Settings
from qwen_jax.serve.engine import Closed, Engine, Overloaded
from qwen_jax.serve.request import Piece, Request

__all__ = ["Closed", "Engine", "Overloaded", "Piece", "Request", "Settings"]
