# SPDX-License-Identifier: Apache-2.0
"""What is done about what a guard finds: allow, flag or block, by category and stage.

Format: TOML or JSON, every key optional:

    mode = "strict"        # a controversial text counts as unsafe; "loose": as safe
    fail_closed = true     # a checker that raises blocks; false: it is passed over
    hold = true            # streams keep back what may yet be part of a finding
    rules = "rules.json"   # rules instead of the built-in ones, beside this file
    [input]                # prompts; [output]: whole answers; [stream]: while they come
    default = "block"      # for categories that are not named, and for none
    pii = "flag"

Categories go by the short names of `guard_verdict.CATEGORIES` or by their full ones.
Without [stream] the words of [output] hold for streams, too. Jailbreak is said of
prompts alone, so [output] and [stream] do not take it.
Invariants: what is not unsafe in the policy's mode is allowed; of several categories
the hardest action is taken.
Raises: config.InputError naming file, key and fix.
"""

import dataclasses
import json
import pathlib
import tomllib
from collections.abc import Mapping

from qwen_jax import config
from qwen_jax.serve import guard_verdict

STRICT, LOOSE = "strict", "loose"
MAX_BYTES = 1_000_000
_DEFAULT = {
    "default": guard_verdict.BLOCK,
    "pii": guard_verdict.FLAG,
    "political": guard_verdict.FLAG,
    "copyright": guard_verdict.FLAG,
}


@dataclasses.dataclass(frozen=True)
class Policy:
    """See the module; each stage has {category or "default": action}."""

    mode: str = STRICT
    fail_closed: bool = True
    hold: bool = True
    rules: str = ""
    input: dict[str, str] = dataclasses.field(default_factory=lambda: dict(_DEFAULT))
    output: dict[str, str] = dataclasses.field(default_factory=lambda: dict(_DEFAULT))
    stream: dict[str, str] | None = None

    def __post_init__(self):
        if self.mode not in (STRICT, LOOSE):
            raise config.InputError(f"mode={self.mode!r}: wanted strict or loose")
        if self.stream is None:
            object.__setattr__(self, "stream", dict(self.output))
        for stage in guard_verdict.STAGES:
            object.__setattr__(self, stage, _checked(stage, getattr(self, stage)))

    def counts(self, level: str) -> bool:
        """Whether a level is unsafe in the policy's mode."""
        if level == guard_verdict.CONTROVERSIAL:
            return self.mode == STRICT
        return level == guard_verdict.UNSAFE

    def action(self, stage: str, risks: Mapping[str, str]) -> str:
        """What is done about {category: level} at a stage."""
        table = getattr(self, stage)
        taken = [
            table.get(category, table["default"])
            for category, level in risks.items()
            if self.counts(level)
        ]
        return max(taken, key=guard_verdict.ACTIONS.index, default=guard_verdict.ALLOW)


def _checked(stage: str, table: Mapping[str, str]) -> dict[str, str]:
    """A stage's table by full names, with its default."""
    made = {"default": guard_verdict.BLOCK}
    for key, action in table.items():
        at = f"{stage}.{key}"
        if action not in guard_verdict.ACTIONS:
            hint = config.nearest(str(action), guard_verdict.ACTIONS)
            raise config.InputError(f"{at}={action!r}{hint}")
        name = key if key == "default" else guard_verdict.category(key, f"[{stage}]")
        if name == guard_verdict.JAILBREAK and stage != guard_verdict.INPUT:
            raise config.InputError(
                f"{at}: jailbreak is said of prompts alone; put it into [input]"
            )
        made[name] = action
    return made


def load(path: str) -> Policy:
    """The policy in a .toml or .json file; with "" the built-in one.

    Raises:
      config.InputError: no such file, another kind, or what is in it.
    """
    if not path:
        return Policy()
    file = pathlib.Path(path)
    if file.suffix not in (".toml", ".json"):
        raise config.InputError(f"policy {path}: wanted a .toml or .json file")
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise config.InputError(f"policy {path}: {error.strerror or error}") from error
    if len(data) > MAX_BYTES:
        raise config.InputError(f"policy {path}: longer than {MAX_BYTES:,} bytes")
    try:
        read = tomllib.loads if file.suffix == ".toml" else json.loads
        held = read(data.decode())
    except (ValueError, RecursionError) as error:
        raise config.InputError(f"policy {path} cannot be read: {error}") from error
    try:
        made = config.freeze(Policy, held)
    except config.InputError as error:
        raise config.InputError(f"policy {path}: {error}") from error
    if made.rules:
        made = dataclasses.replace(made, rules=str(file.parent / made.rules))
    return made
