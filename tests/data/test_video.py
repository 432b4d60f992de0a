# SPDX-License-Identifier: Apache-2.0
"""Videos against transformers' own processors: frames, sizes, patches and times."""

import dataclasses
import io
import itertools
import json

import numpy as np
import pytest

from qwen_jax import config
from qwen_jax.data import image, picture, video

PIL = pytest.importorskip("PIL.Image")
pytest.importorskip("torch")
processing_qwen3_vl = pytest.importorskip(
    "transformers.models.qwen3_vl.processing_qwen3_vl"
)
video_utils = pytest.importorskip("transformers.video_utils")
hf_video = pytest.importorskip("tests.oracles.hf_video")

SMALL2 = video.Settings(min_pixels=28 * 28, max_pixels=84 * 84)
SMALL3 = dataclasses.replace(
    video.FAMILIES["qwen3_vl"], min_pixels=32 * 32, max_pixels=96 * 96 * 8
)


def clip(num_frames, height, width, seed=0):
    made = np.random.default_rng(seed)
    coarse = made.integers(0, 256, (num_frames, height // 6 + 2, width // 6 + 2, 3))
    frames = [PIL.fromarray(x.astype(np.uint8)) for x in coarse]
    return np.stack([np.asarray(x.resize((width, height), 3)) for x in frames])


def reference(settings):
    return hf_video.processor(
        settings.generation,
        size={
            "shortest_edge": settings.min_pixels,
            "longest_edge": settings.max_pixels,
        },
        patch_size=settings.patch,
        temporal_patch_size=settings.temporal_patch,
        merge_size=settings.merge,
        image_mean=list(settings.mean),
        image_std=list(settings.std),
        do_sample_frames=settings.sample,
        fps=settings.fps,
        num_frames=settings.num_frames,
        min_frames=settings.min_frames,
        max_frames=settings.max_frames,
        cap_pixels_per_frame=settings.cap_pixels_per_frame,
        max_video_tokens=settings.max_video_tokens,
    )


def assert_as_reference(settings, clips):
    made = video.patches(settings, clips)
    facts = [
        {
            "total_num_frames": len(c.frames),
            "fps": c.fps,
            "frames_indices": list(range(len(c.frames))),
        }
        for c in clips
    ]
    wanted = reference(settings)(
        videos=[np.asarray(c.frames) for c in clips],
        video_metadata=facts,
        return_metadata=True,
        return_tensors="np",
    )
    np.testing.assert_array_equal(made.arrays["grid_thw"], wanted["video_grid_thw"])
    np.testing.assert_array_equal(made.arrays["pixels"], wanted["pixel_values_videos"])
    assert made.arrays["grid_thw"].dtype == np.int32
    for i, metadata in enumerate(wanted["video_metadata"]):
        np.testing.assert_array_equal(made.indices[i], metadata.frames_indices)
        f = settings.temporal_patch
        assert made.arrays["seconds_per_grid"][i] == np.float32(
            f / metadata.sampled_fps
        )
        times = processing_qwen3_vl.Qwen3VLProcessor._calculate_timestamps(
            None, [int(n) for n in metadata.frames_indices], metadata.fps or 24, f
        )
        np.testing.assert_allclose(made.timestamps[i], times, rtol=1e-12)
    return made


# --- values ---

QWEN2 = {
    "all frames": {},
    "odd number": {"temporal_patch": 3},
    "by number": {"sample": True, "num_frames": 6},
    "by rate": {"sample": True, "fps": 2.0},
    "at most": {"sample": True, "fps": 30.0, "max_frames": 5},
    "capped": {"cap_pixels_per_frame": True, "max_video_tokens": 10},
}


@pytest.mark.parametrize("case", QWEN2)
def test_qwen2_videos_equal_the_models_processor(case):
    settings = dataclasses.replace(SMALL2, **QWEN2[case])
    clips = [video.Clip(clip(13, 50, 90), 8.0), video.Clip(clip(9, 33, 31), 25.0)]
    assert_as_reference(settings, clips)


QWEN3 = {
    "published": {},
    "by number": {"num_frames": 5, "fps": None},
    "all frames": {"sample": False},
    "at most": {"fps": 30.0, "max_frames": 7},
    "at least": {"fps": 0.1, "min_frames": 6},
    "crowded": {"max_pixels": 96 * 96},
    "capped": {"cap_pixels_per_frame": True, "max_video_tokens": 2},
}


@pytest.mark.parametrize("case", QWEN3)
def test_qwen3_videos_equal_the_models_processor(case):
    settings = dataclasses.replace(SMALL3, **QWEN3[case])
    clips = [video.Clip(clip(13, 50, 90), 8.0), video.Clip(clip(9, 20, 31), 3.5)]
    assert_as_reference(settings, clips)


@pytest.mark.parametrize("settings", [SMALL2, SMALL3], ids=["qwen2", "qwen3"])
def test_a_source_without_fps_counts_as_24(settings):
    found = assert_as_reference(settings, [video.Clip(clip(30, 32, 40))])
    assert found.fps_assumed == (True,)
    assert not video.patches(settings, [video.Clip(clip(4, 32, 40), 24)]).fps_assumed[0]


def test_frames_are_taken_as_in_the_reference():
    cases = itertools.product(range(1, 60), (1.0, 2, 3.3, 24), (1.0, 23.976, 30, 60))
    for total, wanted, fps in cases:
        metadata = video_utils.VideoMetadata(total_num_frames=total, fps=fps)
        for base in (SMALL2, SMALL3):
            settings = dataclasses.replace(base, sample=True, fps=wanted, max_frames=20)
            assert_sampled_as_reference(settings, total, fps, metadata)
    for total, number in itertools.product(range(1, 90), range(1, 30)):
        metadata = video_utils.VideoMetadata(total_num_frames=total, fps=24)
        for base in (SMALL2, SMALL3):
            settings = dataclasses.replace(
                base, sample=True, fps=None, num_frames=number
            )
            assert_sampled_as_reference(settings, total, 24, metadata)


def assert_sampled_as_reference(settings, total, fps, metadata):
    try:
        wanted = reference_sampler(settings).sample_frames(
            metadata, num_frames=settings.num_frames, fps=settings.fps
        )
    except (ValueError, ZeroDivisionError):
        with pytest.raises(config.InputError, match="cannot give"):
            video.sample(settings, total, fps)
        return
    np.testing.assert_array_equal(video.sample(settings, total, fps), wanted)


SAMPLERS = {}


def reference_sampler(settings):
    made = SAMPLERS.setdefault(settings.generation, reference(settings))
    made.fps, made.num_frames = settings.fps, settings.num_frames
    made.min_frames, made.max_frames = settings.min_frames, settings.max_frames
    return made


def test_sizes_equal_the_references_for_thousands_of_videos():
    made, module = np.random.default_rng(0), hf_video.module_of("qwen3")
    for _ in range(3000):
        height, width = (int(10 ** made.uniform(0, 3.6)) for _ in range(2))
        frames, f = int(made.integers(1, 200)), int(made.integers(1, 4))
        low, high = sorted(int(10 ** made.uniform(3, 8)) for _ in range(2))
        settings = dataclasses.replace(
            SMALL3, temporal_patch=f, min_pixels=low, max_pixels=high
        )
        arguments = (frames, height, width, f, settings.factor, low, high)
        try:
            wanted = module.smart_resize(*arguments)
        except ValueError:
            wanted = None
        # transformers lets a thin video pass where its short side is below the factor
        # and rounding makes it less thin; ours says 200 of the picture that was given.
        if wanted is None or max(height, width) > 200 * min(height, width):
            with pytest.raises(config.InputError, match="200 times|at least"):
                video.resized(settings, frames, height, width)
        else:
            assert video.resized(settings, frames, height, width) == wanted


# --- sources ---


def test_frames_may_be_pictures_of_any_kind(tmp_path):
    frames = clip(6, 40, 44)
    wanted = video.patches(SMALL3, [video.Clip(frames, 3)]).arrays["pixels"]
    images = [PIL.fromarray(x) for x in frames]
    paths = []
    for i, x in enumerate(images):
        paths.append(tmp_path / f"{i}.png")
        x.save(paths[-1])
    for source in (images, list(frames), paths, frames / 255, tuple(images)):
        found = video.patches(SMALL3, [video.Clip(source, 3)]).arrays["pixels"]
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animated_file_is_a_video_with_its_own_rate(kind):
    frames = [PIL.fromarray(x) for x in clip(10, 32, 40)]
    stream = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(
        stream, kind, save_all=True, append_images=frames[1:], duration=250, **options
    )
    rgb_thwc, fps = picture.frames(stream.getvalue())
    assert fps == 4
    if kind != "GIF":  # a palette loses colours
        np.testing.assert_array_equal(rgb_thwc, np.stack(frames))
    found = video.patches(SMALL3, [video.Clip(stream.getvalue())])
    wanted = video.patches(SMALL3, [video.Clip(rgb_thwc, 4)])
    np.testing.assert_array_equal(found.arrays["pixels"], wanted.arrays["pixels"])
    # 2.5 s at 2 frames a second
    np.testing.assert_array_equal(found.indices[0], [0, 2, 4, 7, 9])
    np.testing.assert_allclose(found.timestamps[0], [0.25, 1.375, 2.25])


def test_frames_that_somebody_has_chosen_keep_their_numbers():
    frames = clip(4, 32, 40)
    found = video.patches(SMALL3, [video.Clip(frames, 10.0, (0, 30, 60, 90), 100)])
    np.testing.assert_allclose(found.timestamps[0], [1.5, 7.5])
    assert found.arrays["seconds_per_grid"][0] == pytest.approx(2 / (4 / 100 * 10))
    assert found.arrays["grid_thw"][0, 0] == 2


# --- bad videos ---


def gif_of(num_frames):
    """Two frames as PIL writes them, and the second again and again."""
    frames, files = [PIL.new("L", (8, 8), 200 * i) for i in range(2)], []
    for many in (frames[1:], [frames[1], frames[0]]):
        stream = io.BytesIO()
        frames[0].save(stream, "GIF", save_all=True, append_images=many, duration=20)
        files.append(stream.getvalue())
    last = files[1][len(files[0]) - 1 : -1]
    return files[0][:-1] + last * (num_frames - 2) + files[0][-1:]


FRAMES = clip(4, 32, 40)
LAZY = np.broadcast_to(np.uint8(0), (2000, 1000, 1000, 3))  # 6 GB that are not there
BAD = {
    "none": ([], "no frames"),
    "empty": (np.zeros((0, 8, 8, 3), np.uint8), "no frames"),
    "one frame": (FRAMES[:1], "give a single frame as an image"),
    "one picture": (FRAMES[0], "frames of type ndarray"),
    "a number": (7, "frames of type int"),
    "unlike": ([FRAMES[0], FRAMES[1][:20]], "wanted one size"),
    "nan": (np.full((4, 8, 8, 3), np.nan), "frame 0: .*nan"),
    "channels": (np.zeros((4, 8, 8, 5), np.uint8), "c of 1, 3 or 4"),
    "thin": (np.zeros((4, 2, 500, 3), np.uint8), "more than 200 times"),
    "text": (b"GIF89a but not really", "damaged|not a picture"),
    "jpeg": (b"\xff\xd8\xff\xe0" + bytes(99), "not a picture"),
    "long": ([FRAMES[0]] * 9000, "9,000 frames; wanted at most 8,192"),
    "heavy": (LAZY, "6,000,000,000 bytes"),
    "url": ("https://example.com/cat.mp4", "not a URL"),
    "film": (b"\0\0\0\x20ftypisom" + bytes(99), "not a picture .* GIF, WEBP, PNG"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_videos_are_named(name):
    frames, words = BAD[name]
    with pytest.raises(config.InputError, match=words) as found:
        video.patches(SMALL3, [video.Clip(FRAMES, 2), video.Clip(frames, 2)])
    assert str(found.value).startswith("video 1: ")


def test_a_gif_of_ten_thousand_frames():
    content = gif_of(10_000)
    assert picture.load(content).size == (8, 8)  # an image: its first frame
    with pytest.raises(config.InputError, match="10,000 frames"):
        video.patches(SMALL3, [video.Clip(content)])
    # A file that claims frames which it does not have is refused before decoding.
    few = picture.Limits(frames=9)
    with pytest.raises(config.InputError, match="10 frames; wanted at most 9"):
        video.patches(SMALL3, [video.Clip(gif_of(10))], few)
    with pytest.raises(config.InputError, match="wanted at most 1,000"):
        limits = picture.Limits(decoded_bytes=1000)
        video.patches(SMALL3, [video.Clip(gif_of(10))], limits)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fps": 0}, "fps 0"),
        ({"fps": float("nan")}, "fps nan"),
        ({"fps": True}, "fps True"),
        ({"indices": (0, 1)}, "one whole number for each"),
        ({"indices": (0, 1, 2, 2.5)}, "one whole number for each"),
        ({"indices": (3, 2, 1, 0)}, "in order"),
        ({"indices": (-1, 0, 1, 2)}, "in order"),
        ({"indices": (0, 1, 2, 99), "total": 50}, "within the 50 frames"),
        ({"total": 9}, "say which, with indices"),
    ],
)
def test_bad_facts_of_a_clip_are_named(changes, words):
    with pytest.raises(config.InputError, match=words):
        video.patches(SMALL3, [video.Clip(FRAMES, **{"fps": 2, **changes})])


@pytest.mark.parametrize("clips", [[], FRAMES, [FRAMES], video.Clip(FRAMES)])
def test_a_list_of_clips_is_wanted(clips):
    with pytest.raises(config.InputError, match="video"):
        video.patches(SMALL3, clips)


# --- settings ---

PUBLISHED = {
    "size": {"longest_edge": 25165824, "shortest_edge": 4096},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "video_processor_type": "Qwen3VLVideoProcessor",
}


def write(path, name, values):
    (path / f"{name}.json").write_text(json.dumps(values))


def test_settings_of_both_generations(tmp_path):
    write(tmp_path, "config", {"model_type": "qwen3_5"})
    assert video.load_settings(tmp_path) == video.FAMILIES["qwen3_5"]
    write(tmp_path, "video_preprocessor_config", PUBLISHED)
    assert video.load_settings(tmp_path) == video.FAMILIES["qwen3_5"]
    bare = {"video_processor_type": "Qwen3VLVideoProcessor"}
    write(tmp_path, "video_preprocessor_config", bare)
    assert_defaults(video.load_settings(tmp_path), "qwen3")
    nested = {"fps": 2, "do_sample_frames": True}
    nested["video_processor_type"] = "Qwen2VLVideoProcessor"
    write(tmp_path, "processor_config", {"video_processor": nested})
    found = video.load_settings(tmp_path)
    assert (found.generation, found.fps, found.sample) == ("qwen2", 2, True)
    assert_defaults(dataclasses.replace(found, fps=None, sample=False), "qwen2")


def assert_defaults(settings, generation):
    theirs = hf_video.processor(generation)
    assert settings.generation == generation
    assert settings.min_pixels == theirs.size["shortest_edge"]
    assert settings.max_pixels == theirs.size["longest_edge"]
    assert settings.patch == theirs.patch_size
    assert settings.sample == theirs.do_sample_frames
    assert list(settings.mean) == list(theirs.image_mean)
    assert list(settings.std) == list(theirs.image_std)
    for name in ("fps", "num_frames", "min_frames", "max_frames", "max_video_tokens"):
        assert getattr(settings, name) == getattr(theirs, name, None), name


def test_a_folder_of_the_first_generation_has_one_file_for_both(tmp_path):
    write(tmp_path, "config", {"model_type": "qwen2_5_vl"})
    old = {"min_pixels": 3136, "max_pixels": 12845056, "image_processor_type": "x"}
    write(tmp_path, "preprocessor_config", old)
    assert video.load_settings(tmp_path) == video.FAMILIES["qwen2_5_vl"]
    assert image.load_settings(tmp_path) == image.FAMILIES["qwen2_5_vl"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"video_processor_type": "Qwen3VLVideoProcesor"}, "did you mean"),
        ({**PUBLISHED, "fps": -1}, "fps -1"),
        ({**PUBLISHED, "max_frames": "many"}, "max_frames 'many'"),
        ({**PUBLISHED, "temporal_patch_size": 0}, "temporal_patch 0"),
        (
            {
                "video_processor_type": "Qwen2VLVideoProcessor",
                "fps": 2,
                "num_frames": 4,
            },
            "both set",
        ),
    ],
)
def test_bad_settings_are_named(values, words, tmp_path):
    write(tmp_path, "video_preprocessor_config", values)
    with pytest.raises(config.InputError, match=words):
        video.load_settings(tmp_path)
