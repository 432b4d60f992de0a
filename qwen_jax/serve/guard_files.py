# SPDX-License-Identifier: Apache-2.0
"""The weights of a guard as a folder: JSON facts and float32 tensors, nothing to run.

Format: config.json with format, version and the facts; model.safetensors with a tensor
for each weight, named by its path in the tree ("head.query.pre_df").
Invariants: what is read has exactly the declared tensors, shapes and dtype, and finite
numbers.
Raises: config.InputError naming the folder, what is wrong and the fix.
"""

import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import config
from qwen_jax import params as params_lib
from qwen_jax.models import json_files, tensor_files, tensor_writer

VERSION = 1


def _named(tree: Any) -> dict[str, Any]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=params_lib.is_param)
    return {".".join(key.key for key in path): leaf for path, leaf in flat}


def save(folder: str, form: str, facts: dict[str, Any], params: Any) -> None:
    """Write a folder of a format; one that was there is replaced as a whole."""
    tensors = {
        name: np.ascontiguousarray(np.asarray(value, np.float32))
        for name, value in _named(params).items()
    }
    tensor_writer.publish(
        pathlib.Path(folder),
        [tensor_writer.Planned(k, v.shape, "float32") for k, v in tensors.items()],
        iter(tensors.items()),
        {"format": form, "version": VERSION, **facts},
        shard_bytes=5_000_000_000,
    )


def facts_of(folder: str, form: str) -> dict[str, Any]:
    """What config.json says.

    Raises:
      config.InputError: there is none, or it is of another format or version.
    """
    path = pathlib.Path(folder) / "config.json"
    if not path.is_file():
        raise config.InputError(
            f"{folder} is no guard head (it has no config.json): make one with "
            "`qwen-jax guard train`"
        )
    held = json_files.read(path)
    if held.get("format") != form or held.get("version") != VERSION:
        raise config.InputError(
            f"{folder}: format {json_files.shown(held.get('format'))} version "
            f"{json_files.shown(held.get('version'))}: wanted {form!r} {VERSION}"
        )
    return held


def params_of(folder: str, declared: Any) -> Any:
    """The weights that a tree of `Param` declares."""
    entries = {one.name: one for one in tensor_files.entries(pathlib.Path(folder))}
    wanted = _named(declared)
    if set(entries) != set(wanted):
        odd = sorted(set(entries) ^ set(wanted))
        raise config.InputError(f"{folder}: tensors {json_files.shown(odd)} do not fit")
    tree = jax.tree.structure(declared, is_leaf=params_lib.is_param)
    return tree.unflatten(_tensor(entries[name], p) for name, p in wanted.items())


def _tensor(entry: tensor_files.Entry, p: params_lib.Param) -> jax.Array:
    if entry.shape != p.shape or entry.dtype != "F32":
        raise config.InputError(
            f"{entry.path}: tensor {entry.name} is {entry.dtype} {entry.shape}: wanted "
            f"F32 {p.shape}"
        )
    read = np.fromfile(entry.path, "<f4", math.prod(p.shape), offset=entry.start)
    if not np.isfinite(read).all():
        raise config.InputError(
            f"{entry.path}: tensor {entry.name} has numbers that are not finite: train "
            "the head anew"
        )
    return jnp.asarray(read.reshape(p.shape))
