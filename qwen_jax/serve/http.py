# SPDX-License-Identifier: Apache-2.0
"""The OpenAI-compatible server as an ASGI application.

    app = App(models, keys=..., guard=..., settings=...)

`App` is the envelope of every request, in this order: its id, limits of its header,
its key, whether the server is draining, then the route. Whatever goes wrong inside
leaves as one of `errors`' shapes; the details of a fault are in the log alone, under
the request's id. /v1/responses is not half there: it is an honest 404.

Formats: OpenAI's JSON and server-sent events; x-request-id, openai-processing-ms,
x-ratelimit-*. Invariants: every route but /health, /ready and the page wants the key
where there are keys; neither keys, query strings nor prompts are logged.
"""

import asyncio
import contextlib
import dataclasses
import logging
import re
import time
import uuid
from concurrent import futures
from typing import Any

from starlette import exceptions, routing

from qwen_jax import __version__
from qwen_jax.serve import (
    admin,
    bodies,
    chat_api,
    completions_api,
    embeddings_api,
    errors,
    flight,
    gate,
    guarding,
    json_body,
    metrics,
    page,
    prompts,
    protocol,
)
from qwen_jax.serve import guard as guard_lib
from qwen_jax.serve import served as served_lib

logger = logging.getLogger("qwen_jax.serve")
_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
OPEN = ("/health", "/ready")  # no key, and also while draining
SMALL_BYTES = 4096  # a body that is read at once; in a larger one may be an image
WATCHED = (*OPEN, "/metrics", "/version")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Limits of a server; rates of 0 are no limit. hosts: names it is asked by, without
    ports; empty for any."""

    body_bytes: int = 10 * 2**20
    body_s: float = 30.0
    header_bytes: int = 16 * 2**10
    header_lines: int = 100
    ping_s: float = 15.0
    write_s: float = 60.0
    max_waiting: int = 256
    requests_a_minute: int = 0
    tokens_a_minute: int = 0
    metrics_prefix: str = metrics.PREFIXES[0]
    hosts: tuple[str, ...] = ()


class App:
    """See the module docstring.

    Attributes: admin (answers on its own port, if it is set), draining (set it, and new
    requests are refused), in_flight (requests of HTTP being answered, without those
    that only watch the server), board, told.
    """

    def __init__(
        self,
        models: served_lib.Models,
        *,
        keys: gate.Keys | None = None,
        guard: guard_lib.Guard | None = None,
        settings: Settings | None = None,
        clock: Any = time.monotonic,
    ):
        self.settings = settings or Settings()
        self.models, self.guard, self._keys = models, guard, keys or gate.Keys()
        self.admin: admin.Admin | None = None
        self.told = metrics.Metrics(models, self.settings.metrics_prefix)
        self.board = flight.Board(self.told, self.settings.max_waiting)
        self._requests = gate.Limit(self.settings.requests_a_minute, "requests", clock)
        self._tokens = gate.Limit(self.settings.tokens_a_minute, "tokens", clock)
        self.draining, self.in_flight = False, 0
        # Apart from the loop's own threads, in which embeddings may take their time.
        self._pool = futures.ThreadPoolExecutor(4, "prepare")
        self._router = self._routes()

    def _routes(self) -> routing.Router:
        posts = {
            "/v1/chat/completions": self._chat,
            "/v1/completions": self._completions,
            "/v1/embeddings": self._embeddings,
            "/v1/moderations": self._moderations,
        }
        gets = {
            "/health": self._health,
            "/ready": self._ready,
            "/metrics": self._metrics,
            "/version": self._version,
            "/v1/models": self._list,
            "/v1/models/{name:path}": self._model,
        }
        gets |= dict.fromkeys(page.FILES, page.answer)
        routes = [_route(path, one, "POST") for path, one in posts.items()]
        routes += [_route(path, one, "GET") for path, one in gets.items()]
        routes.append(_route("/v1/responses", _responses, "POST"))
        routes.append(_route("/v1/responses/{rest:path}", _responses, "GET"))
        return routing.Router(routes, redirect_slashes=False, default=_no_route)

    # --- the envelope ---

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self._router(scope, receive, send)
        given = bodies.header(scope, b"x-request-id") or b""
        fits = _SANE_ID.fullmatch(given)
        request_id = given.decode() if fits else f"req_{uuid.uuid4().hex}"
        begun_s, status = time.monotonic(), 0
        state = scope["state"] = {"id": request_id, "holder": None, "route": "none"}
        scope["app"] = self

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                spent_ms = (time.monotonic() - begun_s) * 1000
                extra = {"x-request-id": request_id}
                extra["openai-processing-ms"] = str(round(spent_ms))
                extra |= self._rate_headers(state["holder"])
                pairs = [(k.encode(), v.encode()) for k, v in extra.items()]
                message = {**message, "headers": [*message["headers"], *pairs]}
            await send(message)

        counted = scope["path"] not in WATCHED
        self.in_flight += counted
        try:
            await self._answer(scope, receive, sending, lambda: status)
        except bodies.Gone:
            status = 499
        finally:
            self.in_flight -= counted
            spent_s = time.monotonic() - begun_s
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self.told.answered(state["route"], method, status, spent_s)
            words = (method, state["route"], status, spent_s, request_id)
            logger.info("%s %s %d %.3f s %s", *words)

    async def _answer(self, scope: Any, receive: Any, send: Any, status: Any) -> None:
        """Let the request in and have it answered; whatever comes out is told."""
        try:
            self._check_header(scope)
            if self.admin is not None and self.admin.here(scope):
                await self.admin.answer(scope, receive, send)
                return
            self._let_in(scope)
            await self._router(scope, receive, send)
            return
        except bodies.Gone:
            raise
        except errors.ApiError as error:
            told = error
        except exceptions.HTTPException as error:
            told = _of_starlette(error, scope)
        except Exception:
            logger.exception("request %s failed", scope["state"]["id"])
            told = errors.internal(scope["state"]["id"])
        if status():  # the answer has begun: nothing else can be said
            raise bodies.Gone
        await bodies.respond(send, told.status, told.json(), told.headers)

    def _check_header(self, scope: Any) -> None:
        """Limits of the header, and the name that it asks.

        Raises:
          errors.ApiError: it may not come in.
        """
        lines = scope["headers"]
        size = sum(len(k) + len(v) + 4 for k, v in lines) + len(scope["raw_path"])
        size += len(scope["query_string"])
        most = self.settings.header_bytes
        if size > most or len(lines) > self.settings.header_lines:
            raise headers_too_large(most)
        names = [name for name, _ in lines]
        if scope["http_version"] not in ("1.0", "1.1"):
            raise no_http("Wanted HTTP/1.1.")
        if b"transfer-encoding" in names and b"content-length" in names:
            said = "Content-Length and Transfer-Encoding exclude each other."
            raise no_http(said)
        asked = (bodies.header(scope, b"host") or b"").decode("latin-1")
        in_brackets = asked.startswith("[")
        name = asked[1:].partition("]")[0] if in_brackets else asked.partition(":")[0]
        if self.settings.hosts and name.lower() not in self.settings.hosts:
            # A page of another site whose name was made to lead here.
            raise no_http("This server is not asked by that name.")

    def _let_in(self, scope: Any) -> None:
        """The key, draining.

        Raises:
          errors.ApiError: it may not come in.
        """
        path = scope["path"]
        if path not in OPEN and path not in page.FILES:
            sent = bodies.header(scope, b"authorization")
            scope["state"]["holder"] = self._keys.holder(sent)
        if self.draining and path not in WATCHED:
            self.told.shed("draining")
            raise errors.unavailable("draining", "The server is shutting down.")

    def _rate_headers(self, holder: str | None) -> dict[str, str]:
        if holder is None:
            return {}
        return self._requests.headers(holder) | self._tokens.headers(holder)

    # --- routes ---

    async def _body(
        self, scope: Any, receive: Any, read: Any, queued: bool = False
    ) -> Any:
        """What `read` makes of a JSON body, counted against the limit of requests.
        queued: it asks an engine for answers, so it is refused where all are full: a
        refusal that is worked out in other threads comes late under load."""
        try:
            self._requests.take(scope["state"]["holder"], 1)
            self._tokens.take(scope["state"]["holder"], 0)
        except errors.ApiError:
            self.told.shed("rate_limit")
            raise
        if queued:
            self.board.check_room([served.engine for served in self.models.all()])
        data = await bodies.read(
            scope, receive, self.settings.body_bytes, self.settings.body_s
        )
        if len(data) <= SMALL_BYTES:
            return read(json_body.parse(data))
        return await self._in_pool(lambda: read(json_body.parse(data)))

    async def _in_pool(self, prepared: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, prepared)

    def _salt(self, scope: Any) -> str:
        return scope["state"]["holder"]

    def _code(self, scope: Any) -> str:
        """Of refusals by the guard."""
        return guarding.code_of(self.guard, bodies.header(scope, guarding.INSPECTION))

    async def _chat(self, scope: Any, receive: Any) -> Any:
        wanted = await self._body(scope, receive, protocol.chat_request, queued=True)
        served, code = self.models.get(wanted.model), self._code(scope)

        def prepared() -> prompts.ChatPrompt:
            made = prompts.of_chat(
                wanted, served, f"chatcmpl-{uuid.uuid4().hex}", self._salt(scope)
            )
            said = wanted.given.messages
            name = made.request.id
            guarding.check_prompt(self.guard, self.told, said, "messages", name, code)
            return made

        async def begun(stack: contextlib.AsyncExitStack) -> chat_api.Chat:
            with self.board.coming(served):
                prompt = await self._in_pool(prepared)
                one = await self._flight(scope, stack, served, prompt.request)
            return chat_api.Chat(wanted, prompt, one, self.guard, self.board)

        return await self._answered(scope, receive, wanted.stream, begun)

    async def _completions(self, scope: Any, receive: Any) -> Any:
        wanted = await self._body(
            scope, receive, protocol.completion_request, queued=True
        )
        served, code = self.models.get(wanted.model), self._code(scope)
        request_id = f"cmpl-{uuid.uuid4().hex}"

        def prepared() -> list[Any]:
            made = []
            for i, prompt in enumerate(wanted.prompts):
                words, text = served.model.tokenizer, isinstance(prompt, str)
                if text:
                    prompts.check_length(prompt, served, "prompt")
                request = prompts.request(
                    wanted,
                    served,
                    words.encode(prompt) if text else prompt,
                    request_id=f"{request_id}-{i}",
                    salt=self._salt(scope),
                    param="prompt",
                    most=wanted.max_tokens,
                    prompt_logprobs=wanted.logprobs if wanted.echo else None,
                )
                said = prompt if text else words.decode(prompt)
                name = request.id
                guarding.check_prompt(self.guard, self.told, said, "prompt", name, code)
                made.append(request)
            return made

        async def begun(stack: Any) -> completions_api.Completion:
            with self.board.coming(served):
                made = await self._in_pool(prepared)
                flights = [await self._flight(scope, stack, served, r) for r in made]
            return completions_api.Completion(
                wanted, flights, self.guard, self.board, request_id
            )

        return await self._answered(scope, receive, wanted.stream, begun)

    async def _flight(self, scope: Any, stack: Any, served: Any, request: Any) -> Any:
        """A request on its way, its tokens counted against the limit."""
        holder = scope["state"]["holder"]
        self._tokens.take(holder, len(request.prompt))
        made = await stack.enter_async_context(
            flight.Flight(served, request, self.board)
        )
        stack.callback(
            lambda: self._tokens.take(holder, made.answer_ids, least=-(10**12))
        )
        return made

    async def _answered(
        self, scope: Any, receive: Any, stream: bool, begun: Any
    ) -> Any:
        """An answer of `begun`'s, whole or in chunks."""
        stack = contextlib.AsyncExitStack()

        async def whole() -> Any:
            async with stack:
                return await (await begun(stack)).whole()

        if not stream:
            return bodies.Whole(await bodies.unless_gone(receive, whole()))
        try:
            made = await bodies.unless_gone(receive, begun(stack))
        except BaseException:
            await stack.aclose()
            raise
        return bodies.Events(
            made.chunks(),
            scope["state"]["id"],
            stack=stack,
            ping_s=self.settings.ping_s,
            write_s=self.settings.write_s,
        )

    async def _embeddings(self, scope: Any, receive: Any) -> Any:
        wanted = await self._body(scope, receive, protocol.embedding_request)
        served = self.models.get(wanted.model)
        made = await bodies.unless_gone(
            receive, embeddings_api.embeddings(wanted, served)
        )
        holder = scope["state"]["holder"]
        self._tokens.take(holder, made["usage"]["total_tokens"], least=-(10**12))
        return bodies.Whole(made)

    async def _moderations(self, scope: Any, receive: Any) -> Any:
        wanted = await self._body(scope, receive, protocol.moderation_request)
        work = guarding.moderations(self.guard, self.told, wanted)
        return bodies.Whole(await bodies.unless_gone(receive, work))

    async def _list(self, scope: Any, receive: Any) -> Any:
        cards = [served.card() for served in self.models.all()]
        return bodies.Whole({"object": "list", "data": cards})

    async def _model(self, scope: Any, receive: Any) -> Any:
        return bodies.Whole(self.models.get(scope["path_params"]["name"]).card())

    async def _health(self, scope: Any, receive: Any) -> Any:
        return bodies.Whole({"status": "ok"})

    async def _ready(self, scope: Any, receive: Any) -> Any:
        if self.draining:
            raise errors.unavailable("draining", "The server is shutting down.")
        if not self.models.ready():
            raise errors.unavailable("model_loading", "The model is being loaded.", 2)
        return bodies.Whole({"status": "ready"})

    async def _metrics(self, scope: Any, receive: Any) -> Any:
        text = await asyncio.to_thread(self.told.text)
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return bodies.Whole(text, headers={"content-type": kind})

    async def _version(self, scope: Any, receive: Any) -> Any:
        return bodies.Whole({"version": __version__})


