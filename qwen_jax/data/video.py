# SPDX-License-Identifier: Apache-2.0
"""Videos (lists of frames) -> patches in space and time, and when each was seen.

    settings = video.load_settings("DIR")        # or video.FAMILIES["qwen3_vl"]
    found = video.patches(settings, [video.Clip(frames, fps=24.0)])
    models.forward(spec, params, tokens_bt, videos=found.arrays)
    found.timestamps                             # for the prompt

Source: transformers 5.23, `Qwen2VLVideoProcessor` (qwen2_vl, qwen2_5_vl) and
`Qwen3VLVideoProcessor` (qwen3_vl to qwen4_exp). Frames, sizes, grids, patch order and
times are equal to theirs. Deviations: frames are resized by PIL, as images are; theirs
only by torch, which rounds otherwise (`image` tells how much). A video whose sides
differ more than 200-fold is always refused, theirs lets some narrow ones pass.

Sampling: "qwen2" takes all frames unless fps or num_frames is set, then every
(total / n)-th one, n a multiple of temporal_patch; "qwen3" takes n frames evenly from
the first to the last, n = duration * fps within [min_frames, max_frames].
Sizes: qwen2 bounds the pixels of a frame, qwen3 those of all frames together.
The last frame is repeated until their number is a multiple of temporal_patch.

Units: fps in frames a second of the source; timestamps and seconds_per_grid in
seconds. A source without fps counts as 24 a second, as in the sources (`fps_assumed`).
Shapes: as in `image`; grid_thw int32 [n, 3] with t in temporal patches.
Raises: InputError for no frames, frames of unlike sizes, indices that do not fit, a
video beyond `picture.Limits`, and what `image` and `picture` refuse.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwen_jax import config
from qwen_jax.data import image, picture

ASSUMED_FPS = 24.0
_QWEN2, _QWEN3 = "Qwen2VLVideoProcessor", "Qwen3VLVideoProcessor"
_SHARE_OF_CONTEXT = 0.9  # of max_video_tokens, which pixels may fill (qwen2, capped)
_FLOOR = 1.05  # times min_pixels: the least that cap_pixels_per_frame leaves a frame


@dataclasses.dataclass(frozen=True)
class Settings(image.Settings):
    """How videos become patches; `generation` says by which rules."""

    generation: str = "qwen2"
    sample: bool = False  # whether frames are chosen, or all taken
    fps: float | None = None  # frames to take a second of the source
    num_frames: int | None = None  # or so many in all
    min_frames: int = 4
    max_frames: int = 768
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 128_000  # qwen2: of all frames; qwen3: of one

    def __post_init__(self):
        super().__post_init__()
        if self.generation not in ("qwen2", "qwen3"):
            raise config.InputError(
                f"generation {self.generation!r}: wanted 'qwen2' or 'qwen3'"
            )
        for name in ("min_frames", "max_frames", "max_video_tokens"):
            image.check_count(name, getattr(self, name))
        if self.num_frames is not None:
            image.check_count("num_frames", self.num_frames)
        check_fps(self.fps)
        if self.generation == "qwen2" and None not in (self.fps, self.num_frames):
            raise config.InputError("fps and num_frames are both set; wanted one")


def check_fps(fps: Any) -> None:
    number = isinstance(fps, int | float | np.number) and not isinstance(fps, bool)
    if fps is not None and not (number and 0 < fps < math.inf):
        raise config.InputError(f"fps {fps!r}: wanted frames a second, more than 0")


@dataclasses.dataclass(frozen=True)
class Clip:
    """One video.

    frames: pictures (see `picture`), an array [t, h, w, c], or the path or bytes of an
    animated file. fps: of the source. indices: which frames of the source these are,
    where somebody has chosen already; total: how many the source has.
    """

    frames: Any
    fps: float | None = None
    indices: Sequence[int] | None = None
    total: int | None = None


@dataclasses.dataclass(frozen=True)
class Patches:
    """Videos as arrays, and one entry for each video in the other fields."""

    # pixels [p, y], grid_thw [n, 3], and seconds_per_grid float32 [n]: from one
    # temporal patch to the next, for positions of Qwen2.5-VL
    arrays: dict[str, np.ndarray]
    indices: tuple[np.ndarray, ...]  # frames taken, numbers in the source
    timestamps: tuple[np.ndarray, ...]  # float64 [t]: middle of a temporal patch
    fps_assumed: tuple[bool, ...]


_PUBLISHED_QWEN2 = Settings(**dataclasses.asdict(image.FAMILIES["qwen2_vl"]))
_DEFAULT_QWEN3 = Settings(
    patch=16,
    min_pixels=128 * 32 * 32,
    max_pixels=32 * 32 * 768,
    mean=image.HALF,
    std=image.HALF,
    generation="qwen3",
    sample=True,
    fps=2,
    max_video_tokens=768,
)
_PUBLISHED_QWEN3 = dataclasses.replace(
    _DEFAULT_QWEN3, min_pixels=64 * 64, max_pixels=32 * 32 * 768 * 32
)
FAMILIES = {
    family: _PUBLISHED_QWEN2 if family.startswith("qwen2") else _PUBLISHED_QWEN3
    for family in image.FAMILIES
}
# What a file that leaves things out means, by the processor it names.
_DEFAULTS = {
    _QWEN2: Settings(min_pixels=128 * 28 * 28, max_pixels=28 * 28 * 768),
    _QWEN3: _DEFAULT_QWEN3,
}


def load_settings(folder: str | os.PathLike) -> Settings:
    """Settings of the videos of a Hugging Face folder.

    From processor_config.json ("video_processor" in it), video_preprocessor_config.json
    or preprocessor_config.json, whichever is there first, as in transformers; else what
    was published for the model_type of config.json.
    """
    names = ("video_preprocessor_config.json", "preprocessor_config.json")
    found = image.read_processor(folder, "video_processor", names)
    if found is None:
        return FAMILIES[image.family_of(folder)]
    values, where = found
    kind = values.get("video_processor_type")
    if kind is None:
        family = image.family_of(folder)
        kind = _QWEN2 if family.startswith("qwen2") else _QWEN3
    if kind not in _DEFAULTS:
        raise config.InputError(
            f"{where}: video_processor_type {kind!r}"
            f"{config.nearest(str(kind), _DEFAULTS)}"
        )
    return Settings(**_settings_of(values, where, _DEFAULTS[kind]))


def _settings_of(values: Mapping, where: str, default: Settings) -> dict[str, Any]:
    fields = image.settings_of(values, where, default)
    names = {"sample": "do_sample_frames"}
    for field in ("fps", "num_frames", "min_frames", "max_frames", "max_video_tokens"):
        names[field] = field
    names["cap_pixels_per_frame"] = "cap_pixels_per_frame"
    for field, name in names.items():
        if values.get(name) is not None:
            fields[field] = values[name]
    try:
        Settings(**fields)
    except config.InputError as error:
        raise config.InputError(f"{where}: {error}") from None
    return fields


# --- which frames, how large ---


def sample(settings: Settings, total: int, fps: float | None) -> np.ndarray:
    """Numbers of the frames to take, of `total` at `fps` frames a second."""
    image.check_count("the number of frames", total)
    if not settings.sample:
        return np.arange(total)
    if settings.generation == "qwen3":
        wanted = settings.num_frames
        if wanted is None:
            wanted = total if settings.fps is None else _at_rate(settings, total, fps)
            wanted = min(max(int(wanted), settings.min_frames), settings.max_frames)
            wanted = wanted if settings.fps is None else min(wanted, total)
        return np.linspace(0, total - 1, wanted).round().astype(int)
    f = settings.temporal_patch
    if settings.num_frames is not None:
        wanted = round(settings.num_frames / f) * f
    elif settings.fps is not None:
        most = math.floor(min(settings.max_frames, total) / f) * f
        wanted = max(_at_rate(settings, total, fps), settings.min_frames)
        wanted = math.floor(min(wanted, most, total) / f) * f
    else:
        return np.arange(total)
    if not 1 <= wanted <= total:
        raise config.InputError(
            f"a video of {total} frames cannot give {wanted} (a multiple of "
            f"temporal_patch {f}): change num_frames or fps"
        )
    # float32 steps, as torch.arange counts them
    return np.arange(0, total, total / wanted).astype(np.float32).astype(int)


def _at_rate(settings: Settings, total: int, fps: float | None) -> float:
    return total / (fps or ASSUMED_FPS) * settings.fps


def resized(
    settings: Settings, num_frames: int, height: int, width: int
) -> tuple[int, int]:
    """(height, width) of every frame of a video of `num_frames` taken frames."""
    f, factor = settings.temporal_patch, settings.factor
    least, most = settings.min_pixels, settings.max_pixels
    floor = int(least * _FLOOR)
    image.check_aspect(height, width)
    if settings.generation == "qwen2":
        if settings.cap_pixels_per_frame:
            budget = int(settings.max_video_tokens * factor**2 * _SHARE_OF_CONTEXT)
            most = max(min(most, budget * f // num_frames), floor)
        return image.fit(settings, height, width, least, most, 1, 1)
    if num_frames < f:
        raise config.InputError(
            f"a video of {num_frames} frames; wanted at least {f} "
            "(temporal_patch): give a single frame as an image"
        )
    if settings.cap_pixels_per_frame:
        cap = settings.max_video_tokens * factor**2
        most = max(min(cap, most // num_frames), floor) * num_frames
    if height < factor or width < factor:
        grow = max(factor / height, factor / width)
        height, width = int(height * grow), int(width * grow)
        image.check_aspect(height, width)
    rounded = round(num_frames / f) * f
    return image.fit(settings, height, width, least, most, num_frames, rounded)


def timestamps(settings: Settings, indices: np.ndarray, fps: float) -> np.ndarray:
    """Seconds of each temporal patch: half way between its first and last frame."""
    f = settings.temporal_patch
    padded = np.pad(np.asarray(indices), (0, -len(indices) % f), mode="edge")
    seconds = (padded / fps).reshape(-1, f)
    return (seconds[:, 0] + seconds[:, -1]) / 2


# --- patches ---


def patches(
    settings: Settings,
    clips: Sequence[Clip],
    limits: picture.Limits = picture.LIMITS,
) -> Patches:
    """Videos, in prompt order -> patches and their times."""
    if not isinstance(clips, Sequence) or not all(isinstance(c, Clip) for c in clips):
        raise config.InputError("wanted a list of video.Clip, one for each video")
    if not clips:
        raise config.InputError("no videos; wanted at least one")
    chosen, grids = [], []
    for i, clip in enumerate(clips):
        try:
            chosen.append(_choose(settings, clip, limits))
            taken, frames = chosen[-1].indices, chosen[-1].frames
            height, width = resized(settings, len(taken), *frames[0].size[::-1])
            t = -(-len(taken) // settings.temporal_patch)
            grids.append((t, height // settings.patch, width // settings.patch))
            image.check_output(settings, grids, limits)
        except config.InputError as error:
            raise config.InputError(f"video {i}: {error}") from None
    num_patches, num_values = (
        sum(map(math.prod, grids)),
        image.values_of_patch(settings),
    )
    pixels_py = np.empty((num_patches, num_values), np.float32)
    start = 0
    for clip, grid in zip(chosen, grids, strict=True):
        end = start + math.prod(grid)
        _write(settings, clip.frames, grid, pixels_py[start:end])
        start = end
    f = settings.temporal_patch
    seconds = [f / (len(c.indices) / c.total * c.fps) for c in chosen]
    return Patches(
        {
            "pixels": pixels_py,
            "grid_thw": np.array(grids, np.int32),
            "seconds_per_grid": np.array(seconds, np.float32),
        },
        tuple(c.indices for c in chosen),
        tuple(timestamps(settings, c.indices, c.fps) for c in chosen),
        tuple(c.fps_assumed for c in chosen),
    )


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """The frames taken of one clip, as PIL images of one size."""

    frames: list[Any]
    indices: np.ndarray
    total: int
    fps: float
    fps_assumed: bool


def _choose(settings: Settings, clip: Clip, limits: picture.Limits) -> _Chosen:
    """Take the frames; only those are decoded, except from animated files."""
    sources, fps = clip.frames, clip.fps
    if isinstance(sources, str | os.PathLike | bytes | bytearray | memoryview):
        sources, own_fps = picture.frames(sources, limits)
        fps = own_fps if fps is None else fps
    check_fps(fps)
    if isinstance(sources, Sequence):
        num_frames = len(sources)
    elif getattr(sources, "ndim", None) == 4:
        num_frames = sources.shape[0]
        height, width = sources.shape[1:3]
        picture.check_frames(num_frames, height, width, "the array of frames", limits)
    else:
        raise config.InputError(
            f"frames of type {type(sources).__name__}; wanted a list of pictures, an "
            "array [t, h, w, c], or the path or bytes of an animated file"
        )
    if num_frames > limits.frames:
        raise config.InputError(
            f"{num_frames:,} frames; wanted at most {limits.frames:,}: give a shorter "
            "piece, or every n-th frame with a smaller fps"
        )
    if num_frames < 1:
        raise config.InputError("no frames; wanted at least one")
    if clip.indices is None:
        total = num_frames if clip.total is None else clip.total
        if total != num_frames:
            raise config.InputError(
                f"{num_frames} frames of {total}: say which, with indices"
            )
        taken = indices = sample(settings, num_frames, fps)
    else:
        indices, total = _given_indices(clip, num_frames)
        taken = np.arange(num_frames)
    frames = _decode([sources[i] for i in taken], limits)
    known = ASSUMED_FPS if fps is None else float(fps)
    return _Chosen(frames, indices, total, known, fps is None)


def _given_indices(clip: Clip, num_frames: int) -> tuple[np.ndarray, int]:
    indices = np.asarray(clip.indices)
    whole = indices.ndim == 1 and np.issubdtype(indices.dtype, np.integer)
    if not whole or len(indices) != num_frames:
        raise config.InputError(
            f"indices {clip.indices!r:.80}: wanted one whole number for each of the "
            f"{num_frames} frames"
        )
    total = int(indices.max()) + 1 if clip.total is None else clip.total
    image.check_count("total", total)
    if indices.min() < 0 or indices.max() >= total or (np.diff(indices) < 0).any():
        raise config.InputError(
            f"indices from {indices.min()} to {indices.max()}: wanted them in order "
            f"and within the {total} frames of the source"
        )
    return indices, total


def _decode(sources: list[Any], limits: picture.Limits) -> list[Any]:
    """Pictures as PIL images of one size, decoded under the limits."""
    frames = []
    for i, source in enumerate(sources):
        try:
            frame = picture.load(source, limits)
        except config.InputError as error:
            raise config.InputError(f"frame {i}: {error}") from None
        if frames and frame.size != frames[0].size:
            raise config.InputError(
                f"frame {i} is {frame.width} x {frame.height}, the first "
                f"{frames[0].width} x {frames[0].height}; wanted one size"
            )
        if not frames:
            name = "the frames taken"
            picture.check_frames(len(sources), *frame.size[::-1], name, limits)
        frames.append(frame)
    return frames


def _write(
    settings: Settings, frames: list[Any], grid: tuple[int, int, int], out: np.ndarray
) -> None:
    """Resized frames -> out [p, y], one temporal patch at a time to save memory."""
    height, width = grid[1] * settings.patch, grid[2] * settings.patch
    f, per_step = settings.temporal_patch, grid[1] * grid[2]
    for step in range(grid[0]):
        part = frames[step * f : (step + 1) * f]
        part += part[-1:] * (f - len(part))
        resized_thwc = np.stack(
            [np.asarray(image.resample(settings, x, height, width)) for x in part]
        )
        out_py = out[step * per_step : (step + 1) * per_step]
        image.write_patches(settings, resized_thwc, out_py)
