# SPDX-License-Identifier: Apache-2.0
"""google-tunix: greedy decoding of its Qwen3 with its own `Sampler`, float32.

Options: new_tokens, threads. Shapes: prompts of `tokens` ids for each of `rows` rows;
one "step" is one call of the sampler that makes new_tokens tokens a row.
Invariants: the cache is just as long as it must be; the end id is none of the ids, so
every row makes all its tokens. Weights as in tunix_train.
Raises: through line.serve.
"""

from __future__ import annotations

import importlib.metadata

import line
import tunix_train


class Ids:
    """What the sampler asks of a tokenizer, for prompts that are ids already."""

    def __init__(self, prompts):
        self.prompts = prompts

    def encode(self, text, **_):
        return self.prompts[int(text)]

    def decode(self, ids, **_):
        return " ".join(map(str, ids))

    def bos_id(self):
        return 0  # none is put before the prompt

    def eos_id(self):
        return -2

    def pad_id(self):
        return -3


def build(shape: dict, options: dict):
    """Make the model, generate once, return facts and the stepper."""
    import jax
    from flax import nnx
    from tunix.generate import sampler as sampler_lib

    graph, params = tunix_train.make_model(shape)
    prompts, new = line.batch(shape)[0].tolist(), options["new_tokens"]
    cache = sampler_lib.CacheConfig(
        cache_size=shape["tokens"] + new,
        num_layers=shape["layers"],
        num_kv_heads=shape["kv_heads"],
        head_dim=shape["head_width"],
    )
    sampler = sampler_lib.Sampler(nnx.merge(graph, params), Ids(prompts), cache)
    names = [str(i) for i in range(len(prompts))]

    def steps(n):
        for _ in range(n):
            out = sampler(
                names,
                max_generation_steps=new,
                max_prompt_length=shape["tokens"],
                eos_tokens=[-2],
            )
        return [len(tokens) for tokens in out.tokens]

    facts = {
        "params": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "tokens_per_step": sum(steps(1)),
        "versions": f"tunix {importlib.metadata.version('google-tunix')}, jax "
        f"{jax.__version__}",
        "setting": "its Sampler, greedy",
    }
    return facts, steps


if __name__ == "__main__":
    line.serve(build)