_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class _Endpoint:
    """A route's function as an ASGI application; a class, so that Starlette takes it
    for one."""

    def __init__(self, path: str, function: Any):
        self._path, self._function = path, function

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope["state"]["route"] = self._path
        answer = await self._function(scope, receive)
        await answer(scope, receive, send)


def _route(path: str, function: Any, method: str) -> routing.Route:
    return routing.Route(path, _Endpoint(path, function), methods=[method])


async def _responses(scope: Any, receive: Any) -> Any:
    said = "This server has no /v1/responses: use /v1/chat/completions."
    raise errors.ApiError(404, "unsupported_endpoint", said)


async def _no_route(scope: Any, receive: Any, send: Any) -> None:
    where = f"{scope['method'][:16]} {scope['path'][:64]}"
    said = f"Invalid URL ({ascii(where)[1:-1]})."
    raise errors.ApiError(404, "unknown_url", said)


def _of_starlette(error: exceptions.HTTPException, scope: Any) -> errors.ApiError:
    """The router's own refusal, a method that a route does not have."""
    names = (error.headers or {}).get("Allow", "").split(", ")
    allowed = ", ".join(sorted(names))
    said = f"Not allowed to {ascii(scope['method'][:16])[1:-1]} here; use {allowed}."
    return errors.ApiError(
        error.status_code, "method_not_allowed", said, headers={"allow": allowed}
    )


def no_http(said: str) -> errors.ApiError:
    """400 for what breaks HTTP's own rules; what follows it is not read."""
    return errors.ApiError(400, "invalid_http", said, headers={"connection": "close"})


def headers_too_large(most_bytes: int) -> errors.ApiError:
    """431, also of the protocol that reads them."""
    said = f"The header is larger than {most_bytes:,} bytes, or has too many lines."
    return errors.ApiError(
        431, "headers_too_large", said, headers={"connection": "close"}
    )
