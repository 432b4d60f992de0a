# SPDX-License-Identifier: Apache-2.0
"""Files of a corpus, on a local disk or behind any fsspec URL: find, check, read,
cache.

A path is a file, a folder (searched to any depth, linked folders too), a glob, or a URL
of these ("s3://...", "gs://...", "memory://..."; "file://" is local). Keys and tokens
for a store come from fsspec's own configuration.

Formats: `File.version` is the time of change in ns of a local file, the ETag or time of
a remote one; `digest` is of the content alone, so that a copied corpus has the same
one: the ETag, or sha256 of (size, first and last 64 KiB, 14 blocks between).
Invariants: files come sorted by name; a cache entry is whole or absent (written aside,
then renamed), whoever is killed when.
Raises: InputError for what is missing, unreadable, changed since it was found, or of a
protocol that is not installed, and for a full disk under the cache.
"""

import dataclasses
import errno
import fnmatch
import glob
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import socket
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from qwen_jax import config

BLOCK_BYTES = 1 << 20
_EDGE_BYTES = 1 << 16

_BINARY = (
    "7z a avi bin bmp bz2 ckpt class db dll doc docx dylib eot exe flac gguf gif h5 "
    "hdf5 ico icns jar jpeg jpg mkv mov mo mp3 mp4 npy npz o odt ogg otf pdf pickle "
    "pkl png ppt pptx pt pth pyc pyd rar safetensors so sqlite sqlite3 tar tar.gz "
    "tar.xz tgz tif tiff ttf wav webp whl woff woff2 xls xlsx xz zip"
)
# Hidden files, caches and files whose name says that they hold no text.
DEFAULT_EXCLUDE = (".*", "__pycache__", *(f"*.{suffix}" for suffix in _BINARY.split()))


@dataclasses.dataclass(frozen=True)
class File:
    """A file as it was found. `root` is "" for a local file, else the URL to open."""

    name: str
    path: str
    size: int
    version: str
    etag: str = ""
    root: str = ""


