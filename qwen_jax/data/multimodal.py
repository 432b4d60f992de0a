# SPDX-License-Identifier: Apache-2.0
"""Prompts with media: text and pictures -> ids with a placeholder for every feature.

    processor = multimodal.load("DIR")                   # tokenizer, settings
    found = multimodal.media(messages)                   # in prompt order
    prompt = processor(ids, found.images, found.videos)  # ids of the rendered chat
    models.forward(
        spec, params, prompt.ids[None], images=prompt.images, videos=prompt.videos
    )

A chat template writes `<|vision_start|><|image_pad|><|vision_end|>` for an image and
`<|vision_start|><|video_pad|><|vision_end|>` for a video. Each pad becomes as many
pads as the encoder gives features: t * h * w / merge^2 of its grid. `Listener` does the
same for sounds, whose pads are those of SOUNDS.

Source: transformers 5.23, Qwen2VLProcessor, Qwen2_5_VLProcessor, Qwen3VLProcessor,
Qwen2AudioProcessor; ids are equal to theirs. A video of the qwen3 generation becomes
one block for each temporal patch, `<1.5 seconds><|vision_start|>pads<|vision_end|>`.
transformers 5 puts these blocks between the marks that the template wrote; transformers
4.57, with which Qwen3-VL was published, and vLLM put them in place of the marks:
`outer_marks="drop"` does that.

Text of strangers: pass ids, made with the strangers' text encoded as plain text
(`Tokenizer.encode`), so that a literal `<|image_pad|>` in it is no placeholder. In a
`str` every literal counts, and one too many is an error.

Shapes: ids int32 [t]; images and videos as in `image` and `video`, or None.
Raises: InputError where placeholders and media differ in number, naming both; for a
vocabulary without the marks; for content of a message that is no text, image or video.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwen_jax import config
from qwen_jax.data import audio, image, picture, video
from qwen_jax.data import tokenizer as tokenizer_lib

IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
START, END = "<|vision_start|>", "<|vision_end|>"
MAX_MEDIA = 4096  # of one prompt


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What one forward pass reads."""

    ids: np.ndarray  # int32 [t]
    images: dict[str, np.ndarray] | None = None  # see image.patches
    videos: dict[str, np.ndarray] | None = None  # see video.Patches.arrays
    watched: video.Patches | None = None  # which frames the videos are, and when
    sounds: dict[str, np.ndarray] | None = None  # see audio.Features.arrays
    heard: audio.Features | None = None  # how long the sounds are, and what was cut


