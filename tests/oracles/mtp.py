# SPDX-License-Identifier: Apache-2.0
"""The head for further tokens in torch, from its formula and transformers' own layers.

    h' = fc([norm_e(embed(x_{t+1})) | norm_h(h_t)]); a full-attention layer; a norm; the
    model's head

transformers drops these weights on load, so the head is put together here; modules are
named as the published tensors `mtp.*` are.
"""

import importlib

import torch
import transformers


class Head(torch.nn.Module):
    """`layers` layers on a model of transformers that ends in a head of tokens."""

    def __init__(self, model, kind, layers=1):
        super().__init__()
        where = f"transformers.models.{model.config.model_type.removesuffix('_text')}"
        home = where.rpartition(".")[2]
        module = importlib.import_module(f"{where}.modeling_{home}")
        config = transformers.AutoConfig.for_model(**model.config.to_dict())
        config.layer_types = ["full_attention"] * layers
        config.num_hidden_layers = layers
        config.mlp_only_layers = []
        config._attn_implementation = "eager"
        width, eps = config.hidden_size, config.rms_norm_eps
        norm = getattr(module, f"{kind}RMSNorm")
        layer = getattr(module, f"{kind}DecoderLayer")
        self.fc = torch.nn.Linear(2 * width, width, bias=False)
        self.pre_fc_norm_embedding = norm(width, eps=eps)
        self.pre_fc_norm_hidden = norm(width, eps=eps)
        self.layers = torch.nn.ModuleList(layer(config, i) for i in range(layers))
        self.norm = norm(width, eps=eps)

    def logits(self, model, ids):
        """[logits of x_{t+2+i} for t = 0 .. n - 2 - i] of one document, [1, n] ids."""
        base = model.model
        hidden = base(ids).last_hidden_state
        out = []
        for i, layer in enumerate(self.layers):
            count = ids.shape[1] - 1 - i
            if count < 1:
                break
            known = self.pre_fc_norm_embedding(base.embed_tokens(ids[:, i + 1 :]))
            hidden = self.pre_fc_norm_hidden(hidden[:, :count])
            x = self.fc(torch.cat([known, hidden], dim=-1))
            index = torch.arange(count)
            seen = index[:, None] >= index[None, :]
            mask = torch.where(seen, 0.0, float("-inf"))[None, None].to(x.dtype)
            turns = base.rotary_emb(x, index[None])
            x = layer(x, position_embeddings=turns, attention_mask=mask)
            hidden = self.norm(x[0] if isinstance(x, tuple) else x)
            out.append(model.lm_head(hidden))
        return out
