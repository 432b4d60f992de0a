# SPDX-License-Identifier: Apache-2.0
"""Pictures in, RGB out: files, bytes, PIL images and arrays, whatever they claim to be.

`load` gives one picture, `frames` all pictures of an animated file (GIF, WebP, APNG).
Conversion follows transformers 5.23 (`image_transforms.convert_to_rgb`, PIL backend):
transparency is laid on white, every other mode (palette, gray, CMYK, 16 bit) goes
through PIL's convert("RGB"), which clips 16-bit gray at 255. Deviations:
- a file is turned upright by its EXIF tag, as transformers' `load_image` does, but
  keeps its transparency for the white ground, which `load_image` drops;
- floats in [0, 1] are rounded to 255 steps, where transformers cuts: an image divided
  by 255 gives what the image gives;
- an array with 1, 3 or 4 as its last dim is read as [h, w, c], never as [c, h, w].

Formats: only those of FORMATS are tried, by their first bytes, never by the suffix;
nothing that runs a program or draws a page (EPS, PDF, SVG). No URLs.
Order of checks: bytes of the file, format, pixels that the header claims, then pixels
are decoded. Memory is bounded by `Limits`.
Shapes: arrays [h, w], [h, w, c] or [c, h, w] with c of 1, 3 or 4; integers 0..255 or
floats 0..1. Gives PIL images of mode RGB, or uint8 [t, h, w, 3].
Raises: InputError naming the source for anything broken, too large or not a picture.
Errors of decoders are named by kind only: their texts may hold addresses of memory.
"""

import dataclasses
import io
import os
import pathlib
import struct
import types
import zlib
from typing import Any

import numpy as np

from qwen_jax import config

