# SPDX-License-Identifier: Apache-2.0
"""transformers' video processors, made to run where torchvision is not installed.

torchvision's usual wheels need a CUDA torch. Three of its functions are used: resize,
rescale with normalize, gray to RGB. The first two are replaced by the functions of
transformers' own PIL processors, frame by frame; the third is left out, as the tests
give RGB. All the rest (sampling, sizes, padding, patches, grids, metadata) is the
library's code.
"""

import importlib.util
import sys
import types

import numpy as np
import torch
from transformers import image_transforms

_FAKE = ("", ".transforms", ".transforms.v2", ".transforms.v2.functional")


def _module(name: str) -> types.ModuleType:
    if importlib.util.find_spec("torchvision"):
        return importlib.import_module(f"transformers.models.{name}")
    fakes = {
        f"torchvision{end}": types.ModuleType(f"torchvision{end}") for end in _FAKE
    }
    sys.modules.update(fakes)
    try:
        return importlib.import_module(f"transformers.models.{name}")
    finally:
        for fake in fakes:
            del sys.modules[fake]


_QWEN2 = _module("qwen2_vl.video_processing_qwen2_vl").Qwen2VLVideoProcessor
_QWEN3 = _module("qwen3_vl.video_processing_qwen3_vl").Qwen3VLVideoProcessor


def _each_frame(function, videos: torch.Tensor) -> torch.Tensor:
    frames = videos.numpy().reshape(-1, *videos.shape[2:])
    made = np.stack([function(frame) for frame in frames])
    return torch.from_numpy(made.reshape(*videos.shape[:2], *made.shape[1:]))


class _Pil:
    """What stands between the library's processors and torchvision."""

    def resize(self, image, size, resample=None, **_):
        to = (size.height, size.width)
        layout = {
            "data_format": "channels_first",
            "input_data_format": "channels_first",
        }
        return _each_frame(
            lambda x: image_transforms.resize(x, to, resample=3, **layout), image
        )

    def rescale_and_normalize(
        self, images, do_rescale, rescale_factor, do_normalize, image_mean, image_std
    ):
        layout = {
            "data_format": "channels_first",
            "input_data_format": "channels_first",
        }

        def both(x):
            x = image_transforms.rescale(x, rescale_factor, **layout)
            return image_transforms.normalize(x, image_mean, image_std, **layout)

        return _each_frame(both, images)

    def convert_to_rgb(self, video):
        return video


def module_of(generation: str) -> types.ModuleType:
    """The file of a generation's processor, for its plain functions."""
    return sys.modules[{"qwen2": _QWEN2, "qwen3": _QWEN3}[generation].__module__]


def processor(generation: str, **values):
    """A processor of "qwen2" or "qwen3" with attributes set as its __init__ would."""
    base = {"qwen2": _QWEN2, "qwen3": _QWEN3}[generation]
    # resize of the library calls super().resize: _Pil must come after it in the order
    bases = (base, _Pil, *base.__mro__[1:-1])
    made = object.__new__(type(base.__name__, bases, {"__init__": lambda self: None}))
    made.__dict__.update(made._standardize_kwargs(**{"size": base.size, **values}))
    for key, value in list(made.__dict__.items()):
        if value is None and key not in values:  # the class has the default
            del made.__dict__[key]
    made._valid_kwargs_names = list(base.valid_kwargs.__annotations__)
    return made
