# SPDX-License-Identifier: Apache-2.0
"""Errors as clients of OpenAI's interface read them.

Source: the shape that OpenAI's SDKs parse; they raise by status, and repeat 408, 409,
429 and 500 and above twice, waiting as Retry-After says.
Formats: {"error": {"message", "type", "param", "code"}}, param and code text or null.
Invariants: messages hold nothing of the machine: no path, no stack, no repr of ours;
what is quoted of a request is short and ASCII.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from qwen_jax import config
from qwen_jax.models import json_files

INVALID = "invalid_request_error"
QUOTED = 64  # letters


class ApiError(Exception):
    """What a request is answered with instead."""

    def __init__(
        self,
        status: int,
        code: str | None,
        message: str,
        *,
        param: str | None = None,
        type: str = INVALID,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.type, self.code, self.param = status, type, code, param
        self.message, self.headers = message, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON of it."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def json(self) -> bytes:
        """The bytes of it."""
        return json.dumps(self.body()).encode()


def invalid(param: str | None, code: str, message: str) -> ApiError:
    """A request that cannot be, by the fault of one of its fields."""
    return ApiError(400, code, message, param=param)


def quoted(value: Any) -> str:
    """A value of a request as messages show it."""
    return json_files.shown(value, QUOTED)


def unknown(param: str, name: str, known: Iterable[str]) -> ApiError:
    """A field that does not exist, with the nearest that does."""
    hint = config.nearest(name[:QUOTED], known).replace("'", "")
    hint = hint if "did you mean" in hint else ""
    return invalid(
        param, "unknown_parameter", f"Unknown parameter: {quoted(param)}{hint}"
    )


def overloaded(retry_after_s: float) -> ApiError:
    """There is no room for one more request."""
    return ApiError(
        429,
        "overloaded",
        "The server has more requests than it can take; try again in a moment.",
        type="server_overloaded",
        headers={"retry-after": retry_after(retry_after_s)},
    )


def unavailable(code: str, message: str, retry_after_s: float = 1.0) -> ApiError:
    """The server does not take requests yet, or any more."""
    return ApiError(
        503,
        code,
        message,
        type="service_unavailable",
        headers={"retry-after": retry_after(retry_after_s)},
    )


def internal(request_id: str, code: str | None = None) -> ApiError:
    """A fault of ours; the log has the rest under the request's id."""
    return ApiError(
        500,
        code,
        f"The server had an error while processing the request (id {request_id}).",
        type="server_error",
    )


def retry_after(seconds: float) -> str:
    """Whole seconds, at least one: SDKs wait as long, up to 120."""
    return str(max(1, min(120, round(seconds))))
