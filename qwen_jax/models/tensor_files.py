# SPDX-License-Identifier: Apache-2.0
"""The safetensors files of a folder: what is in them, checked before it is believed.

Source: the format's own description (github.com/huggingface/safetensors, "Format").
A file is 8 bytes that give the length of a header (little-endian), the header (JSON:
name -> dtype, shape, data_offsets; `__metadata__` holds strings), then the tensors'
bytes, each once, without gaps or overlaps, to the end of the file.

Deviations: a header has at most 16 MB here (the format allows 100), which is 100,000
tensors, and a tensor at most 8 dims, so that no file costs more memory or time than
one that is meant to be read.
Invariants: tensor names are data and never become paths. Files are plain names in the
folder; a symbolic link is followed wherever it leads (caches of model hubs link each
file to a store beside the folder), and what it leads to must be a regular file; of a
file that is refused, no contents are quoted. With an index, its files are read and no
others; without one, all of them.
Units: bytes; `Entry.start` counts from the beginning of the file.
Raises: config.InputError naming the file, what is wrong with it and the fix.
"""

import dataclasses
import os
import pathlib
import re
import stat
from typing import Any

import jax.numpy as jnp
import numpy as np

from qwen_jax import config
from qwen_jax.models import json_files

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 16_000_000
MAX_DIMS = 8
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
# Bits of one number, for the dtypes that are no weights of ours too.
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16}
BITS |= {"U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64}
BITS |= {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8}
BITS |= {"F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: dtype as the format names it, and where its bytes lie."""

    path: pathlib.Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    def numpy_dtype(self) -> np.dtype:
        """The dtype of its numbers.

        Raises:
          config.InputError: not one of floating-point numbers of 16 bits or more.
        """
        if self.dtype not in DTYPES:
            raise config.InputError(
                f"tensor {json_files.shown(self.name)} of {self.path.name} is stored "
                f"as {self.dtype}: wanted {', '.join(DTYPES)}; a quantized model is "
                "not read, take the one it was made from"
            )
        return jnp.dtype(DTYPES[self.dtype])


def entries(folder: pathlib.Path) -> list[Entry]:
    """All tensors of a folder in the order of files and bytes.

    Raises:
      config.InputError: no such files, one is missing or broken, a tensor given twice.
    """
    index = _index(folder)
    paths = _paths(folder, index)
    found: dict[str, Entry] = {}
    for path in paths:
        for entry in header(path):
            if entry.name in found:
                raise config.InputError(
                    f"tensor {json_files.shown(entry.name)} is in "
                    f"{found[entry.name].path.name} and in {path.name} of {folder}"
                )
            found[entry.name] = entry
    for name, file in index.items():
        if name not in found or found[name].path.name != file:
            raise config.InputError(
                f"{folder / INDEX} says that tensor {json_files.shown(name)} is in "
                f"{file}, which it is not: the files are of different models; copy "
                "the folder anew"
            )
    return list(found.values())


def _index(folder: pathlib.Path) -> dict[str, str]:
    """{tensor: file} as the index of a folder says; {} without one."""
    path = folder / INDEX
    if not path.exists():
        return {}
    held = json_files.read(path).get("weight_map")
    if not isinstance(held, dict) or not held:
        raise config.InputError(f"{path} has no weight_map: wanted tensor -> file")
    for name, file in held.items():
        plain = isinstance(file, str) and re.fullmatch(
            r"[\w+][\w.+-]*\.safetensors", file, re.ASCII
        )
        if not plain:
            raise config.InputError(
                f"{path}: weight_map puts {json_files.shown(name)} in "
                f"{json_files.shown(file)}; wanted the plain name of a .safetensors "
                "file in the same folder"
            )
    return held


def _paths(folder: pathlib.Path, index: dict[str, str]) -> list[pathlib.Path]:
    """The files to read, all of them there."""
    there = {path.name for path in folder.glob("*.safetensors")}
    wanted = sorted(set(index.values()))
    if not index:
        if not there:
            raise config.InputError(
                f"{folder} has no *.safetensors files (weights in pickle form are not "
                "read; convert them with the library that wrote them)"
            )
        wanted = sorted(there)
        sets = {x.group(1, 3) for x in map(_SHARD.fullmatch, there) if x}
        for stem, count in sets:  # "model", "00004": four files make one model
            numbers = range(1, min(int(count), 10_000) + 1)
            wanted += [f"{stem}-{i:05d}-of-{count}.safetensors" for i in numbers]
    missing = sorted(set(wanted) - there)
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise config.InputError(
            f"{folder} lacks {', '.join(missing[:5])}{more}: its weights are in "
            f"{len(set(wanted))} files; copy or download the missing ones"
        )
    return [folder / name for name in sorted(set(wanted))]


def header(path: pathlib.Path) -> list[Entry]:
    """The tensors of one file in the order of their bytes.

    Raises:
      config.InputError: the file is not what the format says.
    """
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):  # a pipe would wait for a writer
            raise config.InputError(f"{path} is no regular file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= size - 8:
                raise _broken(path, start + file.read(64), size)
            if length > MAX_HEADER_BYTES:
                raise config.InputError(
                    f"{path}: its header is said to have {length:,} bytes, more than "
                    f"the {MAX_HEADER_BYTES:,} that are read"
                )
            text = file.read(length)
    except OSError as error:
        raise config.InputError(
            f"{path} cannot be read: {error.strerror or error}"
        ) from error
    if len(text) < length or text[:1] != b"{":
        raise _broken(path, start + text, size)
    raw = json_files.parse(text, f"the header of {path}")
    metadata = raw.pop("__metadata__", {})
    strings = isinstance(metadata, dict) and all(
        isinstance(value, str) for value in metadata.values()
    )
    if not strings:
        raise config.InputError(f"{path}: __metadata__ must hold strings only")
    found = [_entry(path, name, told, 8 + length) for name, told in raw.items()]
    return _in_order(path, found, 8 + length, size)


def _broken(path: pathlib.Path, start: bytes, size: int) -> config.InputError:
    """What a file is that does not begin as the format says, as far as one can tell."""
    what = "it is cut off, or no safetensors file; copy it anew"
    if size == 0:
        what = "it is empty; copy it anew"
    elif start.startswith(b"version https://git-lfs"):
        what = (
            "it is a stand-in of Git LFS, not the weights: run `git lfs pull`, or "
            "download the file"
        )
    elif start.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"PK\x03\x04")):
        what = (
            "it is a pickle (as torch.save writes) under another name, which can run "
            "code and is never read; convert it with the library that wrote it"
        )
    elif start.startswith((b"<", b"GGUF", b"\x1f\x8b")):
        what = "it is of another kind (web page, GGUF or archive); download the weights"
    return config.InputError(f"{path} cannot be read as safetensors: {what}")


