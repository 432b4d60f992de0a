# SPDX-License-Identifier: Apache-2.0
"""Who may ask, and how often: API keys and rate limits.

Keys are kept as SHA-256 digests; a given key is compared with all of them in constant
time. A rate limit is a bucket that fills evenly: requests are taken out when they come,
tokens of a prompt when it is known and of an answer when it is over, so the bucket of
tokens may be below nothing for a while.

Formats: a key file has one key a line; lines that begin with # and empty ones are
skipped. Units: seconds of the clock that is given, requests and tokens a minute.
Raises: config.InputError for a key file that cannot be; errors.ApiError 401 and 429.
"""

import dataclasses
import hashlib
import hmac
import os
import pathlib
import time
from collections.abc import Callable, Iterable

from qwen_jax import config
from qwen_jax.serve import errors

VARIABLE = "QWEN_JAX_API_KEY"
ADMIN_VARIABLE = "QWEN_JAX_ADMIN_KEY"
MIN_LETTERS, MAX_LETTERS = 8, 512
ANYBODY = "anybody"


class Keys:
    """The keys of a server; with none, everybody may ask."""

    def __init__(self, keys: Iterable[str] = ()):
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def holder(self, header: bytes | None) -> str:
        """Who sends this Authorization header, as a short name made of the key.

        Raises:
          errors.ApiError: 401, no key or another one.
        """
        if not self._digests:
            return ANYBODY
        scheme, _, key = (header or b"").partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        # All are compared, whichever fits: the time tells nothing of them.
        fits = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != b"bearer" or not any(fits):
            said = "Incorrect API key provided." if key else "No API key provided: "
            said += "" if key else "send it as Authorization: Bearer KEY."
            raise errors.ApiError(
                401, "invalid_api_key", said, headers={"www-authenticate": "Bearer"}
            )
        return hashlib.sha256(given).hexdigest()[:16]


def keys_of(path: str, flag: str = "api_key_file", variable: str = VARIABLE) -> Keys:
    """The keys of a file, and the one in the environment.

    Raises:
      config.InputError: a file that cannot be read, or what is no key in it.
    """
    found = []
    if path:
        try:
            text = pathlib.Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise config.InputError(
                f"--{flag} {path} cannot be read ({type(error).__name__}); "
                "wanted a text file with one key a line"
            ) from None
        lines = [(f"line {i} of {path}", x) for i, x in enumerate(text.splitlines(), 1)]
        found = [(at, x.strip()) for at, x in lines if x.strip() and x[0] != "#"]
        if not found:
            raise config.InputError(f"--{flag} {path} has no key in it")
    if os.environ.get(variable):
        found.append((f"the environment's {variable}", os.environ[variable].strip()))
    for at, key in found:
        fits = key.isascii() and key.isprintable() and " " not in key
        if not fits or not MIN_LETTERS <= len(key) <= MAX_LETTERS:
            raise config.InputError(
                f"{at} is no key: wanted {MIN_LETTERS} to {MAX_LETTERS} letters, "
                "digits and signs without blanks"
            )
    return Keys(key for _, key in found)


@dataclasses.dataclass
class _Bucket:
    left: float
    at_s: float


class Limit:
    """So much a minute for each holder; 0 for no limit."""

    def __init__(
        self, a_minute: int, what: str, clock: Callable[[], float] = time.monotonic
    ):
        """what: "requests" or "tokens", as headers name it."""
        self._most, self._what, self._clock = a_minute, what, clock
        self._buckets: dict[str, _Bucket] = {}

    def _bucket(self, holder: str) -> _Bucket:
        now_s = self._clock()
        bucket = self._buckets.setdefault(holder, _Bucket(self._most, now_s))
        more = (now_s - bucket.at_s) * self._most / 60
        bucket.left, bucket.at_s = min(self._most, bucket.left + more), now_s
        return bucket

    def take(self, holder: str, count: int, least: int = 1) -> None:
        """Take out so many; there must be `least` before.

        Raises:
          errors.ApiError: 429.
        """
        if not self._most:
            return
        bucket = self._bucket(holder)
        if bucket.left < min(least, self._most):
            wait_s = (min(least, self._most) - bucket.left) * 60 / self._most
            raise errors.ApiError(
                429,
                "rate_limit_exceeded",
                f"Rate limit reached: {self._most:,} {self._what} a minute; try again "
                f"in {wait_s:.1f} s.",
                type="rate_limit_error",
                headers={"retry-after": errors.retry_after(wait_s)},
            )
        bucket.left -= count

    def headers(self, holder: str) -> dict[str, str]:
        """What is left, as clients read it."""
        if not self._most:
            return {}
        left = self._bucket(holder).left
        full_s = (self._most - left) * 60 / self._most
        name = f"x-ratelimit-{{}}-{self._what}"
        return {
            name.format("limit"): str(self._most),
            name.format("remaining"): str(max(0, int(left))),
            name.format("reset"): f"{full_s:.2f}s",
        }
