# SPDX-License-Identifier: Apache-2.0
"""An engine's eyes: images through the vision tower, their features kept on the device.

    sight = Sight(spec, settings, rules)
    shown = sight.show(params, row, start, count, size)     # a piece of a prompt

An image is looked at when a piece of a prompt wants tokens of it and its features are
not there: usually once, however many requests, answers and pieces it is part of. They
stay as long as no other image needs their room, the longest unused go first. There is
room for whatever one piece can want, so nothing ever waits for it.

Shapes: patches are padded to a few sizes (`device.Settings.patch_buckets`), one program
each; features lie in rows of one array, in any order, so rows are never fragmented.
Invariants: nothing is shared across salts. Features that a program reads are not
changed before it has: the device works in the order of calls.
Raises: nothing; what does not fit was refused by `images.check`.
"""

import collections
from typing import Any

import jax
import numpy as np

from qwen_jax.models import paged
from qwen_jax.serve import images as images_lib
from qwen_jax.serve import programs, scheduler


class Sight:
    """See the module docstring. buckets: sizes of padded patches; piece: most tokens
    of a piece; how: static arguments of programs."""

    def __init__(self, buckets: tuple[int, ...], piece: int, how: dict[str, Any]):
        self.buckets, self._how = buckets, how
        self._vision = how["spec"].vision
        # A piece has at most two images that it has not all tokens of.
        self.rows = piece + 2 * (buckets[-1] // self._vision.merge**2)
        self.looks = 0  # images that went through the tower
        self.empty()

    def empty(self) -> None:
        """No image is there; with the engine's mesh set."""
        made = programs.features(self._how["spec"], self.rows)
        self._features = jax.tree.map(jax.numpy.copy, made)
        self.forget()

    def forget(self) -> None:
        """What is there is of other weights: look anew."""
        self._free = list(range(self.rows))
        # (salt, digest) -> rows, the longest unused first
        self._held: collections.OrderedDict[tuple[str, int], np.ndarray]
        self._held = collections.OrderedDict()

    def show(
        self, params: Any, row: scheduler.Row, start: int, count: int, size: int
    ) -> paged.Shown:
        """Tokens start .. start + count of a row, padded to `size`."""
        place_t = np.arange(start, start + size, dtype=np.int32)
        index_t = np.full(size, -1, np.int32)
        positions_3t = np.broadcast_to(place_t, (3, size))
        laid = row.laid
        if laid is not None:
            positions_3t = positions_3t + np.int32(laid.shift)
            known = laid.positions_3t[:, start : start + count]
            positions_3t[:, : known.shape[1]] = known
            image_t = laid.image_t[start : start + count]
            salt = row.request.salt
            rows = self._rows_of(params, laid.images, image_t, salt)
            for number, rows_m in rows.items():
                at = np.flatnonzero(image_t == number)
                index_t[at] = rows_m[laid.within_t[start + at]]
        return paged.Shown(
            np.ascontiguousarray(positions_3t[:, None]),
            index_t[None],
            self._features.token_fd,
            self._features.deep_lfd,
        )

    def _rows_of(
        self, params: Any, images: tuple, image_t: np.ndarray, salt: str
    ) -> dict[int, np.ndarray]:
        """Where the features of the images of some tokens are; all of them at once."""
        numbers = [int(i) for i in np.unique(image_t) if i >= 0]
        keys = {i: (salt, images[i].digest) for i in numbers}
        for key in keys.values():
            if key in self._held:
                self._held.move_to_end(key)
        for i, key in keys.items():
            if key not in self._held:
                self._held[key] = self._look(params, images[i])
        return {i: self._held[key] for i, key in keys.items()}

    def _look(self, params: Any, image: images_lib.Image) -> np.ndarray:
        tokens = image.tokens(self._vision)
        # Those that the piece wants were used last, and there is room for all of them.
        while len(self._free) < tokens:
            _, rows_m = self._held.popitem(last=False)
            self._free += rows_m.tolist()
        rows_m = np.array([self._free.pop() for _ in range(tokens)], np.int32)
        size = next(n for n in self.buckets if n >= len(image.pixels_py))
        self._run(params, image.pixels_py, image.grid, rows_m, size)
        self.looks += 1
        return rows_m

    def _run(self, params: Any, pixels_py, grid, rows_m, size: int) -> None:
        padded_py = np.zeros((size, pixels_py.shape[1]), np.float32)
        padded_py[: len(pixels_py)] = pixels_py
        at_m = np.full(size // self._vision.merge**2, self.rows, np.int32)
        at_m[: len(rows_m)] = rows_m
        grid_3 = np.array(grid, np.int32)
        self._features = programs.look(
            params, self._features, padded_py, grid_3, at_m, **self._how
        )

    def warm(self, params: Any, size: int) -> None:
        """Run the program of one bucket on nobody's image."""
        side = self._vision.merge
        pixels_py = np.zeros((side**2, self._vision.patch_numbers), np.float32)
        self._run(params, pixels_py, (1, side, side), np.array([self.rows]), size)
