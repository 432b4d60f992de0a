# SPDX-License-Identifier: Apache-2.0
"""Named arrays -> files -> arrays on any mesh or process count, through Orbax.

A pytree is flattened here to {"params.layers.q_w": leaf}, and Orbax sees only that flat
dict: the structure of optimizer states or dataclasses never enters the files, so a
renamed class cannot make a checkpoint unreadable, and without OCDBT each leaf is a
folder of that name (a damaged file names its leaf).

Source: Orbax `PyTreeCheckpointHandler`, zarr3. Deviation: its `AsyncCheckpointer` is
not used, because a process whose write fails leaves the others in that class's barrier
until a time limit; `manager.py` holds the votes and the atomic commit instead.

Leaves: jax.Array (any sharding, multi-process too), numpy arrays and scalars, Python
bool, int and float. Bits are kept for every dtype; empty arrays live in the table only.
Invariants: once `start_write` returns, the caller may donate or overwrite the leaves.
Raises: config.InputError for a leaf or a name that cannot be stored.
"""

import asyncio
import concurrent.futures
import logging
import math
import pathlib
import urllib.parse
from collections.abc import Coroutine, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from qwen_jax import config

Table = dict[str, list]  # leaf name -> [dtype name, shape]
_RESERVED = ("_METADATA", "_sharding", "array_metadatas", "manifest.ocdbt", "ocdbt.")


class _OrbaxQuiet(logging.Filter):
    """Keeps Orbax's progress notes off the terminal.

    Its records with a traceback go too: the same exception is raised to the caller by
    the future that failed, and is reported once, there.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if "orbax" not in record.pathname:
            return True
        return record.levelno >= logging.ERROR and not record.exc_info


logging.getLogger("absl").addFilter(_OrbaxQuiet())


def named_leaves(tree: Any) -> dict[str, Any]:
    """{"a.b.0": leaf}, in tree order; names are safe as folder names."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        dotted = jax.tree_util.keystr(path, simple=True, separator=".") or "leaf"
        name = urllib.parse.quote(dotted, safe="[]=+@,")
        if name in leaves or name.startswith((*_RESERVED, ".")):
            raise config.InputError(
                f"checkpoint: the leaf name {name!r} is taken or reserved; rename the "
                "key in the tree"
            )
        leaves[name] = leaf
    return leaves


def table(leaves: Mapping[str, Any]) -> Table:
    """Name -> [dtype, shape] of every leaf."""
    return {name: _facts(name, leaf) for name, leaf in leaves.items()}


def _facts(name: str, leaf: Any) -> list:
    if isinstance(leaf, bool | int | float):
        leaf = np.asarray(leaf)
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise config.InputError(
            f"checkpoint: leaf {name} is a {type(leaf).__name__}; wanted an array or a "
            "number: put text and lists into meta"
        )
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) or leaf.dtype == object:
        raise config.InputError(
            f"checkpoint: leaf {name} has dtype {leaf.dtype}, which has no file "
            "format; store jax.random.key_data(key), or a seed in meta"
        )
    return [str(leaf.dtype), [int(size) for size in leaf.shape]]


def total_bytes(leaves: Mapping[str, Any]) -> int:
    """Bytes of all leaves, each counted once whatever its replication."""
    return sum(math.prod(np.shape(x)) * _dtype(x).itemsize for x in leaves.values())


def _dtype(leaf: Any) -> np.dtype:
    return np.dtype(leaf.dtype if hasattr(leaf, "dtype") else type(leaf))


def start_write(
    folder: pathlib.Path, leaves: Mapping[str, Any], *, ocdbt: bool, compress: bool
) -> list:
    """Copy the leaves to host memory and start writing; returns Orbax's futures."""
    storable = {}
    for name, leaf in leaves.items():
        if math.prod(np.shape(leaf)) == 0:
            continue
        # The caller may write into a numpy array as soon as we return, so it is copied;
        # jax arrays are copied by Orbax before async_save returns.
        storable[name] = leaf if isinstance(leaf, jax.Array) else np.array(leaf)
    if not storable:
        return []
    spec = ocp.args.PyTreeSave(storable)
    return _run(_handler(ocdbt, compress).async_save(epath.Path(folder), args=spec))