def find(
    path: str, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[list[File], int]:
    """The files under a path, sorted by name; how many files and folders it leaves out.

    A file given by its own name is never excluded. Patterns are shell-style; `include`
    is met by the relative path or the name, `exclude` by these or any folder's name.
    """
    if path.startswith("file://"):
        path = path.removeprefix("file://")
    choice = _Choice(include, exclude)
    find_in = _find_remote if "://" in path else _find_local
    return sorted(find_in(path, choice), key=lambda file: file.name), choice.left_out


class _Choice:
    """Which files of a folder are wanted; counts what it leaves out."""

    def __init__(self, include: Sequence[str], exclude: Sequence[str]):
        # One expression for all patterns: a folder may hold a million names.
        self._include, self._exclude = _any_of(include or ("*",)), _any_of(exclude)
        self.left_out = 0

    def wants(self, name: str, *, folder: bool = False) -> bool:
        """Whether a file, or the files of a folder, may be read."""
        texts = (name, *name.split("/"))
        wanted = not any(map(self._exclude, texts))
        if wanted and not folder:
            wanted = any(map(self._include, (texts[0], texts[-1])))
        self.left_out += not wanted
        return wanted


def _any_of(patterns: Sequence[str]) -> Callable[[str], Any]:
    # A negative look-ahead of nothing never matches: no pattern, no match.
    patterns = [p for one in patterns for p in (one, one.removeprefix("**/"))]
    joined = "|".join(fnmatch.translate(pattern) for pattern in patterns) or "(?!)"
    return re.compile(joined).match


def _find_local(path: str, choice: _Choice) -> list[File]:
    path = os.path.expanduser(path)
    if os.path.isfile(path):
        return [local_file(path, os.path.basename(path))]
    if os.path.isdir(path):
        return [local_file(f, name) for f, name in _walk(path, choice)]
    if glob.has_magic(path):
        root = os.path.dirname(_before_magic(path)) or "."
        found = [f for f in glob.glob(path, recursive=True) if os.path.isfile(f)]
        names = [os.path.relpath(f, root).replace(os.sep, "/") for f in found]
        pairs = [p for p in zip(found, names, strict=True) if choice.wants(p[1])]
        return [local_file(f, name) for f, name in pairs]
    parent, near = pathlib.Path(path).parent, ""
    if parent.is_dir():
        near = config.nearest(os.path.basename(path), sorted(os.listdir(parent))[:1000])
    hint = near if near.startswith("; did") else ""
    raise config.InputError(f"data path {path!r} does not exist{hint}")


def _before_magic(path: str) -> str:
    """The part of a glob before its first wildcard."""
    return path[: min(path.index(c) for c in "*?[" if c in path)]


def _walk(root: str, choice: _Choice) -> Iterator[tuple[str, str]]:
    """(path, relative name) of the wanted files of a folder."""

    def refuse(error: OSError) -> None:  # os.walk alone would leave the folder out
        raise _unreadable(error.filename, error) from error

    seen = set()
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder above would go round for ever
            folders.clear()
            continue
        seen.add(real)
        inner = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if inner == "." else inner + "/"
        folders[:] = [f for f in folders if choice.wants(prefix + f, folder=True)]
        for name in names:
            path = os.path.join(folder, name)
            if choice.wants(prefix + name) and os.path.isfile(path):
                yield path, prefix + name


def local_file(path: str, name: str) -> File:
    """A local file as it is now."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    return File(name, path, stat.st_size, str(stat.st_mtime_ns))


def _find_remote(url: str, choice: _Choice) -> list[File]:
    fs, path = _open_store(url)
    try:
        if glob.has_magic(path):
            found = fs.glob(path, detail=True)
            root = _before_magic(path).rpartition("/")[0]
        elif fs.isfile(path):
            return [_remote_file(url, path, path.rpartition("/")[2], fs.info(path))]
        else:
            found, root = fs.find(path, detail=True), path
    except OSError as error:
        raise _unreadable(url, error) from error
    named = [(p, p.removeprefix(root).lstrip("/"), found[p]) for p in found]
    named = [one for one in named if one[2].get("type") == "file"]
    if not named and not glob.has_magic(path) and not fs.exists(path):
        raise config.InputError(f"data path {url!r} does not exist")
    return [_remote_file(url, *one) for one in named if choice.wants(one[1])]


def _remote_file(url: str, path: str, name: str, info: dict[str, Any]) -> File:
    etag = str(info.get("ETag") or info.get("etag") or info.get("md5Hash") or "")
    times = (info.get(k) for k in ("mtime", "LastModified", "updated", "created"))
    time = next((t for t in times if t is not None), "")
    # Some stores list a time as a number and tell it as a datetime.
    version = etag or str(time.timestamp() if hasattr(time, "timestamp") else time)
    if info.get("size") is None:
        raise config.InputError(
            f"{path!r}: the server does not tell its size, so parts of it cannot be "
            "read; copy it to a disk or a store that does"
        )
    return File(name, path, int(info["size"]), version, etag, url)


def _open_store(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        fix = ""
        if isinstance(error, ImportError) and url.startswith(("gs://", "gcs://")):
            fix = ": pip install 'qwen_jax[gcs]'"
        raise config.InputError(f"cannot open {url!r}: {error}{fix}") from error


def _unreadable(path: str, error: OSError) -> config.InputError:
    if isinstance(error, FileNotFoundError):
        return config.InputError(
            f"{path!r} is gone since it was found; put it back, or start a new run"
        )
    return config.InputError(f"cannot read {path!r}: {error.strerror or error}")


def check(file: File, stat: os.stat_result | None = None) -> None:
    """InputError naming the file when it is not the one that was found."""
    if file.root:
        fs, _ = _open_store(file.root)
        try:
            fs.invalidate_cache()
            now = _remote_file(file.root, file.path, file.name, fs.info(file.path))
        except OSError as error:
            raise _unreadable(file.path, error) from error
        same = (now.size, now.version) == (file.size, file.version)
    else:
        try:
            stat = stat or os.stat(file.path)
        except OSError as error:
            raise _unreadable(file.path, error) from error
        same = (stat.st_size, str(stat.st_mtime_ns)) == (file.size, file.version)
    if not same:
        raise config.InputError(
            f"{file.path!r} changed since the run read its size and index; put the old "
            "file back and resume, or start a new run on the new one"
        )


def read_spans(file: File, spans: Sequence[tuple[int, int]]) -> list[bytes]:
    """Bytes [start, stop) for every span, after a check that the file is the same."""
    if file.root:
        check(file)
        fs, _ = _open_store(file.root)
        starts, stops = zip(*spans, strict=True)
        try:
            return fs.cat_ranges([file.path] * len(spans), list(starts), list(stops))
        except OSError as error:
            raise _unreadable(file.path, error) from error
    try:
        with open(file.path, "rb", buffering=0) as handle:
            check(file, os.fstat(handle.fileno()))
            fd = handle.fileno()
            return [os.pread(fd, stop - start, start) for start, stop in spans]
    except OSError as error:
        raise _unreadable(file.path, error) from error


def open_binary(file: File) -> BinaryIO:
    """The file, open for reading."""
    if file.root:
        return _open_store(file.root)[0].open(file.path, "rb")
    return open(file.path, "rb")


def blocks(file: File) -> Iterator[bytes]:
    """The file's bytes in order, as stored."""
    try:
        with open_binary(file) as handle:
            while block := handle.read(BLOCK_BYTES):
                yield block
    except OSError as error:
        raise _unreadable(file.path, error) from error


class Broken(Exception):
    """A compressed stream that ends early ("truncated") or makes no sense ("corrupt").

    `sound` is the number of decompressed bytes that can be trusted: of a corrupt stream
    those before the member (gzip) or frame (zstd) that failed, whose checksum covers
    all of it. Never leaves this package: it becomes a counted broken record.
    """

    def __init__(self, reason: str, sound: int):
        super().__init__(reason)
        self.reason, self.sound = reason, sound


def unpacked(name: str, stream: Iterator[bytes]) -> Iterator[bytes]:
    """Decompressed blocks of a .gz or .zst stream (of several members), else as it is.

    Raises Broken after the last block.
    """
    if not name.endswith((".gz", ".zst")):
        yield from stream
        return
    make, errors = _decompressor(name)
    member, size, sound = None, 0, 0
    for block in stream:
        # Small bites bound the memory a very compressible block can ask for.
        bites = [block[i : i + 65536] for i in range(0, len(block), 65536)]
        while bites:
            member = member or make()
            try:
                out = member.decompress(bites.pop(0))
            except errors:
                raise Broken("corrupt", sound) from None
            size += len(out)
            if out:
                yield out
            if member.eof:
                sound = size
                if member.unused_data:
                    bites.insert(0, member.unused_data)
                member = None
    if member is not None:
        raise Broken("truncated", size)


def _decompressor(name: str) -> tuple[Callable[[], Any], type[Exception]]:
    if name.endswith(".gz"):
        return lambda: zlib.decompressobj(wbits=31), zlib.error
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError


def digest(file: File) -> str:
    """A hash of the content (see the module's words) that a copy elsewhere shares."""
    if file.etag:
        return f"etag:{file.etag.strip(chr(34))}"
    if file.size <= 4 * _EDGE_BYTES:
        spans = [(0, file.size)]
    else:
        step = file.size // 15
        spans = [(i * step, i * step + 4096) for i in range(1, 15)]
        spans += [(0, _EDGE_BYTES), (file.size - _EDGE_BYTES, file.size)]
    content = hashlib.sha256(str(file.size).encode())
    for part in read_spans(file, spans):
        content.update(part)
    return content.hexdigest()[:32]


class Cache:
    """Folders made once from facts: `<root>/<hash of the facts>/`."""

    def __init__(self, root: str = ""):
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self.root = pathlib.Path(root or os.path.join(base, "qwen_jax", "data"))

    def entry(
        self, facts: Sequence[Any], build: Callable[[pathlib.Path], None]
    ) -> pathlib.Path:
        """The folder for these facts, built in a folder aside if it is not there."""
        text = json.dumps(facts, sort_keys=True)
        path = self.root / hashlib.sha256(text.encode()).hexdigest()[:40]
        if path.is_dir():
            return path
        aside = self.root / f"{path.name}.{socket.gethostname()}.{os.getpid()}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._sweep(path.name)
            aside.mkdir()
            build(aside)
            try:
                aside.rename(path)
            except OSError:
                if not path.is_dir():  # else another process was quicker: use its own
                    raise
        except OSError as error:
            room = error.errno in (errno.ENOSPC, errno.EDQUOT)
            fix = "free some space" if room else "make it writable"
            raise config.InputError(
                f"cannot write the data cache {str(self.root)!r} "
                f"({error.strerror or error}); {fix}, or name another folder in "
                "data.cache_dir"
            ) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return path

    def keep(self, name: str, text: str) -> None:
        """Write a small file, if the cache can be written; `kept` may find it later."""
        path = self.root / name
        aside = path.with_name(f"{name}.{socket.gethostname()}.{os.getpid()}")
        try:
            if not path.exists():
                self.root.mkdir(parents=True, exist_ok=True)
                aside.write_text(text)
                aside.replace(path)
        except OSError as error:
            logging.getLogger(__name__).warning(
                "cannot keep %s: %s", path, error.strerror
            )

    def kept(self, name: str) -> str | None:
        """The text of a kept file, or None."""
        path = self.root / name
        return path.read_text() if path.is_file() else None

    def _sweep(self, name: str) -> None:
        """Remove what a killed process of this host left of the same entry."""
        for left in self.root.glob(f"{name}.{socket.gethostname()}.*"):
            pid = int(left.suffix[1:])
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                shutil.rmtree(left, ignore_errors=True)
            except PermissionError:
                continue  # another user's live process
