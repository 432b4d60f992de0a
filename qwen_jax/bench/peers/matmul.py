# SPDX-License-Identifier: Apache-2.0
"""The plain float32 matmul rate of this machine, measured in turns like a peer.

Source: this project. Options: "library" is "jax" or "numpy", "size" the side of the
square matrices. One "step" is one product.
Shapes: [size, size] x [size, size].
Units: `flops_per_step` = 2 size^3.
Raises: through line.serve.
"""

from __future__ import annotations

import line


def build(shape: dict, options: dict):
    """Make two matrices, multiply once, return facts and the stepper."""
    import numpy as np

    side = options["size"]
    draw = np.random.default_rng(0)
    left, right = (draw.random((side, side), np.float32) for _ in range(2))
    if options["library"] == "jax":
        import jax

        left, right = jax.device_put(left), jax.device_put(right)
        product = jax.jit(lambda x, y: x @ y)
        versions = f"jax {jax.__version__}"

        def steps(n):
            for _ in range(n):
                product(left, right).block_until_ready()
            return []
    else:
        versions = f"numpy {np.__version__}"

        def steps(n):
            for _ in range(n):
                left @ right
            return []

    steps(1)
    return {"flops_per_step": 2 * side**3, "versions": versions}, steps


if __name__ == "__main__":
    line.serve(build)
