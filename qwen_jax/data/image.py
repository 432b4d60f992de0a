# SPDX-License-Identifier: Apache-2.0
"""Images -> the patches a vision encoder reads, as in the model's own processor.

    settings = image.load_settings("DIR")        # or image.FAMILIES["qwen3_vl"]
    images = image.patches(settings, ["cat.jpg", array_hwc, pil_image])
    models.forward(spec, params, tokens_bt, images=images)

Source: transformers 5.23, `Qwen2VLImageProcessorPil`, the processor of every family
from qwen2_vl to qwen4_exp; pixels and grids are equal to it bit for bit. Where
torchvision is installed its default is another class, which resizes with torch: over
a hundred drawings and photographs 1.4 % (qwen3) and 2.8 % (qwen2) of the values
differed, nearly all by one step of 255, the worst by 19.
Deviations: those of `picture`; `do_resize: false` and its like are refused.

Steps: RGB; `resized` picks a multiple of patch * merge for each side; PIL resamples
(bicubic); v -> (v * rescale - mean) / std; patches in the order of the merger:
(rows of merge blocks, columns of blocks, row in block, column in block), each patch
flattened as (channel, frame, row, column). A still image fills all frames of a patch.

Letters here: t frames, h rows, w columns, c channels, p patches, y values of a patch
(c * temporal_patch * patch * patch), n images.
Shapes: pixels_py float32, grid_thw int32 [n, 3], in patches; p = sum of t * h * w.
Raises: InputError for a setting of a wrong type or value, sides that differ more than
200-fold, output beyond `limits.output_bytes`, and all that `picture` refuses.
"""

import dataclasses
import json
import math
import numbers
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qwen_jax import config
from qwen_jax.data import picture

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
MAX_ASPECT = 200


@dataclasses.dataclass(frozen=True)
class Settings:
    """How images become patches. The defaults are those of a file that says nothing."""

    patch: int = 14
    temporal_patch: int = 2
    merge: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    rescale: float = 1 / 255
    resample: int = 3  # PIL's number: 3 is bicubic

    def __post_init__(self):
        for name in ("patch", "temporal_patch", "merge", "min_pixels", "max_pixels"):
            check_count(name, getattr(self, name))
        if self.min_pixels > self.max_pixels:
            raise config.InputError(
                f"min_pixels {self.min_pixels:,} is more than max_pixels "
                f"{self.max_pixels:,}"
            )
        for name in ("mean", "std"):
            values = getattr(self, name)
            finite = all(_is_number(v) and math.isfinite(v) for v in values)
            if len(values) != 3 or not finite or (name == "std" and 0 in values):
                raise config.InputError(
                    f"{name} {values}: wanted three finite numbers, std without zeros"
                )
        if not (_is_number(self.rescale) and 0 < self.rescale < math.inf):
            raise config.InputError(f"rescale {self.rescale!r}: wanted more than 0")
        if self.resample not in range(6):
            raise config.InputError(
                f"resample {self.resample!r}: wanted PIL's number of a filter, 0..5"
            )

    @property
    def factor(self) -> int:
        """Sides of a resized image are multiples of this."""
        return self.patch * self.merge


def check_count(name: str, value: Any, least: int = 1) -> None:
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < least:
        raise config.InputError(f"{name} {value!r}: wanted a whole number from {least}")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


# As published with the models: Qwen2-VL-7B, Qwen2.5-VL-7B, Qwen3-VL-8B, Qwen3.5-2B.
_QWEN2 = Settings(min_pixels=56 * 56, max_pixels=28 * 28 * 16384)
_QWEN3 = Settings(
    patch=16, min_pixels=256 * 256, max_pixels=4096 * 4096, mean=HALF, std=HALF
)
FAMILIES = {
    "qwen2_vl": _QWEN2,
    "qwen2_5_vl": _QWEN2,
    "qwen2_5_omni": _QWEN2,
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "qwen3_5": _QWEN3,
    "qwen3_5_moe": _QWEN3,
    "qwen4_exp": _QWEN3,
}

# --- settings from a model's folder ---


