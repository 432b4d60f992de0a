# SPDX-License-Identifier: Apache-2.0
"""A log of what a guard decided: hashes and lengths of texts, never the texts.

Format: one JSON object a line: time (seconds since 1970), request, stage, action,
level, categories, rules (those that found something), failed (checkers that raised),
refusal, length (code points of all texts), texts (how many), and `hmac` (HMAC-SHA256
with the key) or, without a key, `sha256`, of the texts in UTF-8, each after its length
in 8 bytes. A short text can be guessed from a bare hash: give a key.
Invariants: a line is one write to a file opened for appending, so the lines of several
processes do not mix; a line that was cut by a full disk is closed before the next. The
file is the owner's alone, and opened anew for each line, so it may be moved away.
Raises: config.InputError when the file cannot be begun. Afterwards nothing: lines that
could not be written are counted in `lost`, and serving goes on.
"""

import hashlib
import hmac
import json
import os
import threading
import time
from collections.abc import Callable, Iterable

from qwen_jax import config
from qwen_jax.serve import guard_verdict

MAX_REQUEST = 200  # letters of a request id


class Audit:
    """A handle on the file; `lost` counts lines that could not be written."""

    def __init__(
        self,
        path: str,
        key: bytes = b"",
        clock: Callable[[], float] = time.time,
    ):
        self.path, self.lost = path, 0
        self._key, self._clock = key, clock
        self._broken = False  # whether the last line was cut
        self._lock = threading.Lock()
        try:
            self._append(b"")
        except OSError as error:
            raise config.InputError(
                f"the audit log {path} cannot be written: {error.strerror or error}; "
                "give another file"
            ) from error

    def write(
        self, verdict: guard_verdict.Verdict, texts: Iterable[str], request: str = ""
    ) -> None:
        """One line on one decision."""
        texts = list(texts)
        told = {
            "time": round(self._clock(), 3),
            "request": str(request)[:MAX_REQUEST],
            "stage": verdict.stage,
            "action": verdict.action,
            "level": verdict.level,
            "categories": list(verdict.categories),
            "rules": sorted({span.rule for span in verdict.where}),
            "failed": list(verdict.failed),
            "refusal": verdict.refusal,
            "texts": len(texts),
            "length": sum(map(len, texts)),
            "hmac" if self._key else "sha256": digest(texts, self._key),
        }
        line = json.dumps(told, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            try:
                self._append(b"\n" + line if self._broken else line)
            except OSError:
                self.lost += 1

    def _append(self, data: bytes) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        handle = os.open(self.path, flags | os.O_NOFOLLOW, 0o600)
        try:
            done = os.write(handle, data) if data else 0
        finally:
            os.close(handle)
        if done < len(data):
            self._broken = self._broken or done > 0
            raise OSError("the line was cut")
        self._broken = False


def digest(texts: Iterable[str], key: bytes = b"") -> str:
    """Of texts in order; ("a", "bc") and ("ab", "c") differ."""
    made = hmac.new(key, digestmod=hashlib.sha256) if key else hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        made.update(len(data).to_bytes(8, "little") + data)
    return made.hexdigest()
