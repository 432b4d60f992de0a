# SPDX-License-Identifier: Apache-2.0
"""Sounds against transformers' extractor, resampling against sines, bad input."""

import dataclasses
import io
import json
import struct
import wave

import numpy as np
import pytest

from qwen_jax import config
from qwen_jax.data import audio

SHORT = audio.Settings(seconds=2)


def voice(num_samples, rate_hz=16_000, seed=0):
    """A rising tone with overtones, noise and silence."""
    made, at = np.random.default_rng(seed), np.arange(num_samples) / rate_hz
    tone = sum(np.sin(2 * np.pi * f * at * (1 + at)) / f for f in (220, 700, 3100))
    tone = tone * 50 * (at % 0.7 > 0.2) + 0.01 * made.standard_normal(num_samples)
    return tone.clip(-1, 1).astype(np.float32)


def wav(samples, rate_hz=16_000):
    """[s] or [s, c] of whole numbers as a file."""
    samples, stream = np.asarray(samples), io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(samples.shape[1] if samples.ndim == 2 else 1)
        file.setsampwidth(samples.dtype.itemsize)
        file.setframerate(rate_hz)
        file.writeframes(samples.tobytes())
    return stream.getvalue()


# --- values ---


@pytest.mark.parametrize(
    "changes",
    [{}, {"fill": False}, {"bands": 80}, {"window": 512, "hop": 200}, {"seconds": 5}],
)
def test_features_equal_the_extractor(changes):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    settings = dataclasses.replace(SHORT, **changes)
    theirs = transformers.WhisperFeatureExtractor(
        feature_size=settings.bands,
        chunk_length=settings.seconds,
        n_fft=settings.window,
        hop_length=settings.hop,
    )
    sounds = [voice(n, seed=n) for n in (16_001, 31_999, 9_000, 48_000)]
    made = audio.features(settings, [audio.Sound(x, 16_000) for x in sounds])
    how = {"padding": "max_length"}
    if not settings.fill:
        how = {"padding": True, "truncation": False}
    wanted = theirs(sounds, sampling_rate=16_000, return_attention_mask=True, **how)
    lengths = np.sum(wanted["attention_mask"], axis=1)
    np.testing.assert_array_equal(made.arrays["lengths"], lengths)
    # torch computes in float32: that far it is from its own formula in float64
    np.testing.assert_allclose(
        made.arrays["mels"], np.array(wanted["input_features"]), atol=3e-4
    )
    width = settings.seconds * 16_000 if settings.fill else 48_000
    padded = [np.pad(x[:width], (0, max(0, width - len(x)))) for x in sounds]
    exact = theirs._np_extract_fbank_features(np.stack(padded), "cpu")
    np.testing.assert_allclose(made.arrays["mels"], exact, atol=5e-7)
    cut = [0, 0, 0, 1.0] if width == 32_000 else [0] * 4
    np.testing.assert_array_equal(made.cut_s, cut)
    np.testing.assert_allclose(
        made.seconds, [min(len(x), width) / 16_000 for x in sounds]
    )


def test_trimmed_features_are_the_first_of_all():
    sounds = [audio.Sound(voice(n), 16_000) for n in (9_000, 14_321)]
    every = audio.features(SHORT, sounds).arrays
    some = audio.features(dataclasses.replace(SHORT, trim=True), sounds).arrays
    np.testing.assert_array_equal(some["lengths"], every["lengths"])
    assert some["mels"].shape[2] == every["lengths"].max() == 90
    np.testing.assert_array_equal(some["mels"], every["mels"][:, :, :90])


def test_features_from_the_definition():
    """One frame of a sine, written out: the filter around its pitch is the loudest."""
    samples = np.sin(2 * np.pi * 1000 * np.arange(32_000) / 16_000)
    mels = audio.features(SHORT, [audio.Sound(samples, 16_000)]).arrays["mels"][0]
    frame = samples[160 * 50 - 200 : 160 * 50 + 200]
    at = np.arange(400)
    frame = frame * (0.5 - 0.5 * np.cos(2 * np.pi * at / 400))
    power = [
        abs(np.sum(frame * np.exp(-2j * np.pi * k * at / 400))) ** 2 for k in range(201)
    ]
    loud = np.log10(np.maximum(np.array(power) @ audio.mel_filters(SHORT), 1e-10))
    wanted = (np.maximum(loud, mels.max() * 4 - 4 - 8) + 4) / 4
    np.testing.assert_allclose(mels[:, 50], wanted, atol=1e-5)
    pitches = audio._hertz(np.linspace(0, audio._slaney(8000), 130))[1:-1]
    assert abs(pitches[mels[:, 50].argmax()] - 1000) < 60


