# SPDX-License-Identifier: Apache-2.0
"""Memory of the loss and its gradient, from the compiled program, as it grows.

Source: XLA's memory analysis of the jitted value-and-gradient of losses.cross_entropy,
beside the same of `losses.reference`, which builds the logits.
Options: points, a list of [tokens, vocabulary].
Units: bytes. `temp` is scratch beyond arguments and results; the gradient of the output
matrix (vocabulary x width) is a result and is not in it.
Raises: through line.serve.
"""

from __future__ import annotations

import line


def build(shape: dict, options: dict):
    """Compile every point; facts hold the rows, and there is nothing to step."""
    import jax
    import jax.numpy as jnp

    from qwen_jax import mesh
    from qwen_jax.train import losses

    def chunked(x, w, targets, mask):
        total, _ = losses.cross_entropy(
            x, w, targets, mask, z_coef=0.0, rules=mesh.Rules()
        )
        return total

    def whole(x, w, targets, mask):
        return losses.reference(x, w, targets, mask)[0]

    def temp(fn, tokens, vocab):
        x = jax.ShapeDtypeStruct((1, tokens, shape["width"]), jnp.float32)
        w = jax.ShapeDtypeStruct((vocab, shape["width"]), jnp.float32)
        targets = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
        mask = jax.ShapeDtypeStruct((1, tokens), jnp.float32)
        step = jax.jit(jax.value_and_grad(fn, argnums=(0, 1)))
        memory = step.lower(x, w, targets, mask).compile().memory_analysis()
        return memory.temp_size_in_bytes

    rows = [
        {
            "tokens": tokens,
            "vocab": vocab,
            "logits_bytes": 4 * tokens * vocab,
            "weight_bytes": 4 * vocab * shape["width"],
            "temp_bytes": temp(chunked, tokens, vocab),
            "plain_temp_bytes": temp(whole, tokens, vocab),
        }
        for tokens, vocab in options["points"]
    ]
    return {"rows": rows, "versions": f"jax {jax.__version__}"}, lambda n: []


if __name__ == "__main__":
    line.serve(build)
