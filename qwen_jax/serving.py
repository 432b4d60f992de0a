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
import dataclasses
import hashlib
import ipaddress
import logging
import os
import pathlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from qwen_jax import config, main, talk
from qwen_jax.serve import admin, device, engine, gate, guard, http, listening
from qwen_jax.serve import served as served_lib

# The engine's thread holds the interpreter whenever it may. What else is to be done,
# such as a refusal, takes a few turns, each of which waits as long as this. At 5 ms,
# CPython's own, p95 of refusals at 5 times the capacity was 73 ms.
SWITCH_S = 0.0005
LOOPBACK = ("localhost", "127.0.0.1", "::1")
GRACE_S = 30.0  # of an engine whose name another one got
SAMPLES, SAMPLE_BYTES = 64, 4096


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
    for flag in ("port", "admin_port"):
        if not 0 <= (getattr(args, flag) or 0) < 2**16:
            raise config.InputError(
                f"--{flag} {getattr(args, flag)}: wanted 0 to 65535"
            )
    admin_keys = gate.keys_of(
        args.admin_key_file, "admin_key_file", gate.ADMIN_VARIABLE
    )
    if args.admin_port is not None and not admin_keys:
        raise config.InputError(
            "--admin_port wants keys: give --admin_key_file FILE, or set "
            f"{gate.ADMIN_VARIABLE}"
        )
    held = held_of(args)
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

        def make_engine(model: talk.Model) -> engine.Engine:
            return engine.Engine(
                model.spec,
                model.params,
                model.tokenizer,
                settings=held,
                stop_ids=model.stop_ids,
            )

    default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    loader = Loader(models, make_engine, args.dtype or default)
    first, sockets = _First(loader, name, args.model, server), [sock]
    if args.admin_port is not None:
        sockets.append(listening.listen("127.0.0.1", args.admin_port))
        app.admin = admin.Admin(sockets[1].getsockname()[1], admin_keys, loader.load)
    host, port = sock.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    there = f"http://{shown}:{port}"
    say(f"listening at {there}/v1, loading {name}")
    say(f"to chat in a browser: {there}/")
    if app.admin is not None:
        say(f"to load others: 127.0.0.1:{sockets[1].getsockname()[1]}/admin/load")
    first.thread.start()
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
        signal.signal(signal.SIGHUP, server.handle_exit)
    sys.setswitchinterval(SWITCH_S)
    with _log_to_stderr(), contextlib.ExitStack() as stack:
        for one in sockets:
            stack.enter_context(contextlib.closing(one))
        server.run(sockets)
        return first.end()


class Loader:
    """A handle on what puts models under their names while the server answers."""

    def __init__(
        self,
        models: served_lib.Models,
        make_engine: Callable[[talk.Model], Any],
        dtype: str,
    ):
        self._models, self._make_engine, self._dtype = models, make_engine, dtype
        self._lock = threading.Lock()

    def load(self, name: str, path: str) -> dict[str, Any]:
        """The model of a folder under a name, new or in another's place, once it is in
        force; see `serve.admin`.

        Raises:
          config.InputError: the folder cannot be.
        """
        with self._lock:
            return self._loaded(name, path)

    def _loaded(self, name: str, path: str) -> dict[str, Any]:
        begun_s, version = time.monotonic(), version_of(path)
        model = talk.load_model(path, self._dtype, lay_out=False)
        bare = dataclasses.replace(model, params=None)  # the engine has its own
        _ = bare.sees  # a folder that does not say how is refused now
        before = self._models.find(name)
        if before is not None and _alike(before.model, model):
            # Written down before an answer can ask for it.
            before.later[before.engine.weights + 1] = version
            before.engine.swap(model.params)
            self._models.put(dataclasses.replace(before, model=bare))
            how = "weights"
        else:
            engine = self._make_engine(model)
            engine.start()
            now = int(time.time())
            self._models.put(served_lib.Served(name, bare, engine, now, version))
            if before is not None:
                # Requests that looked the name up before may still come to it.
                timer = threading.Timer(GRACE_S, before.engine.close)
                timer.daemon = True
                timer.start()
            how = "engine"
        took_s = time.monotonic() - begun_s
        return {"model": name, "version": version, "how": how, "seconds": took_s}

    def close(self) -> None:
        """End all engines."""
        for served in self._models.all():
            served.engine.close(0.0)


def _alike(a: talk.Model, b: talk.Model) -> bool:
    """Whether an engine of one can answer with the weights of the other."""
    words = a.tokenizer.fingerprint == b.tokenizer.fingerprint
    return words and a.spec == b.spec and a.stop_ids == b.stop_ids


def version_of(path: str) -> str:
    """A name for the weights of a folder or file, by what is in it: all names and
    sizes, and pages at even distances, not every byte.

    Raises:
      config.InputError: nothing is there.
    """
    place, digest = pathlib.Path(path), hashlib.sha256()
    if not place.exists():
        raise config.InputError(f"{path}: there is no such folder")
    files = sorted(x for x in place.iterdir() if x.is_file()) if place.is_dir() else []
    for file in files or [place]:
        size = file.stat().st_size
        digest.update(f"{file.name if files else ''}\0{size}\0".encode())
        with file.open("rb") as data:
            for k in range(SAMPLES):
                data.seek(k * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(data.read(SAMPLE_BYTES))
    return digest.hexdigest()[:12]


class _First:
    """A handle on the thread that loads the first model."""

    def __init__(self, loader: Loader, name: str, path: str, server: listening.Server):
        self._loader, self._server = loader, server
        self._name, self._path = name, path
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._load, name="load", daemon=True)

    def _load(self) -> None:
        try:
            told = self._loader.load(self._name, self._path)
        except BaseException as error:
            self._error = error
            self._server.should_exit = True
            raise SystemExit from error  # ends this thread without a word
        say(f"{self._name} is ready after {told['seconds']:.1f} s")

    def end(self) -> int:
        """What is left when the server is gone: engines, or why there is none.

        Raises:
          what the loading raised.
        """
        if self.thread.is_alive():
            # It compiles or reads files and cannot be stopped; nothing is to be saved.
            os._exit(0)
        if self._error is not None:
            raise self._error
        self._loader.close()
        if not say("ended"):
            sys.stdout = None  # else its last flush fails, and with it the exit code
        return 0


def say(text: str) -> bool:
    """Whether a line could be told. What could not, as on a full disk, comes with the
    next line that can, and ends no server."""
    try:
        print(text, flush=True)
    except OSError:
        return False
    return True


def held_of(args: argparse.Namespace) -> device.Settings:
    """How much the flags say an engine holds."""
    return device.Settings(
        max_waiting=args.max_queue,
        max_wait_s=args.max_wait_s,
        images=args.images,
        image_patches=args.image_patches,
        drafts=args.drafts,
        draft_tokens=args.draft_tokens,
    )


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
    if not admin.NAME.fullmatch(name):
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
