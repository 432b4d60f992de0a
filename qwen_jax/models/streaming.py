# SPDX-License-Identifier: Apache-2.0
"""Tensors of files -> weights of ours, block by block, straight onto the devices.

Files are read once, in the order of their bytes, by several threads. A block is some
hundred rows of one tensor; it is read, cast and turned ([out, in] there, [in, out]
here) into its place in the weights of every device of this process that wants a part
of it, and rows that none wants are not read.

On a CPU the weights are NumPy arrays that JAX takes over as they are (`device_put`
aliases them: nothing else keeps a reference), so memory is the weights plus one block
for each thread. Elsewhere a stacked weight is made on its device and filled a tensor at
a time: host memory is at most PENDING_BYTES and the largest tensor.

Shapes: a `Stack` is one weight of ours on all its devices; `place` is the index of a
layer (and expert) in it, then a slice where a tensor holds some of its rows (rows that
none holds are zero). A `Rectangle` is rows and columns of a tensor seen as a matrix,
and the strided view [rows, columns] of ours that they fill.
Invariants: each number is cast once, rounded to nearest even, as `astype` does.
Raises: config.InputError for a file that changes or ends while it is read.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import os
import pathlib
import queue
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import config
from qwen_jax.models import names, tensor_files
from qwen_jax.models import spec as spec_lib

# Rows of a block. Columns of a block become rows of ours: 512 of them make a stretch of
# 1 kB in bfloat16 and touch 512 cache lines, as many as fit in the first cache (twice
# as fast as 128 rows).
ROWS = 512
BLOCK_BYTES = 16_000_000  # of a block with very long rows
CHUNK = 1 << 22  # numbers of a block that is copied as it is
PENDING_BYTES = 256_000_000  # read ahead of what has reached a device
SMALL_BYTES = 8_000_000  # weights that are put on a device whole

Window = tuple[tuple[int, int], ...]  # (start, stop) in each dim of a weight
Place = tuple[int | slice, ...]


def shape_at(shape: tuple[int, ...], place: Place) -> tuple[int, ...]:
    """The shape of what is in a place of a weight."""
    rest = shape[len(place) :]
    if _cut(place):
        return (place[-1].stop - place[-1].start, *rest)
    return rest


def _cut(place: Place) -> bool:
    """Whether a tensor holds a part of the rows in its place."""
    return bool(place) and isinstance(place[-1], slice)


class Stack:
    """One weight of ours on the devices of this process, to be filled."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, sharding: Any | None):
        self.shape, self.dtype, self.sharding = shape, jnp.dtype(dtype), sharding
        whole = tuple((0, size) for size in shape)
        self.devices: dict[Window, list[Any]] = {whole: [None]}
        if sharding is not None:
            self.devices = {}
            held = sharding.addressable_devices_indices_map(shape)
            for device, index in held.items():
                window = tuple(
                    part.indices(size)[:2]
                    for part, size in zip(index, shape, strict=True)
                )
                self.devices.setdefault(window, []).append(device)
        self._made: dict[Window, Any] = {}

    def parts(self, place: Place) -> Iterator[tuple[Window, np.ndarray, Any]]:
        """(window in what is in `place`, array to fill, what to call then)."""
        for window in self.devices:
            found = _inside(place, window)
            if found is None:
                continue
            at, rest = found
            shape = tuple(stop - start for start, stop in rest)
            nbytes = self.dtype.itemsize * math.prod(b - a for a, b in window)
            if not place or _on_host(self.devices[window][0]) or nbytes < SMALL_BYTES:
                made = self._made.get(window)
                if made is None:
                    make = np.zeros if _cut(place) else np.empty
                    made = self._made[window] = _host(window, self.dtype, make)
                yield rest, made[at], None
                continue
            part = aligned(shape, self.dtype)
            yield rest, part, functools.partial(self._put, window, at, part)

    def _put(self, window: Window, at: Place, part: np.ndarray) -> None:
        """Write a part into the arrays on the devices."""
        shape = tuple(stop - start for start, stop in window)
        made = self._made.get(window)
        if made is None:
            made = [
                jnp.zeros(shape, self.dtype, device=device)
                for device in self.devices[window]
            ]
        start = [i.start if isinstance(i, slice) else i for i in at]
        start += [0] * (len(shape) - len(at))
        part = part.reshape(*[1] * (len(shape) - part.ndim), *part.shape)
        start = np.array(start, np.int32)
        self._made[window] = [_update(whole, part, start) for whole in made]
        jax.block_until_ready(self._made[window])  # the part is free again

    def array(self) -> jax.Array:
        """The filled weight; the stack is of no use afterwards."""
        arrays = []
        for window, devices in self.devices.items():
            made = self._made.pop(window, None)
            if made is None:  # rows that no tensor holds
                made = _host(window, self.dtype, np.zeros)
            if not isinstance(made, list):
                made = [jax.device_put(made, device) for device in devices]
            arrays += made
        if self.sharding is None:
            return arrays[0]
        return jax.make_array_from_single_device_arrays(
            self.shape, self.sharding, arrays
        )


