# SPDX-License-Identifier: Apache-2.0
"""Tensors -> the safetensors files of a folder, one tensor in memory at a time.

Names, shapes and dtypes are known before the first byte, so the files are planned
first: which tensor goes to which file and where. Everything is written under names that
end in `.partial`, flushed to the disk, and takes its real name at the end.

Formats: see `tensor_files.py`; several files come with `model.safetensors.index.json`.
Invariants: until all is on the disk, files of the folder that were there before are
untouched. Then config.json goes first and comes back last, so a folder in between has
none and is taken for no model; the next `publish` into it makes it whole.
Raises: OSError from the disk; the files begun are then removed.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from qwen_jax.models import tensor_files

CODES = {name: code for code, name in tensor_files.DTYPES.items()} | {"int64": "I64"}
PARTIAL = ".partial"


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor before it has bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        bits = tensor_files.BITS[CODES[self.dtype]]
        return math.prod(self.shape) * bits // 8


def shards(planned: list[Planned], shard_bytes: int) -> dict[str, list[Planned]]:
    """{file: its tensors in order}; files of at most `shard_bytes` where that goes."""
    cut: list[list[Planned]] = [[]]
    size = 0
    for one in planned:
        if cut[-1] and size + one.num_bytes > shard_bytes:
            cut.append([])
            size = 0
        cut[-1].append(one)
        size += one.num_bytes
    if len(cut) == 1:
        return {"model.safetensors": cut[0]}
    return {
        f"model-{i + 1:05d}-of-{len(cut):05d}.safetensors": held
        for i, held in enumerate(cut)
    }


def header(held: list[Planned]) -> bytes:
    """The bytes of a file before its tensors."""
    told: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for one in held:
        stop = start + one.num_bytes
        told[one.name] = {
            "dtype": CODES[one.dtype],
            "shape": list(one.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(told, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that numbers lie at multiples of their size
    return len(text).to_bytes(8, "little") + text


def index(files: dict[str, list[Planned]]) -> dict[str, Any]:
    """What the index of several files says."""
    return {
        "metadata": {"total_size": sum(x.num_bytes for h in files.values() for x in h)},
        "weight_map": {x.name: file for file, held in files.items() for x in held},
    }


def publish(
    folder: pathlib.Path,
    planned: list[Planned],
    tensors: Iterator[tuple[str, np.ndarray]],
    raw_config: dict[str, Any],
    *,
    shard_bytes: int,
    say: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write config.json and the files of `tensors`, which come in the planned order.

    Args:
      folder: made if missing; files of a model that is there are replaced.
      planned: all tensors.
      tensors: (name, C-contiguous array) of each.
      raw_config: what config.json says.
      shard_bytes: largest file.
      say: told the bytes written and their sum after each tensor.
    Raises:
      OSError: see the module docstring.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = shards(planned, shard_bytes)
    total, done = sum(one.num_bytes for one in planned), 0
    begun: list[pathlib.Path] = []
    try:
        for name, held in files.items():
            begun.append(folder / (name + PARTIAL))
            with begun[-1].open("wb", buffering=0) as file:
                _write(file, header(held))
                for one in held:
                    given, array = next(tensors)
                    if (given, array.nbytes) != (one.name, one.num_bytes):
                        raise RuntimeError(f"{given} came where {one} was planned")
                    _write(file, array)
                    done += one.num_bytes
                    say(done, total)
                os.fsync(file.fileno())
        texts = {"config.json": raw_config}
        if len(files) > 1:
            texts[tensor_files.INDEX] = index(files)
        for name, value in texts.items():
            begun.append(folder / (name + PARTIAL))
            with begun[-1].open("w") as file:
                file.write(json.dumps(value, indent=2, sort_keys=True) + "\n")
                file.flush()
                os.fsync(file.fileno())
    except BaseException:
        for path in begun:
            path.unlink(missing_ok=True)
        raise
    _rename(folder, [*files, *sorted(texts, reverse=True)])


def _write(file: Any, data: Any) -> None:
    view = memoryview(data if isinstance(data, bytes) else data.reshape(-1).view("u1"))
    while len(view):
        view = view[file.write(view) :]


def _rename(folder: pathlib.Path, names: list[str]) -> None:
    """Give the new files their names; config.json is the last of them."""
    (folder / "config.json").unlink(missing_ok=True)
    _sync(folder)
    for stale in folder.glob("model*.safetensors*"):
        if not stale.name.endswith(PARTIAL):
            stale.unlink()
    for name in names:
        if name == "config.json":
            _sync(folder)
        (folder / (name + PARTIAL)).rename(folder / name)
    for stale in folder.glob(f"model*{PARTIAL}"):  # of a process that was killed
        stale.unlink()
    _sync(folder)


def _sync(folder: pathlib.Path) -> None:
    """Put the names of a folder on the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
