# SPDX-License-Identifier: Apache-2.0
"""transformers on torch: one float32 training step of Qwen3ForCausalLM.

Source: the library's own model and loss with its best CPU setting as measured: sdpa
attention, fused AdamW, gradients set to None. torch.compile brought nothing (2.83 s
against 2.6-2.7 s a step on a Zen 4 machine) and costs a compiler, so it is off.
Shapes: tokens int64 [rows, tokens]; targets are given shifted, so rows x tokens
targets count, as in every other candidate.
Invariants: fresh random weights of deviation 1/sqrt(fan in); loss before the first
update is near log(vocabulary).
Raises: through line.serve.
"""

from __future__ import annotations

import line


def make_model(shape: dict):
    """The library's Qwen3 of this shape with fresh random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    cfg = transformers.Qwen3Config(
        vocab_size=shape["vocab"],
        hidden_size=shape["width"],
        intermediate_size=shape["ffn"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_width"],
        max_position_embeddings=max(32768, shape["tokens"]),
        rms_norm_eps=shape["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": shape["rope_theta"]},
        tie_word_embeddings=shape["tied"],
        attn_implementation="sdpa",
    )
    model = transformers.Qwen3ForCausalLM(cfg).to(torch.float32)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 2:
                value.normal_(std=value.shape[1] ** -0.5)
    return model


def build(shape: dict, options: dict):
    """Make the model, run one step to warm up, return facts and the stepper."""
    import torch
    import transformers

    torch.set_num_threads(options["threads"])
    model = make_model(shape).train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=options["lr"],
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        fused=True,
    )
    tokens, targets = (torch.from_numpy(x) for x in line.batch(shape))

    def steps(n):
        losses = []
        for _ in range(n):
            optimizer.zero_grad(set_to_none=True)
            loss = model(input_ids=tokens, labels=targets, shift_labels=targets).loss
            loss.backward()
            if options["clip"]:
                torch.nn.utils.clip_grad_norm_(
                    model.parameters(), options["clip"], foreach=True
                )
            optimizer.step()
            losses.append(loss.detach())
        return [loss.item() for loss in losses]

    facts = {
        "params": sum(value.numel() for value in model.parameters()),
        "tokens_per_step": targets.numel(),
        "first_loss": steps(1)[0],
        "versions": f"transformers {transformers.__version__}, torch "
        f"{torch.__version__}",
        "setting": f"sdpa, fused AdamW, {torch.get_num_threads()} threads",
    }
    return facts, steps


if __name__ == "__main__":
    line.serve(build)
