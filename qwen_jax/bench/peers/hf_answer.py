# SPDX-License-Identifier: Apache-2.0
"""transformers on torch: greedy `generate` of a batch padded on the left, float32.

Shape: folder, prompts (ids). Options: new_tokens, threads. One "step" is one call.
Invariants: no end id; padding is masked.
Raises: through line.serve.
"""

from __future__ import annotations

import line


def build(shape: dict, options: dict):
    """Load the model, answer once, return facts and the stepper."""
    import torch
    import transformers

    torch.set_num_threads(options["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        shape["folder"], dtype=torch.float32
    ).eval()
    # What is None below would be taken from here, and end ids would be held back.
    model.generation_config.eos_token_id = None
    prompts, new = shape["prompts"], options["new_tokens"]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    how = transformers.GenerationConfig(
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        eos_token_id=None,
    )

    def answers():
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=seen, generation_config=how)
        return out[:, longest:].tolist()

    def steps(n):
        return [float(len(answers())) for _ in range(n)]

    facts = {
        "ids": answers(),
        "versions": f"transformers {transformers.__version__}, torch "
        f"{torch.__version__}",
        "setting": f"generate, sdpa, {torch.get_num_threads()} threads",
    }
    return facts, steps


if __name__ == "__main__":
    line.serve(build)
