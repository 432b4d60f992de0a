# SPDX-License-Identifier: Apache-2.0
"""Tiny random models written by transformers: same logits, loss, gradient norms.

The oracle is transformers with torch on the CPU. Its weights are drawn here with fan-in
scale, norms off one and biases off zero, so that a missing bias, a wrong norm or a
wrong RoPE layout shows at once (the library's own initialization hides them).
"""

import copy
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import config, models
from qwen_jax.models import decode, hf
from qwen_jax.train import losses

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 10_000.0,
    "attn_implementation": "eager",
}
CASES = {
    "llama": ("Llama", {"head_dim": 16}),
    "llama-tied": (
        "Llama",
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "hidden_size": 48,
            "tie_word_embeddings": True,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-mha": ("Qwen3", {"head_dim": 8, "num_key_value_heads": 4}),
    "qwen3-yarn": ("Qwen3", {"head_dim": 16, "rope_scaling": YARN}),
    "qwen3-linear": (
        "Qwen3",
        {"head_dim": 16, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "qwen3-window": (
        "Qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
        },
    ),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-odd-heads": (
        "Qwen2",
        {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48},
    ),
    "qwen2-yarn": ("Qwen2", {"rope_scaling": YARN}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ),
}
EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 24,
}
LINEAR = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
HYBRID = ["linear_attention", "linear_attention", "full_attention"]
CASES |= {
    "qwen2_moe": ("Qwen2Moe", EXPERTS),
    "qwen2_moe-mixed": (
        "Qwen2Moe",
        EXPERTS | {"decoder_sparse_step": 2, "norm_topk_prob": True},
    ),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 16, "norm_topk_prob": True} | EXPERTS),
    "qwen3_moe-raw-tied": (
        "Qwen3Moe",
        {"head_dim": 8, "tie_word_embeddings": True, "num_key_value_heads": 4}
        | EXPERTS
        | {"num_experts": 5, "num_experts_per_tok": 3, "mlp_only_layers": [1]},
    ),
    "qwen3_next": ("Qwen3Next", LINEAR | EXPERTS | {"layer_types": HYBRID}),
    "qwen3_next-wide": (
        "Qwen3Next",
        LINEAR
        | EXPERTS
        | {
            "head_dim": 32,
            "linear_num_value_heads": 6,
            "linear_value_head_dim": 8,
            "num_hidden_layers": 5,
            "layer_types": ["linear_attention", "full_attention"] * 2
            + ["linear_attention"],
        },
    ),
    "qwen3_5": ("Qwen3_5", LINEAR | {"layer_types": HYBRID}),
    "qwen3_5-tied": (
        "Qwen3_5",
        LINEAR
        | {
            "layer_types": HYBRID[::-1],
            "tie_word_embeddings": True,
            "linear_num_key_heads": 4,
            "linear_conv_kernel_dim": 3,
        },
    ),
    "qwen3_5_moe": ("Qwen3_5Moe", LINEAR | EXPERTS | {"layer_types": HYBRID}),
}
T = 40


def offset_norms(kind):
    """Whether the norms multiply by one plus the weight."""
    return kind in ("Qwen3Next", "Qwen3_5", "Qwen3_5Moe")


def make_reference(name, tmp_path):
    """A random model in transformers, saved to a folder; returns the torch model."""
    kind, changes = CASES[name]
    settings = COMMON | changes
    text = "Text" if kind.startswith("Qwen3_5") else ""
    cls = getattr(transformers, f"{kind}{text}Config")
    made = cls(**settings)
    torch.manual_seed(sum(map(ord, name)))
    model = getattr(transformers, f"{kind}ForCausalLM")(made).eval().float()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim == 1 and "norm" in key:
                middle = 0 if offset_norms(kind) and "linear" not in key else 1
                weight.copy_(middle + 0.2 * torch.randn_like(weight))
            elif weight.ndim == 1:
                weight.copy_(0.3 * torch.randn_like(weight))
            elif "embed_tokens" in key and not settings.get("tie_word_embeddings"):
                weight.copy_(torch.randn_like(weight))
            else:
                weight.copy_(torch.randn_like(weight) * weight.shape[-1] ** -0.5)
    model.save_pretrained(tmp_path)
    return model


