# SPDX-License-Identifier: Apache-2.0
"""GGUF files: the weights, logits and configuration are those they were written from.

Files are written with the `gguf` package from random models of transformers; its
dequantization, and transformers' own reading of the file, are the oracles.
"""

import dataclasses

import jax
import numpy as np
import pytest

from qwen_jax import config, mesh, models
from qwen_jax.models import gguf_blocks, gguf_file, hf
from qwen_jax.models import spec as spec_lib

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
package = pytest.importorskip("gguf")
from tests import ggufs  # noqa: E402 (it needs the three)

Kind = package.GGMLQuantizationType
TIED = {"tie_word_embeddings": True}
CASES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", TIED | {"num_attention_heads": 6, "hidden_size": 48}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", TIED),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", TIED | {"num_key_value_heads": 4}),
    "qwen3moe": ("qwen3moe", {}),
    "qwen3moe-tied": ("qwen3moe", TIED),
}
IDS = np.random.default_rng(0).integers(0, 96, (2, 24)).astype(np.int32)


def logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def named(spec, params):
    """The weights under the names of transformers."""
    return dict(hf.named_tensors(spec, params, fused=True))


def written(name, folder):
    """(the model, its file) of a case."""
    architecture, changes = CASES[name]
    made = ggufs.model(architecture, **changes)
    path = folder / "model.gguf"
    ggufs.write(path, architecture, ggufs.tensors(made, architecture), made.config)
    return made, path


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_model_that_was_written(name, tmp_path):
    made, path = written(name, tmp_path)
    spec, params = models.load(path)
    got = jax.jit(lambda p, x: models.forward(spec, p, x))(params, IDS)
    want = logits(made, IDS)
    assert want.std() > 0.3
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)
    assert (spec.bos_id, spec.eos_ids, spec.max_positions) == (1, (2,), 128)
    assert spec.tie_embedding == made.config.tie_word_embeddings
    assert spec.norm_eps == made.config.rms_norm_eps
    assert spec.param_dtype == spec.compute_dtype == "float32"


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen2-tied"])
def test_transformers_reads_the_same_weights(name, tmp_path):
    """Of Qwen3 it does not read the widths of heads and experts."""
    pytest.importorskip("accelerate")
    path = written(name, tmp_path)[1]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    ours = named(*models.load(path))
    for key, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[key].numpy(), err_msg=key)
    assert theirs.keys() - ours.keys() <= {"lm_head.weight"}


def test_a_mesh_gets_the_same_weights(tmp_path):
    path = written("llama", tmp_path)[1]
    on, rules = mesh.make(mesh.MeshConfig(data=2, fsdp=2, tensor=2)), mesh.Rules()
    _, placed = models.load(path, device_mesh=on, rules=rules)
    _, plain = models.load(path)
    jax.tree.map(np.testing.assert_array_equal, placed, plain)
    assert len(placed["embed_vd"].sharding.device_set) == 8


# --- types ---


@pytest.mark.parametrize("number", gguf_file.TYPES)
def test_blocks_become_what_the_package_makes_of_them(number, monkeypatch):
    stored, kind = gguf_file.TYPES[number], Kind(number)
    assert stored.name == kind.name
    assert package.GGML_QUANT_SIZES[kind] == (stored.block, stored.block_bytes)
    raw = ggufs.blocks(kind, 1000 * stored.block_bytes, seed=number)
    want = package.dequantize(raw, kind).reshape(-1)
    assert np.isfinite(want).all() and want.std() > 0
    for chunk in (gguf_blocks.CHUNK, 7 * stored.block):
        monkeypatch.setattr(gguf_blocks, "CHUNK", chunk)
        got = gguf_blocks.dequantize(raw, stored)
        np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("number", [0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 30])
