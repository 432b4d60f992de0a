# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax pull`: a published model into a folder, at one commit, each file checked.

The hub's own client library downloads (extra `hub`: huggingface_hub; extra
`modelscope`: modelscope-hub) and goes on where a connection broke. Here the revision is
resolved to a commit first, the files are chosen, and what has come is compared with the
digests that the hub tells: sha256 of large files, git's blob id of the others. Given
again after an interruption, it brings only the files that are not whole.

Formats: DIR/source.json: source, repo, revision as asked, commit, endpoint, and bytes
and sha256 of each file. While files come it is named source.json.partial, so a folder
that was begun is known when the command is given again.
Invariants: only files that match INCLUDE (or --include) and none of NEVER: no pickles,
no code. A name that would leave the folder is refused. Nothing of another kind in the
folder is overwritten.
Environment: HF_ENDPOINT and HF_TOKEN, MODELSCOPE_ENDPOINT and MODELSCOPE_API_TOKEN.
Raises: config.InputError for a repository, revision or endpoint that cannot be had, a
file that is not what the hub tells, a full disk, a missing client library.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import hashlib
import importlib
import json
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Callable
from typing import Any

from qwen_jax import config

INCLUDE = ("*.safetensors", "*.json", "*.txt", "*.jinja")
NEVER = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.py", "*.so")
NEVER += ("*.h5", "*.msgpack", "*.npy", "*.npz", "*.sh", "*.exe", "*.joblib")
SOURCE, PARTIAL = "source.json", "source.json.partial"
CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a repository: its digest is sha256, or git's id where that is known."""

    name: str
    size: int
    sha256: str = ""
    git_sha1: str = ""


def run(args: argparse.Namespace) -> int:
    """The verb; returns the exit code."""
    if args.verify:
        if args.repo or args.dir:
            raise config.InputError("--verify DIR stands alone: give no REPO with it")
        return verify(pathlib.Path(args.verify))
    if not args.repo or not args.dir:
        raise config.InputError("wanted REPO[@REVISION] and DIR, or --verify DIR")
    repo, _, revision = args.repo.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo, re.ASCII) or ".." in repo:
        raise config.InputError(
            f"{args.repo!r} names no repository: wanted OWNER/NAME or "
            "OWNER/NAME@REVISION, such as Qwen/Qwen3-0.6B"
        )
    source = SOURCES[args.source](repo)
    pull(source, revision, pathlib.Path(args.dir), tuple(args.include))
    return 0


def pull(source: Any, revision: str, folder: pathlib.Path, include: tuple) -> None:
    """Bring one commit of a repository into a folder.

    Raises:
      config.InputError: see the module docstring.
    """
    before = _before(folder, source)
    commit, there = source.resolve(revision)
    files = choose(there, include)
    if not files:
        raise config.InputError(
            f"{source.repo} at {commit[:12]} has no file that matches "
            f"{' '.join(include or INCLUDE)}: set --include"
        )
    total = sum(file.size for file in files)
    print(f"{source.repo} at commit {commit}: {len(files)} files, {_size(total)}")
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "source": source.name,
        "repo": source.repo,
        "revision": revision,
        "commit": commit,
        "endpoint": source.endpoint,
    }
    (folder / PARTIAL).write_text(json.dumps(facts, indent=1) + "\n")
    here = [file for file in files if _is(folder / file.name, file)]
    _room(folder, total - sum(file.size for file in here))
    told: dict[str, Any] = {}
    for i, file in enumerate(files):
        if file not in here:
            _fetch(source, file, commit, folder)
        sha256 = file.sha256 or _sha256(folder / file.name)
        told[file.name] = {"bytes": file.size, "sha256": sha256}
        how = "was here" if file in here else "ok"
        print(f"[{i + 1}/{len(files)}] {file.name}  {_size(file.size)}  {how}")
    for name in set(before.get("files", ())) - set(told):
        if _plain(name):  # of another commit
            (folder / name).unlink(missing_ok=True)
    text = json.dumps(facts | {"files": told}, indent=1) + "\n"
    (folder / PARTIAL).write_text(text)
    os.replace(folder / PARTIAL, folder / SOURCE)
    shutil.rmtree(folder / source.scratch, ignore_errors=True)
    print(f"{folder} is complete; `qwen-jax pull --verify {folder}` checks it again")


def _before(folder: pathlib.Path, source: Any) -> dict[str, Any]:
    """What was pulled into the folder before; refuses a folder of anything else."""
    if not folder.exists():
        return {}
    if not folder.is_dir():
        raise config.InputError(f"{folder} is a file: name a folder")
    for name in (PARTIAL, SOURCE):
        path = folder / name
        if path.is_file():
            before = _record(path)
            if before.get("repo") != source.repo:
                raise config.InputError(
                    f"{folder} holds {before.get('repo')!r}: name another folder for "
                    f"{source.repo}"
                )
            return before
    if any(folder.iterdir()):
        raise config.InputError(
            f"{folder} holds something else (it has no {SOURCE}): name a new folder"
        )
    return {}


