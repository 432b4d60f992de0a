# SPDX-License-Identifier: Apache-2.0
"""Sound in, log-mel features out, as the audio encoders of Qwen read it.

    settings = audio.load_settings("DIR")        # or audio.FAMILIES["qwen2_audio"]
    found = audio.features(settings, ["voice.wav", audio.Sound(samples, 44_100)])
    found.arrays["mels"], found.arrays["lengths"]

Source: transformers 5.23, `WhisperFeatureExtractor` (arXiv 2212.04356): frames of
`window` samples every `hop`, a Hann window, the signal mirrored at both ends, power
spectrum, triangular filters on Slaney's mel scale, log10, all that is 8 below the
sound's loudest raised to there, (x + 4) / 4. Here in float64, there in float32.
Deviations: files are read here (WAV with whole numbers of 8 to 32 bits, by Python's
`wave`) and brought to the model's rate by polyphase filtering (`scipy`); channels are
averaged; a sound that is longer than the model takes is cut as there, and told.

Shapes: samples [s] or [s, c] for c channels, whole numbers of 16 or 32 bits, of 8
without sign, or floats in -1..1; mels_nzt float32, n sounds, z mel bands, t frames;
lengths int32 [n] counts the frames of sound, the rest is silence that fills up.
Units: rate_hz in samples a second; cut_s, seconds and limits in seconds.
Raises: InputError for anything that is no sound, a bad rate, NaN, a sound too short for
one token (three frames) or beyond `Limits`.
"""

import dataclasses
import functools
import io
import math
import os
import pathlib
import struct
import wave
from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen_jax import config
from qwen_jax.data import image