@dataclasses.dataclass(frozen=True)
class Processor:
    """A model's tokenizer and settings; calling it makes a Prompt."""

    tokenizer: tokenizer_lib.Tokenizer
    images: image.Settings
    videos: video.Settings
    outer_marks: str = "keep"
    limits: picture.Limits = picture.LIMITS

    def __post_init__(self):
        if self.outer_marks not in ("keep", "drop"):
            raise config.InputError(
                f"outer_marks {self.outer_marks!r}: wanted 'keep' or 'drop'"
            )
        missing = [
            mark
            for mark in (IMAGE, VIDEO, START, END)
            if mark not in self.tokenizer.specials
        ]
        if missing:
            raise config.InputError(
                f"the vocabulary has no {', '.join(missing)}; wanted the tokenizer of "
                "a model that sees"
            )

    def __call__(
        self,
        text: str | Sequence[int],
        images: Sequence[Any] = (),
        videos: Sequence[video.Clip] = (),
    ) -> Prompt:
        """text: a rendered chat, or its ids; media in the order of their pads."""
        check_counts(self.count(text), len(images), len(videos))
        seen = image.patches(self.images, images, self.limits) if images else None
        watched = video.patches(self.videos, videos, self.limits) if videos else None
        image_grids = seen["grid_thw"] if seen else np.zeros((0, 3), np.int32)
        video_grids = watched.arrays["grid_thw"] if watched else image_grids[:0]
        times = watched.timestamps if watched else ()
        ids = self.expand(text, image_grids, video_grids, times)
        return Prompt(ids, seen, watched.arrays if watched else None, watched)

    def count(self, text: str | Sequence[int]) -> tuple[int, int]:
        """How many placeholders of images and of videos a text or its ids hold."""
        if isinstance(text, str):
            return text.count(IMAGE), text.count(VIDEO)
        ids = _as_ids(text)
        specials = self.tokenizer.specials
        return int((ids == specials[IMAGE]).sum()), int((ids == specials[VIDEO]).sum())

    def expand(
        self,
        text: str | Sequence[int],
        image_grids: np.ndarray,
        video_grids: np.ndarray,
        times: Sequence[np.ndarray] = (),
    ) -> np.ndarray:
        """ids int32 [t] with one pad for every feature of the grids [n, 3].

        times: of each video, the seconds of its temporal patches (qwen3 only).
        """
        check_counts(self.count(text), len(image_grids), len(video_grids))
        blocks = self.videos.generation == "qwen3"
        if blocks and [len(t) for t in times] != [int(t) for t in video_grids[:, 0]]:
            raise config.InputError(
                "times: wanted the seconds of every temporal patch of every video"
            )
        if blocks and len(video_grids):
            if isinstance(text, str):
                text = self._timed_text(text, times)
            else:
                text = self._timed_ids(_as_ids(text), times)
        if isinstance(text, str):
            text = self.tokenizer.encode(text, allow_special=True)
        ids, specials = _as_ids(text), self.tokenizer.specials
        repeats = np.ones(len(ids), np.int64)
        repeats[ids == specials[IMAGE]] = _features(image_grids, self.images.merge)
        if blocks:  # one pad stands for one temporal patch by now
            num_blocks = video_grids[:, 0]
            video_grids = np.repeat(video_grids * [0, 1, 1] + [1, 0, 0], num_blocks, 0)
        repeats[ids == specials[VIDEO]] = _features(video_grids, self.videos.merge)
        return np.repeat(ids, repeats).astype(np.int32)

    def _timed_text(self, text: str, times: Sequence[np.ndarray]) -> str:
        """Every video pad becomes blocks of a time and one pad between marks."""
        videos = iter(times)
        pad = re.escape(VIDEO)
        if self.outer_marks == "drop":
            pad = f"{re.escape(START)}{pad}{re.escape(END)}|{pad}"

        def blocks(_: re.Match) -> str:
            return "".join(f"{_written(s)}{START}{VIDEO}{END}" for s in next(videos))

        return re.sub(pad, blocks, text)

    def _timed_ids(self, ids: np.ndarray, times: Sequence[np.ndarray]) -> np.ndarray:
        """The same on ids: the text of a time stands between marks, so it can be
        encoded by itself."""
        specials = self.tokenizer.specials
        block = [specials[START], specials[VIDEO], specials[END]]
        parts, done = [], 0
        for place, seconds in zip(
            np.flatnonzero(ids == specials[VIDEO]), times, strict=True
        ):
            first, last = place, place + 1
            around = ids[max(place - 1, 0) : place + 2].tolist()
            if self.outer_marks == "drop" and around == block:
                first, last = place - 1, place + 2
            parts.append(ids[done:first])
            for second in seconds:
                parts += [self.tokenizer.encode(_written(second)), block]
            done = last
        return np.concatenate([*parts, ids[done:]]).astype(np.int64)


# The placeholder of a sound, by family.
SOUNDS = {
    "qwen2_audio": "<|AUDIO|>",
    "qwen2_5_omni": "<|AUDIO|>",
    "qwen3_omni_moe": "<|audio_pad|>",
}