def load_settings(folder: str | os.PathLike) -> Settings:
    """Settings of the images of a Hugging Face folder.

    From processor_config.json ("image_processor" in it), preprocessor_config.json, or
    what was published for the model_type of config.json, whichever is there first.
    """
    found = read_processor(folder, "image_processor", ("preprocessor_config.json",))
    if found is None:
        return FAMILIES[family_of(folder)]
    values, where = found
    return Settings(**settings_of(values, where, Settings()))


def read_processor(
    folder: str | os.PathLike, part: str, names: Sequence[str]
) -> tuple[Mapping, str] | None:
    """(object, name of its file) of the first file that has one; None if none has."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise config.InputError(f"model folder {str(folder)!r} does not exist")
    if (folder / "processor_config.json").is_file():
        whole = _read_object(folder / "processor_config.json")
        if isinstance(whole.get(part), Mapping):
            return whole[part], f"processor_config.json: {part}"
    for name in names:
        if (folder / name).is_file():
            return _read_object(folder / name), name
    return None


def family_of(folder: str | os.PathLike, known: Iterable[str] = FAMILIES) -> str:
    """The model_type of a folder, one of those known."""
    path = pathlib.Path(folder) / "config.json"
    family = _read_object(path).get("model_type") if path.is_file() else None
    if family not in known:
        raise config.InputError(
            f"{str(folder)!r}: no preprocessor_config.json, and the model_type "
            f"{family!r} of config.json is none of {', '.join(known)}: add the "
            "file, or give settings"
        )
    return family


def settings_of(values: Mapping, where: str, default: Settings) -> dict[str, Any]:
    """Fields of Settings from a processor's JSON; what it leaves out is `default`'s."""
    for switch in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if values.get(switch) is False:
            raise config.InputError(
                f"{where}: {switch} is false; only true is supported, as all published "
                "Qwen models have it"
            )
    fields = dataclasses.asdict(default)
    names = {
        "patch": "patch_size",
        "temporal_patch": "temporal_patch_size",
        "merge": "merge_size",
        "mean": "image_mean",
        "std": "image_std",
        "rescale": "rescale_factor",
        "resample": "resample",
    }
    for field, name in names.items():
        if values.get(name) is not None:
            fields[field] = values[name]
    for field in ("mean", "std"):
        if not isinstance(fields[field], list | tuple):
            fields[field] = [fields[field]] * 3  # transformers reads one number for all
        fields[field] = tuple(fields[field])
    size = values.get("size") or {}
    if not isinstance(size, Mapping) or set(size) & {"height", "width"}:
        raise config.InputError(
            f"{where}: size {size!r}: wanted shortest_edge and longest_edge, in pixels "
            "of the whole image"
        )
    for field, edge in (
        ("min_pixels", "shortest_edge"),
        ("max_pixels", "longest_edge"),
    ):
        # min_pixels beside size wins over size, as the older files meant it
        for found in (size.get(field), size.get(edge), values.get(field)):
            if found is not None:
                fields[field] = found
    try:
        Settings(**{f.name: fields[f.name] for f in dataclasses.fields(Settings)})
    except config.InputError as error:
        raise config.InputError(f"{where}: {error}") from None
    return fields


def _read_object(path: pathlib.Path) -> dict:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise config.InputError(f"{path.name}: {error}") from None
    if not isinstance(value, dict):
        raise config.InputError(f"{path.name}: wanted a JSON object")
    return value


# --- sizes ---


def resized(settings: Settings, height: int, width: int) -> tuple[int, int]:
    """(height, width) nearest the image's own that the encoder takes.

    Each side rounded to a multiple of `factor`; where the area is then outside
    [min_pixels, max_pixels], both sides are scaled by sqrt(bound / area) and rounded
    towards the inside.
    """
    check_aspect(height, width)
    return fit(settings, height, width, settings.min_pixels, settings.max_pixels, 1, 1)


def fit(
    settings: Settings,
    height: int,
    width: int,
    least: int,
    most: int,
    frames: int,
    frames_rounded: int,
) -> tuple[int, int]:
    """Sides for `frames` frames whose pixels lie in [least, most] together."""
    factor, area = settings.factor, frames * height * width
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if frames_rounded * new_height * new_width > most:
        shrink = math.sqrt(area / most)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif frames_rounded * new_height * new_width < least:
        grow = math.sqrt(least / area)
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def check_aspect(height: int, width: int) -> None:
    check_count("height", height)
    check_count("width", width)
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise config.InputError(
            f"an image of {width} x {height}: one side is more than {MAX_ASPECT} times "
            "the other; cut or pad it first"
        )


def check_output(
    settings: Settings, grids: Sequence[Sequence[int]], limits: picture.Limits
) -> None:
    """InputError where patches of these grids would not fit in limits.output_bytes."""
    num_bytes = sum(math.prod(grid) for grid in grids) * 4 * values_of_patch(settings)
    if num_bytes > limits.output_bytes:
        raise config.InputError(
            f"patches of {len(grids)} inputs take {num_bytes:,} bytes; wanted at most "
            f"{limits.output_bytes:,}: give fewer or smaller ones, or lower max_pixels"
        )


def values_of_patch(settings: Settings) -> int:
    return 3 * settings.temporal_patch * settings.patch**2


# --- patches ---


def patches(
    settings: Settings,
    sources: Sequence[Any],
    limits: picture.Limits = picture.LIMITS,
) -> dict[str, np.ndarray]:
    """Images -> dict(pixels=float32 [p, y], grid_thw=int32 [n, 3]).

    sources: paths, bytes, PIL images or arrays (see `picture`), in prompt order.
    """
    if not isinstance(sources, Sequence) or isinstance(sources, str | bytes):
        raise config.InputError("wanted a list of images, got one: write [image]")
    if not sources:
        raise config.InputError("no images; wanted at least one")
    found, grids = [], []
    for i, source in enumerate(sources):
        try:
            image = picture.load(source, limits)
            height, width = resized(settings, image.height, image.width)
            grids.append((1, height // settings.patch, width // settings.patch))
            check_output(settings, grids, limits)
        except config.InputError as error:
            raise config.InputError(f"image {i}: {error}") from None
        found.append(np.asarray(resample(settings, image, height, width))[None])
    pixels_py = np.empty((sum(map(math.prod, grids)), values_of_patch(settings)), "f4")
    start = 0
    for rgb_thwc, grid in zip(found, grids, strict=True):
        end = start + math.prod(grid)
        write_patches(settings, rgb_thwc, pixels_py[start:end])
        start = end
    return {"pixels": pixels_py, "grid_thw": np.array(grids, np.int32)}


def resample(settings: Settings, image: Any, height: int, width: int) -> Any:
    """A PIL image at the given size."""
    return image.resize((width, height), resample=settings.resample)


def write_patches(settings: Settings, rgb_thwc: np.ndarray, out_py: np.ndarray) -> None:
    """uint8 [t, h, w, 3] -> normalized patches, into out_py [p, y].

    t is 1 (a still image) or a multiple of temporal_patch.
    """
    t, height, width, _ = rgb_thwc.shape
    f, m, q = settings.temporal_patch, settings.merge, settings.patch
    rows, columns = height // (m * q), width // (m * q)
    still = t == 1
    frames = 1 if still else f
    split = rgb_thwc.reshape(t // frames, frames, rows, m, q, columns, m, q, 3)
    order = split.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    out = out_py.reshape(t // frames, rows, columns, m, m, 3, f, q, q)
    table_cv = normalized_table(settings)
    for channel in range(3):  # a value of uint8 has one result: look it up
        # For a still image the one frame is broadcast over the f frames of a patch.
        out[:, :, :, :, :, channel] = table_cv[channel][order[:, :, :, :, :, channel]]


def normalized_table(settings: Settings) -> np.ndarray:
    """[3, 256]: (v * rescale - mean) / std, rounded to float32 at each step."""
    scaled_v = (np.arange(256, dtype=np.float64) * settings.rescale).astype(np.float32)
    mean_c = np.array(settings.mean, np.float32)
    std_c = np.array(settings.std, np.float32)
    return (scaled_v[None] - mean_c[:, None]) / std_c[:, None]