MIN_FRAMES = 3  # the encoders halve twice, rounding down
MAX_RATE_HZ = 768_000
# What Python's reader raises on damaged files, found by feeding it such files.
_DAMAGE = (wave.Error, EOFError, RuntimeError, struct.error, OverflowError)
_BLOCK = 4096  # frames transformed together


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much one input may ask for."""

    file_bytes: int = 256 * 2**20
    seconds: float = 3600.0  # of one sound
    output_bytes: int = 2**31  # of all features of one call


LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class Settings:
    """How sound becomes features.

    seconds: the length that all sounds are filled up to and cut at; with `fill` off
    they are filled up to the longest, and never cut. trim: give only as many frames as
    the longest sound has, where the tower takes any number.
    """

    rate_hz: int = 16_000
    bands: int = 128
    window: int = 400
    hop: int = 160
    seconds: int = 30
    fill: bool = True
    trim: bool = False

    def __post_init__(self):
        for name in ("rate_hz", "bands", "window", "hop", "seconds"):
            image.check_count(name, getattr(self, name))
        if self.window < 2 or self.window % 2 or self.hop > self.window:
            raise config.InputError(
                f"window {self.window}, hop {self.hop}: wanted an even window of at "
                "least one hop"
            )


FAMILIES = {
    "qwen2_audio": Settings(),
    "qwen2_5_omni": Settings(seconds=300, trim=True),
    "qwen3_omni_moe": Settings(fill=False),
}


@dataclasses.dataclass(frozen=True)
class Sound:
    """Samples [s] or [s, c], and how many there are a second."""

    samples: Any
    rate_hz: int


@dataclasses.dataclass(frozen=True)
class Features:
    """arrays: mels float32 [n, z, t], lengths int32 [n]; for each sound its seconds,
    and how many of them were cut off."""

    arrays: dict[str, np.ndarray]
    seconds: np.ndarray
    cut_s: np.ndarray


def load_settings(folder: str | os.PathLike) -> Settings:
    """Settings of the sounds of a Hugging Face folder, from its
    preprocessor_config.json and the model_type of its config.json."""
    names = ("preprocessor_config.json",)
    found = image.read_processor(folder, "feature_extractor", names)
    family = image.family_of(folder, FAMILIES)
    if found is None:
        return FAMILIES[family]
    values, where = found
    # What the file leaves out is the extractor's default, which has 80 bands.
    usual = FAMILIES[family]
    fields = {"bands": 80, "fill": usual.fill, "trim": usual.trim}
    known = {
        "rate_hz": "sampling_rate",
        "bands": "feature_size",
        "window": "n_fft",
        "hop": "hop_length",
        "seconds": "chunk_length",
    }
    for field, name in known.items():
        if values.get(name) is not None:
            fields[field] = values[name]
    for name in ("dither", "padding_value", "do_normalize"):
        if values.get(name):
            raise config.InputError(
                f"{where}: {name} is {values[name]!r}; only none is supported"
            )
    try:
        return Settings(**fields)
    except config.InputError as error:
        raise config.InputError(f"{where}: {error}") from None


def num_tokens(family: str, length: int) -> int:
    """How many placeholders a sound of `length` frames has in a prompt."""
    if family != "qwen3_omni_moe":
        return ((length - 1) // 2 + 1 - 2) // 2 + 1
    whole, rest = divmod(length, 100)  # chunks of 100 frames are encoded apart
    for _ in range(3):
        rest = (rest - 1) // 2 + 1
    return whole * 13 + rest


# --- reading ---


def load(settings: Settings, source: Any, limits: Limits = LIMITS) -> np.ndarray:
    """The sound as float64 samples [s] in -1..1 at the settings' rate."""
    if isinstance(source, str | os.PathLike | bytes | bytearray | memoryview):
        source = _read_wav(source, limits)
    if not isinstance(source, Sound):
        raise config.InputError(
            f"a sound of type {type(source).__name__}; wanted the path or bytes of a "
            "WAV file, or an audio.Sound"
        )
    rate_hz = source.rate_hz
    image.check_count("rate_hz", rate_hz)
    if rate_hz > MAX_RATE_HZ:
        raise config.InputError(f"rate_hz {rate_hz:,}: wanted at most {MAX_RATE_HZ:,}")
    samples_sc = np.asarray(source.samples)
    if samples_sc.ndim == 1:
        samples_sc = samples_sc[:, None]
    if samples_sc.ndim != 2 or not 1 <= samples_sc.shape[1] <= 32:
        raise config.InputError(
            f"samples of shape {np.shape(source.samples)}: wanted [s] or [s, c] with "
            "at most 32 channels c"
        )
    _check_seconds(len(samples_sc), rate_hz, limits)
    samples_s = _as_floats(samples_sc).mean(axis=1)
    return _at_rate(samples_s, int(rate_hz), settings.rate_hz)


def _check_seconds(num_samples: int, rate_hz: int, limits: Limits) -> None:
    if num_samples > limits.seconds * rate_hz:
        raise config.InputError(
            f"{num_samples / rate_hz:,.1f} s of sound; wanted at most "
            f"{limits.seconds:,.0f} s: give a shorter piece"
        )


def _as_floats(samples: np.ndarray) -> np.ndarray:
    if samples.dtype == np.uint8:
        return (samples.astype(np.float64) - 128) / 128
    if samples.dtype in (np.int16, np.int32):
        return samples / -float(np.iinfo(samples.dtype).min)
    if samples.dtype.kind != "f":
        raise config.InputError(
            f"samples of {samples.dtype}: wanted uint8, int16, int32 or floats in -1..1"
        )
    samples = samples.astype(np.float64)
    most = np.abs(samples).max(initial=0)
    if not most <= 1.0:  # NaN fails this
        raise config.InputError(
            f"samples up to {most} in size; wanted floats in -1..1: divide them by "
            "their largest, or give int16"
        )
    return samples


