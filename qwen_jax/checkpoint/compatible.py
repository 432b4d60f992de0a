# SPDX-License-Identifier: Apache-2.0
"""Which changes of the configuration a resumed run may make.

A checkpoint stores the resolved configuration. Going on with another model, optimizer
or data order would either fail deep inside the compiler or, worse, train something that
no file describes; so differences are looked for before anything is compiled.

Formats: configurations are nested dicts of JSON types (`config.thaw`); keys that may
change are dotted patterns: "num_steps", "checkpoint.*", "eval.*".
Raises: `refuse` raises config.InputError listing every refused difference.
"""

import fnmatch
import json
from collections.abc import Iterable, Mapping
from typing import Any

from qwen_jax import config


def config_difference(
    stored: Mapping[str, Any], new: Mapping[str, Any], may_change: Iterable[str]
) -> list[str]:
    """Lines "key: old in the checkpoint, new now" for each change that is refused."""
    patterns = tuple(may_change)
    # Through JSON, as the stored side went: tuples are lists, keys are text.
    old, now = (json.loads(json.dumps(side)) for side in (stored, new))
    return [
        f"{key}: {_shown(before)} in the checkpoint, {_shown(after)} now"
        for key, before, after in config.diff(old, now)
        if not any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)
    ]


def refuse(
    stored: Mapping[str, Any],
    new: Mapping[str, Any],
    may_change: Iterable[str],
    *,
    where: str,
    also: Iterable[str] = (),
) -> None:
    """InputError if the run at `where` cannot go on with the new configuration.

    `also` names in words what the caller lets change beside the patterns.
    """
    patterns = tuple(may_change)
    lines = config_difference(stored, new, patterns)
    if lines:
        listed = "\n  ".join(lines)
        raise config.InputError(
            f"the run in {where} was started with another configuration:\n  {listed}\n"
            "set these back, or use a new --workdir; a resumed run may change only "
            f"{', '.join((*patterns, *also)) or 'nothing'}"
        )


def _shown(value: Any) -> str:
    text = value if value == "<absent>" else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
