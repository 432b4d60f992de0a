# SPDX-License-Identifier: Apache-2.0
"""The chat page of the server: three files of page/, sent as they are.

The page holds no secrets, so it needs no key; what it asks of the API does, and the
person at the page types it. The policy is for a page that shows what models say: only
the page's own script and style, no connection but to this server, no frames around it,
and no way for a script to make markup or code of a text.

Source: W3C's Content Security Policy Level 3 and Trusted Types.
Formats: {path: file} in FILES; no other name leads to a file.
Raises: OSError at the first request where the package was installed without its data.
"""

import functools
import pathlib
from typing import Any

from qwen_jax.serve import bodies

FILES = {  # path of a request -> name in page/ and type
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Asked for again each time: a server of another version may be at the same port.
    "cache-control": "no-cache",
}


async def answer(scope: Any, receive: Any) -> bodies.Whole:
    """The file of a path in FILES."""
    data, kind = _file(scope["path"])
    return bodies.Whole(data, headers={"content-type": kind, **HEADERS})


@functools.cache
def _file(path: str) -> tuple[bytes, str]:
    name, kind = FILES[path]
    return (pathlib.Path(__file__).parent / "page" / name).read_bytes(), kind