def _record(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise config.InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("files", {}), dict):
        raise config.InputError(f"{path} is not of `qwen-jax pull`")
    return found


def choose(there: list[File], include: tuple[str, ...]) -> list[File]:
    """The files to bring, smallest first: what is wrong shows early.

    Raises:
      config.InputError: a pattern asks for what is never brought; a name leaves the
        folder.
    """
    for pattern in include:
        if any(fnmatch.fnmatch(pattern, never) for never in NEVER):
            raise config.InputError(
                f"--include {pattern}: files that can run code are never brought "
                f"({' '.join(NEVER)})"
            )
    chosen = []
    for file in there:
        wanted = any(fnmatch.fnmatchcase(file.name, x) for x in include or INCLUDE)
        if not include and "/" in file.name:  # other forms of a model have folders
            wanted = False
        if any(fnmatch.fnmatch(file.name.lower(), never) for never in NEVER):
            wanted = False
        if wanted and not _plain(file.name):
            raise config.InputError(f"the repository names a file {file.name!r}")
        if wanted and file.name not in (SOURCE, PARTIAL):
            chosen.append(file)
    return sorted(chosen, key=lambda file: (file.size, file.name))


def _plain(name: str) -> bool:
    """Whether a name stays in its folder."""
    parts = name.split("/")
    return all(re.fullmatch(r"[\w+][\w.+ -]*", part, re.ASCII) for part in parts)


def _fetch(source: Any, file: File, commit: str, folder: pathlib.Path) -> None:
    """Bring one file; once more where it is not what the hub tells."""
    path = folder / file.name
    for again in (False, True):
        if path.is_symlink():
            path.unlink()
        source.fetch(file, commit, folder, again)
        if _is(path, file):
            return
        found = f"{path.stat().st_size:,} bytes" if path.is_file() else "nothing"
        path.unlink(missing_ok=True)
        print(f"{file.name} is not what the hub tells", file=sys.stderr)
    raise config.InputError(
        f"{file.name} of {source.repo} came twice otherwise than {source.endpoint} "
        f"tells ({found}; wanted {file.size:,} with digest "
        f"{file.sha256 or file.git_sha1}) and was removed: something on the way "
        "changes it; try again later or another endpoint"
    )


def _is(path: pathlib.Path, file: File) -> bool:
    """Whether a file is there with the size and digest that the hub tells."""
    if not path.is_file() or path.is_symlink() or path.stat().st_size != file.size:
        return False
    if file.sha256:
        return _sha256(path) == file.sha256
    digest = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    return not file.git_sha1 or _digest(path, digest) == file.git_sha1


def _sha256(path: pathlib.Path) -> str:
    return _digest(path, hashlib.sha256())


