"""The HTTP API of an exported model, compatible with OpenAI's clients.

    GET  /health                    whether the server is healthy; needs no token
    GET  /metrics                   for Prometheus
    GET  /v1/models                 the model, and each loaded adapter as a model
    POST /v1/completions            completes a prompt
    POST /v1/chat/completions       completes a conversation
    GET, POST /v1/adapters, DELETE /v1/adapters/NAME

A request is read up to a bound, checked, and queued; if too many wait, it gets 429. A stream ends when its client
disconnects.

Without a token only programs of this machine may ask. A browser on it runs other people's pages, so a request must name
this machine as its host, and as its origin where it has one: a page whose name is made to resolve to this machine (DNS
rebinding) sends its own.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedtune.client.inference.exported_model import ExportedModel, PromptError, Sampling
from fedtune.client.inference.openai_bodies import (
    COMPLETION_TOKENS,
    DONE,
    MAX_BODY_BYTES,
    AdapterRequest,
    Answer,
    ApiError,
    ChatRequest,
    CompletionRequest,
    event,
    parse,
)
from fedtune.client.inference.scheduler import BusyError, Piece, Scheduler, Stream
from fedtune.core.errors import ExportError

DISCONNECT_POLL = 0.2  # seconds between checks whether the client of an unstreamed answer is still connected
BODY_SECONDS = 30.0  # limit for a client to send its request
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_OPEN = ("/health",)
_COUNTED = ("/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/adapters")


def create_app(model: ExportedModel, scheduler: Scheduler, token: str | None = None) -> FastAPI:
    """Returns the ASGI application.

    Args:
        token: token that requests must carry as `Authorization: Bearer TOKEN`; None admits all requests.
    """
    service = _Service(model, scheduler, _Metrics(scheduler))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        del app
        yield
        await asyncio.to_thread(scheduler.close)

    app = FastAPI(title="fedtune", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    app.add_middleware(_Endpoint, service=service, token=token)

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        del request
        return JSONResponse(error.body(), error.status, {"Retry-After": "1"} if error.status == 429 else None)

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).body(), error.status_code)

    app.add_api_route("/health", service.health, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", service.prometheus, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models", service.models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/completions", service.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/chat/completions", service.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/adapters", service.adapters, methods=["GET"], response_model=None)
    app.add_api_route("/v1/adapters", service.load_adapter, methods=["POST"], response_model=None)
    app.add_api_route("/v1/adapters/{name}", service.unload_adapter, methods=["DELETE"], response_model=None)
    return app


class _Metrics:
    """Prometheus metrics of one server, in a registry of its own."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "fedtune_requests", "Requests answered.", ["endpoint", "status"], registry=self._registry
        )
        self.prompt_tokens = Counter("fedtune_prompt_tokens", "Tokens of prompts.", registry=self._registry)
        self.completion_tokens = Counter("fedtune_completion_tokens", "Tokens of answers.", registry=self._registry)
        self.finished = Counter("fedtune_streams", "Streams that ended.", ["reason"], registry=self._registry)
        self.first_token = Histogram(
            "fedtune_first_token_seconds", "Request to first text.", buckets=_FIRST_TOKEN, registry=self._registry
        )
        self.seconds = Histogram(
            "fedtune_stream_seconds", "Request to last token.", buckets=_WHOLE, registry=self._registry
        )
        active = Gauge("fedtune_active_streams", "Streams that get tokens.", registry=self._registry)
        active.set_function(lambda: scheduler.load[0])
        waiting = Gauge("fedtune_waiting_streams", "Streams that wait for a slot.", registry=self._registry)
        waiting.set_function(lambda: scheduler.load[1])

    def text(self) -> bytes:
        """Returns the metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _Service:
    """The endpoints."""

    def __init__(self, model: ExportedModel, scheduler: Scheduler, metrics: _Metrics) -> None:
        self._model, self._scheduler, self.metrics = model, scheduler, metrics
        self._created = int(time.time())

    async def health(self) -> Response:
        active, waiting = self._scheduler.load
        alive = self._scheduler.alive
        body = {"status": "ok" if alive else "failed", "model": self._model.name, "active": active, "waiting": waiting}
        return JSONResponse(body, 200 if alive else 503)

    async def prometheus(self) -> Response:
        return Response(self.metrics.text(), media_type=_METRICS_TYPE)

    async def models(self) -> Response:
        names = [self._model.name, *self._model.adapters]
        data = [{"id": name, "object": "model", "created": self._created, "owned_by": "fedtune"} for name in names]
        return JSONResponse({"object": "list", "data": data})

    async def adapters(self) -> Response:
        data = [{"name": name, "sha256": digest} for name, digest in self._model.adapters.items()]
        return JSONResponse({"object": "list", "data": data})

    async def load_adapter(self, request: Request) -> Response:
        wanted = parse(AdapterRequest, await _body(request))
        await _export_errors(self._model.load_adapter, wanted.name)
        return await self.adapters()

    async def unload_adapter(self, name: str) -> Response:
        await _export_errors(self._model.unload_adapter, name)
        return await self.adapters()

    async def complete(self, request: Request) -> Response:
        asked = parse(CompletionRequest, await _body(request))
        prompt = asked.prompt if isinstance(asked.prompt, str) else asked.prompt[0]
        if isinstance(prompt, str):
            ids = await asyncio.to_thread(self._model.encode, prompt)  # takes seconds for a prompt of the largest size
        else:
            ids = [int(token) for token in asked.prompt]
        if asked.max_tokens is None:
            room = self._room(ids, None)
            tokens = min(COMPLETION_TOKENS, room)
        else:
            tokens = self._room(ids, asked.max_tokens)
        return await self._answer(request, asked, ids, asked.sampling(tokens), chat=False)

    async def chat(self, request: Request) -> Response:
        asked = parse(ChatRequest, await _body(request))
        try:
            ids = await asyncio.to_thread(self._model.encode_chat, [message.turn() for message in asked.messages])
        except PromptError as error:
            raise ApiError(400, str(error), param="messages") from error
        tokens = self._room(ids, asked.max_completion_tokens or asked.max_tokens)
        return await self._answer(request, asked, ids, asked.sampling(tokens), chat=True)

    def _room(self, ids: list[int], max_tokens: int | None) -> int:
        try:
            return self._model.check_prompt(ids, max_tokens)
        except PromptError as error:
            raise ApiError(400, str(error), param="prompt", code="context_length_exceeded") from error

    async def _answer(
        self, request: Request, asked: ChatRequest | CompletionRequest, ids: list[int], sampling: Sampling, chat: bool
    ) -> Response:
        try:
            adapter = self._model.acquire(asked.model)
        except KeyError:
            known = ", ".join([self._model.name, *self._model.adapters])
            raise ApiError(
                404, f"model {asked.model!r} does not exist; expected {known}", param="model", code="model_not_found"
            ) from None
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece]()

        def emit(piece: Piece) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        try:
            stream = self._scheduler.submit(ids, sampling, adapter, emit)
        except BusyError:
            self._model.release(adapter)
            raise ApiError(429, "too many requests are being answered; try again", "rate_limit_error") from None
        self.metrics.prompt_tokens.inc(len(ids))
        answer = Answer(asked.model, chat, len(ids))
        watched = self._watched(stream, pieces)
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            events = _events(watched, answer, usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        return await _whole(request, watched, answer)

    async def _watched(self, stream: Stream, pieces: asyncio.Queue[Piece]) -> AsyncIterator[Piece]:
        """Yields and counts the pieces; cancels the stream when the consumer stops early."""
        began = time.monotonic()
        tokens, reason = 0, "cancelled"
        try:
            while True:
                piece = await pieces.get()
                if not tokens and piece.tokens:
                    self.metrics.first_token.observe(time.monotonic() - began)
                tokens = piece.tokens
                if piece.finish is not None:
                    reason = piece.finish
                yield piece
                if piece.finish is not None:
                    return
        finally:
            stream.cancel()
            self.metrics.completion_tokens.inc(tokens)
            self.metrics.finished.labels(reason).inc()
            self.metrics.seconds.observe(time.monotonic() - began)


class _Endpoint:
    """Checks who asks and counts responses by status. It is plain ASGI, which lets disconnects through."""

    def __init__(self, app: ASGIApp, service: _Service, token: str | None) -> None:
        self._app, self._service, self._token = app, service, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        error = self._refusal(Headers(scope=scope))

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                endpoint = scope["path"] if scope["path"] in _COUNTED else "other"
                self._service.metrics.requests.labels(endpoint, str(message["status"])).inc()
                if error is not None:  # unauthenticated clients keep no connection
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        if error is None or (self._token is not None and scope["path"] in _OPEN):
            await self._app(scope, receive, counted)
        else:
            extra = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
            await JSONResponse(error.body(), error.status, extra)(scope, receive, counted)

    def _refusal(self, headers: Headers) -> ApiError | None:
        if self._token is None:
            return _misdirected(headers)
        if _authorized(headers, self._token):
            return None
        return ApiError(401, "a valid bearer token is needed", "authentication_error", code="invalid_api_key")


async def _events(pieces: AsyncIterator[Piece], answer: Answer, usage: bool) -> AsyncIterator[bytes]:
    try:
        if (opening := answer.opening()) is not None:
            yield event(opening)
        async for piece in pieces:
            if piece.finish in ("error", "cancelled"):
                yield event(_failure(piece).body())
                return
            if piece.text or piece.finish:
                if piece.text and piece.finish:
                    yield event(answer.chunk(piece.text, None))
                yield event(answer.chunk("" if piece.finish else piece.text, piece.finish))
            if piece.finish and usage:
                yield event(answer.closing(piece.tokens))
        yield DONE
    finally:
        await pieces.aclose()  # type: ignore[attr-defined] # it is a generator; closing it cancels the stream


async def _whole(request: Request, pieces: AsyncIterator[Piece], answer: Answer) -> Response:
    text: list[str] = []

    async def collect() -> Piece:
        async for piece in pieces:
            text.append(piece.text)
            if piece.finish is not None:
                return piece
        raise RuntimeError("a stream without an end")

    task = asyncio.create_task(collect())
    try:
        while not (await asyncio.wait([task], timeout=DISCONNECT_POLL))[0]:
            if await request.is_disconnected():
                return Response(status_code=499)  # the client is gone; the status is for the metrics
        last = task.result()
    finally:
        task.cancel()
        await asyncio.wait([task])
        await pieces.aclose()  # type: ignore[attr-defined] # as above
    if last.finish in ("error", "cancelled"):
        raise _failure(last)
    return JSONResponse(answer.whole("".join(text), str(last.finish), last.tokens))


def _failure(piece: Piece) -> ApiError:
    if piece.finish == "cancelled":
        return ApiError(503, "the server is shutting down", "server_error")
    return ApiError(500, "the model failed on this request", "server_error")


async def _export_errors(call: Callable[[str], None], name: str) -> None:
    try:
        await asyncio.to_thread(call, name)
    except ExportError as error:
        raise ApiError(400, str(error), param="name") from error


async def _body(request: Request) -> bytes:
    """Returns the request's body; refuses one that is too large or too slow."""
    too_large = ApiError(413, f"the request is larger than {MAX_BODY_BYTES:,} bytes", code="request_too_large")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the request took longer than {BODY_SECONDS:.0f} seconds to arrive") from None
    return bytes(body)


def _misdirected(headers: Headers) -> ApiError | None:
    """Returns the refusal of a request that is not for this machine, or comes from a page that is not of it."""
    expected = "expected localhost, 127.0.0.1 or [::1], or a server with a token"
    for name, status, prefix in (("host", 421, "http://"), ("origin", 403, "")):
        values = headers.getlist(name)
        if (name == "host" and len(values) != 1) or not all(_is_local(prefix + value) for value in values):
            said = ", ".join(value[:100] for value in values)
            return ApiError(status, f"the {name} {said!r} is not this machine; {expected}", "permission_error")
    return None


def _is_local(url: str) -> bool:
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Returns whether a name or an address is this machine's own."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _authorized(headers: Headers, token: str) -> bool:
    given = headers.get("authorization", "")
    return hmac.compare_digest(given.encode(), f"Bearer {token}".encode())
