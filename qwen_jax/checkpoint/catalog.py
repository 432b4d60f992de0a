# SPDX-License-Identifier: Apache-2.0
"""Which steps of a checkpoints folder are good, and what is wrong with the others.

One view for all processes of a run: process 0 looks, every verdict is exchanged, and
between two looks the lists live in memory. So `good` never names a step that another
process believes absent, and never one whose save has not ended.

Formats: see `steps.py` and `manifest.py`.
Invariants: a step is in `good` or in `damaged` or in neither, never in both; a step
whose digests were found right is not read again by the same process.
Raises: config.InputError naming the step, the file and what was found.
"""

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from qwen_jax import config
from qwen_jax.checkpoint import agree, arrays, lock, manifest, steps


class Catalog:
    """The steps of one folder, as known to this run."""

    def __init__(
        self,
        folder: pathlib.Path,
        tags: Iterator[str],
        say: Callable[[str], None],
        timeout_s: float,
    ):
        self.good: list[int] = []
        self.damaged: dict[int, str] = {}
        self._folder = folder
        self._tags, self._say, self._timeout_s = tags, say, timeout_s
        self._verified: set[int] = set()
        self._said: set[int] = set()

    def open(self, *, read_only: bool) -> None:
        """Clear leftovers (unless read-only) and list the steps (collective)."""
        wrong = ""
        if jax.process_index() == 0:
            try:
                if not read_only:
                    lock.check_writable(self._folder)
                    steps.recover(self._folder)
                self.scan()
            except (config.InputError, OSError) as error:
                wrong = str(error)
        state = [wrong, self.good, list(self.damaged.items())]
        wrong, self.good, damaged = agree.from_primary(
            next(self._tags), state, self._timeout_s
        )
        self.damaged = dict(map(tuple, damaged))
        if wrong:
            raise config.InputError(wrong)

    def scan(self) -> None:
        """List the steps anew by their manifests and file sizes."""
        found = steps.present(self._folder)
        reasons = {step: steps.problem(self._folder, step) for step in found}
        self.good = [step for step, wrong in reasons.items() if not wrong]
        self.damaged = {step: wrong for step, wrong in reasons.items() if wrong}

    def add(self, step: int) -> None:
        """A step that has just become visible."""
        self.forget([step])
        self.good = sorted([*self.good, step])

    def forget(self, gone: list[int]) -> None:
        """Steps that are no longer there."""
        self.good = [step for step in self.good if step not in gone]
        for step in gone:
            self.damaged.pop(step, None)
            self._verified.discard(step)

    def choose(
        self, step: int | None, *, verify: bool, wanted: arrays.Table | None = None
    ) -> tuple[int, dict[str, Any]]:
        """The step to restore and its manifest (collective).

        Passes over damaged ones with a notice; a step asked for by number raises.
        """
        known = sorted({*self.good, *self.damaged}, reverse=True)
        if step is not None and step not in known:
            raise self.no_step(step)
        for candidate in known if step is None else [step]:
            content, wrong = None, self.damaged.get(candidate, "")
            if not wrong:
                content, wrong = self.inspect(candidate, verify=verify, wanted=wanted)
            if not wrong:
                return candidate, content
            self.pass_over(candidate, wrong, asked=step)
        raise self.no_step(None)

    def inspect(
        self, step: int, *, verify: bool, wanted: arrays.Table | None = None
    ) -> tuple[dict[str, Any], str]:
        """The manifest and what is wrong with the files, each process reading a share.

        With `wanted`, only files that restoring those leaves needs are looked at.
        """
        path = steps.path(self._folder, step)
        content, wrong = manifest.read(path, step)
        if content is not None and verify and step not in self._verified:
            needed = {
                name: size
                for name, (size, _) in content["files"].items()
                if _is_needed(name, content, wanted)
            }
            shares = manifest.deal(needed, jax.process_count())
            share = shares[jax.process_index()]
            wrong = "; ".join(manifest.check_digests(path, content, share)[:3])
        votes = agree.gather(next(self._tags), wrong, self._timeout_s)
        wrong = "; ".join(dict.fromkeys(text for text in votes if text))
        if verify and wanted is None and not wrong:
            self._verified.add(step)
        return content, wrong

    def inspect_again(self, step: int) -> str:
        """As `inspect`, reading all files though they were found right before."""
        self._verified.discard(step)
        return self.inspect(step, verify=True)[1]

    def pass_over(self, step: int, wrong: str, asked: int | None) -> None:
        """Remember a damaged step; say so, or raise if it was asked for by number."""
        self.forget([step])
        self.damaged[step] = wrong
        if asked is not None:
            raise config.InputError(self._damaged_text(step, wrong))
        if step not in self._said:
            self._said.add(step)
            self._say(f"warning: {self._damaged_text(step, wrong)}")

    def load_meta(self, step: int) -> dict[str, Any]:
        """meta.json, with the processes' own facts as "local"."""
        path = steps.path(self._folder, step)
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        local = sorted(path.glob("local.*.json"), key=lambda p: int(p.suffixes[0][1:]))
        if local:
            meta["local"] = [json.loads(p.read_text(encoding="utf-8")) for p in local]
        return meta

    def checked_meta(self, step: int | None) -> dict[str, Any]:
        """`load_meta` after the digests of the JSON files alone."""
        step = max(self.good, default=None) if step is None else step
        if step not in self.good:
            raise self.no_step(step)
        path = steps.path(self._folder, step)
        content, wrong = manifest.read(path, step)
        if content is not None:
            facts = [name for name in content["files"] if "/" not in name]
            wrong = "; ".join(manifest.check_digests(path, content, facts))
        if wrong:
            raise config.InputError(self._damaged_text(step, wrong))
        return self.load_meta(step)

    def no_step(self, step: int | None) -> config.InputError:
        """The error for a step that is not there, or for a folder without any."""
        if step is None:
            why = "; ".join(f"step {s}: {w}" for s, w in sorted(self.damaged.items()))
            return config.InputError(
                f"no intact checkpoint in {self._folder}"
                + (f" ({why}); move that folder away to start anew" if why else "")
            )
        have = ", ".join(map(str, self.good)) or "none"
        return config.InputError(
            f"no checkpoint of step {step} in {self._folder}; steps there: {have}"
        )

    def _damaged_text(self, step: int, wrong: str) -> str:
        older = max((s for s in self.good if s < step), default=None)
        advice = (
            "no older intact step is left"
            if older is None
            else f"the next older one is step {older}"
        )
        return f"checkpoint step {step} in {self._folder} is damaged: {wrong}; {advice}"


def _is_needed(path: str, content: dict, wanted: arrays.Table | None) -> bool:
    """Whether restoring the leaves of `wanted` (None: all) reads this file."""
    if wanted is None:
        return True
    part = path.split("/")[1] if path.startswith("arrays/") else ""
    return part not in content["leaves"] or part in wanted
