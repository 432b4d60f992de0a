# SPDX-License-Identifier: Apache-2.0
"""Safetensors files of a stranger: what lies is named, at once and in little memory.

The oracle is the safetensors library: it writes the files that are right, and what we
take from a changed file, it takes too and finds the same there.
"""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax import config
from qwen_jax.models import tensor_files

TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.arange(4, dtype=np.float16),
    "empty": np.zeros((0, 7), np.float32),
    "one": np.array(5.0),
    "ids": np.arange(3),
}
WHOLE = safetensors.numpy.save(TENSORS, metadata={"format": "pt"})
HEADER = int.from_bytes(WHOLE[:8], "little")


def made(header, data=b"\0" * 8):
    """A file of a header (object or bytes) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def told(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def refused(path):
    start = time.process_time()
    with pytest.raises(config.InputError) as caught:
        tensor_files.header(path)
    assert time.process_time() - start < 0.2
    words = str(caught.value)
    assert str(path) in words and len(words) < 500
    return words


def values(path):
    """{name: (shape, bytes)} by our header."""
    data = path.read_bytes()
    return {
        e.name: (e.shape, data[e.start : e.start + e.num_bytes])
        for e in tensor_files.header(path)
    }


def test_what_the_library_writes_is_found(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(WHOLE)
    assert values(path) == {k: (x.shape, x.tobytes()) for k, x in TENSORS.items()}
    entries = tensor_files.header(path)
    assert [e.start for e in entries] == sorted(e.start for e in entries)
    dtypes = {e.name: e.dtype for e in entries}
    assert dtypes["b"] == "F32" and dtypes["ids"] == "I64"


BROKEN = {
    "empty": (b"", "it is empty"),
    "four bytes": (b"\x08\0\0\0", "it is cut off"),
    "length 2^60": ((1 << 60).to_bytes(8, "little") + b"{}", "it is cut off"),
    "length 2^64-1": (b"\xff" * 8 + b"{}", "it is cut off"),
    "length 0": (bytes(8) + b"{}", "it is cut off"),
    "cut in the header": (WHOLE[: HEADER // 2], "it is cut off"),
    "cut in the data": (WHOLE[:-1], "it was cut off or changed"),
    "a byte more": (WHOLE + b"\0", "it was cut off or changed"),
    "no header": (WHOLE[8 + HEADER :] * 9, "cannot be read"),
    "LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n",
        "run `git lfs pull`",
    ),
    "pickle": (b"\x80\x04\x95\x1e\0\0\0\0\0\0\0\x8c\x08builtins", "it is a pickle"),
    "zip": (b"PK\x03\x04" + bytes(3000), "it is a pickle"),
    "web page": (b"<!doctype html><html>" + b" " * 100, "it is of another kind"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(100), "it is of another kind"),
    "list": (made(b"[1, 2]"), "cannot be read"),
    "not UTF-8": (made(b'{"\xff": 1}'), "not JSON"),
    "NaN": (made(b'{"a": NaN}'), "NaN is no number"),
    "nested": (made(b'{"a":' * 50_000), "nested too deeply"),
    "digits": (made(b'{"a": ' + b"9" * 6000 + b"}"), "is not JSON"),
    "twice": (
        made(('{"a": %s, "a": %s}' % ((json.dumps(told()),) * 2)).encode()),
        "key 'a' is given twice",
    ),
    "twice inside": (
        made(b'{"a": {"dtype": "F32", "dtype": "F16"}}'),
        "key 'dtype' is given twice",
    ),
    "no object": (made({"a": [1]}), "wanted dtype, shape and data_offsets"),
    "no offsets": (made({"a": {"dtype": "F32", "shape": [2]}}), "no two places"),
    "dtype": (made({"a": told("F31")}), "has dtype 'F31'"),
    "dtype of another kind": (made({"a": told(7)}), "has dtype 7"),
    "negative": (made({"a": told(shape=[-2])}), "no list of small counts"),
    "true": (made({"a": told(shape=[True, 2])}), "no list of small counts"),
    "float": (made({"a": told(shape=[2.0])}), "no list of small counts"),
    "text": (made({"a": told(shape=["2"])}), "no list of small counts"),
    "2^64": (made({"a": told(shape=[1 << 64, 0])}), "no list of small counts"),
    "overflow": (made({"a": told(shape=[1 << 40, 1 << 40])}), "do not fill bytes"),
    "many dims": (made({"a": told(shape=[1] * 100_000)}), "no list of small counts"),
    "wrong size": (made({"a": told(shape=[3])}), "do not fill bytes 0 to 8"),
    "backwards": (made({"a": told(offsets=(8, 0))}), "do not fill bytes 8 to 0"),
    "offsets negative": (made({"a": told(offsets=(-8, 0))}), "no two places"),
    "offsets three": (made({"a": told(offsets=(0, 4, 8))}), "no two places"),
    "beyond": (made({"a": told(shape=[4], offsets=(0, 16))}), "cut off or changed"),
    "overlap": (
        made({"a": told(), "b": told(shape=[1], offsets=(4, 8))}),
        "'b' overlaps another",
    ),
    "same bytes": (made({"a": told(), "b": told()}), "'b' overlaps another"),
    "gap": (
        made({"a": told(shape=[1], offsets=(4, 8))}),
        "'a' leaves a gap before it",
    ),
    "metadata": (made({"__metadata__": {"a": 1}, "a": told()}), "strings only"),
    "metadata list": (made({"__metadata__": ["a"], "a": told()}), "strings only"),
    "long name": (made({"n" * 10**6: told("F31")}), "has dtype"),
    "control name": (made({"\x1b[2J\n": told("F31")}), r"tensor '\x1b[2J\n'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_lies_is_named(tmp_path, name):
    data, words = BROKEN[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    assert words in refused(path)


def test_the_header_has_a_largest_size(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((50_000_000).to_bytes(8, "little") + b"{")
        file.truncate(60_000_000)
    assert "50,000,000 bytes, more than" in refused(path)


def test_what_is_no_file_is_not_opened(tmp_path):
    path = tmp_path / "model.safetensors"
    os.mkfifo(path)  # reading it would wait for ever
    assert "no regular file" in refused(path)
    path.unlink()
    path.mkdir()
    assert "no regular file" in refused(path)
    path.rmdir()
    path.symlink_to(tmp_path / "gone")
    assert "cannot be read" in refused(path)


def test_memory_is_bounded(tmp_path):
    """The worst of the files above, and a header as large as is read, in a process."""
    data = b'{"a":{"dtype":"F32","shape":[' + b"1," * 7_000_000 + b"1]}}"
    (tmp_path / "model.safetensors").write_bytes(made(data))
    code = (
        "import resource, pathlib, sys\n"
        "from qwen_jax import config\n"
        "from qwen_jax.models import tensor_files\n"
        "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    tensor_files.header(pathlib.Path(sys.argv[1]))\n"
        "except config.InputError as error:\n    print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model.safetensors"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"},
    ).stdout.splitlines()
    assert "no list of small counts" in out[0]
    assert int(out[1]) < 250_000  # kB


CHANGES = st.lists(
    st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=4
)


@given(changes=CHANGES, cut=st.none() | st.integers(0, len(WHOLE)))
@settings(max_examples=400)
def test_bytes_that_are_taken_are_taken_by_the_library(tmp_path_factory, changes, cut):
    data = bytearray(WHOLE)
    for place, value in changes:
        data[place] = value
    data = bytes(data[:cut])
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    path.write_bytes(data)
    _compare(path, data)


NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 7, 8, 16, 24, -1, True, 2.0, 1 << 61, None])
INFO = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*tensor_files.BITS, "F31"]),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, max_size=3),
    }
)


@given(
    header=st.dictionaries(st.sampled_from("abc"), INFO, min_size=1),
    data=st.integers(0, 24).map(bytes),
)
@settings(max_examples=400)
def test_headers_that_are_taken_are_taken_by_the_library(
    tmp_path_factory, header, data
):
    path = tmp_path_factory.getbasetemp() / "header.safetensors"
    path.write_bytes(made(header, data))
    _compare(path, made(header, data))


def _compare(path, data):
    try:
        found = values(path)
    except config.InputError:
        return
    theirs = dict(safetensors.deserialize(data))
    assert {
        k: (tuple(v["shape"]), bytes(v["data"])) for k, v in theirs.items()
    } == found


# --- folders ---


def folder_of(tmp_path, index=None, **files):
    for name, tensors in files.items():
        safetensors.numpy.save_file(tensors, tmp_path / f"{name}.safetensors")
    if index is not None:
        raw = index if isinstance(index, str) else json.dumps({"weight_map": index})
        (tmp_path / tensor_files.INDEX).write_text(raw)
    return tmp_path


ONE, TWO = {"x": np.ones(3)}, {"y": np.ones((2, 2))}


def test_files_of_an_index_are_read_and_no_others(tmp_path):
    index = {"x": "m-1.safetensors", "y": "m-2.safetensors"}
    folder_of(tmp_path, index, **{"m-1": ONE, "m-2": TWO, "other": {"x": np.ones(9)}})
    assert [e.name for e in tensor_files.entries(tmp_path)] == ["x", "y"]


def test_links_are_followed_as_caches_of_hubs_need(tmp_path):
    (tmp_path / "blobs").mkdir()
    safetensors.numpy.save_file(ONE, tmp_path / "blobs" / "0123abcd")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/0123abcd")
    (entry,) = tensor_files.entries(tmp_path / "snapshot")
    assert entry.name == "x" and entry.path.name == "model.safetensors"


@pytest.mark.parametrize(
    "file",
    [
        "../m.safetensors",
        "/etc/m.safetensors",
        "sub/m.safetensors",
        "..",
        "m.bin",
        ".m.safetensors",
        "m\n.safetensors",
        "m.safetensors\n",
        "m\\..\\m.safetensors",
        "",
        7,
        None,
        ["m.safetensors"],
    ],
    ids=repr,
)
def test_an_index_names_plain_files(tmp_path, file):
    safetensors.numpy.save_file(ONE, tmp_path / "m.safetensors")
    (tmp_path / "folder").mkdir()
    folder_of(tmp_path / "folder", {"x": file}, **{"m": ONE})
    with pytest.raises(config.InputError, match="wanted the plain name"):
        tensor_files.entries(tmp_path / "folder")


@pytest.mark.parametrize("raw", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "["])
def test_an_index_is_an_index(tmp_path, raw):
    with pytest.raises(config.InputError, match="weight_map|not JSON"):
        tensor_files.entries(folder_of(tmp_path, raw, m=ONE))


def test_missing_files_are_named(tmp_path):
    index = {"x": "m-1.safetensors"} | {f"z{i}": f"m-{i}.safetensors" for i in range(9)}
    folder_of(tmp_path, index, **{"m-1": ONE})
    with pytest.raises(config.InputError, match=r"lacks m-0.*m-5.safetensors and 3 mo"):
        tensor_files.entries(tmp_path)
    (tmp_path / tensor_files.INDEX).unlink()
    (tmp_path / "m-1.safetensors").rename(tmp_path / "m-00002-of-00003.safetensors")
    with pytest.raises(config.InputError, match=r"lacks m-00001.*, m-00003.* 3 files"):
        tensor_files.entries(tmp_path)
    (tmp_path / "m-00002-of-00003.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(config.InputError, match="pickle form are not read"):
        tensor_files.entries(tmp_path)


def test_an_index_of_other_files_is_named(tmp_path):
    folder_of(tmp_path, {"x": "m.safetensors", "y": "m.safetensors"}, m=ONE)
    with pytest.raises(config.InputError, match="'y' is in m.safetensors, which it is"):
        tensor_files.entries(tmp_path)
    folder_of(tmp_path, {"x": "n.safetensors", "y": "m.safetensors"}, m=ONE, n=TWO)
    with pytest.raises(config.InputError, match="which it is not"):
        tensor_files.entries(tmp_path)


def test_a_tensor_in_two_files_is_named(tmp_path):
    with pytest.raises(config.InputError, match="'x' is in a.* and in b.safetensors"):
        tensor_files.entries(folder_of(tmp_path, a=ONE, b=ONE))


def test_names_are_never_paths(tmp_path):
    name = "../../outside"
    folder_of(tmp_path, m={name: np.ones(2)})
    (entry,) = tensor_files.entries(tmp_path)
    assert entry.name == name and entry.path.parent == tmp_path


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"])
def test_numbers_that_are_no_weights_are_refused_by_name(tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    path.write_bytes(made({"w": told(dtype, [8])}))
    (entry,) = tensor_files.header(path)
    with pytest.raises(config.InputError, match=f"'w' of model.* stored as {dtype}"):
        entry.numpy_dtype()
