# SPDX-License-Identifier: Apache-2.0
"""Real servers on loopback ports in threads, with fake engines behind them."""

import contextlib
import json
import socket
import ssl
import threading
import time

import openai

from qwen_jax.serve import gate, http, listening
from qwen_jax.serve import served as served_lib
from tests.serve import fake_engine

NAME = "tiny"
# Clients here speak plain HTTP; reading the system's certificates for each takes longer
# than most of what they ask.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class Running:
    """A server that runs: app, engine, port and a client for it."""

    def __init__(self, app, engine, server, thread, port):
        self.app, self.engine, self.port = app, engine, port
        self.server, self.thread = server, thread
        self.url = f"http://127.0.0.1:{port}"
        self.clients = []

    def client(self, key="none-needed", **how):
        how = {"max_retries": 0, "timeout": 20} | how
        how["http_client"] = openai.DefaultHttpxClient(verify=NO_TLS)
        made = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **how)
        self.clients.append(made)
        return made

    def raw(self, data: bytes, *, wait_s: float = 10) -> bytes:
        """What comes back for bytes, until the server closes or waits for more."""
        with socket.create_connection(("127.0.0.1", self.port), wait_s) as one:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                one.sendall(data)
            return answer_of(one)


def answer_of(one: socket.socket) -> bytes:
    """A whole answer with a Content-Length, or all until the end."""
    got = b""
    with contextlib.suppress(ConnectionResetError):
        while True:
            head, blank, rest = got.partition(b"\r\n\r\n")
            if blank:
                lengths = [x for x in head.lower().split(b"\r\n") if b"length:" in x]
                if lengths and len(rest) >= int(lengths[0].split(b":")[1]):
                    return got
            more = one.recv(65536)
            if not more:
                return got
            got += more
    return got


def error_of(answer: bytes) -> tuple:
    """(status, type, param, code) of an answer of HTTP."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return status, error["type"], error["param"], error["code"]


def post(path: str, body: bytes, *headers: str) -> bytes:
    """A POST of JSON as bytes."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


@contextlib.contextmanager
def running(
    model=None,
    script=None,
    *,
    keys=(),
    guard=None,
    shutdown_s=5.0,
    header_s=30.0,
    max_connections=4096,
    **settings,
):
    """A server for as long as the block lasts."""
    model = model or fake_engine.model()
    engine = fake_engine.Engine(model, script)
    models = served_lib.Models()
    models.put(served_lib.Served(NAME, model, engine, 1_700_000_000))
    app = http.App(
        models,
        keys=gate.Keys(keys),
        guard=guard,
        settings=http.Settings(**settings),
    )
    server = listening.server(
        app,
        shutdown_s=shutdown_s,
        header_s=header_s,
        max_connections=max_connections,
    )
    sock = listening.listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    until_s = time.monotonic() + 20
    while not server.started and time.monotonic() < until_s:
        time.sleep(0.01)
    made = Running(app, engine, server, thread, sock.getsockname()[1])
    try:
        yield made
    finally:
        for client in made.clients:
            client.close()
        server.should_exit = True
        thread.join(10)
        engine.close()
        sock.close()
    assert not thread.is_alive()
