# SPDX-License-Identifier: Apache-2.0
"""Experiment files in, frozen records out; a user's mistake becomes an InputError.

An experiment file is Python with `get_config(arg) -> ml_collections.ConfigDict`. It is
loaded by `load("experiments/x.py:tiny")`, changed by `override` (dotted keys from the
command line) and turned once into typed frozen dataclasses by `freeze`. Below that door
no code reads a ConfigDict.

An experiment file is code and is run: load only files you would execute.

Formats: overrides are text; a value is read as a Python literal where the field is not
a string, so `--config.mesh.data=4`, `--config.optim.lr_peak=1e-4` and
`--config.data.sources='[{"path": "x"}]'` all work.
Invariants: `freeze(cls, thaw(record)) == record`; thaw gives only JSON types.
Raises: InputError for an unknown key (with the nearest name), a value of a wrong type,
a missing file, an experiment file without `get_config` or given an unknown argument.
"""

import ast
import contextlib
import dataclasses
import difflib
import pathlib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any


class InputError(ValueError):
    """A mistake the user can fix: says the value, what was wanted, and the fix."""


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint such as "; did you mean 'lr_peak'?" or the list of known names."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, 1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""


def load(path_and_arg: str) -> Any:
    """The ConfigDict of `get_config(arg)` in the experiment file `path[:arg]`."""
    module, arg = load_module(path_and_arg)
    if not hasattr(module, "get_config"):
        raise InputError(
            f"{path_and_arg}: the file has no get_config(arg); an experiment file "
            "must define get_config returning an ml_collections.ConfigDict"
        )
    made = module.get_config(arg)
    if not hasattr(made, "keys"):
        raise InputError(
            f"{path_and_arg}: get_config returned {made!r}; wanted an "
            "ml_collections.ConfigDict"
        )
    return made


def variant(arg: str | None, *known: str) -> str:
    """The argument of an experiment file: one of `known`, or "" where none is given."""
    if arg and arg not in known:
        raise InputError(f"experiment argument {arg!r}{nearest(arg, known)}")
    return arg or ""


def load_module(path_and_arg: str) -> tuple[types.ModuleType, str | None]:
    """The experiment file as a module, and the text after the colon (or None)."""
    path_text, _, arg = str(path_and_arg).partition(":")
    path = pathlib.Path(path_text)
    if not path.is_file():
        near = ""
        if path.parent.is_dir():
            near = nearest(path.name, [p.name for p in path.parent.glob("*.py")])
        raise InputError(f"experiment file {path_text!r} does not exist{near}")
    name = "qwen_jax_experiment_" + path.stem
    if path.suffix != ".py":
        raise InputError(
            f"{path_text}: it is not a Python file; wanted an experiment file (NAME.py)"
        )
    module = types.ModuleType(name)
    module.__file__ = str(path)
    # Not imported: Python would keep its bytecode, and take that for the bytecode of a
    # file that was changed within the same second and is as long as before.
    exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    return module, (arg or None)


def override(config: Any, assignments: Iterable[tuple[str, str]]) -> Any:
    """Set dotted keys to values given as text; the type comes from the old value."""
    for key, text in assignments:
        node, parts = config, key.split(".")
        for depth, part in enumerate(parts):
            if not isinstance(node, Mapping) and not hasattr(node, "keys"):
                raise InputError(
                    f"--config.{key}: {'.'.join(parts[:depth])!r} is a value, not a "
                    "group; set it directly"
                )
            if part not in node:
                raise InputError(
                    f"--config.{key}: unknown key {part!r}{nearest(part, node.keys())}"
                )
            if depth < len(parts) - 1:
                node = node[part]
        old = node[parts[-1]]
        value = _parse(text, old, key)
        if hasattr(node, "ignore_type"):
            with node.ignore_type():
                node[parts[-1]] = value
        else:
            node[parts[-1]] = value
    return config


def _parse(text: str, old: Any, key: str) -> Any:
    """Text from the command line -> a value of the kind that `old` is."""
    if isinstance(old, str):
        return text
    if isinstance(old, bool):
        if text.lower() in ("true", "1", "yes"):
            return True
        if text.lower() in ("false", "0", "no"):
            return False
        raise InputError(f"--config.{key}={text}: wanted true or false")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        if old is None:
            return text
        raise InputError(
            f"--config.{key}={text}: wanted a value like {old!r} ({_kind(old)})"
        ) from None
    if isinstance(old, int) and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e6 for a count of steps or tokens
    if isinstance(old, int | float) and not isinstance(value, int | float):
        raise InputError(f"--config.{key}={text}: wanted a number like {old!r}")
    if isinstance(old, int) and isinstance(value, float):
        raise InputError(f"--config.{key}={text}: wanted a whole number like {old!r}")
    if hasattr(old, "keys") and not isinstance(value, dict):
        raise InputError(
            f"--config.{key}={text}: {key!r} is a group with the keys "
            f"{', '.join(old.keys())}; set one of them"
        )
    return value