def _digest(path: pathlib.Path, digest: Any) -> str:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _room(folder: pathlib.Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise config.InputError(
            f"{folder}: {_size(wanted)} are to come and {_size(free)} are free: free "
            "some space, or name a folder on another disk"
        )


def _size(num_bytes: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:,.{0 if unit == 'bytes' else 1}f} {unit}"
        num_bytes /= 1000
    raise AssertionError


def verify(folder: pathlib.Path) -> int:
    """Compare the files of a folder with its source.json; 1 where they differ."""
    path = folder / SOURCE
    if not path.is_file():
        begun = "; a pull was begun here: give it again" * (folder / PARTIAL).is_file()
        raise config.InputError(f"{folder} has no {SOURCE}{begun}")
    found = _record(path)
    wrong = []
    for name, told in found.get("files", {}).items():
        if not _plain(name) or not isinstance(told, dict):
            raise config.InputError(f"{path} names a file {name!r}")
        file = File(name, told.get("bytes"), str(told.get("sha256")))
        if not _is(folder / name, file):
            wrong.append(name)
            print(f"{name}: {'changed' if (folder / name).exists() else 'missing'}")
    if wrong:
        print(
            f"{len(wrong)} of {len(found['files'])} files are not as they came; "
            f"`qwen-jax pull {found.get('repo')}@{found.get('commit')} {folder}` "
            "brings them anew"
        )
        return 1
    print(f"{len(found.get('files', {}))} files are as they came from {found['repo']}")
    return 0


def _client(name: str, package: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise config.InputError(
            f"this needs the package {package}: pip install 'qwen_jax[{extra}]'"
        ) from error


class Hub:
    """A repository of the Hugging Face hub, or of what HF_ENDPOINT names."""

    name, scratch = "hub", ".cache"

    def __init__(self, repo: str):
        self.client = _client("huggingface_hub", "huggingface_hub", "hub")
        self.repo = repo
        self.endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        self.endpoint = self.endpoint.rstrip("/")
        self.api = self.client.HfApi(endpoint=self.endpoint)

    def resolve(self, revision: str) -> tuple[str, list[File]]:
        """(commit, its files)."""
        found = self._told(
            lambda: self.api.model_info(
                self.repo, revision=revision or "main", files_metadata=True
            ),
            revision,
        )
        files = []
        for one in found.siblings or []:
            sha256 = one.lfs.sha256 if one.lfs else ""
            git = "" if sha256 else one.blob_id or ""
            files.append(File(one.rfilename, one.size or 0, sha256, git))
        return found.sha, files

    def fetch(self, file: File, commit: str, folder: pathlib.Path, again: bool) -> None:
        """Download one file into a folder."""
        bars = self.client.utils
        (
            bars.enable_progress_bars
            if sys.stderr.isatty()
            else bars.disable_progress_bars
        )()
        self._told(
            lambda: self.api.hf_hub_download(
                self.repo,
                file.name,
                revision=commit,
                local_dir=folder,
                force_download=again,
            ),
            commit,
        )

    def _told(self, call: Callable[[], Any], revision: str) -> Any:
        """What a call of the client gives; its errors in words of ours."""
        errors = self.client.errors
        try:
            return call()
        except errors.GatedRepoError as error:
            raise config.InputError(
                f"{self.repo} is gated: accept its conditions at {self.endpoint}/"
                f"{self.repo} and set HF_TOKEN to a token of your account"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise config.InputError(
                f"{self.endpoint} has no repository {self.repo!r}, or it is private "
                "and HF_TOKEN does not open it; check the name"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise config.InputError(
                f"{self.repo} has no revision {revision!r}: give a branch, tag or "
                "commit after the @"
            ) from error
        except errors.EntryNotFoundError as error:
            raise _unreachable(self.endpoint, error, "HF_ENDPOINT") from error
        except Exception as error:
            if isinstance(error, OSError) and error.errno:
                raise  # of the disk: the command line has words for it
            raise _unreachable(self.endpoint, error, "HF_ENDPOINT") from error


class ModelScope:
    """A repository of ModelScope, or of what MODELSCOPE_ENDPOINT names.

    It tells sha256 of files but no commit: a tag pins a model, and source.json keeps
    the digests, which tell whether it is the same.
    """

    name, scratch = "modelscope", "._____temp"

    def __init__(self, repo: str):
        self.client = _client("modelscope_hub", "modelscope-hub", "modelscope")
        self.errors = importlib.import_module("modelscope_hub.errors")
        self.repo = repo
        endpoint = os.environ.get("MODELSCOPE_ENDPOINT", "https://www.modelscope.cn")
        self.endpoint = endpoint.rstrip("/")
        self.api = self.client.HubApi(endpoint=self.endpoint)

    def resolve(self, revision: str) -> tuple[str, list[File]]:
        """(the revision itself, its files)."""
        revision = revision or "master"
        found = self._told(
            lambda: self.api.list_repo_files(self.repo, "model", revision=revision),
            revision,
        )
        files = [x for x in found if not x.is_dir]
        return revision, [File(x.path, x.size or 0, x.sha256 or "") for x in files]

    def fetch(self, file: File, commit: str, folder: pathlib.Path, again: bool) -> None:
        """Download one file into a folder."""
        self._told(
            lambda: self.api.download_file(
                self.repo,
                "model",
                file.name,
                revision=commit,
                local_dir=folder,
                force=again,
            ),
            commit,
        )

    def _told(self, call: Callable[[], Any], revision: str) -> Any:
        """What a call of the client gives; its errors in words of ours."""
        errors = self.errors
        try:
            return call()
        except errors.NotExistError as error:
            raise config.InputError(
                f"{self.endpoint} has no model {self.repo!r} with a revision "
                f"{revision!r}, or MODELSCOPE_API_TOKEN does not open it"
            ) from error
        except (errors.AuthenticationError, errors.PermissionDeniedError) as error:
            raise config.InputError(
                f"{self.repo} is gated or private: accept its conditions at "
                f"{self.endpoint} and set MODELSCOPE_API_TOKEN"
            ) from error
        except Exception as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise _unreachable(self.endpoint, error, "MODELSCOPE_ENDPOINT") from error


def _unreachable(endpoint: str, error: Exception, variable: str) -> config.InputError:
    said = str(error).strip().split("\n", 1)[0][:200]
    return config.InputError(
        f"{endpoint} did not give the file or its description "
        f"({type(error).__name__}: {said}); check the network, or set {variable} to a "
        "mirror, then give the same command again: whole files stay"
    )


SOURCES = {"hub": Hub, "modelscope": ModelScope}
