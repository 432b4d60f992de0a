# SPDX-License-Identifier: Apache-2.0
"""Models and weights of a running server are exchanged: POST /admin/load.

    curl 127.0.0.1:8001/admin/load -H "Authorization: Bearer $KEY" \\
        -d '{"model": "Qwen3-0.6B", "path": "/models/Qwen3-0.6B-step-2000"}'

The route is on a port of its own, of this machine alone, with keys of its own: whoever
may ask for answers may not choose what gives them. A folder with the same model and
tokenizer as the name has gives its engine other weights (`engine.swap`); any other gets
an engine beside the old one, which ends with its last request. Either way no request is
dropped, and each says by its system_fingerprint which weights answered it. The answer
comes when the new ones are in force.

Formats: {"model", "version", "how": "weights" or "engine", "seconds"}.
Raises: errors.ApiError: 401 without the key; 400 for fields and folders that cannot be;
409 while another one is being loaded; 404 for other routes.
"""

import asyncio
import re
from collections.abc import Callable
from typing import Any

from qwen_jax import config
from qwen_jax.serve import bodies, errors, fields, gate, json_body

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
BODY_BYTES, BODY_S = 64 * 2**10, 10.0
_LOAD = {
    "model": fields.Field(fields.Text(128, pattern=NAME), required=True),
    "path": fields.Field(fields.Text(4096), required=True),
}


class Admin:
    """See the module docstring.

    Args:
      port: where it is asked.
      keys: of those who may.
      load: (name, path) -> what is told; called in a thread, one at a time.
    """

    def __init__(
        self, port: int, keys: gate.Keys, load: Callable[[str, str], dict[str, Any]]
    ):
        self._port, self._keys, self._load = port, keys, load
        self._busy = False

    def here(self, scope: Any) -> bool:
        """Whether a request came to this port."""
        return scope["server"][1] == self._port

    async def answer(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        self._keys.holder(bodies.header(scope, b"authorization"))
        scope["state"]["route"] = "/admin/load"
        if (scope["method"], scope["path"]) != ("POST", "/admin/load"):
            said = "Here is only POST /admin/load."
            raise errors.ApiError(404, "unknown_url", said)
        data = await bodies.read(scope, receive, BODY_BYTES, BODY_S)
        wanted = fields.read(_LOAD, json_body.parse(data))
        if self._busy:
            said = "Another model is being loaded; ask again when it is there."
            raise errors.ApiError(409, "busy", said)
        self._busy = True
        try:
            work = asyncio.to_thread(self._load, wanted["model"], wanted["path"])
            # It cannot be stopped: whoever hangs up leaves it to its end.
            told = await asyncio.shield(asyncio.ensure_future(self._done(work)))
        except config.InputError as error:
            raise errors.invalid("path", "invalid_value", str(error)) from None
        await bodies.Whole(told)(scope, receive, send)

    async def _done(self, work: Any) -> dict[str, Any]:
        try:
            return await work
        finally:
            self._busy = False
