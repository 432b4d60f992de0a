# SPDX-License-Identifier: Apache-2.0
"""YaRN as Qwen3 is published with it: factor 4 on 32,768 positions, over all 131,072.

The oracle is transformers: its frequencies and factors, and logits of a small model at
positions all over the extended length.
"""

import jax
import numpy as np
import pytest

from qwen_jax import config, models
from qwen_jax.models import hf_config, rope

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PUBLISHED = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32_768,
}
MODEL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
    "attn_implementation": "eager",
}


def theirs(scaling, theta=1e6):
    """transformers' rotary module."""
    from transformers.models.qwen3 import modeling_qwen3

    rope_parameters = dict(scaling) | {"rope_theta": theta}
    made = transformers.Qwen3Config(**MODEL, rope_parameters=rope_parameters)
    return modeling_qwen3.Qwen3RotaryEmbedding(made)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"attention_factor": 1.25},
        {"mscale": 1.0, "mscale_all_dim": 0.7},
        {"mscale": 0.7},
        {"mscale": 0.7, "mscale_all_dim": 0.7, "attention_factor": 1.5},
        {"beta_fast": 16, "beta_slow": 2, "truncate": False},
        {"factor": None},
        {"factor": 1.0},
    ],
    ids=str,
)
def test_frequencies_and_factor(more):
    scaling = PUBLISHED | more
    reference = theirs(scaling)
    raw = {"model_type": "qwen3", "rope_theta": 1e6} | MODEL
    # In the form of publication, and in that of transformers 5.
    for form in (
        {"rope_scaling": scaling},
        {"rope_parameters": scaling | {"rope_theta": 1e6}},
    ):
        spec = hf_config.spec_from_config(raw | form)
        inverse, factor = rope.frequencies(spec)
        np.testing.assert_allclose(inverse, reference.inv_freq.numpy(), rtol=3e-7)
        np.testing.assert_allclose(factor, reference.attention_scaling, rtol=1e-12)
        again = hf_config.spec_from_config(hf_config.config_of(spec))
        assert rope.frequencies(again)[1] == factor
    if not more:
        np.testing.assert_allclose(factor, 1.1386294361119891, rtol=1e-12)


def test_a_factor_that_cannot_be():
    raw = {"model_type": "qwen3", "rope_theta": 1e6} | MODEL
    for scaling in ({"rope_type": "linear"}, PUBLISHED | {"factor": 0.5}):
        with pytest.raises(config.InputError, match="wanted a number of (at least )?1"):
            hf_config.spec_from_config(raw | {"rope_scaling": scaling})


def test_logits_over_the_extended_length(tmp_path):
    torch.manual_seed(0)
    made = transformers.Qwen3Config(
        **MODEL, rope_parameters=PUBLISHED | {"rope_theta": 1e6}
    )
    reference = transformers.Qwen3ForCausalLM(made).eval().float()
    with torch.no_grad():
        for weight in reference.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn_like(weight) * weight.shape[-1] ** -0.5)
    reference.save_pretrained(tmp_path)
    spec, params = models.load(tmp_path, dtype="float32")
    ids = np.random.default_rng(0).integers(0, 96, (1, 64)).astype(np.int32)
    # Near and far from each other, to the last position there is.
    steps = np.where(np.arange(64) % 4 == 3, 8188, 1)
    positions = np.cumsum(steps)[None].astype(np.int32)
    positions += 131_071 - positions.max()
    assert positions.min() >= 0
    with torch.no_grad():
        want = reference(
            torch.tensor(ids).long(), position_ids=torch.tensor(positions).long()
        ).logits.numpy()
    got = np.asarray(models.forward(spec, params, ids, positions=positions))
    with jax.enable_x64(True):
        wide, params64 = models.load(tmp_path, dtype="float64")
        exact = np.asarray(models.forward(wide, params64, ids, positions=positions))
    # Angles of float32 at 131,071 are off by 0.004: both stray alike from the exact.
    noise = np.abs(want - exact).max()
    assert noise < 0.05
    assert np.abs(got - want).max() < 4 * noise
    plain, _ = models.load(tmp_path, dtype="float32", rope_scaling=None)
    assert np.abs(
        models.forward(plain, params, ids, positions=positions) - want
    ).max() > (20 * noise)
