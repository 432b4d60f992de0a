# SPDX-License-Identifier: Apache-2.0
"""Vectors and scores of documents equal transformers', row by row and packed.

The oracle is transformers with torch on the CPU (its base models and its classes for
sequences and tokens); for rewards, which it has no class for, its base model with the
published two layers on top, written here.
"""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from qwen_jax import config, mesh, models
from qwen_jax.models import heads, hf_config, sizes
from qwen_jax.models import spec as spec_lib

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 24,
}
HYBRID = EXPERTS | {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
T = 24
NEAR = {"atol": 2e-5, "rtol": 0}
# Real tokens of each row: whole, after padding, before padding, a single one.
REAL = [(0, T), (5, T), (0, T - 9), (11, 12)]


def drawn(model, seed=0):
    """Weights with fan-in scale and biases and norms off their usual values."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            if weight.ndim == 1 and "norm" in name:
                weight.add_(0.2 * noise)
            elif weight.ndim == 1:
                weight.copy_(0.3 * noise)
            else:
                weight.copy_(noise * weight.shape[-1] ** -0.5)
    return model.eval().float()


def make(kind, ending, folder, **changes):
    """A random model of transformers, saved; returns it."""
    text = "Text" if kind.startswith("Qwen3_5") else ""
    made = getattr(transformers, f"{kind}{text}Config")(**SIZES | changes)
    model = drawn(getattr(transformers, f"{kind}{ending}")(made))
    model.save_pretrained(folder)
    return model


def rows(seed=0):
    ids = np.random.default_rng(seed).integers(1, 96, (len(REAL), T)).astype(np.int32)
    segments = np.zeros_like(ids)
    for row, (start, stop) in enumerate(REAL):
        segments[row, start:stop] = 1
    return ids * segments, segments  # padding is id 0, as transformers finds it


def packed(seed=1):
    ids = np.random.default_rng(seed).integers(1, 96, (2, T)).astype(np.int32)
    segments = np.zeros_like(ids)
    segments[0, :10], segments[0, 10:11], segments[0, 11:20] = 1, 2, 3
    segments[1, 3:15], segments[1, 15:] = 2, 1
    return ids, segments


def alone(model, ids, pick):
    with torch.no_grad():
        return pick(model(torch.tensor(ids[None], dtype=torch.long))).numpy()[0]


BASES = {
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-untied": ("Qwen3", {"head_dim": 16}),
    "qwen3_next": ("Qwen3Next", HYBRID),
}


@pytest.mark.parametrize("name", BASES)
def test_vectors_are_those_of_the_last_token(name, tmp_path):
    """A folder without "model." in its names and without lm_head, as embedding models
    are published."""
    kind, changes = BASES[name]
    reference = make(kind, "Model", tmp_path, **changes)
    spec, params = models.load(tmp_path, dtype="float32")
    assert spec.head == "none" and "head_vd" not in params
    state = lambda out: out.last_hidden_state[:, -1]  # noqa: E731

    def want(ids, dims):
        x = alone(reference, ids, state)[:dims]
        return x / np.linalg.norm(x)

    ids, segments = rows()
    for dims in (None, 8):
        got = models.embed(spec, params, ids, segments, dims=dims)
        for row, (start, stop) in enumerate(REAL):
            np.testing.assert_allclose(
                got[row], want(ids[row, start:stop], dims), **NEAR
            )
    ids, segments = packed()
    got = np.asarray(models.embed(spec, params, ids, segments, documents=4))
    for row, number in np.ndindex(2, 4):
        mine = segments[row] == number + 1
        if mine.any():
            np.testing.assert_allclose(
                got[row, number], want(ids[row, mine], None), **NEAR
            )
        else:
            np.testing.assert_array_equal(got[row, number], 0)
    with pytest.raises(config.InputError, match="models.embed"):
        models.forward(spec, params, ids)
    with pytest.raises(config.InputError, match="dims=33: wanted 1 to the width, 32"):
        models.embed(spec, params, ids, dims=33)
    again(spec, params, tmp_path, f"{kind}Model", reference)


def again(spec, params, folder, architecture, reference):
    """load -> save -> transformers gives the same weights under the same names."""
    models.save(spec, params, folder / "again")
    raw = json.loads((folder / "again" / "config.json").read_text())
    assert raw["architectures"] == [architecture]
    back = getattr(transformers, architecture).from_pretrained(
        folder / "again", dtype=torch.float32
    )
    assert back.config.pad_token_id == 0
    ours, theirs = back.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert torch.equal(ours[key], theirs[key]), key
    spec_again, params_again = models.load(folder / "again", dtype="float32")
    assert spec_again == spec
    jax.tree.map(np.testing.assert_array_equal, params_again, params)


def test_an_embedding_model_under_the_name_of_one_with_logits(tmp_path):
    """Qwen3-Embedding's config.json names Qwen3ForCausalLM; the files have no head."""
    reference = make("Qwen3", "Model", tmp_path, head_dim=16)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["architectures"] = ["Qwen3ForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    spec, params = models.load(tmp_path, dtype="float32")
    assert spec.head == "none"
    ids, _ = rows()
    got = models.embed(spec, params, ids[:1])
    x = alone(reference, ids[0], lambda out: out.last_hidden_state[:, -1])
    np.testing.assert_allclose(got[0], x / np.linalg.norm(x), **NEAR)


CLASSES = {
    "qwen2": ("Qwen2", {"num_labels": 1}),
    "qwen2_moe": ("Qwen2Moe", EXPERTS | {"num_labels": 3}),
    "qwen3": ("Qwen3", {"head_dim": 16, "num_labels": 2}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | {"head_dim": 16, "num_labels": 5}),
    "qwen3_next": ("Qwen3Next", HYBRID | {"num_labels": 3}),
    "qwen3_5": (
        "Qwen3_5",
        {k: v for k, v in HYBRID.items() if k not in EXPERTS} | {"num_labels": 3},
    ),
}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_of_documents(name, tmp_path):
    kind, changes = CLASSES[name]
    text = "Text" if kind == "Qwen3_5" else ""
    architecture = f"{kind}{text}ForSequenceClassification"
    reference = make(kind, architecture.removeprefix(kind), tmp_path, **changes)
    spec, params = models.load(tmp_path, dtype="float32")
    assert (spec.head, spec.num_classes) == ("classes", changes["num_labels"])
    ids, segments = rows()
    got = models.score(spec, params, ids, segments)
    for row, (start, stop) in enumerate(REAL):
        want = alone(reference, ids[row, start:stop], lambda out: out.logits)
        np.testing.assert_allclose(got[row], want, **NEAR)
    if kind == "Qwen3":  # padded rows as transformers itself takes them
        with torch.no_grad():
            want = reference(
                torch.tensor(ids, dtype=torch.long),
                attention_mask=torch.tensor(segments, dtype=torch.long),
            ).logits
        np.testing.assert_allclose(got, want.numpy(), **NEAR)
    ids, segments = packed()
    got = np.asarray(models.score(spec, params, ids, segments, documents=3))
    for row, number in np.ndindex(2, 3):
        mine = segments[row] == number + 1
        want = np.zeros(spec.num_classes)
        if mine.any():
            want = alone(reference, ids[row, mine], lambda out: out.logits)
        np.testing.assert_allclose(got[row, number], want, **NEAR)
    again(spec, params, tmp_path, architecture, reference)


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3"])
@pytest.mark.parametrize("bias", [True, False])
def test_classes_of_tokens(kind, bias, tmp_path):
    reference = make(
        kind,
        "ForTokenClassification",
        tmp_path,
        num_labels=4,
        token_classification_bias=bias,
    )
    spec, params = models.load(tmp_path, dtype="float32")
    assert (spec.head, spec.num_classes) == ("token_classes", 4)
    assert ("score_bias_y" in params) == bias
    ids, segments = rows()
    got = np.asarray(models.score(spec, params, ids, segments))
    for row, (start, stop) in enumerate(REAL):
        with torch.no_grad():
            want = reference(torch.tensor(ids[row : row + 1, start:stop]).long()).logits
        np.testing.assert_allclose(got[row, start:stop], want[0], **NEAR)
    again(spec, params, tmp_path, f"{kind}ForTokenClassification", reference)


@pytest.mark.parametrize(
    ("architecture", "classes"),
    [("Qwen2ForRewardModel", 1), ("Qwen2ForProcessRewardModel", 2)],
)
def test_rewards(architecture, classes, tmp_path):
    base = make("Qwen2", "ForCausalLM", tmp_path)
    top = drawn(
        torch.nn.Sequential(
            torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, classes)
        ),
        seed=1,
    )
    weights = {k: v.clone() for k, v in base.state_dict().items()}
    weights |= {f"score.{k}": v.clone() for k, v in top.state_dict().items()}
    from safetensors.torch import load_file, save_file

    save_file(weights, tmp_path / "model.safetensors")
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["architectures"] = [architecture]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    spec, params = models.load(tmp_path, dtype="float32")
    assert (spec.head, spec.num_classes) == ("reward", classes)
    ids, segments = rows()
    got = np.asarray(models.score(spec, params, ids, segments))
    for row, (start, stop) in enumerate(REAL):
        with torch.no_grad():
            x = base.model(torch.tensor(ids[row : row + 1, start:stop]).long())[0]
            want = top(x)[0]
        np.testing.assert_allclose(got[row, start:stop], want, **NEAR)
    models.save(spec, params, tmp_path / "again")
    back = load_file(tmp_path / "again" / "model.safetensors")
    assert back.keys() == weights.keys() - {"lm_head.weight"}
    for key, value in back.items():
        assert torch.equal(value, weights[key]), key


def test_the_unused_head_of_tokens_is_told(tmp_path, capsys):
    reference = make("Qwen3", "ForSequenceClassification", tmp_path, num_labels=2)
    from safetensors.torch import save_file

    weights = {k: v.clone() for k, v in reference.state_dict().items()}
    save_file(
        weights | {"lm_head.weight": torch.ones(96, 32)}, tmp_path / "model.safetensors"
    )
    models.load(tmp_path, dtype="float32")
    assert "1 tensors of other parts" in capsys.readouterr().err


@pytest.mark.parametrize("tied", [True, False])
def test_yes_or_no(tied, tmp_path):
    reference = make("Qwen3", "ForCausalLM", tmp_path, tie_word_embeddings=tied)
    spec, params = models.load(tmp_path, dtype="float32")
    ids, segments = rows()
    got = heads.yes_no(spec, params, ids, segments, yes_id=17, no_id=4)
    for row, (start, stop) in enumerate(REAL):
        logits = alone(reference, ids[row, start:stop], lambda out: out.logits[:, -1])
        want = torch.softmax(torch.tensor(logits[[4, 17]]), 0)[1]
        np.testing.assert_allclose(got[row], want, **NEAR)
    assert np.ptp(got) > 0.05
    with pytest.raises(config.InputError, match="yes_id=96"):
        heads.yes_no(spec, params, ids, yes_id=96, no_id=4)


@pytest.mark.slow
def test_a_mesh_gives_the_same():
    spec = spec_lib.Spec(
        vocab_size=64,
        width=32,
        num_layers=1,
        num_heads=4,
        num_kv_heads=4,
        head_width=8,
        ffn_width=48,
        init_std=0.2,
    )
    yes_no = functools.partial(heads.yes_no, yes_id=3, no_id=5)
    ids, segments = rows()
    ids = ids % 64
    on, rules = mesh.make(mesh.MeshConfig(data=2, fsdp=2, tensor=2)), mesh.Rules()
    for head, run in {
        "reward": models.score,
        "classes": models.score,
        "tokens": yes_no,
    }.items():
        classes = 0 if head == "tokens" else 3
        here = dataclasses.replace(spec, head=head, num_classes=classes)
        run = functools.partial(run, here, rules=rules)
        want = jax.jit(run)(models.init(here, 0), ids, segments)
        with jax.set_mesh(on):
            placed = models.init(here, 0, device_mesh=on, rules=rules)
            batch = mesh.sharding(on, rules.pspec("batch", None))
            got = jax.jit(run)(placed, *jax.device_put((ids, segments), batch))
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"head": "clases"}, "did you mean 'classes'"),
        ({"head": "classes"}, "num_classes=0"),
        ({"num_classes": 3}, "num_classes=3 with head='tokens': wanted 0"),
        ({"head_bias": True}, "head_bias=True"),
    ],
)
def test_heads_that_cannot_be(changes, told):
    with pytest.raises(ValueError, match=told):
        spec_lib.Spec(**changes)


def test_a_head_that_nothing_reads_is_not_saved(tmp_path):
    spec = sizes.get("qwen3-0.6b", head="reward", num_classes=1)
    with pytest.raises(config.InputError, match="head='reward'"):
        hf_config.check_spec(spec)


def test_texts_are_those_of_the_published_models():
    assert heads.query("what", "Find it") == "Instruct: Find it\nQuery:what"
    text = heads.pair("q", "d", "i")
    assert text.startswith("<|im_start|>system\nJudge whether the Document meets")
    assert "<Instruct>: i\n<Query>: q\n<Document>: d<|im_end|>\n" in text
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