def _handler(ocdbt: bool, compress: bool = False) -> ocp.PyTreeCheckpointHandler:
    """Orbax's writer and reader, with its choices for jax arrays made here."""
    write_array = ocp.type_handlers.ArrayHandler(
        # Sharing a replicated array's writing among its replicas compiles one slice
        # per array and replica inside the first save (seconds of blocking on a mesh of
        # 8), and inside one process gains nothing. Between processes it does, when the
        # slices are large.
        use_replica_parallel=jax.process_count() > 1,
        min_slice_bytes_for_replica_parallel=32 << 20,
        # The files of shardings and layouts are for readers that bring none.
        enable_write_sharding_file=False,
        array_metadata_store=None,
    )
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler()), (jax.Array, write_array)
    )
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=ocdbt,
        use_zarr3=True,
        use_compression=compress,
        type_handler_registry=registry,
    )


def finish_write(folder: pathlib.Path) -> None:
    """After every process has written: merge the per-process parts (primary only)."""
    if any(folder.glob("ocdbt.process_*")):
        _handler(ocdbt=True).finalize(epath.Path(folder))


def mismatches(stored: Table, wanted: Table, *, subset: bool) -> list[str]:
    """What differs between a checkpoint's leaves and the wanted ones, in words."""
    lines = []
    for name in dict.fromkeys([*wanted, *stored]):
        if name not in stored:
            lines.append(f"{name}: missing in the checkpoint")
        elif name not in wanted:
            if not subset:
                lines.append(f"{name}: in the checkpoint but not wanted")
        elif stored[name] != wanted[name]:
            old, new = (f"{d}{s}" for d, s in (stored[name], wanted[name]))
            lines.append(f"{name}: {old} in the checkpoint, {new} wanted")
    return lines


def read(folder: pathlib.Path, abstract: Any) -> Any:
    """Arrays for every leaf of `abstract`, whose table must agree with the files.

    A leaf with a sharding becomes a jax.Array there; a ShapeDtypeStruct without one
    and a numpy leaf become numpy arrays; a Python number stays a Python number.
    """
    wanted = named_leaves(abstract)
    items, args, restored = {}, {}, {}
    for name, leaf in wanted.items():
        sharding = getattr(leaf, "sharding", None)
        shape, dtype = np.shape(leaf), _dtype(leaf)
        if math.prod(shape) == 0:
            empty = np.zeros(shape, dtype)
            restored[name] = jax.device_put(empty, sharding) if sharding else empty
            continue
        items[name] = jax.ShapeDtypeStruct(shape, dtype)
        if sharding is None:
            args[name] = ocp.RestoreArgs(restore_type=np.ndarray)
        else:
            args[name] = ocp.ArrayRestoreArgs(
                sharding=sharding, global_shape=shape, dtype=dtype
            )
    if items:
        spec = ocp.args.PyTreeRestore(items, restore_args=args, partial_restore=True)
        # Whether the files are OCDBT is read from them.
        restored |= _handler(ocdbt=True).restore(epath.Path(folder), args=spec)
    for name, leaf in wanted.items():
        if isinstance(leaf, bool | int | float):
            restored[name] = type(leaf)(restored[name].item())
    ordered = [restored[name] for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(abstract), ordered)


def _run(coroutine: Coroutine) -> Any:
    """Drive a coroutine to its end, also where a loop already runs (a notebook)."""

    def drive() -> Any:
        loop = asyncio.new_event_loop()
        try:
            return loop.run_until_complete(coroutine)
        finally:
            loop.close()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return drive()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(drive).result()