@pytest.mark.parametrize("family", ["qwen2_audio", "qwen3_omni_moe"])
def test_numbers_of_tokens_are_the_references(family):
    pytest.importorskip("transformers")
    if family == "qwen2_audio":

        def wanted(length):
            convolved = (length + 2 - 3) // 2 + 1  # kernel 3, stride 2, padding 1
            return (convolved - 2) // 2 + 1  # mean of pairs
    else:
        module = pytest.importorskip(
            "transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe"
        )
        wanted = module._get_feat_extract_output_lengths
    for length in range(audio.MIN_FRAMES, 3001):
        assert audio.num_tokens(family, length) == wanted(length) >= 1


# --- sources ---


@pytest.mark.parametrize("rate_hz", [8_000, 22_050, 44_100, 48_000, 15_999])
def test_resampling_keeps_a_sine_and_drops_what_cannot_be_heard(rate_hz):
    num, pitch = rate_hz, 1000
    at = np.arange(num) / rate_hz
    found = audio.load(
        SHORT, audio.Sound(0.5 * np.sin(2 * np.pi * pitch * at), rate_hz)
    )
    assert abs(len(found) - 16_000) <= 1
    wanted = 0.5 * np.sin(2 * np.pi * pitch * np.arange(len(found)) / 16_000)
    inner = slice(1000, 15_000)
    np.testing.assert_allclose(found[inner], wanted[inner], atol=2e-3)
    if rate_hz > 32_000:  # 11 kHz would come back as 5 kHz
        high = audio.Sound(0.5 * np.sin(2 * np.pi * 11_000 * at), rate_hz)
        assert np.abs(audio.load(SHORT, high)[inner]).max() < 1e-3


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32])
def test_a_file_is_its_samples(dtype, tmp_path):
    floats = voice(20_000)
    if dtype == np.uint8:
        whole = np.round(floats * 100 + 128).astype(np.uint8)
        wanted = (whole.astype(float) - 128) / 128
    else:
        whole = np.round(floats * 0.9 * np.iinfo(dtype).max).astype(dtype)
        wanted = whole / (np.iinfo(dtype).max + 1.0)
    path = tmp_path / "sound.bin"
    path.write_bytes(wav(whole))
    for source in (path, str(path), wav(whole), audio.Sound(whole, 16_000)):
        np.testing.assert_array_equal(audio.load(SHORT, source), wanted)


def test_24_bits_and_channels():
    left = np.array([0, 1, -1, 2**23 - 1, -(2**23)])
    right = np.array([5, 5, 5, 5, 5])
    content = b"".join(
        int(x).to_bytes(3, "little", signed=True)
        for x in np.stack([left, right], 1).flat
    )
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(3)
        file.setframerate(16_000)
        file.writeframes(content)
    found = audio.load(SHORT, stream.getvalue())
    np.testing.assert_array_equal(found, (left + right) / 2 / 2**23)


# --- bad sounds ---

GOOD = audio.Sound(voice(8000), 16_000)
SAMPLES = (voice(4000) * 30_000).astype(np.int16)
FILE = wav(SAMPLES)


def patched(place, form, value):
    changed = bytearray(FILE)
    struct.pack_into(form, changed, place, value)
    return bytes(changed)