# What a file may be: PIL's name, and the media type a caller may have been told.
FORMATS = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
    "TIFF": "image/tiff",
}
ANIMATED = ("GIF", "WEBP", "PNG")
# What PIL's decoders raise on damaged files, found by feeding them such files.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError)
_DAMAGE += (ArithmeticError, AttributeError, RuntimeError, MemoryError)
_DAMAGE += (struct.error, zlib.error, UserWarning)


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much one input may ask for; PIL itself stops at 178,956,970 pixels."""

    file_bytes: int = 64 * 2**20
    pixels: int = 2**26  # of one picture or frame, as its header claims
    frames: int = 8192  # of one video, before sampling
    decoded_bytes: int = 2**31  # of one video's frames as uint8 RGB
    output_bytes: int = 2**32  # of all patches of one call


LIMITS = Limits()


def pil() -> types.ModuleType:
    """PIL.Image, imported when it is needed."""
    try:
        from PIL import Image
    except ImportError:
        raise config.InputError(
            "pictures need pillow: pip install 'qwen_jax[vision]'"
        ) from None
    return Image


def load(source: Any, limits: Limits = LIMITS, mime: str | None = None) -> Any:
    """The picture as a PIL image of mode RGB; the first one of an animated file.

    source: a path, bytes, a PIL image, or an array. mime: the media type that came
    with a file, which its content must then have.
    """
    if isinstance(source, str | os.PathLike | bytes | bytearray | memoryview):
        image, name = _open(source, limits, tuple(FORMATS), mime)
        return _decoded(image, name, upright=True)
    Image = pil()
    if isinstance(source, Image.Image):
        name = f"the PIL image of mode {source.mode}"
        _check_size(*source.size, name, limits)
        return _decoded(source, name, upright=False)
    return Image.fromarray(_rgb_of_array(source, limits))


def size(
    source: Any, limits: Limits = LIMITS, mime: str | None = None
) -> tuple[int, int]:
    """(width, height) that the header of a file claims, checked as `load` does before
    it decodes anything."""
    image, _ = _open(source, limits, tuple(FORMATS), mime)
    return image.size


def frames(
    source: Any,
    limits: Limits = LIMITS,
) -> tuple[np.ndarray, float | None]:
    """All frames of an animated file: uint8 [t, h, w, 3], and frames a second or None.

    Files give each frame a duration; the rate is that of their mean.
    """
    image, name = _open(source, limits, ANIMATED, None)
    try:
        num_frames = getattr(image, "n_frames", 1)
    except _DAMAGE as error:
        raise _damaged(name, error) from None
    width, height = image.size
    check_frames(num_frames, height, width, name, limits)
    rgb_thwc = np.empty((num_frames, height, width, 3), np.uint8)
    milliseconds = 0.0
    for i in range(num_frames):
        try:
            image.seek(i)
            rgb_thwc[i] = np.asarray(to_rgb(image))
        except _DAMAGE as error:
            raise _damaged(f"{name}, frame {i}", error) from None
        milliseconds += float(image.info.get("duration") or 0)
    rate = num_frames / milliseconds * 1000 if milliseconds > 0 else None
    return rgb_thwc, rate


def check_frames(
    num_frames: int, height: int, width: int, name: str, limits: Limits
) -> None:
    """InputError where a video is longer or larger than the limits."""
    if num_frames > limits.frames:
        raise config.InputError(
            f"{name}: {num_frames:,} frames; wanted at most {limits.frames:,}: give "
            "a shorter piece, or every n-th frame with a smaller fps"
        )
    _check_size(width, height, name, limits)
    decoded_bytes = num_frames * height * width * 3
    if decoded_bytes > limits.decoded_bytes:
        raise config.InputError(
            f"{name}: {num_frames:,} frames of {width} x {height} are "
            f"{decoded_bytes:,} bytes; wanted at most {limits.decoded_bytes:,}: give "
            "fewer or smaller frames"
        )


def to_rgb(image: Any) -> Any:
    """A PIL image of mode RGB; what is transparent becomes white."""
    Image = pil()
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")


def _open(
    source: Any, limits: Limits, formats: tuple[str, ...], mime: str | None
) -> tuple[Any, str]:
    """An opened file, of which only the header has been read, and its name."""
    Image = pil()
    stream, name = _stream(source, limits)
    too_large = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    try:
        image = Image.open(stream, formats=list(formats))
    except too_large:
        raise config.InputError(
            f"{name}: its header claims more than {Image.MAX_IMAGE_PIXELS:,} pixels; "
            f"wanted at most {limits.pixels:,}"
        ) from None
    except Image.UnidentifiedImageError:
        raise config.InputError(
            f"{name}: not a picture this program reads, by its first bytes or its "
            f"header; wanted one of {', '.join(formats)}"
        ) from None
    except _DAMAGE as error:
        raise _damaged(name, error) from None
    _check_size(*image.size, name, limits)
    # A JPEG with more JPEGs behind it, as phones write them, calls itself MPO.
    found = FORMATS["JPEG" if image.format == "MPO" else image.format]
    if mime is not None and mime != found:
        raise config.InputError(f"{name}: declared as {mime!r}, but it is {found!r}")
    return image, name


def _stream(source: Any, limits: Limits) -> tuple[io.BytesIO, str]:
    """The bytes of a path or of memory, as many as the limits allow."""
    if isinstance(source, bytes | bytearray | memoryview):
        view = memoryview(source).cast("B")
        content, name = bytes(view[: limits.file_bytes + 1]), "the picture in memory"
    else:
        path = pathlib.Path(source)
        name = f"picture {str(path)!r}"
        if "://" in str(source) or str(source).startswith("data:"):
            raise config.InputError(f"{name}: wanted a local path or bytes, not a URL")
        if not path.is_file():  # a pipe or a device would never end
            raise config.InputError(f"{name} is not a file")
        try:
            with path.open("rb") as file:
                content = file.read(limits.file_bytes + 1)
        except OSError as error:
            raise config.InputError(f"{name}: {error.strerror}") from None
    if not content:
        raise config.InputError(f"{name} is empty")
    if len(content) > limits.file_bytes:
        raise config.InputError(
            f"{name} is larger than {limits.file_bytes:,} bytes, the most a picture "
            "may have"
        )
    return io.BytesIO(content), name


def _decoded(image: Any, name: str, *, upright: bool) -> Any:
    from PIL import ImageOps

    try:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image) if upright else image)
    except _DAMAGE as error:
        raise _damaged(name, error) from None


def _damaged(name: str, error: BaseException) -> config.InputError:
    return config.InputError(
        f"{name}: cut off or damaged; it cannot be decoded ({type(error).__name__})"
    )


def _check_size(width: int, height: int, name: str, limits: Limits) -> None:
    if width < 1 or height < 1:
        raise config.InputError(f"{name}: {width} x {height} pixels; wanted at least 1")
    if width * height > limits.pixels:
        raise config.InputError(
            f"{name}: {width:,} x {height:,} pixels; wanted at most {limits.pixels:,} "
            "in all: make it smaller first"
        )


def _rgb_of_array(source: Any, limits: Limits) -> np.ndarray:
    """Any array of one picture -> uint8 [h, w, 3]."""
    try:
        array = np.asarray(source)
    except (ValueError, TypeError) as error:
        raise config.InputError(
            f"{type(source).__name__} as picture: {error}"
        ) from None
    name = f"the array {array.shape} of {array.dtype}"
    wanted = "wanted [h, w], [h, w, c] or [c, h, w] with c of 1, 3 or 4"
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3:
        raise config.InputError(f"{name} is not a picture; {wanted}")
    if array.shape[2] not in (1, 3, 4):
        if array.shape[0] not in (1, 3, 4):
            raise config.InputError(f"{name} is not a picture; {wanted}")
        array = np.moveaxis(array, 0, 2)
    _check_size(array.shape[1], array.shape[0], name, limits)
    rgba_hwc = _bytes_of_array(array, name)
    channels = rgba_hwc.shape[2]
    if channels == 4:
        return _on_white(rgba_hwc)
    return np.ascontiguousarray(np.repeat(rgba_hwc, 3 // channels, axis=2))


def _bytes_of_array(array: np.ndarray, name: str) -> np.ndarray:
    """Values as uint8: integers 0..255 as they are, floats 0..1 times 255."""
    if array.dtype == np.uint8:
        return array
    if not (np.issubdtype(array.dtype, np.integer) or array.dtype.kind == "f"):
        raise config.InputError(
            f"{name}: wanted integers in 0..255 or floats in 0..1, such as uint8"
        )
    low, high = array.min(), array.max()
    top = 1 if array.dtype.kind == "f" else 255
    if not (low >= 0 and high <= top):  # NaN fails both
        fix = "divide them by 255, or give uint8" if top == 1 else "give uint8"
        raise config.InputError(
            f"{name}: values from {low} to {high}; wanted 0..{top}: {fix}"
        )
    if top == 1:
        return np.rint(array.astype(np.float64) * 255).astype(np.uint8)
    return array.astype(np.uint8)


def _on_white(rgba_hwc: np.ndarray) -> np.ndarray:
    """c a + 255 (1 - a) with a = alpha / 255, in float64 and this order."""
    alpha_hw1 = rgba_hwc[..., 3:] / 255
    laid_hwc = alpha_hw1 * rgba_hwc[..., :3] + (1 - alpha_hw1) * 255
    return np.round(laid_hwc).astype(np.uint8)
