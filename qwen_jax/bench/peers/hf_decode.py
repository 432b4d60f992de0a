# SPDX-License-Identifier: Apache-2.0
"""transformers on torch: greedy `generate` with its key-value cache, float32, sdpa.

Options: new_tokens, threads. Shapes: prompts int64 [rows, tokens]; one "step" is one
call of `generate` that makes exactly new_tokens tokens a row.
Invariants: as in hf_train, fresh random weights of deviation 1/sqrt(fan in); no end id.
Raises: through line.serve.
"""

from __future__ import annotations

import hf_train
import line


def build(shape: dict, options: dict):
    """Make the model, generate once, return facts and the stepper."""
    import torch
    import transformers

    torch.set_num_threads(options["threads"])
    model = hf_train.make_model(shape).eval()
    prompts = torch.from_numpy(line.batch(shape)[0])
    new = options["new_tokens"]
    how = transformers.GenerationConfig(
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    seen = torch.ones_like(prompts)

    def steps(n):
        for _ in range(n):
            with torch.inference_mode():
                out = model.generate(
                    prompts, attention_mask=seen, generation_config=how
                )
        return [out.shape[1] - prompts.shape[1]] * out.shape[0]

    facts = {
        "params": sum(value.numel() for value in model.parameters()),
        "tokens_per_step": sum(steps(1)),
        "versions": f"transformers {transformers.__version__}, torch "
        f"{torch.__version__}",
        "setting": f"generate, sdpa, {torch.get_num_threads()} threads",
    }
    return facts, steps


if __name__ == "__main__":
    line.serve(build)