def test_a_file_of_each_type_gives_its_weights(number, tmp_path):
    kind = Kind(number)
    wide = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    made = ggufs.model("llama", **wide)
    plain = ggufs.tensors(made, "llama")
    kinds = {name: kind for name, weight in plain.items() if weight.ndim == 2}
    path = tmp_path / "model.gguf"
    truth = ggufs.write(path, "llama", plain, made.config, kinds=kinds)
    spec, params = models.load(path)
    half = {"F16": "float16", "BF16": "bfloat16"}.get(kind.name, "float32")
    assert spec.param_dtype == half
    got = named(*models.load(path, dtype="float32"))
    q = truth["blk.0.attn_q.weight"].reshape(4, 32, 2, 256).swapaxes(1, 2)
    k = truth["blk.0.attn_k.weight"].reshape(2, 32, 2, 256).swapaxes(1, 2)
    for ours, want in {
        "model.embed_tokens.weight": truth["token_embd.weight"],
        "lm_head.weight": truth["output.weight"],
        "model.layers.0.self_attn.q_proj.weight": q.reshape(256, 256),
        "model.layers.0.self_attn.k_proj.weight": k.reshape(128, 256),
        "model.layers.0.mlp.down_proj.weight": truth["blk.0.ffn_down.weight"],
    }.items():
        np.testing.assert_array_equal(got[ours], want, err_msg=ours)
    assert params["embed_vd"].dtype == half


# --- positions ---


def scaled(kind, *facts):
    def add(writer):
        writer.add_rope_scaling_type(package.RopeScalingType(kind))
        writer.add_rope_scaling_factor(4.0)
        for name, value in facts:
            writer.add_float32(f"qwen3.rope.scaling.{name}", value)
        writer.add_rope_scaling_orig_ctx_len(32)

    return add


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "add, told",
    [
        (scaled("linear"), {"rope_type": "linear", "factor": 4.0}),
        (scaled("yarn"), YARN),
        (
            scaled("yarn", ("yarn_beta_fast", 16.0), ("yarn_beta_slow", 2.0)),
            YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
        ),
    ],
)
def test_scaled_positions(add, told, tmp_path):
    rope = {"rope_theta": 10_000.0, "rope_parameters": {"rope_theta": 10_000.0} | told}
    made = ggufs.model("qwen3", **rope)
    path = tmp_path / "model.gguf"
    tensors = ggufs.tensors(made, "qwen3")
    ggufs.write(path, "qwen3", tensors, made.config, facts=[add])
    spec, params = models.load(path)
    assert spec.rope_scaling.kind == told["rope_type"]
    got = models.forward(spec, params, IDS)
    np.testing.assert_allclose(got, logits(made, IDS), atol=1e-4, rtol=0)
    plain = dataclasses.replace(spec, rope_scaling=None)
    assert np.abs(got - models.forward(plain, params, IDS)).max() > 1e-2


# --- what is refused ---


@pytest.fixture(scope="module")
def tiny():
    made = ggufs.model("llama", num_hidden_layers=1)
    return made, ggufs.tensors(made, "llama")


def refusal(tiny, tmp_path, *facts, change=None, architecture="llama"):
    made, tensors = tiny
    path = tmp_path / "model.gguf"
    tensors = dict(tensors)
    if change:
        change(tensors)
    ggufs.write(path, architecture, tensors, made.config, facts=facts)
    with pytest.raises(config.InputError) as error:
        models.load(path)
    return str(error.value)