@functools.partial(jax.jit, donate_argnums=0)
def _update(whole: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(whole, part, list(start))


def _on_host(device: Any) -> bool:
    """Whether arrays of this device (None: the default one) lie in host memory."""
    return (device.platform if device is not None else jax.default_backend()) == "cpu"


def _inside(place: Place, window: Window) -> tuple[Place, Window] | None:
    """(the part of a place that a window has, counted from the window's start; the same
    counted from the place's); None where it has none."""
    at, rest = [], list(window[len(place) :])
    for i, (start, stop) in zip(place, window[: len(place)], strict=True):
        if isinstance(i, slice):
            first, last = max(start, i.start), min(stop, i.stop)
            at.append(slice(first - start, last - start))
            rest.insert(0, (first - i.start, last - i.start))
        else:
            first, last = i, i + 1
            at.append(i - start)
        if not start <= first < last <= stop:
            return None
    return tuple(at), tuple(rest)


def _host(window: Window, dtype: np.dtype, make: Callable[..., Any]) -> np.ndarray:
    return aligned(tuple(stop - start for start, stop in window), dtype, make)


def aligned(
    shape: tuple[int, ...], dtype: np.dtype, make: Callable[..., Any] = np.empty
) -> np.ndarray:
    """An array that JAX takes over without a copy on a CPU."""
    size = math.prod(shape) * dtype.itemsize
    raw = make(size + 64, np.uint8)
    skip = -raw.ctypes.data % 64
    return raw[skip : skip + size].view(dtype).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Rectangle:
    """`len(out)` rows of `pitch` numbers, the first at number `row` of a tensor; of
    each the columns from `column` on go to a row of `out`."""

    row: int
    pitch: int
    column: int
    out: np.ndarray


def rectangles(
    tensor: names.Tensor,
    key: str,
    spec: spec_lib.Spec,
    window: Window,
    out: np.ndarray,
) -> list[Rectangle] | None:
    """What of a tensor fills `out`, the part of a weight that `window` tells.

    None where the window cuts a dim in a way that is no range there.
    """
    left, right = names.sides(tensor, key)
    known = names.sizes(spec, key)
    ranges = _ranges(right, window, known)
    if ranges is None:
        return None
    view = out.reshape([ranges[x][1] - ranges[x][0] for group in right for x in group])
    order = [x for group in right for x in group]
    # Outermost first: [start, stop, its stride in the tensor, its stride in ours].
    dims, stride = [], 1
    cut = names.cuts(tensor, spec)[key].start
    base, sizes = 0, names.view_shape(tensor, spec)
    for i in reversed(range(len(left))):
        inner = stride
        for x in reversed([x for x in left[i] if x in ranges]):
            start, stop = ranges[x]
            dims.insert(0, [start, stop, known[x], inner, view.strides[order.index(x)]])
            inner *= known[x]
        base += cut * stride if i == tensor.dim else 0
        stride *= sizes[i]
    dims = _merged(dims)
    base += sum(start * stride for start, _, _, stride, _ in dims)
    shape = [stop - start for start, stop, *_ in dims]
    steps = [stride for _, _, _, stride, _ in dims]
    view = np.lib.stride_tricks.as_strided(out, shape, [dim[-1] for dim in dims])
    if len(dims) == 1:
        return [Rectangle(base, stride, 0, view[None])]
    found = []
    for index in itertools.product(*map(range, shape[:-2])):
        at = base + sum(i * step for i, step in zip(index, steps[:-2], strict=True))
        pitch = steps[-2]
        found.append(Rectangle(at - at % pitch, pitch, at % pitch, view[index]))
    return found


def _ranges(
    right: list[list[str]], window: Window, known: dict[str, int]
) -> dict[str, tuple[int, int]] | None:
    """{letter: the range of it that a window covers}."""
    found = {}
    for group, (start, stop) in zip(right, window, strict=True):
        inner = math.prod(known[x] for x in group[1:])
        if start % inner or stop % inner:
            return None
        found |= {x: (0, known[x]) for x in group[1:]}
        found[group[0]] = start // inner, stop // inner
    return found


def _merged(dims: list[list[int]]) -> list[list[int]]:
    """Neighbours that are one dim there and in ours become one."""
    merged: list[list[int]] = []
    for dim in dims:
        start, stop, size, stride, ours = dim
        if merged and (start, stop) == (0, size):
            outer = merged[-1]
            if outer[3] == size * stride and outer[4] == size * ours:
                outer[0], outer[1], outer[2] = (x * size for x in outer[:3])
                outer[3], outer[4] = stride, ours
                continue
        merged.append(list(dim))
    return merged


@dataclasses.dataclass(frozen=True)
class Job:
    """A tensor of a file, the weight it holds a part of, and which part."""

    entry: tensor_files.Entry
    tensor: names.Tensor
    key: str
    spec: spec_lib.Spec
    stack: Stack | None = None
    place: Place = ()


def fill(jobs: list[Job]) -> None:
    """Fill the stacks of all jobs from their files.

    Raises:
      config.InputError: see the module docstring.
    """
    jobs = sorted(jobs, key=lambda job: (job.entry.path, job.entry.start))
    workers = min(8, os.cpu_count() or 1)
    scratch: queue.SimpleQueue[_Scratch] = queue.SimpleQueue()
    for _ in range(workers):
        scratch.put(_Scratch())
    pending: collections.deque[tuple[list[Any], list[Any], int]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool, _Files() as files:
        try:
            for _, group in itertools.groupby(jobs, key=lambda job: job.entry):
                group = list(group)
                tasks, after, nbytes = _tasks(group, files, scratch)
                futures = [pool.submit(task) for task in tasks]
                pending.append((futures, after, nbytes))
                while pending and (
                    sum(held for _, _, held in pending) > PENDING_BYTES
                    or len(pending) > 64
                ):
                    _complete(*pending.popleft())
            while pending:
                _complete(*pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _complete(futures: list[Any], after: list[Any], _: int) -> None:
    for future in futures:
        future.result()
    for call in after:
        call()


def _tasks(
    jobs: list[Job], files: "_Files", scratch: Any
) -> tuple[list[Any], list[Any], int]:
    """(what threads do, what is to be done when they have, bytes held until then)."""
    entry = jobs[0].entry
    found: list[Rectangle] = []
    after: list[Any] = []
    held = 0
    for job in jobs:
        for window, out, done in job.stack.parts(job.place):
            made = rectangles(job.tensor, job.key, job.spec, window, out)
            if made is None:
                full = names.window(job.tensor, job.key, job.spec)
                whole = np.empty([stop for _, stop in full], out.dtype)
                made = rectangles(job.tensor, job.key, job.spec, full, whole)
                part = tuple(slice(*one) for one in window)
                after.append(functools.partial(np.copyto, out, whole[part]))
                held += whole.nbytes
            if done is not None:
                after.append(done)
                held += out.nbytes
            found += made
    tasks = []
    found.sort(key=_stretch)
    for (row, pitch, rows), group in itertools.groupby(found, key=_stretch):
        tasks += _blocks(files.at(entry), entry, row, pitch, rows, list(group), scratch)
    return tasks, after, held


def _stretch(one: Rectangle) -> tuple[int, int, int]:
    return one.row, one.pitch, len(one.out)


def _blocks(file, entry, row, pitch, rows, group, scratch) -> Iterator[Any]:
    """One stretch of rows of a tensor, block by block."""
    dtype = entry.numpy_dtype()
    if rows == 1:
        for one in group:
            for start in range(0, one.out.shape[1], CHUNK):
                out = one.out[:, start : start + CHUNK]
                at = row + one.column + start
                flat = Rectangle(at, out.shape[1], 0, out)
                block = _Block(file, entry, dtype, flat.row, flat.pitch, [flat])
                yield functools.partial(_run, block, scratch)
        return
    first = min(one.column for one in group)
    last = max(one.column + one.out.shape[1] for one in group)
    step = max(1, min(ROWS, BLOCK_BYTES // (pitch * dtype.itemsize)))
    for start in range(0, rows, step):
        parts = [
            Rectangle(row, pitch, one.column - first, one.out[start : start + step])
            for one in group
        ]
        at = row + start * pitch + first
        block = _Block(file, entry, dtype, at, pitch, parts, last - first)
        yield functools.partial(_run, block, scratch)


@dataclasses.dataclass(frozen=True)
class _Block:
    """Rows of a tensor, `width` numbers of each from number `start` on."""

    file: int
    entry: tensor_files.Entry
    dtype: np.dtype
    start: int
    pitch: int
    parts: list[Rectangle]
    width: int = 0


class _Scratch:
    """Memory of one thread for a block, rows apart so that they do not share a cache
    set: powers of two would make every row fall on the same lines."""

    def __init__(self) -> None:
        self._held: dict[str, np.ndarray] = {}
        self._views: tuple[Any, list[memoryview]] = (None, [])

    def views(self, rows: np.ndarray) -> list[memoryview]:
        """The rows as `preadv` takes them, kept: making 512 takes as long as a read."""
        form = (rows.ctypes.data, rows.shape, rows.strides)
        if self._views[0] != form:
            self._views = form, [memoryview(row) for row in rows]
        return self._views[1]

    def rows(self, name: str, rows: int, width: int, dtype: np.dtype) -> np.ndarray:
        lines = -(-width * dtype.itemsize // 64) | 1
        size = rows * lines * 64
        if self._held.get(name, np.empty(0)).size < size:
            self._held[name] = np.empty(size, np.uint8)
        raw = self._held[name][:size].reshape(rows, lines * 64)
        return raw[:, : width * dtype.itemsize].view(dtype)


def _run(block: _Block, scratch: Any) -> None:
    held = scratch.get()
    try:
        _copy(block, held)
    finally:
        scratch.put(held)


def _copy(block: _Block, held: _Scratch) -> None:
    """Read a block and put it where it belongs."""
    out = block.parts[0].out
    at = block.entry.start + block.start * block.dtype.itemsize
    if block.width == 0 and out.dtype == block.dtype and out.flags.c_contiguous:
        _read(block, at, [memoryview(out[0].view(np.uint8))])
        return
    width = block.width or block.pitch
    there = held.rows("read", len(out), width, block.dtype)
    raw = there.view(np.uint8)
    if width == block.pitch:
        _read(block, at, held.views(raw))
    else:
        for i, row in enumerate(held.views(raw)):
            _read(block, at + i * block.pitch * block.dtype.itemsize, [row])
    if out.dtype != block.dtype:
        cast = held.rows("cast", len(out), width, out.dtype)
        _cast(there, cast)
        there = cast
    # As plain bits: NumPy copies bfloat16, a stranger to it, with Python's lock held.
    bits = np.dtype(f"u{out.dtype.itemsize}")
    there = there.view(bits)
    for part in block.parts:
        columns = slice(part.column, part.column + part.out.shape[1])
        part.out.view(bits)[...] = there[:, columns]


def _cast(there: np.ndarray, out: np.ndarray) -> None:
    if there.dtype == jnp.bfloat16 and out.dtype == np.float32:
        # The upper half of a float32; by whole words it needs no lock of Python's.
        np.left_shift(there.view(np.uint16), 16, out=out.view(np.uint32), dtype="u4")
        return
    with np.errstate(all="ignore"):  # infinities and NaN are the file's own
        np.copyto(out, there, casting="unsafe")


def _read(block: _Block, at: int, views: list[memoryview]) -> None:
    """Fill views, which follow each other in the file, from place `at` on."""
    wanted = sum(map(len, views))
    got = os.preadv(block.file, views, at) if wanted else 0
    done = 0
    for view in views if got < wanted else ():
        start = max(0, min(len(view), got - done))
        while start < len(view):
            more = os.preadv(block.file, [view[start:]], at + done + start)
            if more == 0:
                raise config.InputError(
                    f"{block.entry.path} ended while it was read: it was changed; copy "
                    "it anew"
                )
            start += more
        done += len(view)


class _Files:
    """Open files by path, closed together."""

    def __init__(self) -> None:
        self._open: dict[pathlib.Path, int] = {}

    def __enter__(self) -> "_Files":
        return self

    def at(self, entry: tensor_files.Entry) -> int:
        """The open file of a tensor; files come in order, so those before are done."""
        if entry.path not in self._open:
            self._open[entry.path] = os.open(entry.path, os.O_RDONLY)
        return self._open[entry.path]

    def __exit__(self, *_: Any) -> None:
        for file in self._open.values():
            os.close(file)
