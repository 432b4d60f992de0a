# SPDX-License-Identifier: Apache-2.0
"""This project's bare training step: the compiled step that `qwen-jax run` uses.

Source: train/step.py with AdamW from optim/build.py, nothing added or taken away: the
gradient norm, the check for non-finite values and the counted metrics are in it.
Options: loop ("scan" or "unroll" over layers), dtype of the compute, remat.
Shapes: tokens int32 [1, rows, tokens] (one micro-batch), one segment a row.
Invariants: as in every peer, fresh random weights of deviation 1/sqrt(width).
Raises: through line.serve.
"""

from __future__ import annotations

import line


def make_spec(shape: dict, options: dict):
    """The model record of a benchmark shape."""
    from qwen_jax.models import spec

    return spec.Spec(
        family="qwen3",
        vocab_size=shape["vocab"],
        width=shape["width"],
        num_layers=shape["layers"],
        num_heads=shape["heads"],
        num_kv_heads=shape["kv_heads"],
        head_width=shape["head_width"],
        ffn_width=shape["ffn"],
        tie_embedding=shape["tied"],
        rope_theta=shape["rope_theta"],
        norm_eps=shape["norm_eps"],
        max_positions=max(32768, shape["tokens"]),
        init_std=shape["width"] ** -0.5,
        compute_dtype=options.get("dtype", "float32"),
    )


def make_optimizer(options: dict):
    """AdamW with the constants every peer uses."""
    from qwen_jax.optim import build

    optim = build.OptimConfig(
        name="adamw",
        lr_peak=options["lr"],
        schedule="linear",
        lr_end_ratio=1.0,
        warmup_steps=0,
        b2=0.95,
        weight_decay=0.1,
        decay_embedding=True,
        clip_norm=options["clip"],
    )
    return build.build(optim, 1_000_000)


def make_batch(shape: dict):
    """The shared random batch in the layout of the step: [1, rows, tokens]."""
    import numpy as np

    tokens, targets = (x[None].astype(np.int32) for x in line.batch(shape))
    positions = np.broadcast_to(
        np.arange(shape["tokens"], dtype=np.int32), tokens.shape
    )
    return {
        "tokens_bt": tokens,
        "targets_bt": targets,
        "positions_bt": positions,
        "segments_bt": np.ones_like(tokens),
        "mask_bt": np.ones(tokens.shape, np.float32),
    }


def build(shape: dict, options: dict):
    """Make the state, compile and run one step, return facts and the stepper."""
    import jax

    from qwen_jax import mesh
    from qwen_jax.train import state as state_lib
    from qwen_jax.train import step as step_lib

    spec, tx = make_spec(shape, options), make_optimizer(options)
    device_mesh = mesh.make(mesh.MeshConfig(), jax.devices()[:1])
    rules = mesh.Rules()
    how = step_lib.StepConfig(
        loop=options.get("loop", "scan"), remat=options.get("remat", "none")
    )
    jax.set_mesh(device_mesh)
    rows = mesh.sharding(device_mesh, jax.P(None, *rules.pspec("batch", None)))
    batch = jax.device_put(make_batch(shape), rows)
    now = [state_lib.create(spec, tx, device_mesh, rules, seed=0)]
    count = sum(leaf.size for leaf in jax.tree.leaves(now[0].params))
    step = step_lib.compile_step(spec, tx, rules, how)
    step = step.lower(now[0], batch, None).compile()
    memory = step.memory_analysis()

    def steps(n):
        losses = []
        for _ in range(n):
            now[0], metrics = step(now[0], batch, None)
            losses.append(metrics["loss"])
        jax.block_until_ready(now)
        return [float(loss) for loss in losses]

    facts = {
        "params": count,
        "tokens_per_step": batch["targets_bt"].size,
        "first_loss": steps(1)[0],
        "temp_bytes": memory.temp_size_in_bytes,
        "versions": f"qwen_jax, jax {jax.__version__}",
        "setting": f"blockwise attention, layers by {how.loop}",
    }
    return facts, steps


if __name__ == "__main__":
    line.serve(build)
