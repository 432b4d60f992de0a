# SPDX-License-Identifier: Apache-2.0
"""The application on a port: uvicorn with limits that come before HTTP, and a drain.

Source: uvicorn's h11 protocol. Deviations: what is no HTTP is refused in the shape of
`errors`; a header block larger than its limit is 431; a header that does not come
within HEADER_S is 408, a connection that says nothing is closed; no more than
`max_connections` are kept; a client that goes on sending a body after it was answered
is cut off after LINGER_BYTES or LINGER_S.

Drain: at the first SIGTERM or SIGINT `/ready` and new requests get 503, requests in
flight finish; after `shutdown_s` those that are left end with an error frame, and the
server is gone within a second more. A second signal does not wait.
Raises: config.InputError for an address that cannot be had.
"""

import asyncio
import errno
import resource
import socket
import sys
import time
import uuid
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http import h11_impl

from qwen_jax import config
from qwen_jax.serve import errors, http

HEADER_S = 30.0
LINGER_BYTES, LINGER_S = 64 * 2**20, 10.0
SPARE_FILES = 64
FLUSH_S = 0.5


class Protocol(h11_impl.H11Protocol):
    """One connection."""

    header_s = HEADER_S
    max_connections = 4096
    _waits: asyncio.TimerHandle | None = None
    _spoke = False
    _after = 0

    def connection_made(self, transport: Any) -> None:
        """A client has come."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._refuse(errors.overloaded(1.0))
            return
        self._waits = self.loop.call_later(self.header_s, self._too_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._heard()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some bytes of a request."""
        self._spoke = True
        if self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY:
            if not self._after:
                self._waits = self.loop.call_later(LINGER_S, self.transport.abort)
            self._after += len(data)
            if self._after > LINGER_BYTES:
                self.transport.abort()
                return
        super().data_received(data)
        if self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY:
            return
        if self.conn.their_state is not h11.IDLE:
            self._heard()
        elif self._waits is None and not self.transport.is_closing():
            self._waits = self.loop.call_later(self.header_s, self._too_late)

    def send_400_response(self, msg: str) -> None:
        """What h11 cannot read; called while its error is handled."""
        status = getattr(sys.exception(), "error_status_hint", 400)
        if status == 431:
            self._refuse(http.headers_too_large(self.conn._max_incomplete_event_size))
            return
        self._refuse(http.no_http("This is no HTTP request."))

    def _heard(self) -> None:
        if self._waits is not None:
            self._waits.cancel()
            self._waits = None

    def _too_late(self) -> None:
        self._waits = None
        if self._spoke:
            said = f"The header did not come within {self.header_s:g} s."
            self._refuse(errors.ApiError(408, "request_timeout", said))
        else:
            self.transport.close()

    def _refuse(self, error: errors.ApiError) -> None:
        """Answer without the application, if nothing was answered yet, and close."""
        self._heard()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = error.json()
            headers = {
                "content-type": "application/json",
                "content-length": str(len(body)),
                "x-request-id": f"req_{uuid.uuid4().hex}",
                **error.headers,
                "connection": "close",
            }
            response = h11.Response(
                status_code=error.status,
                headers=list(headers.items()),
                reason=h11_impl.STATUS_PHRASES[error.status],
            )
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server with our drain."""

    def __init__(self, settings: uvicorn.Config, app: http.App, shutdown_s: float):
        super().__init__(settings)
        self._app, self._shutdown_s = app, shutdown_s
        self._until_s: float | None = None

    def handle_exit(self, sig: int, frame: Any) -> None:
        """A signal: the first begins the drain, another ends it. It is not raised again
        afterwards: a server that was asked to end has done what it should."""
        if self._until_s is not None:
            self.should_exit = True
        self.drain()

    def drain(self) -> None:
        """No new requests; the end comes when those in flight are done."""
        self._app.draining = True
        if self._until_s is None:
            self._until_s = time.monotonic() + self._shutdown_s

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        if self._until_s is None:
            return await super().on_tick(counter)
        if self.should_exit or time.monotonic() >= self._until_s:
            error = errors.unavailable("draining", "The server is shutting down.")
            self._app.board.end_all(error)
            until_s = time.monotonic() + FLUSH_S
            while self._app.in_flight and time.monotonic() < until_s:
                await asyncio.sleep(0.02)
            return True
        return not self._app.in_flight


def server(
    app: http.App,
    *,
    shutdown_s: float = 30.0,
    max_connections: int = 4096,
    header_s: float = HEADER_S,
) -> Server:
    """A server for `app`; `run` it with sockets from `listen`."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(1, min(max_connections, files - SPARE_FILES))
    names = {"header_s": header_s, "max_connections": most}
    settings = uvicorn.Config(
        app,
        http=type("BoundedProtocol", (Protocol,), names),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        h11_max_incomplete_event_size=app.settings.header_bytes,
        timeout_graceful_shutdown=FLUSH_S,
    )
    return Server(settings, app, shutdown_s)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
      config.InputError: the address is in use, or not of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, proto, _, address = found[0]
        made = socket.socket(family, kind, proto)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            made.listen(2048)
        except OSError:
            made.close()
            raise
    except OSError as error:
        fix = "choose another --port" if error.errno == errno.EADDRINUSE else ""
        fix = fix or "choose a --host of this machine and a free --port"
        said = f"cannot listen on {host} port {port}: {error.strerror or error}; {fix}"
        raise config.InputError(said) from None
    return made
