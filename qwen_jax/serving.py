# SPDX-License-Identifier: Apache-2.0
"""`qwen-jax serve`: a model folder behind an OpenAI-compatible server.

The port is taken first and answers at once; the model is loaded beside it, and until it
is there requests get 503 model_loading. The model's name is that of its folder unless
--name says otherwise. Only this machine can connect unless --host says otherwise, and
then there must be a key, or --insecure. Without either it answers to the names of this
machine alone, so that no page of another site can ask it by a name of its own.

Formats: see `serve.http`; a key file has one key a line.
Units: --shutdown_timeout_s in seconds, rates a minute.
Raises: config.InputError for a model, an address, a name or keys that cannot be.
"""

import argparse
import contextlib
import ipaddress
import logging
import os
import pathlib
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from qwen_jax import config, main, talk
from qwen_jax.serve import device, engine, gate, guard, http, listening
from qwen_jax.serve import served as served_lib

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")


def run(
    args: argparse.Namespace,
    *,
    make_engine: Callable[[talk.Model], Any] | None = None,
) -> int:
    """Serve until a signal; the exit code."""
    main.use_compile_cache()
    name = name_of(args.model, args.name)
    keys = gate.keys_of(args.api_key_file)
    check_address(args.host, bool(keys), args.insecure)
    for flag in ("max_queue", "shutdown_timeout_s"):
        if getattr(args, flag) <= 0:
            raise config.InputError(f"--{flag} {getattr(args, flag)}: wanted above 0")
    for flag in ("requests_per_minute", "tokens_per_minute", "max_wait_s"):
        if getattr(args, flag) < 0:
            raise config.InputError(f"--{flag} {getattr(args, flag)}: 0 is no limit")
    if not 0 <= args.port < 2**16:
        raise config.InputError(f"--port {args.port}: wanted 0 to 65535")
    models = served_lib.Models()
    models.expect(name)
    settings = http.Settings(
        max_waiting=args.max_queue,
        requests_a_minute=args.requests_per_minute,
        tokens_a_minute=args.tokens_per_minute,
        metrics_prefix=args.metrics_prefix,
        hosts=() if keys or args.insecure else (*LOOPBACK, args.host.lower()),
    )
    app = http.App(models, keys=keys, guard=guard_of(args), settings=settings)
    sock = listening.listen(args.host, args.port)
    server = listening.server(app, shutdown_s=args.shutdown_timeout_s)
    if make_engine is None:
        held = device.Settings(max_waiting=args.max_queue, max_wait_s=args.max_wait_s)

        def make_engine(model: talk.Model) -> engine.Engine:
            return engine.Engine(
                model.spec,
                model.params,
                model.tokenizer,
                settings=held,
                stop_ids=model.stop_ids,
            )

    loader = _Loader(args, name, models, make_engine, server)
    host, port = sock.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    there = f"http://{shown}:{port}"
    print(f"listening at {there}/v1, loading {name}", flush=True)
    print(f"to chat in a browser: {there}/", flush=True)
    loader.thread.start()
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
        signal.signal(signal.SIGHUP, server.handle_exit)
    with _log_to_stderr(), contextlib.closing(sock):
        server.run([sock])
        return loader.end()


class _Loader:
    """A handle on the thread that loads the model while the server answers."""

    def __init__(
        self,
        args: argparse.Namespace,
        name: str,
        models: served_lib.Models,
        make_engine: Callable[[talk.Model], Any],
        server: listening.Server,
    ):
        self._args, self._name, self._models = args, name, models
        self._make_engine, self._server = make_engine, server
        self._engine: Any = None
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._load, name="load", daemon=True)

    def _load(self) -> None:
        begun_s = time.monotonic()
        try:
            model = talk.load_model(self._args.model, self._dtype(), lay_out=False)
            self._engine = self._make_engine(model)
            self._engine.start()
        except BaseException as error:
            self._error = error
            self._server.should_exit = True
            raise SystemExit from error  # ends this thread without a word
        now = int(time.time())
        self._models.put(served_lib.Served(self._name, model, self._engine, now))
        took_s = time.monotonic() - begun_s
        print(f"{self._name} is ready after {took_s:.1f} s", flush=True)

    def _dtype(self) -> str:
        default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        return self._args.dtype or default

    def end(self) -> int:
        """What is left when the server is gone: the engine, or why there is none.

        Raises:
          what the loading raised.
        """
        if self.thread.is_alive():
            # It compiles or reads files and cannot be stopped; nothing is to be saved.
            sys.stdout.flush()
            os._exit(0)
        if self._error is not None:
            raise self._error
        if self._engine is not None:
            self._engine.close(0.0)
        print("ended", flush=True)
        return 0


def guard_of(args: argparse.Namespace) -> guard.Guard | None:
    """The guard that flags ask for, if they do."""
    given = (args.guard_policy, args.guard_head, args.guard_audit)
    if not args.guard and not any(given):
        return None
    key = os.environ.get("QWEN_JAX_AUDIT_KEY", "").encode()
    policy, head, audit = given
    return guard.load(policy, head=head, audit=audit, audit_key=key)


def name_of(path: str, given: str) -> str:
    """The name of a model: as given, or its folder's.

    Raises:
      config.InputError: no such model, or a name with odd letters.
    """
    place = pathlib.Path(path)
    if not place.exists():
        near = ""
        if place.parent.is_dir():
            names = [one.name for one in place.parent.iterdir()]
            near = config.nearest(place.name, names) if len(names) < 1000 else ""
        raise config.InputError(f"--model {path}: there is no such folder{near}")
    own = place.resolve().name.removesuffix(".gguf")
    name = given or own
    if not _NAME.fullmatch(name):
        flag = f"--name {given!r}" if given else f"the folder's name {own!r}"
        raise config.InputError(
            f"{flag}: wanted 1 to 128 letters, digits and . _ : / - ; set --name"
        )
    return name


def check_address(host: str, has_keys: bool, insecure: bool) -> None:
    """Refuse to let strangers in.

    Raises:
      config.InputError: others can connect, and there is no key.
    """
    if has_keys or insecure:
        return
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        raise config.InputError(f"--host {host}: no address of this machine") from None
    addresses = [one[4][0].partition("%")[0] for one in found]
    if not all(ipaddress.ip_address(one).is_loopback for one in addresses):
        raise config.InputError(
            f"--host {host} lets other machines in, and there is no key: give "
            f"--api_key_file FILE, set {gate.VARIABLE}, or say --insecure"
        )


@contextlib.contextmanager
def _log_to_stderr() -> Iterator[None]:
    """One line a request: when, route, status, seconds, id."""
    logger = logging.getLogger("qwen_jax.serve")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
