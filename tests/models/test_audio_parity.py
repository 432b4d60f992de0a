# SPDX-License-Identifier: Apache-2.0
"""Tiny random models with audio written by transformers: same features, same logits.

Weights are drawn here with fan-in scale, norms off one and biases off zero. Tolerances
are four times what the reference's own float32 differs from its float64.
"""

import copy
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import config, models
from qwen_jax import params as params_lib
from qwen_jax.models import audio, hf_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

AUDIO = 90  # the id of the placeholder
TOWERS = {
    "plain": {},
    "odd": {"encoder_attention_heads": 3, "d_model": 24, "encoder_layers": 3},
}
TEXT = {
    "model_type": "qwen2",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "use_sliding_window": False,
}
LENGTHS = np.array([40, 7, 26])


def make_reference(changes, folder):
    tower = {
        "model_type": "qwen2_audio_encoder",
        "num_mel_bins": 10,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 40,
        "d_model": 16,
        "max_source_positions": 20,
    }
    made = transformers.Qwen2AudioConfig(
        audio_config=tower | changes,
        text_config=TEXT,
        audio_token_index=AUDIO,
        attn_implementation="eager",
    )
    torch.manual_seed(len(str(changes)))
    model = transformers.Qwen2AudioForConditionalGeneration(made).eval().float()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim == 1 and "norm" in key and "bias" not in key:
                weight.copy_(1 + 0.2 * torch.randn_like(weight))
            elif weight.ndim == 1:
                weight.copy_(0.3 * torch.randn_like(weight))
            elif "embed_tokens" in key:
                weight.copy_(torch.randn_like(weight))
            else:
                fan = weight[0].numel()
                weight.copy_(torch.randn_like(weight) * fan**-0.5)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=TOWERS)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    reference = make_reference(TOWERS[request.param], folder)
    tower, heard = audio.load(folder, dtype="float32")
    spec, params = models.load(folder, dtype="float32")
    return reference, folder, tower, heard, spec, params


def mels(tower, seed=0):
    made = np.random.default_rng(seed)
    shape = (len(LENGTHS), tower.bands, 2 * tower.places)
    values = made.standard_normal(shape).astype(np.float32)
    for row, length in zip(values, LENGTHS, strict=True):
        row[:, length:] = -1.5  # silence, not zeros: it must not be heard
    return values