def _kind(value: Any) -> str:
    return type(value).__name__


def freeze(cls: type, node: Any, *, at: str = "") -> Any:
    """ConfigDict or dict -> frozen dataclass `cls`, nested records included.

    Args:
      cls: a dataclass type; nested dataclass fields and `tuple[Record, ...]` fields
        are frozen in turn, lists become tuples, ints are accepted for floats.
      node: mapping of field names to values.
      at: dotted place of `node` in the whole config, for messages.
    Raises:
      InputError: unknown key, missing key, wrong type. A ValueError from a record's
        own `__post_init__` is given the place and passed on as InputError.
    """
    if dataclasses.is_dataclass(node) and isinstance(node, cls):
        return node
    where = at or "the config"
    if not hasattr(node, "keys"):
        raise InputError(f"{where}: wanted a group of keys, got {node!r}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in node:
        if key not in fields:
            raise InputError(f"unknown key {key!r} in {where}{nearest(key, fields)}")
    hints = typing.get_type_hints(cls)
    values = {
        key: _coerce(hints[key], node[key], f"{at}.{key}" if at else key)
        for key in node
    }
    try:
        return cls(**values)
    except TypeError as error:
        missing = [
            name
            for name, f in fields.items()
            if name not in values
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ]
        if not missing:
            raise
        raise InputError(f"{where}: missing {', '.join(missing)}") from error
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def _coerce(hint: Any, value: Any, at: str) -> Any:
    """`value` as the annotated type; InputError naming the place when it is not."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        lists = any(typing.get_origin(arg) is tuple for arg in args)
        if isinstance(value, str) and (
            value == "None" or (lists and value[:1] in "([")
        ):
            # Text stays text where the old value was some, so it is read only here.
            with contextlib.suppress(ValueError, SyntaxError):
                value = ast.literal_eval(value)
        if value is None and type(None) in args:
            return None
        errors = []
        for arg in args:
            if arg is type(None):
                continue
            try:
                return _coerce(arg, value, at)
            except InputError as error:
                errors.append(str(error))
        raise InputError("; or ".join(errors))
    if dataclasses.is_dataclass(hint):
        return freeze(hint, value, at=at)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{at}: wanted a list, got {value!r}")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_coerce(args[0], v, f"{at}[{i}]") for i, v in enumerate(value))
        if len(args) != len(value):
            raise InputError(f"{at}: wanted {len(args)} values, got {value!r}")
        pairs = enumerate(zip(args, value, strict=True))
        return tuple(_coerce(a, v, f"{at}[{i}]") for i, (a, v) in pairs)
    if origin is dict or hint is dict:
        if not hasattr(value, "items"):
            raise InputError(f"{at}: wanted a group of keys, got {value!r}")
        inner = args[1] if args else Any
        return {k: _coerce(inner, v, f"{at}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint in (int, float, str, bool):
        wrong = not isinstance(value, hint)
        if wrong or (hint is not bool and isinstance(value, bool)):
            raise InputError(f"{at}: wanted {hint.__name__}, got {value!r}")
    return value


def thaw(record: Any) -> Any:
    """Frozen records -> plain dicts, lists, numbers and text (JSON types)."""
    if dataclasses.is_dataclass(record):
        return {
            f.name: thaw(getattr(record, f.name))
            for f in dataclasses.fields(record)
            if f.init
        }
    if hasattr(record, "items"):
        return {k: thaw(v) for k, v in record.items()}
    if isinstance(record, list | tuple):
        return [thaw(v) for v in record]
    return record


def merge(base: Mapping, changes: Mapping) -> dict[str, Any]:
    """`base` with `changes` in it; of a group only the keys that are given change."""
    out = dict(base)
    for key, value in changes.items():
        groups = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merge(out[key], value) if groups else value
    return out


def flatten(node: Mapping, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists stay values."""
    flat = {}
    for key, value in node.items():
        if hasattr(value, "items") and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def diff(old: Mapping, new: Mapping) -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) for every key that differs."""
    old_flat, new_flat = flatten(old), flatten(new)
    absent = "<absent>"
    return [
        (key, old_flat.get(key, absent), new_flat.get(key, absent))
        for key in sorted(old_flat.keys() | new_flat.keys())
        if old_flat.get(key, absent) != new_flat.get(key, absent)
    ]