def tokens(rows, seed=0):
    return np.random.default_rng(seed).integers(0, 96, (rows, T)).astype(np.int32)


def reference_logits(model, ids, attention_mask=None):
    with torch.no_grad():
        kwargs = {}
        if attention_mask is not None:
            kwargs["attention_mask"] = torch.tensor(attention_mask, dtype=torch.long)
        return model(torch.tensor(ids, dtype=torch.long), **kwargs).logits.numpy()


def exact_logits(model, ids):
    """The same in float64, where the library itself would round to float32: in norms,
    softmax, RoPE and router it names that type."""
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")  # its grouped product has no float64
    wide = mock.patch.object(torch, "float32", torch.float64)
    with wide, mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        return reference_logits(model, ids)


# Variants of a family that is there otherwise, for slow runs.
LATER = (
    "llama-tied",
    "qwen2-tied",
    "qwen2_moe-mixed",
    "qwen3_next-wide",
    "qwen3_5-tied",
)


def marked(name):
    return pytest.param(name, marks=pytest.mark.slow if name in LATER else ())


@pytest.fixture(scope="module", params=map(marked, CASES))
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    reference = make_reference(request.param, folder)
    spec, params = models.load(folder, dtype="float32")
    forward = jax.jit(lambda p, ids, seg: models.forward(spec, p, ids, segments=seg))
    return request.param, reference, spec, params, folder, forward


def test_logits(pair):
    _, reference, _spec, params, _, forward = pair
    ids = tokens(4)
    got = np.asarray(forward(params, ids, np.ones_like(ids)))
    want, exact = reference_logits(reference, ids), exact_logits(reference, ids)
    assert exact.dtype == np.float64 and want.std() > 0.3
    assert 0 < np.abs(want - exact).max() < 2.5e-4
    # Of all logits: the largest error of one is another on each kind of machine.
    ours, theirs = (np.sqrt(np.mean((x - exact) ** 2)) for x in (got, want))
    assert ours < 2 * theirs
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


def test_the_same_twenty_tokens(pair):
    """Greedy decoding with a cache, prompts of different lengths in one call."""
    name, reference, spec, params, _, _ = pair
    prompts = [tokens(1, seed=5)[0, :n].tolist() for n in (9, 16)]
    got = decode.generate(spec, params, prompts, max_tokens=20, stop_ids=())
    for prompt, new in zip(prompts, got, strict=True):
        with torch.no_grad():
            out = reference.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=20,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert new == out[0, len(prompt) :].tolist(), name


def test_padded_rows(pair):
    """Left and right padding: the real tokens' logits are the row's own, alone."""
    _, reference, _spec, params, _, forward = pair
    ids = tokens(4, seed=1)
    mask = np.ones_like(ids)
    mask[0, :7] = 0
    mask[1, -9:] = 0
    mask[2, :1] = 0
    got = np.asarray(forward(params, ids, mask))
    for row in range(4):
        real = mask[row] > 0
        want = reference_logits(reference, ids[row : row + 1, real])[0]
        np.testing.assert_allclose(got[row, real], want, atol=1e-4, rtol=0)


def test_packed_rows_equal_separate_rows(pair):
    _, reference, _spec, params, _, forward = pair
    ids = tokens(4, seed=2)
    segments = np.zeros_like(ids)
    borders = [(0, 13, 1), (13, 14, 2), (14, 37, 3)]
    for start, stop, number in borders:
        segments[:, start:stop] = number
    got = np.asarray(forward(params, ids, segments))
    for start, stop, _ in borders:
        want = reference_logits(reference, ids[:, start:stop])
        np.testing.assert_allclose(got[:, start:stop], want, atol=1e-4, rtol=0)


