# SPDX-License-Identifier: Apache-2.0
"""google-tunix: one float32 training step of its Qwen3 with optax AdamW.

Source: the library's model, built from its own config class; its splash attention
exists on TPU only, so the dense attention is its best on a CPU. The step is a pure
jitted function over the split model with donated parameters and moments, which
spares the per-call object traversal that its trainer pays: the faster way.
Shapes: tokens int32 [rows, tokens]; rows x tokens targets count.
Invariants: the library starts its feed-forward weights at zero; here every matrix is
drawn with deviation 1/sqrt(fan in), so that the loss is near log(vocabulary) and all
parameters learn.
Raises: through line.serve.
"""

from __future__ import annotations

import importlib.metadata

import line


def draw(key, path, value, shape: dict):
    """A random matrix for the parameter at `path`; norm weights stay at one."""
    import jax

    name = jax.tree_util.keystr(path)
    if value.ndim < 2:
        return value
    last_is_out = not ("o_proj" in name or "input_embedding" in name)
    fan_in = shape["width"] if last_is_out else value.size // value.shape[-1]
    if "input_embedding" in name:
        fan_in = shape["width"]
    if "down_proj" in name:
        fan_in = shape["ffn"]
    return jax.random.normal(key, value.shape, value.dtype) * fan_in**-0.5


def make_params(model, shape: dict):
    """Split the model into its definition and freshly drawn parameters."""
    import jax
    from flax import nnx

    graph, params = nnx.split(model, nnx.Param)
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [
        draw(key, path, value, shape)
        for key, (path, value) in zip(keys, leaves, strict=True)
    ]
    return graph, jax.tree_util.tree_unflatten(tree, drawn)


def make_step(graph, optimizer, tokens, targets):
    """The jitted (params, moments) -> (params, moments, loss), inputs donated."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    rows, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    mask = jnp.broadcast_to(
        jnp.tril(jnp.ones((length, length), bool)), (rows, length, length)
    )

    def loss_of(params, tokens, targets):
        logits, _ = nnx.merge(graph, params)(tokens, positions, None, mask)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return losses.mean()

    def step(params, moments, tokens, targets):
        loss, grads = jax.value_and_grad(loss_of)(params, tokens, targets)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    return jax.jit(step, donate_argnums=(0, 1))


def make_model(shape: dict):
    """The library's Qwen3 of this shape: its definition and freshly drawn weights."""
    import jax.numpy as jnp
    from flax import nnx
    from tunix.models.qwen3 import model as qwen3

    cfg = qwen3.ModelConfig(
        num_layers=shape["layers"],
        vocab_size=shape["vocab"],
        embed_dim=shape["width"],
        hidden_dim=shape["ffn"],
        num_heads=shape["heads"],
        head_dim=shape["head_width"],
        num_kv_heads=shape["kv_heads"],
        rope_theta=int(shape["rope_theta"]),
        norm_eps=shape["norm_eps"],
        use_tied_embedding=shape["tied"],
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    )
    return make_params(qwen3.Qwen3(cfg, rngs=nnx.Rngs(params=0)), shape)


def build(shape: dict, options: dict):
    """Make the model, compile and run one step, return facts and the stepper."""
    import jax
    import jax.numpy as jnp
    import optax

    graph, params = make_model(shape)
    optimizer = optax.adamw(options["lr"], b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
    if options["clip"]:
        clip = optax.clip_by_global_norm(options["clip"])
        optimizer = optax.chain(clip, optimizer)
    tokens, targets = (jnp.asarray(x, jnp.int32) for x in line.batch(shape))
    step = make_step(graph, optimizer, tokens, targets)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    state = [params, optimizer.init(params)]

    def steps(n):
        losses = []
        for _ in range(n):
            state[0], state[1], loss = step(state[0], state[1], tokens, targets)
            losses.append(loss)
        jax.block_until_ready(state)
        return [float(loss) for loss in losses]

    facts = {
        "params": count,
        "tokens_per_step": targets.size,
        "first_loss": steps(1)[0],
        "versions": f"tunix {importlib.metadata.version('google-tunix')}, jax "
        f"{jax.__version__}",
        "setting": "jit, donated, optax adamw",
    }
    return facts, steps


if __name__ == "__main__":
    line.serve(build)
