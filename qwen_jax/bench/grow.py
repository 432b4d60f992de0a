# SPDX-License-Identifier: Apache-2.0
"""How the cost of this project's step grows: with row length, and memory of the loss.

`length` measures the bare step at 512 to 8192 tokens a row for one number of tokens a
step, in turns (rounds.py). `loss_memory` compiles the loss and its gradient at growing
sizes and reads the compiler's own account of scratch memory.
Units: seconds, bytes, microseconds a token.
Raises: rounds.ChildError when a child fails.
"""

from __future__ import annotations

import contextlib
import dataclasses

from qwen_jax.bench import candidates, rounds
from qwen_jax.bench import shape as shape_lib

LENGTHS = (512, 1024, 2048, 4096, 8192)
LOSS_POINTS = ((2048, 8192), (2048, 32768), (2048, 151936), (8192, 151936))


def length(args, shape: shape_lib.Shape) -> list[dict]:
    """Cost per token of `ours` at growing row LENGTHS for one token count."""
    children, facts = {}, {}
    with contextlib.ExitStack() as stack:
        for tokens in LENGTHS:
            candidates.say(f"building ours at {tokens} tokens a row")
            made = dataclasses.replace(
                shape, tokens=tokens, rows=max(LENGTHS) // tokens
            )
            child = candidates.start("ours_train.py")
            stack.callback(child.close)
            request = {
                "do": "build",
                "shape": made.record(),
                "options": candidates.options_of(args),
            }
            facts[tokens] = child.ask(request, candidates.BUILD_S)
            children[str(tokens)] = child
        turns = rounds.measure(
            children,
            dict.fromkeys(children, 1),
            args.rounds,
            timeout_s=candidates.BUILD_S,
            say=candidates.say,
        )
    rows = []
    for tokens in LENGTHS:
        time_s = rounds.summarize(turns, str(tokens))
        slower = rounds.ratio(turns, str(LENGTHS[0]), str(tokens))
        rows.append(
            {
                "tokens": tokens,
                "rows": max(LENGTHS) // tokens,
                "median_s": time_s.median_s,
                "us_per_token": time_s.median_s / max(LENGTHS) * 1e6,
                "x_shortest": slower.median,
                "temp_bytes": facts[tokens]["temp_bytes"],
            }
        )
    return rows


def loss_memory(args, shape: shape_lib.Shape) -> list[dict]:
    """Scratch bytes of the loss at growing vocabularies and token counts."""
    candidates.say("compiling the loss at growing sizes")
    with contextlib.ExitStack() as stack:
        child = candidates.start("loss_memory.py")
        stack.callback(child.close)
        options = candidates.options_of(args) | {"points": LOSS_POINTS}
        request = {"do": "build", "shape": shape.record(), "options": options}
        return child.ask(request, candidates.BUILD_S)["rows"]