def _entry(path: pathlib.Path, name: str, told: Any, data: int) -> Entry:
    """One tensor as the header tells it, each number checked."""
    where = f"{path}: tensor {json_files.shown(name)}"
    if not isinstance(told, dict):
        raise config.InputError(f"{where}: wanted dtype, shape and data_offsets")
    dtype, shape, offsets = map(told.get, ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise config.InputError(f"{where} has dtype {json_files.shown(dtype)}")
    if not _counts(shape) or len(shape) > MAX_DIMS:
        raise config.InputError(f"{where} has a shape that is no list of small counts")
    if not _counts(offsets) or len(offsets) != 2:
        raise config.InputError(f"{where} has data_offsets that are no two places")
    bits = BITS[dtype]
    for size in shape:
        bits *= size
    if bits != 8 * (offsets[1] - offsets[0]):
        raise config.InputError(
            f"{where}: {dtype} numbers of shape {tuple(shape)} do not fill bytes "
            f"{offsets[0]} to {offsets[1]}"
        )
    start, stop = offsets
    return Entry(path, name, dtype, tuple(shape), data + start, stop - start)


def _counts(numbers: Any) -> bool:
    """Whether this is a list of whole numbers that a file can have."""
    return isinstance(numbers, list) and all(
        type(number) is int and 0 <= number < 1 << 60 for number in numbers
    )


def _in_order(
    path: pathlib.Path, found: list[Entry], start: int, size: int
) -> list[Entry]:
    """The entries by place; together they are the rest of the file, each byte once."""
    found = sorted(found, key=lambda entry: (entry.start, entry.num_bytes))
    for entry in found:
        if entry.start != start:
            told = (
                "overlaps another" if entry.start < start else "leaves a gap before it"
            )
            raise config.InputError(
                f"{path}: tensor {json_files.shown(entry.name)} {told} in the file"
            )
        start += entry.num_bytes
    if start != size:
        raise config.InputError(
            f"{path} cannot be read as safetensors: it has {size:,} bytes, its header "
            f"tells of {start:,}; it was cut off or changed: copy it anew"
        )
    return found
