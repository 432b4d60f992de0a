# SPDX-License-Identifier: Apache-2.0
"""Images against transformers' own processor, bit for bit, and bad pictures."""

import copy
import io
import json
import struct
import sys
import tracemalloc
import warnings
import zlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from qwen_jax import config
from qwen_jax.data import image, picture

PIL = pytest.importorskip("PIL.Image")
pytest.importorskip("torch")
image_utils = pytest.importorskip("transformers.image_utils")
hf = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")

SMALL = image.Settings(patch=4, min_pixels=64, max_pixels=4096)


def noise(height, width, *channels, seed=0):
    made = np.random.default_rng(seed)
    return made.integers(0, 256, (height, width, *channels), np.uint8)


def smooth(height, width, seed=0):
    """A picture with structure, as resizing of noise hides what overshoots."""
    coarse = PIL.fromarray(noise(height // 6 + 2, width // 6 + 2, 3, seed=seed))
    return np.asarray(coarse.resize((width, height), 3))


def reference(settings, **changes):
    values = {
        "patch_size": settings.patch,
        "temporal_patch_size": settings.temporal_patch,
        "merge_size": settings.merge,
        "image_mean": list(settings.mean),
        "image_std": list(settings.std),
        "rescale_factor": settings.rescale,
        "resample": settings.resample,
        "size": {
            "shortest_edge": settings.min_pixels,
            "longest_edge": settings.max_pixels,
        },
    }
    return hf.Qwen2VLImageProcessorPil(**values, **changes)


def assert_as_reference(settings, ours, theirs):
    made = image.patches(settings, ours)
    wanted = reference(settings)(theirs, return_tensors="np")
    np.testing.assert_array_equal(made["grid_thw"], wanted["image_grid_thw"])
    np.testing.assert_array_equal(made["pixels"], wanted["pixel_values"])
    assert made["pixels"].dtype == np.float32
    assert made["grid_thw"].dtype == np.int32


# --- values ---


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_patches_equal_the_models_processor(family):
    sizes = [(1, 1), (1, 9), (57, 100), (300, 211), (40, 7000), (28, 56)]
    pictures = [PIL.fromarray(smooth(*size, seed=i)) for i, size in enumerate(sizes)]
    assert_as_reference(image.FAMILIES[family], pictures, pictures)


@pytest.mark.parametrize(
    "changes",
    [
        {"temporal_patch": 1},
        {"temporal_patch": 3, "merge": 1},
        {"merge": 3, "patch": 5},
        {"resample": 2, "rescale": 1 / 127.5, "mean": (1.0, 1.1, 0.9)},
        {"std": (0.1, 0.2, 0.3)},
    ],
)
def test_patches_of_other_settings_equal_the_reference(changes):
    settings = image.dataclasses.replace(SMALL, **changes)
    pictures = [noise(50, 90, 3), smooth(61, 33)]
    assert_as_reference(settings, pictures, pictures)


@hypothesis.given(
    height=st.integers(1, 9000),
    width=st.integers(1, 9000),
    factor=st.sampled_from([(14, 2), (16, 2), (7, 1), (5, 3)]),
    bounds=st.tuples(st.integers(1, 10**7), st.integers(1, 10**8)),
)
@hypothesis.settings(max_examples=300)
def test_resized_equals_smart_resize(height, width, factor, bounds):
    assert_resized_as_reference(height, width, factor, bounds)


def test_resized_equals_smart_resize_for_thousands_of_sizes():
    made = np.random.default_rng(0)
    for _ in range(5000):
        height, width = (int(10 ** made.uniform(0, 4)) for _ in range(2))
        factor = ((14, 2), (16, 2), (3, 4))[made.integers(3)]
        bounds = [int(10 ** made.uniform(0, 8)) for _ in range(2)]
        assert_resized_as_reference(height, width, factor, bounds)


def assert_resized_as_reference(height, width, factor, bounds):
    patch, merge = factor
    settings = image.Settings(
        patch=patch, merge=merge, min_pixels=min(bounds), max_pixels=max(bounds)
    )
    arguments = (height, width, patch * merge, min(bounds), max(bounds))
    try:
        wanted = hf.smart_resize(*arguments)
    except ValueError:
        with pytest.raises(config.InputError, match="200 times"):
            image.resized(settings, height, width)
        return
    assert image.resized(settings, height, width) == wanted


def pictures_of_every_mode():
    rgb = PIL.fromarray(smooth(40, 60))
    alpha = PIL.fromarray(noise(40, 60))
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    palette = rgb.quantize(16)
    clear = palette.copy()
    clear.info["transparency"] = 3
    gray_clear = rgb.convert("L")
    gray_clear.info["transparency"] = 7
    deep = PIL.fromarray(noise(40, 60).astype(np.uint16) << 4)
    modes = {mode: rgb.convert(mode) for mode in ("L", "1", "CMYK", "YCbCr", "HSV")}
    modes |= {"I": rgb.convert("I"), "F": rgb.convert("F"), "LAB": rgb.convert("LAB")}
    modes |= {"RGB": rgb, "RGBA": rgba, "LA": rgba.convert("LA"), "P": palette}
    return modes | {"P clear": clear, "L clear": gray_clear, "I;16": deep}


@pytest.mark.parametrize("mode", pictures_of_every_mode())
def test_every_mode_becomes_rgb_as_in_the_reference(mode):
    found = pictures_of_every_mode()[mode]
    assert_as_reference(SMALL, [found], [found])


def test_arrays_of_every_layout():
    rgb, gray, rgba = noise(20, 30, 3), noise(20, 30), noise(20, 30, 4)
    assert_as_reference(SMALL, [gray], [PIL.fromarray(gray)])
    for array in (rgb, gray[..., None], rgba, np.moveaxis(rgb, 2, 0), gray[None]):
        assert_as_reference(SMALL, [array], [array])
    for array in (rgb.astype(np.int64), rgb / 255, (rgb / 255).astype(np.float32)):
        np.testing.assert_array_equal(
            image.patches(SMALL, [array])["pixels"],
            image.patches(SMALL, [rgb])["pixels"],
        )


def test_a_low_and_narrow_array_is_read_with_channels_last():
    """transformers takes [3, w, 3] for channels first; a picture of 3 rows is one."""
    low = noise(3, 20, 3)
    assert_as_reference(SMALL, [low], [PIL.fromarray(low)])


def test_patches_stand_in_the_order_of_the_merger():
    """From the definition: blocks of merge x merge patches, row after row."""
    settings = image.Settings(patch=2, merge=2, min_pixels=1, max_pixels=10**6)
    array = noise(8, 12, 3)
    pixels = image.patches(settings, [array])["pixels"]
    table = image.normalized_table(settings)
    number = 0
    for block_row in range(2):
        for block_column in range(3):
            for row in range(2):
                for column in range(2):
                    top, left = 4 * block_row + 2 * row, 4 * block_column + 2 * column
                    piece = array[top : top + 2, left : left + 2]
                    wanted = [
                        [[table[c][piece[..., c]]] * 2 for c in range(3)],
                    ]
                    np.testing.assert_array_equal(pixels[number], np.ravel(wanted))
                    number += 1
    assert number == len(pixels)


# --- files ---


def encoded(array, kind, **options):
    stream = io.BytesIO()
    PIL.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_files_and_bytes_give_what_their_pil_image_gives(kind, tmp_path):
    content = encoded(smooth(33, 47), kind)
    path = tmp_path / "picture.bin"  # the content decides, not the suffix
    path.write_bytes(content)
    opened = PIL.open(io.BytesIO(content))
    for source in (content, bytearray(content), path, str(path)):
        assert_as_reference(SMALL, [source], [opened])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_turned_upright_as_transformers_loads_them(orientation, tmp_path):
    exif = PIL.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(smooth(32, 64), "JPEG", exif=exif))
    assert_as_reference(SMALL, [path], [image_utils.load_image(str(path))])


def test_an_animated_file_is_its_first_frame():
    frames = [PIL.fromarray(noise(20, 20, 3, seed=i)).quantize(64) for i in range(3)]
    stream = io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    assert_as_reference(SMALL, [stream.getvalue()], [frames[0]])


def test_a_phones_file_of_several_jpegs_is_its_first():
    pictures = [PIL.fromarray(smooth(20, 30, seed=i)) for i in range(2)]
    stream = io.BytesIO()
    pictures[0].save(stream, "MPO", save_all=True, append_images=pictures[1:])
    first = PIL.open(io.BytesIO(encoded(np.asarray(pictures[0]), "JPEG")))
    assert_as_reference(SMALL, [stream.getvalue()], [first])
    assert picture.load(stream.getvalue(), mime="image/jpeg").size == (30, 20)


# --- bad pictures ---


def png_header(width, height):
    """A PNG that claims a size and holds nothing."""

    def chunk(kind, body):
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


GOOD = noise(16, 16, 3)
BAD = {
    "empty": (b"", "is empty"),
    "text": (b"hello, I am a picture", "not a picture"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    "pdf": (b"%PDF-1.7\n", "not a picture"),
    "bomb": (png_header(60_000, 60_000), "more than|60,000"),
    "wide": (png_header(20_000, 4_000), "20,000 x 4,000 pixels"),
    "zero": (png_header(0, 10), "not a picture|damaged|wanted at least 1"),
    "thin": (encoded(noise(1, 300, 3), "PNG"), "more than 200 times"),
    "hollow": (png_header(40, 40), "cut off or damaged"),
    "cut png": (encoded(noise(50, 50, 3), "PNG")[:4000], "cut off or damaged"),
    "cut jpeg": (encoded(noise(50, 50, 3), "JPEG")[:1000], "cut off or damaged"),
    "cut webp": (encoded(noise(50, 50, 3), "WEBP")[:500], "damaged|not a picture"),
    "no rows": (np.zeros((0, 0, 3), np.uint8), "wanted at least 1"),
    "nan": (np.full((8, 8, 3), np.nan), "nan"),
    "inf": (np.full((8, 8, 3), np.inf), "inf"),
    "255 as float": (GOOD.astype(np.float32), "divide them by 255"),
    "negative": (-GOOD.astype(np.int16) - 1, "wanted 0..255"),
    "two channels": (noise(9, 9, 2), "c of 1, 3 or 4"),
    "five dims": (noise(1, 2, 3, 4, 5), "c of 1, 3 or 4"),
    "complex": (GOOD.astype(complex), "wanted integers"),
    "objects": (np.full((4, 4, 3), None), "wanted integers"),
    "ragged": ([[1, 2], [3]], "list as picture"),
    "none": (None, "not a picture"),
    "url": ("https://example.com/cat.png", "not a URL"),
    "data uri": ("data:image/png;base64,AAAA", "not a URL"),
    "absent": ("no/such/file.png", "is not a file"),
    "device": ("/dev/zero", "is not a file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures_are_named(name):
    source, words = BAD[name]
    tracemalloc.start()
    with pytest.raises(config.InputError, match=words) as found:
        image.patches(SMALL, [GOOD, source])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(found.value).startswith("image 1: ")
    assert "0x" not in str(found.value)  # no addresses of memory
    assert most < 64 * 2**20


def test_a_declared_media_type_must_be_the_contents():
    content = encoded(GOOD, "PNG")
    assert picture.load(content, mime="image/png").size == (16, 16)
    with pytest.raises(config.InputError, match="'image/jpeg', but it is 'image/png'"):
        picture.load(content, mime="image/jpeg")


def test_limits_are_of_bytes_pixels_and_output():
    content = encoded(GOOD, "PNG")
    for limits, words in (
        (picture.Limits(file_bytes=100), "larger than 100 bytes"),
        (picture.Limits(pixels=255), "16 x 16 pixels; wanted at most 255"),
        (picture.Limits(output_bytes=1000), "patches of 1 inputs take"),
    ):
        with pytest.raises(config.InputError, match=words):
            image.patches(SMALL, [content], limits)


@pytest.mark.parametrize("sources", [[], "cat.png", b"cat", GOOD])
def test_a_list_of_images_is_wanted(sources):
    with pytest.raises(config.InputError, match="images"):
        image.patches(SMALL, sources)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_damaged_files_decode_or_are_refused(kind):
    """Any change of bytes gives patches or an InputError, nothing else."""
    content = bytearray(encoded(smooth(24, 24), kind))
    made = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        broken = bytearray(content)
        for place in made.integers(0, len(broken), made.integers(1, 8)):
            broken[place] = made.integers(256)
        broken = broken[: made.integers(len(broken) // 2, len(broken) + 1)]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PIL warns of what it mends
                image.patches(SMALL, [bytes(broken)])
        except config.InputError:
            refused += 1
    assert refused > 10


def test_without_pillow_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(config.InputError, match=r"pip install 'qwen_jax\[vision\]'"):
        image.patches(SMALL, [GOOD])


# --- settings ---

OLD = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": list(image.CLIP_MEAN),
    "image_std": list(image.CLIP_STD),
    "image_processor_type": "Qwen2VLImageProcessor",
}
NEW = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}


def folder(path, **files):
    for name, value in files.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (path / f"{name}.json").write_text(text)
    return path


@pytest.mark.parametrize(
    "values",
    [
        OLD,
        NEW,
        {},
        {"size": {"min_pixels": 3136, "max_pixels": 99999}, "min_pixels": 3136},
        {**NEW, "min_pixels": 70000},
        {"patch_size": 8, "image_mean": 0.5, "image_std": 0.25, "rescale_factor": 0.01},
    ],
)
def test_settings_of_both_generations_as_transformers_reads_them(values, tmp_path):
    folder(tmp_path, preprocessor_config=values)
    found = image.load_settings(tmp_path)
    if "min_pixels" in values.get("size", {}):  # transformers wants the pair outside
        values = dict(values["size"])
    theirs = hf.Qwen2VLImageProcessorPil(**copy.deepcopy(values))  # it changes size
    sizes = (theirs.size.shortest_edge, theirs.size.longest_edge)
    assert (found.min_pixels, found.max_pixels) == sizes
    assert found.patch == theirs.patch_size
    assert found.rescale == theirs.rescale_factor
    np.testing.assert_array_equal(found.mean, np.broadcast_to(theirs.image_mean, 3))
    np.testing.assert_array_equal(found.std, np.broadcast_to(theirs.image_std, 3))


def test_settings_from_the_nested_file_and_from_the_family(tmp_path):
    folder(tmp_path, config={"model_type": "qwen3_vl"})
    assert image.load_settings(tmp_path) == image.FAMILIES["qwen3_vl"]
    folder(tmp_path, preprocessor_config=NEW)
    assert image.load_settings(tmp_path) == image.FAMILIES["qwen3_vl"]
    folder(tmp_path, preprocessor_config=OLD)
    assert image.load_settings(tmp_path) == image.FAMILIES["qwen2_vl"]
    folder(tmp_path, processor_config={"image_processor": NEW})
    assert image.load_settings(tmp_path) == image.FAMILIES["qwen3_vl"]


BAD_SETTINGS = {
    "no folder": (None, "does not exist"),
    "nothing": ({}, "none of qwen2_vl"),
    "not json": ({"preprocessor_config": "{"}, "preprocessor_config.json"),
    "a list": ({"preprocessor_config": []}, "wanted a JSON object"),
    "deep": ({"preprocessor_config": "[" * 100_000}, "preprocessor_config.json"),
    "text": ({"preprocessor_config": {"patch_size": "14"}}, "patch '14'"),
    "true": ({"preprocessor_config": {"merge_size": True}}, "merge True"),
    "zero": ({"preprocessor_config": {"patch_size": 0}}, "patch 0"),
    "turned": ({"preprocessor_config": {**OLD, "max_pixels": 9}}, "more than max_"),
    "two means": ({"preprocessor_config": {"image_mean": [1, 2]}}, "three finite"),
    "no std": ({"preprocessor_config": {"image_std": [1, 0, 1]}}, "without zeros"),
    "square": ({"preprocessor_config": {"size": {"height": 9, "width": 9}}}, "_edge"),
    "raw": ({"preprocessor_config": {"do_normalize": False}}, "do_normalize is false"),
    "filter": ({"preprocessor_config": {"resample": 9}}, "resample 9"),
    "nan": ({"preprocessor_config": '{"rescale_factor": NaN}'}, "rescale nan"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings_are_named(name, tmp_path):
    files, words = BAD_SETTINGS[name]
    path = tmp_path / "absent" if files is None else folder(tmp_path, **files)
    with pytest.raises(config.InputError, match=words):
        image.load_settings(path)
