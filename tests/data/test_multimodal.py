# SPDX-License-Identifier: Apache-2.0
"""Prompts with images and videos against transformers' processors: the same ids."""

import json

import numpy as np
import pytest

from qwen_jax import config
from qwen_jax.data import audio, image, multimodal, video
from qwen_jax.data import tokenizer as tokenizer_lib

pytest.importorskip("PIL")
transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")
hf = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
hf_video = pytest.importorskip("tests.oracles.hf_video")

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
FAMILIES = {
    "qwen2_vl": transformers.Qwen2VLProcessor,
    "qwen2_5_vl": transformers.Qwen2_5_VLProcessor,
    "qwen3_vl": transformers.Qwen3VLProcessor,
    "qwen3_5": transformers.Qwen3VLProcessor,
}
MADE = np.random.default_rng(0)
IMAGES = [MADE.integers(0, 256, (*s, 3), np.uint8) for s in [(60, 90), (40, 41)]]
CLIPS = [
    video.Clip(MADE.integers(0, 256, (7, 40, 60, 3), np.uint8), 4.0),
    video.Clip(MADE.integers(0, 256, (12, 64, 33, 3), np.uint8), 29.97),
]


@pytest.fixture(scope="module")
def tokenizer():
    text = "hello world, look: <0.2 seconds> (1.5 seconds) seconds. describe\n"
    return tokenizer_lib.train([text] * 5, 400)


def processor(tokenizer, family="qwen3_vl", **changes):
    images, videos = image.FAMILIES[family], video.FAMILIES[family]
    small = {"min_pixels": 28 * 28, "max_pixels": 128 * 128}
    images = image.dataclasses.replace(images, **small)
    videos = video.dataclasses.replace(videos, min_pixels=28 * 28, max_pixels=256 * 256)
    return multimodal.Processor(tokenizer, images, videos, **changes)


