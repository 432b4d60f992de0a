# SPDX-License-Identifier: Apache-2.0
"""Bytes in and out of a request: bodies with limits, answers, streams of events.

Source: ASGI 3; server-sent events of the WHATWG's HTML standard, as OpenAI's clients
read them: `data: JSON`, an error as a frame of its own, `data: [DONE]` at the end of
every stream, comments to keep connections alive.

Units: bytes, seconds. Invariants: no more of a body than its limit is ever in memory; a
client that is gone is noticed at once, whether it streams or not, and what was made for
it is cancelled.
Raises: errors.ApiError 400, 408, 413, 415; Gone.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from qwen_jax.serve import errors

logger = logging.getLogger("qwen_jax.serve")
STREAM = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


class Gone(Exception):
    """The client hung up."""


def header(scope: Any, name: bytes) -> bytes | None:
    """A header's value; the first, where it came twice."""
    return next((value for key, value in scope["headers"] if key == name), None)


async def read(scope: Any, receive: Any, most_bytes: int, most_s: float) -> bytes:
    """The body of a JSON request.

    Raises:
      errors.ApiError: 400 of another type, 408 too slow, 413 too large, 415 packed.
      Gone: the client hung up.
    """
    packed = header(scope, b"content-encoding") or b"identity"
    if packed.lower() != b"identity":
        said = "Content-Encoding is not supported: send the body as it is."
        raise errors.ApiError(415, "unsupported_content_encoding", said)
    kind = (header(scope, b"content-type") or b"").split(b";")[0].strip().lower()
    if kind != b"application/json":
        said = "The Content-Type must be application/json."
        raise errors.ApiError(415, "invalid_json", said)
    told = header(scope, b"content-length")
    if told is not None and told.isdigit() and int(told[:20]) > most_bytes:
        raise _too_large(most_bytes)
    data = bytearray()
    try:
        async with asyncio.timeout(most_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                data += message.get("body", b"")
                if len(data) > most_bytes:
                    raise _too_large(most_bytes)
                if not message.get("more_body", False):
                    return bytes(data)
    except TimeoutError:
        said = f"The body did not come within {most_s:g} s."
        headers = {"connection": "close", "x-should-retry": "false"}
        raise errors.ApiError(408, "request_timeout", said, headers=headers) from None


def _too_large(most_bytes: int) -> errors.ApiError:
    said = f"The body is larger than {most_bytes:,} bytes."
    return errors.ApiError(413, "request_too_large", said)


async def unless_gone(receive: Any, work: Coroutine[Any, Any, Any]) -> Any:
    """What the work gives; it is cancelled when the client hangs up.

    Raises:
      Gone: it did.
    """
    doing = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise Gone
        return doing.result()
    finally:
        await _stopped(doing, gone)


async def _hung_up(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stopped(*tasks: asyncio.Future) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def respond(
    send: Any, status: int, body: bytes, headers: dict[str, str] | None = None
) -> None:
    """A whole answer; JSON unless the headers say otherwise."""
    headers = {"content-type": "application/json"} | (headers or {})
    headers["content-length"] = str(len(body))
    pairs = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


class Whole:
    """An ASGI answer of JSON or text."""

    def __init__(
        self,
        content: Any,
        status: int = 200,
        headers: dict[str, str] | None = None,
    ):
        as_json = not isinstance(content, bytes)
        # Half a surrogate pair has no UTF-8 form; escaped, JSON can hold anything.
        self._body = json.dumps(content).encode() if as_json else content
        self._status, self._headers = status, headers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await respond(send, self._status, self._body, self._headers)


class Events:
    """An ASGI answer of JSON chunks as they come, each whole code points."""

    def __init__(
        self,
        chunks: AsyncIterator[dict[str, Any]],
        request_id: str,
        *,
        stack: contextlib.AsyncExitStack,
        ping_s: float,
        write_s: float,
    ):
        """stack: left when the stream is over, whatever ended it."""
        self._chunks, self._request_id, self._stack = chunks, request_id, stack
        self._ping_s, self._write_s = ping_s, write_s

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        pairs = [(k.encode(), v.encode()) for k, v in STREAM.items()]
        gone = asyncio.ensure_future(_hung_up(receive))
        try:
            async with self._stack:
                await send(
                    {"type": "http.response.start", "status": 200, "headers": pairs}
                )
                await self._stream(send, gone)
        finally:
            await _stopped(gone)

    async def _stream(self, send: Any, gone: asyncio.Future) -> None:
        coming: asyncio.Future | None = None
        try:
            while True:
                coming = coming or asyncio.ensure_future(anext(self._chunks))
                await asyncio.wait(
                    {coming, gone},
                    timeout=self._ping_s,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if gone.done():
                    raise Gone
                if not coming.done():
                    await self._write(send, b": ping\n\n")
                    continue
                done, coming = coming, None
                try:
                    chunk = done.result()
                except StopAsyncIteration:
                    break
                await self._write(send, _event(chunk))
        except Gone:
            raise
        except errors.ApiError as error:
            await self._write(send, _event(error.body()))
        except Exception:
            logger.exception("request %s failed in its stream", self._request_id)
            error = errors.internal(self._request_id, "internal_error")
            await self._write(send, _event(error.body()))
        finally:
            if coming is not None:
                await _stopped(coming)
            await self._chunks.aclose()
        await self._write(send, b"data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b""})

    async def _write(self, send: Any, data: bytes) -> None:
        try:
            async with asyncio.timeout(self._write_s):
                await send(
                    {"type": "http.response.body", "body": data, "more_body": True}
                )
        except TimeoutError:
            raise Gone from None  # nobody reads


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"