BAD = {
    "empty": (b"", "not a WAV file"),
    "text": (b"hello, I am a sound, am I not", "not a WAV file"),
    "mp3": (b"ID3\x04" + bytes(500), "not a WAV file"),
    "cut": (FILE[:3000], "cut off, 1478 of 4000"),
    "header": (FILE[:30], "not a WAV file"),
    "compressed": (patched(20, "<H", 85), "not a WAV file"),
    "lying": (patched(40, "<I", 2**31), "wanted at most|cut off|not a WAV"),
    "no rate": (patched(24, "<I", 0), "0 samples a second"),
    "fast": (patched(24, "<I", 2**31 - 1), "rate_hz 2,147,483,647"),
    "none": (audio.Sound(np.zeros(0), 16_000), "0 samples at 16,000"),
    "short": (audio.Sound(np.zeros(320), 16_000), "at least 321"),
    "nan": (audio.Sound(np.full(4000, np.nan), 16_000), "samples up to nan"),
    "loud": (audio.Sound(np.full(4000, 1.5), 16_000), "samples up to 1.5"),
    "int64": (audio.Sound(np.zeros(4000, int), 16_000), "samples of int64"),
    "turned": (audio.Sound(np.zeros((2, 4000)), 16_000), "most 32 channels"),
    "deep": (audio.Sound(np.zeros((2, 2, 2)), 16_000), "most 32 channels"),
    "rate": (audio.Sound(np.zeros(4000), 16_000.5), "rate_hz 16000.5"),
    "negative": (audio.Sound(np.zeros(4000), -1), "rate_hz -1"),
    "long": (audio.Sound(np.broadcast_to(0.0, 10**9), 16_000), "62,500.0 s of sound"),
    "bare": (np.zeros(4000), "a sound of type ndarray"),
    "url": ("https://example.com/voice.wav", "not a URL"),
    "device": ("/dev/zero", "is not a file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sounds_are_named(name):
    source, words = BAD[name]
    with pytest.raises(config.InputError, match=words) as found:
        audio.features(SHORT, [GOOD, source])
    assert str(found.value).startswith("sound 1: ")


def test_the_shortest_sound_gives_one_token():
    found = audio.features(SHORT, [audio.Sound(np.zeros(321), 16_000)])
    assert found.arrays["lengths"].tolist() == [3]
    assert audio.num_tokens("qwen2_audio", 3) == 1
    alone = dataclasses.replace(SHORT, fill=False)
    made = audio.features(alone, [audio.Sound(np.zeros(321), 16_000)]).arrays
    assert made["lengths"].tolist() == [2] and made["mels"].shape == (1, 128, 2)


def test_limits_are_of_bytes_seconds_and_output():
    for limits, words in (
        (audio.Limits(file_bytes=1000), "larger than 1,000 bytes"),
        (audio.Limits(seconds=0.1), "0.2 s of sound|0.3 s of sound"),
        (audio.Limits(output_bytes=1000), "features of 1 sounds take"),
    ):
        with pytest.raises(config.InputError, match=words):
            audio.features(SHORT, [FILE], limits)


@pytest.mark.parametrize("sources", [[], "voice.wav", b"RIFF", GOOD])
def test_a_list_of_sounds_is_wanted(sources):
    with pytest.raises(config.InputError, match="sounds"):
        audio.features(SHORT, sources)


def test_damaged_files_are_read_or_refused():
    made = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        broken = bytearray(FILE)
        for place in made.integers(0, 60, made.integers(1, 6)):
            broken[place] = made.integers(256)
        broken = broken[: made.integers(len(broken) // 2, len(broken) + 1)]
        try:
            audio.features(SHORT, [bytes(broken)])
        except config.InputError:
            refused += 1
    assert refused > 100


# --- settings ---

PUBLISHED = {
    "chunk_length": 30,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 128,
    "hop_length": 160,
    "n_fft": 400,
    "n_samples": 480000,
    "nb_max_frames": 3000,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": True,
    "sampling_rate": 16000,
}


def write(path, name, values):
    (path / f"{name}.json").write_text(json.dumps(values))


def test_settings_of_a_folder(tmp_path):
    write(tmp_path, "config", {"model_type": "qwen2_audio"})
    assert audio.load_settings(tmp_path) == audio.FAMILIES["qwen2_audio"]
    write(tmp_path, "preprocessor_config", PUBLISHED)
    assert audio.load_settings(tmp_path) == audio.FAMILIES["qwen2_audio"]
    write(tmp_path, "preprocessor_config", {**PUBLISHED, "chunk_length": 300})
    write(tmp_path, "config", {"model_type": "qwen2_5_omni"})
    assert audio.load_settings(tmp_path) == audio.FAMILIES["qwen2_5_omni"]
    write(tmp_path, "preprocessor_config", {})
    assert audio.load_settings(tmp_path).bands == 80


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"feature_size": "128"}, "bands '128'"),
        ({"hop_length": 0}, "hop 0"),
        ({"hop_length": 500}, "hop 500"),
        ({"n_fft": 401}, "window 401"),
        ({"dither": 0.1}, "dither is 0.1"),
        ({"sampling_rate": -5}, "rate_hz -5"),
    ],
)
def test_bad_settings_are_named(values, words, tmp_path):
    write(tmp_path, "config", {"model_type": "qwen2_audio"})
    write(tmp_path, "preprocessor_config", {**PUBLISHED, **values})
    with pytest.raises(config.InputError, match=words):
        audio.load_settings(tmp_path)
    write(tmp_path, "config", {"model_type": "qwen3"})
    with pytest.raises(config.InputError, match="none of qwen2_audio"):
        audio.load_settings(tmp_path)