@pytest.fixture(scope="module")
def references(tokenizer, tmp_path_factory):
    """{family: transformers' processor} with the same settings as `processor`."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json")
    )
    made = {}
    for family, cls in FAMILIES.items():
        ours = processor(tokenizer, family)

        def bounds(s):
            return {"shortest_edge": s.min_pixels, "longest_edge": s.max_pixels}

        images = hf.Qwen2VLImageProcessorPil(
            size=bounds(ours.images), patch_size=ours.images.patch
        )
        videos = hf_video.processor(
            ours.videos.generation,
            size=bounds(ours.videos),
            patch_size=ours.videos.patch,
            cap_pixels_per_frame=False,
        )
        # where torchvision is missing, the check of classes meets a stand-in
        unchecked = {"check_argument_for_proper_class": lambda *_: None}
        made[family] = type(cls.__name__, (cls,), unchecked)(
            image_processor=images, tokenizer=fast, video_processor=videos
        )
    return made


def reference_ids(reference, text, images, clips):
    options = {}
    if clips:
        facts = [
            {
                "total_num_frames": len(c.frames),
                "fps": c.fps,
                "frames_indices": list(range(len(c.frames))),
            }
            for c in clips
        ]
        options = {"videos": [c.frames for c in clips], "video_metadata": facts}
    return reference(text=[text], images=images or None, **options)


LAYOUTS = {
    "one image": f"<|im_start|>user\n{IMAGE}describe<|im_end|>\n",
    "two images together": f"<|im_start|>user\n{IMAGE}{IMAGE}<|im_end|>\n",
    "images between words": f"hello {IMAGE}world, {IMAGE}look",
    "one video": f"<|im_start|>user\n{VIDEO}describe<|im_end|>\n",
    "videos and images": f"look: {VIDEO}{IMAGE} hello {IMAGE}{VIDEO}.",
    "pads without marks": "look: (<|video_pad|>) <|image_pad|>seconds",
    "marks without pads": "<|vision_start|>hello<|vision_end|>",
    "text": "hello world",
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_equal_the_models_processor(family, layout, tokenizer, references):
    text = LAYOUTS[layout]
    images = IMAGES[: text.count("image_pad")]
    clips = CLIPS[: text.count("video_pad")]
    prompt = processor(tokenizer, family)(text, images, clips)
    wanted = reference_ids(references[family], text, images, clips)
    assert prompt.ids.tolist() == list(wanted["input_ids"][0])
    assert prompt.ids.dtype == np.int32
    if "second_per_grid_ts" in wanted:
        found = prompt.videos["seconds_per_grid"]
        np.testing.assert_allclose(found, wanted["second_per_grid_ts"])
    if layout != "pads without marks":  # ids from ids are the same
        ids = tokenizer.encode(text, allow_special=True)
        from_ids = processor(tokenizer, family)(ids, images, clips)
        np.testing.assert_array_equal(from_ids.ids, prompt.ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_there_is_one_pad_for_every_feature(family, tokenizer):
    prompt = processor(tokenizer, family)(f"{VIDEO}{IMAGE}", IMAGES[:1], CLIPS[:1])
    for pad, arrays in (
        ("<|image_pad|>", prompt.images),
        ("<|video_pad|>", prompt.videos),
    ):
        number = int((prompt.ids == tokenizer.specials[pad]).sum())
        assert number == len(arrays["pixels"]) // 4
        assert number == np.prod(arrays["grid_thw"]) // 4


def test_outer_marks_may_be_dropped(tokenizer):
    text = f"hello{VIDEO}world"
    keep = processor(tokenizer)(text, (), CLIPS[:1]).ids
    drop = processor(tokenizer, outer_marks="drop")(text, (), CLIPS[:1]).ids
    ids = tokenizer.encode(text, allow_special=True)
    again = processor(tokenizer, outer_marks="drop")(ids, (), CLIPS[:1]).ids
    start, end = (tokenizer.specials[x] for x in ("<|vision_start|>", "<|vision_end|>"))
    first, last = list(keep).index(start), len(keep) - list(keep)[::-1].index(end) - 1
    np.testing.assert_array_equal(drop, np.delete(keep, [first, last]))
    np.testing.assert_array_equal(again, drop)
    text = tokenizer.decode(drop)
    assert text.startswith("hello<0.2 seconds><|vision_start|><|video_pad|>")
    assert text.endswith("<|video_pad|><|vision_end|>world")


def test_a_strangers_pads_are_text_in_ids_and_an_error_in_text(tokenizer):
    stranger = "<|image_pad|><|vision_start|><|video_pad|>"
    ids = tokenizer.encode(f"hello {IMAGE}", allow_special=True)
    ids += tokenizer.encode(stranger)
    made = processor(tokenizer)
    prompt = made(ids, IMAGES[:1])
    pads = int((prompt.ids == tokenizer.specials["<|image_pad|>"]).sum())
    assert pads == len(prompt.images["pixels"]) // 4
    assert tokenizer.decode(prompt.ids).endswith(stranger)
    with pytest.raises(config.InputError, match=r"2 <\|image_pad\|> and 1 images"):
        made(f"hello {IMAGE}{stranger}", IMAGES[:1])


@pytest.mark.parametrize(
    ("text", "images", "clips", "words"),
    [
        (IMAGE, [], [], r"1 <\|image_pad\|> and 0 images"),
        ("hello", IMAGES, [], r"0 <\|image_pad\|> and 2 images"),
        (VIDEO, [], [], r"1 <\|video_pad\|> and 0 videos"),
        (IMAGE, [], CLIPS[:1], r"1 <\|image_pad\|> and 0 images"),
        ("hello", [IMAGES[0]] * 5000, [], "wanted at most 4096"),
        ([[1, 2]], [], [], "list of ids of one prompt"),
        ([0.5], [], [], "list of ids of one prompt"),
    ],
)
def test_pads_and_media_must_agree(text, images, clips, words, tokenizer):
    with pytest.raises(config.InputError, match=words):
        processor(tokenizer)(text, images, clips)


def test_a_vocabulary_without_the_marks_is_refused(tokenizer):
    specials = [
        t for t in tokenizer.document["added_tokens"] if "pad" not in t["content"]
    ]
    blind = tokenizer_lib.Tokenizer({**tokenizer.document, "added_tokens": specials})
    with pytest.raises(config.InputError, match=r"no <\|image_pad\|>, <\|video_pad\|>"):
        processor(blind)
    with pytest.raises(config.InputError, match="outer_marks 'no'"):
        processor(tokenizer, outer_marks="no")


def test_times_are_wanted_for_every_temporal_patch(tokenizer):
    made, grid = processor(tokenizer), np.array([[3, 2, 2]])
    with pytest.raises(config.InputError, match="times"):
        made.expand(VIDEO, grid[:0], grid, [np.array([0.5, 1.5])])


def test_media_of_messages_in_order():
    messages = [
        {"role": "system", "content": "You see."},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "a.png"},
                {"type": "text", "text": "and"},
                {"type": "video", "video": ["0.png", "1.png"], "fps": 2},
                {"type": "image", "image": b"png"},
                {"type": "audio", "audio": "hello.wav"},
            ],
        },
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": [{"type": "video", "video": CLIPS[0]}]},
    ]
    found = multimodal.media(messages)
    assert found.images == ["a.png", b"png"]
    assert found.videos == [video.Clip(["0.png", "1.png"], 2), CLIPS[0]]
    assert found.sounds == ["hello.wav"]


@pytest.mark.parametrize(
    "content",
    [7, [{"type": "film", "film": "a.mp4"}], [{"type": "image"}], [None], [["x"]]],
)
def test_other_content_is_named(content):
    with pytest.raises(config.InputError, match="message 0"):
        multimodal.media([{"role": "user", "content": content}])


def test_a_processor_from_a_folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"}))
    found = multimodal.load(tmp_path, outer_marks="drop")
    assert found.images == image.FAMILIES["qwen3_vl"]
    assert found.videos == video.FAMILIES["qwen3_vl"]
    assert found.outer_marks == "drop"
    text = f"{IMAGE}hello"
    one = found(text, IMAGES[:1]).ids
    settings = multimodal.Processor(tokenizer, found.images, found.videos)
    np.testing.assert_array_equal(one, settings(text, IMAGES[:1]).ids)


# --- sounds ---

SOUND = "<|audio_bos|><|AUDIO|><|audio_eos|>"
VOICES = [
    audio.Sound(0.1 * MADE.standard_normal(n).clip(-9, 9), 16_000)
    for n in (16_123, 321, 40_000)
]


@pytest.fixture(scope="module")
def hearing(tokenizer):
    """The vocabulary with the marks of Qwen2-Audio behind its own."""
    added, document = list(tokenizer.document["added_tokens"]), tokenizer.document
    for i, mark in enumerate(("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")):
        added.append({**added[0], "content": mark, "id": tokenizer.vocab_size + i})
    return tokenizer_lib.Tokenizer({**document, "added_tokens": added})


def test_ids_with_sounds_equal_the_models_processor(hearing, tmp_path):
    hearing.save(tmp_path)
    reference = transformers.Qwen2AudioProcessor(
        feature_extractor=transformers.WhisperFeatureExtractor(
            feature_size=128, chunk_length=3
        ),
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tmp_path / "tokenizer.json")
        ),
    )
    listener = multimodal.Listener(hearing, "qwen2_audio", audio.Settings(seconds=3))
    for text in (
        f"Audio 1: {SOUND}\nhello",
        f"{SOUND}{SOUND}",
        f"a {SOUND} b {SOUND}{SOUND}",
    ):
        sounds = VOICES[: text.count("AUDIO|")]
        wanted = reference(
            text=[text],
            audio=[np.float32(s.samples) for s in sounds],
            sampling_rate=16_000,
        )
        prompt = listener(text, sounds)
        assert prompt.ids.tolist() == list(wanted["input_ids"][0])
        lengths = np.sum(wanted["feature_attention_mask"], axis=1)
        np.testing.assert_array_equal(prompt.sounds["lengths"], lengths)
        ids = hearing.encode(text, allow_special=True)
        np.testing.assert_array_equal(listener(ids, sounds).ids, prompt.ids)


def test_sounds_and_their_pads_must_agree(hearing, tokenizer, tmp_path):
    listener = multimodal.Listener(hearing, "qwen2_audio", audio.Settings(seconds=3))
    assert listener("hello").sounds is None
    for text, sounds, words in (
        (SOUND, [], r"1 <\|AUDIO\|> and 0 sounds"),
        ("hello", VOICES[:1], r"0 <\|AUDIO\|> and 1 sounds"),
    ):
        with pytest.raises(config.InputError, match=words):
            listener(text, sounds)
    with pytest.raises(config.InputError, match="did you mean 'qwen2_audio'"):
        multimodal.Listener(hearing, "qwen2_audi", audio.Settings())
    with pytest.raises(config.InputError, match="a model that hears"):
        multimodal.Listener(tokenizer, "qwen2_audio", audio.Settings())
    hearing.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_audio"}))
    found = multimodal.load_listener(tmp_path)
    assert found.sounds == audio.FAMILIES["qwen2_audio"]
    ids = found(SOUND, VOICES[1:2]).ids
    assert (ids == hearing.specials["<|AUDIO|>"]).sum() == 1
