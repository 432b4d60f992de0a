# SPDX-License-Identifier: Apache-2.0
"""Sizes and digests of a step's files: the mark that makes a folder a checkpoint.

`manifest.json` is the last file written into a step folder, after all others are on
disk. A folder without a valid manifest for its own step is not a checkpoint, whatever
else it holds; so neither a killed save nor a full disk can produce one, and a file that
is later flipped, cut, removed or swapped with another step's is found and named.

Why it is needed: Orbax 0.12.8 stores no checksum of array data, and a single flipped
bit in a data file restores silently wrong in most cases.

Format: {"content": {...}, "sha256": digest of the content's canonical JSON}; content
has
  format 1, step, leaves {name: [dtype, shape]}, files {path: [bytes, sha256]}, and
  written (UTC). Paths are relative to the step folder. SHA-256 because it is as fast as
  CRC-32 where the CPU has the instructions, about 1 GB/s a core, and `sha256sum` checks
  it by hand.
Raises: OSError from the disk when writing, RuntimeError for a folder that is not what
was digested; reading never raises but names problems.
"""

import concurrent.futures
import datetime
import hashlib
import heapq
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

NAME = "manifest.json"
_BLOCK_BYTES = 1 << 20


def digest(path: pathlib.Path, *, sync: bool = False) -> tuple[int, str]:
    """(bytes read, sha256 in hex); with `sync` the file is also flushed to the disk."""
    sha, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            sha.update(block)
            size += len(block)
        if sync:
            os.fsync(file.fileno())
    return size, sha.hexdigest()


def sync_folder(path: pathlib.Path) -> None:
    """Flush a folder's entries, so that names created or renamed in it stay."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sizes(folder: pathlib.Path) -> dict[str, int]:
    """{path: bytes} of every file below `folder`, sorted by path."""
    paths = sorted(
        pathlib.Path(top, name).relative_to(folder).as_posix()
        for top, _, names in os.walk(folder)
        for name in names
    )
    found = _parallel(lambda path: os.stat(folder / path).st_size, paths)
    return dict(zip(paths, found, strict=True))


def deal(files: Mapping[str, int], num_shares: int) -> list[list[str]]:
    """The paths of {path: bytes} in shares of about equal work, each path in one.

    The largest go first, each to the share with the least so far; no share then has
    more than the mean by more than one file. The same in every process.
    """
    shares: list[list[str]] = [[] for _ in range(num_shares)]
    least = [(0, number) for number in range(num_shares)]
    for path in sorted(files, key=lambda path: (-files[path], path)):
        work, number = least[0]
        shares[number].append(path)
        # To open and flush a small file takes about as long as to read a block.
        heapq.heapreplace(least, (work + files[path] + _BLOCK_BYTES, number))
    return shares


def flush(folder: pathlib.Path, paths: Sequence[str]) -> dict[str, list]:
    """{path: [bytes, sha256]} of files below `folder`, each flushed to the disk."""
    records = _parallel(lambda path: list(digest(folder / path, sync=True)), paths)
    return dict(zip(paths, records, strict=True))


def write(
    folder: pathlib.Path, step: int, leaves: dict[str, list], files: dict[str, list]
) -> int:
    """Write the manifest of `files`, which must be all there is; their bytes.

    Args:
      folder: of the step.
      step: its number.
      leaves: name -> [dtype, shape].
      files: path -> [bytes, sha256], already on the disk (`flush`).
    Raises:
      RuntimeError: a file has appeared, gone or changed its size since its digest.
    """
    digested = {path: size for path, (size, _) in files.items()}
    changed = dict(sizes(folder).items() ^ digested.items())
    if changed:
        raise RuntimeError(
            f"{len(changed)} files appeared, went or grew while the step was being "
            f"finished ({', '.join(sorted(changed)[:3])}): does something else write "
            f"into {folder}?"
        )
    content = {
        "format": 1,
        "step": step,
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "leaves": leaves,
        "files": {path: files[path] for path in sorted(files)},
    }
    text = json.dumps({"content": content, "sha256": _content_digest(content)})
    with open(folder / NAME, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _parallel(sync_folder, [pathlib.Path(top) for top, _, _ in os.walk(folder)])
    return sum(digested.values())


def read(folder: pathlib.Path, step: int) -> tuple[dict[str, Any] | None, str]:
    """(content, "") of a valid manifest for `step`, or (None, what is wrong)."""
    path = folder / NAME
    try:
        record = json.loads(path.read_bytes())
        content, claimed = record["content"], record["sha256"]
        found = _content_digest(content)
    except FileNotFoundError:
        return None, f"{NAME} is missing"
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        return None, f"{NAME} is unreadable ({error})"
    if found != claimed:
        return None, f"{NAME} is damaged (its own digest is wrong)"
    if content.get("format") != 1:
        return None, f"{NAME} has format {content.get('format')!r}, this code reads 1"
    if content["step"] != step:
        return None, f"{NAME} belongs to step {content['step']}"
    return content, ""


def check_sizes(folder: pathlib.Path, content: dict[str, Any]) -> list[str]:
    """Problems visible without reading: files that are missing or of another size, and
    links out of the folder, which could name any file of the machine as a weight."""
    return _links_out(folder) + [
        problem
        for path, (size, _) in content["files"].items()
        if (problem := _size_problem(folder, path, size))
    ]


def check_digests(
    folder: pathlib.Path, content: dict[str, Any], paths: Sequence[str] | None = None
) -> list[str]:
    """Problems found by reading `paths` (all files when None) and comparing digests."""

    def problem(path: str) -> str:
        size, wanted = content["files"][path]
        if wrong := _size_problem(folder, path, size):
            return wrong
        try:
            found = digest(folder / path)[1]
        except OSError as error:
            return f"{path} cannot be read ({error.strerror or error})"
        return "" if found == wanted else f"{path} has changed (digest differs)"

    wanted_paths = list(content["files"]) if paths is None else paths
    return [text for text in _parallel(problem, wanted_paths) if text]


def _links_out(folder: pathlib.Path) -> list[str]:
    whole = folder.resolve()
    return [
        f"{path.relative_to(folder)} is a link out of the checkpoint"
        for top, folders, names in os.walk(folder)
        for path in (pathlib.Path(top, name) for name in sorted((*folders, *names)))
        if path.is_symlink() and not path.resolve().is_relative_to(whole)
    ]


def _size_problem(folder: pathlib.Path, path: str, size: int) -> str:
    parts = pathlib.PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts:
        return f"{path} is not a path inside of the checkpoint"
    try:
        found = os.stat(folder / path).st_size
    except OSError as error:
        return f"{path} is missing ({error.strerror or error})"
    return "" if found == size else f"{path} has {found} bytes instead of {size}"


def _content_digest(content: Any) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _parallel(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """[function(item)] over a few threads: hashing and reading release the GIL."""
    if len(items) < 2:
        return [function(item) for item in items]
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))
