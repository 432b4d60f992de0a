# SPDX-License-Identifier: Apache-2.0
"""Images in the prompt of a request: what they are, and where their tokens lie.

    images = images.of(image.patches(settings, [picture]))     # one Image each
    Request(..., prompt=ids, images=images)

`prompt` has one placeholder (the model's `image_id`) for each merged square of patches,
as `data.multimodal` expands them. `check` compares both; `lay` says once, on the host,
what each token of the prompt is.

Source of keys: as in vLLM, pages with tokens of images are shared by what the image is,
not by its placeholders. Deviation: the key of a token is the whole SHA-256 of pixels
and grid, as a negative integer beside the ids, not a short hash of a page.

Shapes: pixels_py float32 [p, y], patches in the order of the published processors;
positions_3t int32, temporal, row and column (`models.vl`); image_t int32, number of the
image a token is of, -1 for text; within_t int32, its place among the image's tokens.
Invariants: two prompts have equal keys up to a place only where their ids, images and
positions up to there are the same. What an image is never depends on the caller's word.
Raises: config.InputError naming images, prompt, or what does not fit them.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qwen_jax import config
from qwen_jax.models import spec as spec_lib
from qwen_jax.models import vl


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """One image: its patches, and how many frames (1), rows and columns they are.
    digest: a name that no other image has; made here, by whoever asks."""

    pixels_py: np.ndarray
    grid: tuple[int, int, int]
    digest: int = dataclasses.field(init=False)

    def __post_init__(self):
        shape, grid = np.shape(self.pixels_py), self.grid
        if len(grid) != 3 or grid[0] != 1 or min(grid) < 1:
            raise config.InputError(
                f"an image of grid {tuple(grid)}: wanted (1, rows, columns) of "
                "patches; videos are not taken"
            )
        if len(shape) != 2 or shape[0] != math.prod(grid):
            raise config.InputError(
                f"an image of grid {tuple(grid)} with pixels of shape {shape}: wanted "
                f"[{math.prod(grid)}, numbers of a patch]"
            )
        # One that is not finite would stay in pages that others are given later.
        if not np.isfinite(self.pixels_py).all():
            raise config.InputError("pixels of an image are not all finite numbers")
        pixels_py = np.ascontiguousarray(self.pixels_py, "<f4")
        made = hashlib.sha256(repr((*map(int, grid), shape[1])).encode())
        made.update(pixels_py.data)
        object.__setattr__(self, "digest", int.from_bytes(made.digest(), "big"))

    def tokens(self, vision: spec_lib.Vision) -> int:
        """Placeholders that it takes."""
        return math.prod(self.grid) // vision.merge**2


def of(part: Mapping[str, np.ndarray]) -> tuple[Image, ...]:
    """The images of `image.patches`: {"pixels": [p, y], "grid_thw": [n, 3]}."""
    made, start, pixels_py = [], 0, np.asarray(part["pixels"], np.float32)
    for grid in np.asarray(part["grid_thw"]).tolist():
        stop = start + math.prod(grid)
        made.append(Image(pixels_py[start:stop], tuple(grid)))
        start = stop
    if start != len(pixels_py):
        raise config.InputError(
            f"grid_thw of images counts {start} patches, pixels have {len(pixels_py)}"
        )
    return tuple(made)


def check(spec: spec_lib.Spec, request: Any, settings: Any) -> None:
    """Refuse a request whose images do not fit the model, its prompt, or an engine of
    these `device.Settings`.

    Raises:
      config.InputError: see the module docstring.
    """
    images, most, patches = request.images, settings.images, settings.image_patches
    if spec.vision is None or not most:
        if images:
            why = "has no vision" if spec.vision is None else "runs without (images=0)"
            raise config.InputError(f"images={len(images)}: this model {why}")
        return
    if len(images) > most:
        raise config.InputError(f"images={len(images)}: wanted at most {most}")
    for i, one in enumerate(images):
        if len(one.pixels_py) > patches:
            raise config.InputError(
                f"images[{i}] has {len(one.pixels_py)} patches: wanted at most "
                f"{patches}; make it smaller"
            )
        vl.check(
            spec,
            np.full((1, one.tokens(spec.vision)), spec.vision.image_id, np.int32),
            images={"pixels": one.pixels_py, "grid_thw": np.array([one.grid])},
        )
    ids_t = np.asarray(request.prompt)
    if (ids_t == spec.vision.video_id).any():
        raise config.InputError(
            f"the prompt has placeholders of a video (id {spec.vision.video_id}): "
            "videos are not taken"
        )
    at_m = np.flatnonzero(ids_t == spec.vision.image_id)
    counts = [one.tokens(spec.vision) for one in images]
    if len(at_m) != sum(counts):
        raise config.InputError(
            f"the prompt has {len(at_m)} placeholders of images (id "
            f"{spec.vision.image_id}), {len(images)} images take {sum(counts)}"
        )
    for i, block in enumerate(np.split(at_m, np.cumsum(counts)[:-1])):
        if len(block) and block[-1] - block[0] >= len(block):
            raise config.InputError(
                f"the placeholders of images[{i}] are not side by side in the prompt"
            )


def crowd(new: Any, here: Iterable[Any]) -> int:
    """Bytes of pixels with one more request among those that are here; 0 where it has
    none, or is the only one that has."""
    if not new.images:
        return 0
    others = {one.id: one.images for one in here if one.images}
    every = [image for some in (*others.values(), new.images) for image in some]
    return sum(image.pixels_py.nbytes for image in every) if others else 0


@dataclasses.dataclass(frozen=True, eq=False)
class Laid:
    """A prompt with images, token by token; see the module docstring. shift: what
    follows the prompt has its place plus this as all three positions."""

    images: tuple[Image, ...]
    positions_3t: np.ndarray
    shift: int
    image_t: np.ndarray
    within_t: np.ndarray
    keys: tuple[int, ...]


def lay(
    spec: spec_lib.Spec, prompt: Sequence[int], images: tuple[Image, ...]
) -> Laid | None:
    """What each token of a checked prompt is; None without images."""
    if not images:
        return None
    ids_1t = np.asarray(prompt, np.int32)[None]
    grids = np.array([one.grid for one in images], np.int32)
    positions_3t = vl.positions(spec, ids_1t, images={"grid_thw": grids})[:, 0]
    here_t = ids_1t[0] == spec.vision.image_id
    counts = [one.tokens(spec.vision) for one in images]
    image_t = np.full(len(here_t), -1, np.int32)
    image_t[here_t] = np.repeat(np.arange(len(images)), counts)
    within_t = np.zeros(len(here_t), np.int32)
    within_t[here_t] = np.concatenate([np.arange(count) for count in counts])
    keys = list(prompt)
    for at in np.flatnonzero(here_t).tolist():
        keys[at] = -1 - images[image_t[at]].digest
    shift = int(positions_3t.max()) + 1 - len(here_t)
    return Laid(images, positions_3t, shift, image_t, within_t, tuple(keys))