@pytest.mark.parametrize(
    "add, told",
    [
        (
            lambda w: w.add_rope_scaling_type(package.RopeScalingType.LONGROPE),
            "llama.rope.scaling.type is 'longrope'; wanted none, linear or yarn",
        ),
        (
            lambda w: w.add_rope_scaling_attn_factors(2.0),
            "llama.rope.scaling.attn_factor is 2.0; wanted 1.0",
        ),
        (lambda w: w.add_sliding_window(64), "attention.sliding_window is 64"),
        (lambda w: w.add_logit_scale(0.5), "llama.logit_scale is 0.5; wanted 0.0"),
        (lambda w: w.add_expert_count(8), "expert_count is 8; wanted 0 for this"),
        (lambda w: w.add_key_length(-4 % 2**32), "rope.dimension_count is 8; wanted"),
        (lambda w: w.add_value_length(4), "value_length is 4; wanted the head width"),
        (lambda w: w.add_int32("split.count", 3), "one of 3 parts; join them with"),
        (lambda w: w.add_eot_token_id(96), "eot_token_id is 96; the vocabulary has 96"),
        (
            lambda w: w.add_float64("llama.rope.scale_linear", float("nan")),
            "rope.scale_linear is nan; wanted a finite number",
        ),
    ],
)
def test_a_fact_that_this_decoder_does_not_know(add, told, tiny, tmp_path):
    assert told in refusal(tiny, tmp_path, add)


def test_tensors_of_another_model(tiny, tmp_path):
    bias = {"blk.0.attn_q.bias": np.ones(32, np.float32)}
    told = refusal(tiny, tmp_path, change=lambda t: t.update(bias))
    assert "1 tensors belong to no weight of a llama model" in told
    assert "blk.0.attn_q.bias" in told
    told = refusal(tiny, tmp_path, change=lambda t: t.pop("blk.0.ffn_up.weight"))
    assert "has no tensor 'blk.0.ffn_up.weight'; did you mean" in told
    other = {"blk.0.ffn_up.weight": np.ones((32, 64), np.float32)}
    told = refusal(tiny, tmp_path, change=lambda t: t.update(other))
    assert "shape (32, 64), its header wants (64, 32)" in told
    scales = {"rope_freqs.weight": np.ones(4, np.float32)}
    told = refusal(tiny, tmp_path, change=lambda t: t.update(scales))
    assert "scales positions as Llama 3.1 does" in told
    told = refusal(tiny, tmp_path, change=lambda t: t.pop("token_embd.weight"))
    assert "has no tensor 'token_embd.weight'" in told


def test_a_file_and_a_folder_are_told_apart(tiny, tmp_path):
    made, tensors = tiny
    ggufs.write(tmp_path / "a.gguf", "llama", tensors, made.config)
    with pytest.raises(config.InputError, match="one of its GGUF files: a.gguf"):
        models.load(tmp_path)
    with pytest.raises(config.InputError, match="qwen-jax convert .*a.gguf DIR"):
        hf.load(tmp_path / "a.gguf")
    (tmp_path / "a.txt").write_text("{}")
    with pytest.raises(config.InputError, match="begins with b'{}' and not with"):
        models.load(tmp_path / "a.txt")


def test_another_architecture(tiny, tmp_path):
    told = refusal(tiny, tmp_path, architecture="gemma3")
    assert "general.architecture is 'gemma3'" in told
    assert "llama, qwen2, qwen3, qwen3moe" in told


def test_a_fact_never_heard_of_is_told(tiny, tmp_path, capsys):
    made, tensors = tiny
    path = tmp_path / "model.gguf"
    add = [lambda w: w.add_uint32("llama.new_thing", 3)]
    ggufs.write(path, "llama", tensors, made.config, facts=add)
    models.load(path)
    assert "not read: llama.new_thing" in capsys.readouterr().err


def test_a_layer_count_is_no_invitation(tiny, tmp_path):
    made, tensors = tiny
    made.config.num_hidden_layers = 4_000_000_000
    try:
        told = refusal((made, tensors), tmp_path)
    finally:
        made.config.num_hidden_layers = 1
    assert "block_count is 4,000,000,000 and there are 12 tensors" in told


def test_the_family_has_no_windows():
    """A config.json of Llama tells of none, so one would be lost."""
    spec = dataclasses.replace(
        spec_lib.Spec(num_layers=1), family="llama", qk_norm=False, window=8
    )
    with pytest.raises(config.InputError, match="would tell of another model"):
        models.save(spec, {}, "unused")