@dataclasses.dataclass(frozen=True)
class Listener:
    """A model's tokenizer and settings for sounds; calling it makes a Prompt."""

    tokenizer: tokenizer_lib.Tokenizer
    family: str
    sounds: audio.Settings
    limits: audio.Limits = audio.LIMITS

    def __post_init__(self):
        if self.family not in SOUNDS:
            raise config.InputError(
                f"family {self.family!r}{config.nearest(str(self.family), SOUNDS)}"
            )
        if SOUNDS[self.family] not in self.tokenizer.specials:
            raise config.InputError(
                f"the vocabulary has no {SOUNDS[self.family]}; wanted the tokenizer of "
                "a model that hears"
            )

    def __call__(self, text: str | Sequence[int], sounds: Sequence[Any] = ()) -> Prompt:
        """text: a rendered chat, or its ids; sounds (see `audio`) in its order."""
        if isinstance(text, str):
            text = self.tokenizer.encode(text, allow_special=True)
        mark = SOUNDS[self.family]
        ids, pad = _as_ids(text), self.tokenizer.specials[mark]
        _check_count(mark, int((ids == pad).sum()), "sounds", len(sounds))
        if not sounds:
            return Prompt(ids.astype(np.int32))
        heard = audio.features(self.sounds, sounds, self.limits)
        repeats = np.ones(len(ids), np.int64)
        repeats[ids == pad] = [
            audio.num_tokens(self.family, int(n)) for n in heard.arrays["lengths"]
        ]
        ids = np.repeat(ids, repeats).astype(np.int32)
        return Prompt(ids, sounds=heard.arrays, heard=heard)


def load(folder: str | os.PathLike, **changes: Any) -> Processor:
    """The Processor of a Hugging Face folder; changes: fields to set otherwise."""
    return Processor(
        tokenizer_lib.load(folder),
        image.load_settings(folder),
        video.load_settings(folder),
        **changes,
    )


def load_listener(folder: str | os.PathLike) -> Listener:
    """The Listener of a Hugging Face folder."""
    family = image.family_of(folder, SOUNDS)
    tokenizer = tokenizer_lib.load(folder)
    return Listener(tokenizer, family, audio.load_settings(folder))


@dataclasses.dataclass(frozen=True)
class Media:
    """What the messages of a chat show and play, in the order of its pads."""

    images: list[Any]
    videos: list[video.Clip]
    sounds: list[Any]


def media(messages: Sequence[Mapping]) -> Media:
    """The media of a chat, in the order in which a template writes their pads.

    A message's content is text, or a list of {"type": "text", "text": ...},
    {"type": "image", "image": ...}, {"type": "video", "video": ..., "fps": ...} and
    {"type": "audio", "audio": ...}; a video is a Clip, or what Clip.frames takes.
    """
    found = Media([], [], [])
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else message
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, Sequence):
            raise config.InputError(
                f"message {i}: content of type {type(content).__name__}; wanted text "
                "or a list of parts"
            )
        for j, part in enumerate(content):
            if isinstance(part, str):
                continue
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind not in ("text", "image", "video", "audio") or kind not in part:
                raise config.InputError(
                    f"message {i}, part {j}: wanted an object with type text, image, "
                    "video or audio and a key of that name"
                )
            if kind == "image":
                found.images.append(part["image"])
            elif kind == "audio":
                found.sounds.append(part["audio"])
            elif kind == "video":
                clip = part["video"]
                if not isinstance(clip, video.Clip):
                    clip = video.Clip(clip, part.get("fps"))
                found.videos.append(clip)
    return found


def check_counts(
    placeholders: tuple[int, int], num_images: int, num_videos: int
) -> None:
    """InputError where a prompt holds more or fewer placeholders than media."""
    _check_count(IMAGE, placeholders[0], "images", num_images)
    _check_count(VIDEO, placeholders[1], "videos", num_videos)


def _check_count(mark: str, pads: int, what: str, given: int) -> None:
    if given > MAX_MEDIA:
        raise config.InputError(f"{given} {what}; wanted at most {MAX_MEDIA}")
    if pads != given:
        raise config.InputError(
            f"the prompt holds {pads} {mark} and {given} {what} came with it; "
            "wanted one for each (text of strangers must be encoded as plain text)"
        )


def _features(grids: np.ndarray, merge: int) -> list[int]:
    return [math.prod(int(n) for n in grid) // merge**2 for grid in grids]


def _written(seconds: float) -> str:
    return f"<{seconds:.1f} seconds>"


def _as_ids(ids: Sequence[int]) -> np.ndarray:
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise config.InputError("wanted text, or a list of ids of one prompt")
    return array.astype(np.int64)
