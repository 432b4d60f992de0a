# SPDX-License-Identifier: Apache-2.0
"""Pictures in the messages of a stranger: data URIs in, images of an engine out.

`of_url` looks at the header of a picture, which is cheap, before it is known whether
the model sees; `read` decodes those of a request, one after another, and makes patches
of each at once, so that only one is in memory as pixels.

Source: OpenAI's `image_url` parts. Deviations: nothing is fetched, so only data URIs
are taken; a picture larger than the engine takes is made smaller, as OpenAI does, by
the rule of the model's own processor; detail "low" makes it LOW_PIXELS at most, "auto"
is "high".

Formats: data:image/TYPE;base64,... with TYPE one of TYPES, which the content must have.
Units: bytes of a file, pixels as its header claims. Invariants: a picture that fits is
patches equal to those of the model's processor.
Raises: errors.ApiError 400 invalid_image_url naming the URL's place, without anything
that a decoder said.
"""

import base64
import binascii
import dataclasses
import re
from collections.abc import Sequence

from qwen_jax import config
from qwen_jax.data import image, multimodal, picture
from qwen_jax.serve import errors
from qwen_jax.serve import images as images_lib

LIMITS = picture.Limits(file_bytes=6 * 2**20, pixels=2**25)
MAX_PIXELS = 2**26  # of all pictures of a request
MAX_PICTURES = 64
LOW_PIXELS = 512 * 512
TYPES = ("png", "jpeg", "webp", "gif")
DETAILS = ("auto", "low", "high")
_DATA = re.compile(r"data:(image/[a-z0-9.+-]+);base64,")


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture whose header is right. at: the place of its part; detail: how much of
    it is wanted; pixels: how many it has."""

    data: bytes
    detail: str
    at: str
    pixels: int


def _refused(at: str, reason: str) -> errors.ApiError:
    at = f"{at}.image_url.url"
    return errors.invalid(at, "invalid_image_url", f"Invalid {at}: {reason}.")


def of_url(url: str, detail: str, at: str) -> Picture:
    """The picture of a data URI.

    Raises:
      errors.ApiError: another URL, no base64, no picture, one that is too large.
    """
    found = _DATA.match(url)
    if found is None:
        raise _refused(
            at,
            "wanted data:image/TYPE;base64,...; this server fetches nothing from "
            "addresses and reads no files",
        )
    if (len(url) - found.end()) * 3 // 4 > LIMITS.file_bytes:
        raise _refused(at, f"the image has more than {LIMITS.file_bytes:,} bytes")
    kind = found[1].replace("/jpg", "/jpeg")  # as many write it
    if kind.removeprefix("image/") not in TYPES:
        raise _refused(at, f"wanted an image of type {', '.join(TYPES)}")
    try:
        data = base64.b64decode(url[found.end() :], validate=True)
        width, height = picture.size(data, LIMITS, kind)
    except binascii.Error:
        raise _refused(at, "it is not base64") from None
    except config.InputError as error:
        raise _refused(at, str(error)) from None
    return Picture(data, detail, at, width * height)


def check(pictures: Sequence[Picture]) -> None:
    """Refuse more pictures than one request may have.

    Raises:
      errors.ApiError: 400, naming the first that is too many.
    """
    if len(pictures) > MAX_PICTURES:
        raise too_many(pictures, MAX_PICTURES)
    seen = 0
    for one in pictures:
        seen += one.pixels
        if seen > MAX_PIXELS:
            said = f"the images of a request have more than {MAX_PIXELS:,} pixels"
            raise _refused(one.at, said)


def too_many(pictures: Sequence[Picture], most: int) -> errors.ApiError:
    """More pictures than somebody takes."""
    at = pictures[most].at
    said = f"Invalid {at}: {len(pictures)} images; wanted at most {most}."
    return errors.invalid(at, "invalid_value", said)


def read(
    pictures: Sequence[Picture], settings: image.Settings, patches: int
) -> tuple[images_lib.Image, ...]:
    """What an engine that takes `patches` patches of an image is given.

    Raises:
      errors.ApiError: one is damaged, or too narrow.
    """
    made = []
    for one in pictures:
        most = min(settings.max_pixels, patches * settings.patch**2)
        if one.detail == "low":
            most = min(most, LOW_PIXELS)
        bounds = {"max_pixels": most, "min_pixels": min(settings.min_pixels, most)}
        fitting = dataclasses.replace(settings, **bounds)
        try:
            part = image.patches(fitting, [one.data], LIMITS)
        except config.InputError as error:
            said = str(error).removeprefix("image 0: ")
            raise _refused(one.at, said) from None
        # Sides are rounded up to a patch at least: a very narrow one may be too large.
        if len(part["pixels"]) > patches:
            raise _refused(one.at, "it is too narrow; cut or pad it")
        made += images_lib.of(part)
    return tuple(made)


def check_places(
    sees: multimodal.Processor, ids: Sequence[int], pictures: Sequence[Picture]
) -> None:
    """Refuse pictures that a template has not written a place for.

    Raises:
      errors.ApiError: 400, naming the first picture.
    """
    if sees.count(ids) != (len(pictures), 0):
        at = pictures[0].at
        said = f"Invalid {at}: the chat template of this model has no place for images."
        raise errors.invalid(at, "invalid_value", said)