def prompt(seed=0):
    """Two rows: one with two sounds, one with a sound, padded on the right."""
    made = np.random.default_rng(seed)
    counts = audio.num_tokens(LENGTHS)
    rows = []
    for sounds in ([0, 1], [2]):
        row = made.integers(0, AUDIO, 3).tolist()
        for i in sounds:
            row += [AUDIO] * counts[i] + made.integers(0, AUDIO, 2).tolist()
        rows.append(row)
    width = max(map(len, rows))
    segments = np.array([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    tokens = np.array([r + [0] * (width - len(r)) for r in rows])
    return tokens.astype(np.int32), segments.astype(np.int32)


def reference_logits(model, tokens, segments, values):
    dtype = next(model.parameters()).dtype
    heard = np.arange(values.shape[2])[None] < LENGTHS[:, None]
    out = model(
        input_ids=torch.tensor(tokens, dtype=torch.long),
        attention_mask=torch.tensor(segments, dtype=torch.long),
        input_features=torch.tensor(values, dtype=dtype),
        feature_attention_mask=torch.tensor(heard, dtype=torch.long),
    )
    return out.logits


@functools.cache
def jitted(spec, tower):
    """One compiled program of each pair; inside jit values cannot be compared."""

    def run(params, heard, tokens, sounds, segments):
        return audio.forward(
            spec, params, tower, heard, tokens, sounds=sounds, segments=segments
        )

    return jax.jit(run)


def noise(model, run):
    """How far the reference in float32 is from itself in float64, at most."""
    with torch.no_grad():
        wide = run(copy.deepcopy(model).double())
        return float((run(model).double() - wide).abs().max())


def test_logits(pair):
    reference, _, tower, heard, spec, params = pair
    (tokens, segments), values = prompt(), mels(tower)
    sounds = {"mels": values, "lengths": LENGTHS}
    got = jitted(spec, tower)(params, heard, tokens, sounds, segments)

    def run(model):
        return reference_logits(model, tokens, segments, values)

    with torch.no_grad():
        wanted = run(reference).numpy()
    real = segments > 0
    assert wanted[real].std() > 0.3
    most = 4 * noise(reference, run)
    assert most < 1e-4
    np.testing.assert_allclose(np.asarray(got)[real], wanted[real], atol=most, rtol=0)


def test_embeddings_of_each_sound(pair):
    reference, _, tower, heard, _, _ = pair
    values = mels(tower, seed=1)
    got = jax.jit(lambda p, x: audio.encode(tower, p, x, LENGTHS))(heard, values)
    model = reference.model
    for i, length in enumerate(LENGTHS):
        # alone and without a mask: what is behind a sound is no part of it
        keep = (length - 1) // 2 + 1
        with torch.no_grad():
            x = torch.tensor(values[i : i + 1])
            x = torch.nn.functional.gelu(model.audio_tower.conv1(x))
            x = torch.nn.functional.gelu(model.audio_tower.conv2(x)).permute(0, 2, 1)
            x = (x + model.audio_tower.embed_positions.weight)[:, :keep]
            for layer in model.audio_tower.layers:
                x = layer(x, None)
                x = x[0] if isinstance(x, tuple) else x
            x = model.audio_tower.avg_pooler(x.permute(0, 2, 1)).permute(0, 2, 1)
            x = model.multi_modal_projector(model.audio_tower.layer_norm(x))[0].numpy()
        assert len(x) == audio.num_tokens(length)
        np.testing.assert_allclose(got[i, : len(x)], x, atol=1e-5)


def test_loss_and_gradient_norms(pair):
    reference, _, tower, heard, spec, params = pair
    (tokens, segments), values = prompt(seed=2), mels(tower, seed=2)
    counted = (segments[:, 1:] > 0) & (tokens[:, 1:] != AUDIO)

    def loss(params, heard):
        sounds = {"mels": values, "lengths": LENGTHS}
        logits = audio.forward(
            spec, params, tower, heard, tokens, sounds=sounds, segments=segments
        )
        logs = jax.nn.log_softmax(logits[:, :-1])
        picked = jnp.take_along_axis(logs, tokens[:, 1:, None], axis=2)[..., 0]
        return -jnp.sum(picked * counted) / counted.sum()

    value, grads = jax.jit(jax.value_and_grad(loss, argnums=1))(params, heard)
    reference.zero_grad()
    logits = reference_logits(reference, tokens, segments, values)[:, :-1]
    labels = torch.tensor(np.where(counted, tokens[:, 1:], -100), dtype=torch.long)
    wanted = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    )
    wanted.backward()
    np.testing.assert_allclose(value, wanted.item(), rtol=1e-5)
    theirs = {k.removeprefix("model."): p.grad for k, p in reference.named_parameters()}
    compared = 0
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name, _ = audio.NAMES[".".join(part.key for part in path)]
        for i, mine in enumerate(grad) if "{i}" in name else [(0, grad)]:
            their = theirs[name.format(i=i)]
            if their is None:  # places: frozen there
                continue
            np.testing.assert_allclose(
                np.linalg.norm(mine), their.norm(), rtol=1e-4, err_msg=name
            )
            compared += 1
    assert compared == 8 + 15 * tower.num_layers


def test_the_tower_of_qwen2_5_omni(tmp_path):
    """Chunks of 12 frames; sounds that end inside one, at its end, and behind one."""
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as theirs

    made = transformers.Qwen2_5OmniThinkerConfig(
        audio_config={
            "num_mel_bins": 10,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 40,
            "d_model": 16,
            "n_window": 6,
            "output_dim": 32,
            "max_source_positions": 20,
        },
        audio_token_index=AUDIO,
    )
    torch.manual_seed(0)
    made.audio_config._attn_implementation = "eager"
    reference = theirs.Qwen2_5OmniAudioEncoder(made.audio_config).eval()
    with torch.no_grad():
        for weight in reference.parameters():
            fan = 10 if weight.ndim == 1 else weight[0].numel()
            weight.copy_(torch.randn_like(weight) * fan**-0.5)
    named = {f"thinker.audio_tower.{k}": v for k, v in reference.state_dict().items()}
    safetensors_torch = pytest.importorskip("safetensors.torch")
    safetensors_torch.save_file(named, tmp_path / "model.safetensors")
    raw = {"model_type": "qwen2_5_omni", "thinker_config": made.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    tower, heard = audio.load(tmp_path, dtype="float32")
    assert (tower.chunk, tower.places, tower.out_width) == (12, 6, 32)
    assert tower.audio_id == AUDIO
    lengths = np.array([40, 7, 24, 25, 3, 12])
    values = np.random.default_rng(0).standard_normal((6, 10, 40)).astype(np.float32)
    got = jax.jit(lambda p, x: audio.encode(tower, p, x, lengths))(heard, values)
    joined = [x[:, :n] for x, n in zip(values, lengths, strict=True)]
    with torch.no_grad():
        wanted = reference(
            torch.tensor(np.concatenate(joined, axis=1)),
            feature_lens=torch.tensor(lengths),
        ).last_hidden_state.numpy()
    start = 0
    for mine, length in zip(got, lengths, strict=True):
        count = audio.num_tokens(length)
        their = wanted[start : start + count]
        np.testing.assert_allclose(mine[:count], their, atol=1e-5, err_msg=length)
        start += count
    assert start == len(wanted) and wanted.std() > 0.3


# --- bad input ---


def test_what_does_not_fit_is_named(pair):
    _, _, tower, heard, spec, params = pair
    (tokens, _), values = prompt(), mels(tower)
    good = {"mels": values, "lengths": LENGTHS}
    cases = [
        ({"mels": values}, "sounds lack lengths"),
        (good | {"mels": values[:, :, :-1]}, "mels of shape"),
        (good | {"mels": values[:, :-1]}, "mels of shape"),
        (good | {"lengths": LENGTHS[:2]}, "lengths of shape"),
        (good | {"lengths": np.array([41, 7, 26])}, "lengths from 7 to 41"),
        (good | {"lengths": np.array([40, 2, 26])}, "lengths from 2 to 40"),
        (good | {"lengths": np.array([40, 7, 30])}, "18 placeholders .* 19 emb"),
    ]
    for sounds, words in cases:
        with pytest.raises(config.InputError, match=words):
            audio.forward(spec, params, tower, heard, tokens, sounds=sounds)


def test_a_placeholder_without_a_sound_is_not_silent_in_jit(pair):
    _, _, tower, heard, spec, params = pair
    (tokens, segments), values = prompt(), mels(tower)
    short = {"mels": values, "lengths": np.array([40, 7, 22])}
    got = np.asarray(jitted(spec, tower)(params, heard, tokens, short, segments))
    assert np.isfinite(got[0]).all() and np.isnan(got[1]).any()


@pytest.mark.parametrize(
    ("part", "key", "value", "words"),
    [
        (None, "model_type", "qwen2", "has no tower of this kind"),
        ("audio_config", "activation_function", "relu", "wanted 'gelu'"),
        ("audio_config", "encoder_layers", 5, "no tensor 'audio_tower.layers.2"),
        ("audio_config", "encoder_layers", 1, "belong to no weight"),
        ("audio_config", "encoder_ffn_dim", 41, "has shape"),
        ("audio_config", "d_model", 17, "not divisible"),
        ("audio_config", "encoder_layers", -1, "wanted above 0"),
        ("audio_config", "encoder_layers", "two", "wanted int"),
    ],
)
def test_wrong_folders_are_named(part, key, value, words, tmp_path):
    make_reference({}, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (raw[part] if part else raw)[key] = value
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(config.InputError, match=words):
        audio.load(tmp_path)


def test_the_published_sizes():
    """Qwen2-Audio-7B as published: its config.json leaves most of itself out."""
    raw = {
        "model_type": "qwen2_audio",
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 128,
            "encoder_layers": 32,
            "encoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "d_model": 1280,
            "scale_embedding": False,
            "activation_function": "gelu",
        },
        "audio_token_index": 151646,
        "text_config": {
            "model_type": "qwen2",
            "intermediate_size": 11008,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "sliding_window": 32768,
            "use_mrope": False,
            "vocab_size": 156032,
        },
    }
    tower = audio.tower_from_config(raw)
    count = params_lib.count(audio.tower_params(tower))
    theirs = transformers.Qwen2AudioConfig(**copy.deepcopy(raw))
    with torch.device("meta"):
        model = transformers.Qwen2AudioForConditionalGeneration(theirs).model
    towers = (model.audio_tower, model.multi_modal_projector)
    assert count == sum(p.numel() for t in towers for p in t.parameters())
    spec = hf_config.spec_from_config(raw)
    assert spec.num_layers == 32 and spec.width == 4096 and spec.ffn_width == 11008