def test_loss_and_gradient_norms(pair):
    _name, reference, spec, params, _, _ = pair
    ids = tokens(4, seed=3)
    reference.zero_grad()
    out = reference(torch.tensor(ids, dtype=torch.long)).logits[:, :-1]
    want = torch.nn.functional.cross_entropy(
        out.reshape(-1, out.shape[-1]),
        torch.tensor(ids[:, 1:], dtype=torch.long).ravel(),
    )
    want.backward()

    def loss(params):
        from qwen_jax import mesh
        from qwen_jax.models import decoder

        hidden, _ = decoder.hidden(spec, params, ids, loop="unroll", remat="dots")
        total, _parts = losses.cross_entropy(
            hidden[:, :-1],
            decoder.head_vd(spec, params),
            jnp.asarray(ids[:, 1:]),
            jnp.ones(ids[:, 1:].shape),
            z_coef=0.0,
            rules=mesh.Rules(),
            chunk=16,
        )
        return total / ids[:, 1:].size

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, want.item(), rtol=1e-5)
    theirs = {k: p.grad for k, p in reference.named_parameters() if p.grad is not None}
    ours = dict(hf.named_tensors(spec, grads, fused=True))
    assert ours.keys() == theirs.keys()
    for key, grad in ours.items():
        # A key's bias shifts all scores of a query alike: its gradient is zero but for
        # rounding, so only the scale of the noise can be compared.
        np.testing.assert_allclose(
            np.linalg.norm(grad),
            theirs[key].norm().item(),
            rtol=1e-4,
            atol=2e-6,
            err_msg=key,
        )


def test_round_trip_through_transformers(pair, tmp_path):
    _name, reference, spec, params, _folder, _ = pair
    models.save(spec, params, tmp_path, shard_bytes=60_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    back = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    ).eval()
    ours, theirs = back.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert torch.equal(ours[key], theirs[key]), key
    ids = tokens(2, seed=4)
    want = reference_logits(reference, ids)
    np.testing.assert_array_equal(reference_logits(back, ids), want)
    again, params_again = models.load(tmp_path, dtype="float32")
    assert again == spec
    jax.tree.map(np.testing.assert_array_equal, params_again, params)


def test_a_wrong_folder_is_named(tmp_path):
    with pytest.raises(config.InputError, match="does not exist"):
        models.load(tmp_path / "absent")
    with pytest.raises(config.InputError, match="has no config.json"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwenn3"}))
    with pytest.raises(config.InputError, match="did you mean 'qwen3'"):
        models.load(tmp_path)


def test_wrong_tensors_are_named(tmp_path):
    make_reference("qwen3", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    for key, value, words in [
        ("num_hidden_layers", 4, "no tensor 'model.layers.3"),
        ("num_hidden_layers", 2, "belong to no weight"),
        (
            "intermediate_size",
            48,
            r"shape \(32, 64\), its config.json wants \(32, 48\)",
        ),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(raw | {key: value}))
        with pytest.raises(config.InputError, match=words):
            models.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    weights = next(tmp_path.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(config.InputError, match="cannot be read"):
        models.load(tmp_path)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope type 'llama3': wanted default, linear or yarn",
        ),
        ({"attention_bias": True}, "attention_bias=true with llama"),
        ({"mlp_bias": True}, "mlp_bias=true"),
    ],
)
def test_a_llama_that_this_decoder_is_not(change, words, tmp_path):
    raw = {"model_type": "llama", "vocab_size": 96, "hidden_size": 32}
    raw |= {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(config.InputError, match=words):
        models.load(tmp_path)


def test_the_text_part_of_a_larger_model_is_found(tmp_path, capsys):
    """As Qwen3.5 is published: a prefix, vision and prediction heads beside it."""
    reference = make_reference("qwen3_5", tmp_path)
    whole = dict(reference.state_dict())
    renamed = {
        k.replace("model.", "model.language_model.", 1): v.contiguous()
        for k, v in whole.items()
    }
    more = {"mtp.fc.weight": torch.ones(2, 2), "model.visual.x": torch.ones(3)}
    from safetensors.torch import save_file

    save_file(renamed | more, tmp_path / "model.safetensors")
    raw = json.loads((tmp_path / "config.json").read_text())
    outer = {"model_type": "qwen3_5", "text_config": raw, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    spec, params = models.load(tmp_path, dtype="float32")
    told = (
        "2 tensors of other parts than the text model are left out: mtp., model.visual."
    )
    assert told in capsys.readouterr().err
    ids = tokens(1)
    got = models.forward(spec, params, ids)
    np.testing.assert_allclose(got, reference_logits(reference, ids), atol=1e-4)