def _at_rate(samples_s: np.ndarray, rate_hz: int, wanted_hz: int) -> np.ndarray:
    if rate_hz == wanted_hz or not len(samples_s):
        return samples_s
    from scipy import signal

    common = math.gcd(rate_hz, wanted_hz)
    return signal.resample_poly(samples_s, wanted_hz // common, rate_hz // common)


def _read_wav(source: Any, limits: Limits) -> Sound:
    if isinstance(source, bytes | bytearray | memoryview):
        content, name = bytes(memoryview(source).cast("B")), "the sound in memory"
    else:
        name, path = f"sound {str(source)!r}", pathlib.Path(source)
        if "://" in str(source) or str(source).startswith("data:"):
            raise config.InputError(f"{name}: wanted a local path or bytes, not a URL")
        if not path.is_file():
            raise config.InputError(f"{name} is not a file")
        with path.open("rb") as file:
            content = file.read(limits.file_bytes + 1)
    if len(content) > limits.file_bytes:
        raise config.InputError(
            f"{name} is larger than {limits.file_bytes:,} bytes, the most a sound may "
            "have"
        )
    try:
        with wave.open(io.BytesIO(content)) as file:
            facts = file.getparams()
            if not (1 <= facts.sampwidth <= 4 and facts.framerate >= 1):
                raise config.InputError(
                    f"{name}: {facts.sampwidth} bytes a sample, {facts.framerate} "
                    "samples a second"
                )
            _check_seconds(facts.nframes, facts.framerate, limits)
            # Never more than there is, whatever the header says.
            data = file.readframes(min(facts.nframes, len(content)))
    except _DAMAGE as error:
        raise config.InputError(
            f"{name}: not a WAV file of whole numbers, or damaged "
            f"({str(error) or 'its parts do not fit'})"
        ) from None
    size = facts.sampwidth * facts.nchannels
    if len(data) != facts.nframes * size:
        raise config.InputError(
            f"{name}: cut off, {len(data) // size} of {facts.nframes} samples are there"
        )
    samples = _whole_numbers(data, facts.sampwidth)
    return Sound(samples.reshape(-1, facts.nchannels), facts.framerate)


def _whole_numbers(data: bytes, width: int) -> np.ndarray:
    if width != 3:
        return np.frombuffer(data, {1: np.uint8, 2: "<i2", 4: "<i4"}[width])
    threes = np.frombuffer(data, np.uint8).reshape(-1, 3)
    return np.pad(threes, ((0, 0), (1, 0))).view("<i4")[:, 0]


# --- features ---


def features(
    settings: Settings, sources: Sequence[Any], limits: Limits = LIMITS
) -> Features:
    """Sounds, in prompt order -> features and how long each is."""
    if not isinstance(sources, Sequence) or isinstance(sources, str | bytes):
        raise config.InputError("wanted a list of sounds, got one: write [sound]")
    if not sources:
        raise config.InputError("no sounds; wanted at least one")
    most = settings.seconds * settings.rate_hz
    found, cut = [], []
    for i, source in enumerate(sources):
        try:
            samples_s = load(settings, source, limits)
            if -(-len(samples_s) // settings.hop) < MIN_FRAMES:
                raise config.InputError(
                    f"{len(samples_s)} samples at {settings.rate_hz:,} a second are "
                    f"too few; wanted at least {(MIN_FRAMES - 1) * settings.hop + 1}"
                )
        except config.InputError as error:
            raise config.InputError(f"sound {i}: {error}") from None
        kept = samples_s[:most] if settings.fill else samples_s
        cut.append((len(samples_s) - len(kept)) / settings.rate_hz)
        found.append(kept)
    num_samples = np.array([len(s) for s in found])
    width = most if settings.fill else int(num_samples.max())
    # torch.stft mirrors half a window at the ends, so a sound must be longer than that
    width = max(width, settings.window // 2 + 1)
    t = width // settings.hop
    lengths = np.minimum(-(-num_samples // settings.hop), t)
    kept_t = int(lengths.max()) if settings.trim else t
    if len(found) * settings.bands * kept_t * 4 > limits.output_bytes:
        raise config.InputError(
            f"features of {len(found)} sounds take more than {limits.output_bytes:,} "
            "bytes: give fewer or shorter ones"
        )
    mels_nzt = np.empty((len(found), settings.bands, kept_t), np.float32)
    for samples_s, mels_zt in zip(found, mels_nzt, strict=True):
        mels_zt[:] = _filled(settings, samples_s, width)[:, :kept_t]
    return Features(
        {"mels": mels_nzt, "lengths": lengths.astype(np.int32)},
        num_samples / settings.rate_hz,
        np.array(cut),
    )


def _filled(settings: Settings, samples_s: np.ndarray, width: int) -> np.ndarray:
    """`log_mel` of samples filled up with silence to `width`, most of which, being the
    same everywhere, is not computed."""
    need = min(width, len(samples_s) + 2 * settings.window)
    mels_zt = log_mel(settings, np.pad(samples_s, (0, need - len(samples_s))))
    loudest = mels_zt.max() * 4.0 - 4.0
    silence = (max(-10.0, loudest - 8.0) + 4.0) / 4.0
    rest = width // settings.hop - mels_zt.shape[1]
    return np.pad(mels_zt, ((0, 0), (0, rest)), constant_values=silence)


def log_mel(settings: Settings, samples_s: np.ndarray) -> np.ndarray:
    """float64 [z, t] of samples [s], t = s / hop rounded down."""
    half = settings.window // 2
    # as float32, in which the extractor takes them
    samples_s = np.pad(samples_s.astype(np.float32).astype(np.float64), half, "reflect")
    frames_tw = np.lib.stride_tricks.sliding_window_view(samples_s, settings.window)
    frames_tw = frames_tw[:: settings.hop][:-1]
    # Hann, periodic: the window of the next frame would begin with its first value
    hann_w = 0.5 - 0.5 * np.cos(
        2 * np.pi * np.arange(settings.window) / settings.window
    )
    filters_fz = mel_filters(settings)
    powers_tz = np.empty((len(frames_tw), settings.bands))
    for start in range(0, len(frames_tw), _BLOCK):
        part_tw = frames_tw[start : start + _BLOCK] * hann_w[None]
        power_tf = np.abs(np.fft.rfft(part_tw, axis=1)) ** 2
        powers_tz[start : start + _BLOCK] = power_tf @ filters_fz
    logs_tz = np.log10(np.maximum(powers_tz, 1e-10))
    return (np.maximum(logs_tz, logs_tz.max() - 8.0).T + 4.0) / 4.0


@functools.lru_cache(maxsize=8)
def mel_filters(settings: Settings) -> np.ndarray:
    """float64 [frequencies, z]: triangles between neighbours of bands + 2 points that
    are even on Slaney's scale from 0 to 8 kHz, each with an area of one."""
    top = min(8000.0, settings.rate_hz / 2)
    points_hz = _hertz(np.linspace(0.0, _slaney(top), settings.bands + 2))
    bins_hz = np.linspace(0.0, settings.rate_hz // 2, settings.window // 2 + 1)
    low_z, middle_z, high_z = points_hz[:-2], points_hz[1:-1], points_hz[2:]
    up_fz = (bins_hz[:, None] - low_z[None]) / (middle_z - low_z)[None]
    down_fz = (high_z[None] - bins_hz[:, None]) / (high_z - middle_z)[None]
    triangle_fz = np.maximum(0.0, np.minimum(up_fz, down_fz))
    return triangle_fz * (2.0 / (high_z - low_z))[None]


def _slaney(hertz: float) -> float:
    """Even steps of 200 / 3 Hz up to 1 kHz, then 27 steps for each factor of 6.4."""
    if hertz < 1000:
        return hertz * 3 / 200
    return 15 + 27 * math.log(hertz / 1000) / math.log(6.4)


def _hertz(mels: np.ndarray) -> np.ndarray:
    steep = 1000 * np.exp(math.log(6.4) / 27 * (mels - 15))
    return np.where(mels < 15, mels * 200 / 3, steep)
