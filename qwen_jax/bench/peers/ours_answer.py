# SPDX-License-Identifier: Apache-2.0
"""This project's serving engine, as `qwen-jax serve` runs it, without HTTP.

Shape: model, prompts (ids). Options: new_tokens, threads. One "step" answers all
prompts, handed over at once.
Invariants: no end id; each step has a salt of its own, so that no page is found again.
Raises: through line.serve.
"""

from __future__ import annotations

import line


def build(shape: dict, options: dict):
    """Load the model, answer once, return facts and the stepper."""
    import jax

    from qwen_jax import talk
    from qwen_jax.serve import device, engine, request

    model = talk.load_model(shape["model"], lay_out=False)
    prompts, new = shape["prompts"], options["new_tokens"]
    settings = device.Settings(
        rows=len(prompts), max_tokens=max(map(len, prompts)) + new
    )
    made = engine.Engine(
        model.spec, model.params, model.tokenizer, settings=settings, stop_ids=()
    )
    made.warm()
    count = 0

    def answers():
        nonlocal count
        count += 1
        asked = [
            request.Request(f"{count}-{i}", tuple(ids), new, salt=str(count))
            for i, ids in enumerate(prompts)
        ]
        told = made.run(asked)
        return [[t for piece in told[r.id] for t in piece.ids] for r in asked]

    def steps(n):
        return [float(len(answers())) for _ in range(n)]

    facts = {
        "ids": answers(),
        "versions": f"qwen_jax, jax {jax.__version__}",
        "setting": f"engine, {len(prompts)} rows, pages of {settings.page_tokens}",
    }
    return facts, steps


if __name__ == "__main__":
    line.serve(build)
