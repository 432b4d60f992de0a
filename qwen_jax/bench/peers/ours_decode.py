# SPDX-License-Identifier: Apache-2.0
"""This project's greedy decoding with a cache: `models.decode.generate` as it is.

Options: new_tokens, threads. Shapes: prompts [rows, tokens] of random ids; one "step"
is one call: prefill, then new_tokens tokens a row.
Invariants: no end id, so every row makes all its tokens; weights as `decode.laid_out`
has them, as in `qwen-jax generate`.
Raises: through line.serve.
"""

from __future__ import annotations

import line
import ours_train


def build(shape: dict, options: dict):
    """Make the model, generate once, return facts and the stepper."""
    import jax

    from qwen_jax import models
    from qwen_jax.models import decode

    spec = ours_train.make_spec(shape, options)
    params = decode.laid_out(spec, models.init(spec))
    prompts = line.batch(shape)[0].tolist()

    def steps(n):
        for _ in range(n):
            out = decode.generate(
                spec, params, prompts, max_tokens=options["new_tokens"]
            )
        return [len(row) for row in out]

    facts = {
        "params": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "tokens_per_step": sum(steps(1)),
        "versions": f"qwen_jax, jax {jax.__version__}",
        "setting": "one jitted call, layers unrolled, matrices turned",
    }
    return facts, steps


if __name__ == "__main__":
    line.serve(build)
