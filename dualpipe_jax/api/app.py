"""The application: routes, limits, and who may ask.

Completions and chats are as in OpenAI's API (platform.openai.com/docs/api-reference).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import (
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    Response,
)
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dualpipe_jax.api.answers import Answer, Piece
from dualpipe_jax.api.errors import ApiError
from dualpipe_jax.api.fields import parse_json, read_generation
from dualpipe_jax.api.generating import Completions, engine_requests
from dualpipe_jax.api.page import SECURITY, page
from dualpipe_jax.api.streaming import Events, watched
from dualpipe_jax.api.worker import EngineWorker
from dualpipe_jax.deepseek.serve import Engine
from dualpipe_jax.tokens import Tokenizer

# The page holds no data: it asks for /metrics with the key that its reader enters.
_OPEN = ("/", "/health", "/ready")
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a client may ask for.

    Attributes:
      max_body_bytes: of a request.
      max_waiting: requests beyond those that run; more are refused.
      max_choices: completions of one request, over all of its prompts.
      max_seconds: of a request, from its arrival to its last token.
    """

    max_body_bytes: int = 2**22
    max_waiting: int = 256
    max_choices: int = 16
    max_seconds: float = 600.0


class Api:
    """A model behind HTTP.

    Attributes:
      worker: runs the engine.
      is_draining: whether new requests are refused because the server ends.
    """

    def __init__(
        self,
        start: Callable[[], Engine],
        tokenizer: Tokenizer,
        model: str,
        *,
        limits: Limits | None = None,
        api_key: str | None = None,
    ):
        """Makes an API; `app` serves it.

        Args:
          start: makes the engine, in a thread of its own.
          tokenizer: of the model.
          model: the name under which it is served.
          limits: what a client may ask for.
          api_key: the bearer token that clients must send; None: no token.
        """
        self._limits = limits or Limits()
        self.worker = EngineWorker(start, self._limits.max_waiting)
        self.is_draining = False
        self._tokenizer, self._model, self._api_key = tokenizer, model, api_key
        self._created = int(time.time())

    def app(self, ended: Callable[[], Any] | None = None) -> ASGIApp:
        """Returns the application.

        Args:
          ended: called in the event loop when the engine has failed.
        """

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            self.worker.begin(asyncio.get_running_loop(), ended)
            yield

        routes = [
            Route("/", self._page),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._one_model),
            Route("/metrics", self._metrics),
            Route("/health", self._health),
            Route("/ready", self._ready),
        ]
        handlers: Mapping[Any, Any] = {
            ApiError: _answer_error,
            HTTPException: _answer_http_error,
            Exception: _answer_fault,
        }
        app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
        return self._guarded(app)

    def _guarded(self, app: ASGIApp) -> ASGIApp:
        """Checks the bearer token, and counts answers."""
        wanted = None if self._api_key is None else f"Bearer {self._api_key}".encode()

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return

            async def counted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    self.worker.measures.answers[message["status"]] += 1
                await send(message)

            given = dict(scope["headers"]).get(b"authorization", b"")
            is_allowed = wanted is None or hmac.compare_digest(given, wanted)
            if is_allowed or scope["path"] in _OPEN:
                await app(scope, receive, counted)
            else:
                error = ApiError(
                    401, "The bearer token is missing or wrong.", code="invalid_api_key"
                )
                await _error(error)(scope, receive, counted)

        return guarded

    # Completions.

    async def _complete(self, request: Request) -> Response:
        return await self._generate(request, is_chat=False)

    async def _chat(self, request: Request) -> Response:
        return await self._generate(request, is_chat=True)

    async def _generate(self, request: Request, *, is_chat: bool) -> Response:
        engine = self._check_open()
        fields = parse_json(await self._body(request))
        self._check_model(fields.get("model"))
        most = self._limits.max_choices
        generation = read_generation(fields, self._tokenizer, most, is_chat=is_chat)
        requests = engine_requests(generation, engine, self._tokenizer)
        answer = Answer(
            self._model,
            self._tokenizer,
            sum(map(len, generation.prompts)),
            generation.num_logprobs,
            is_chat=is_chat,
        )
        completions = Completions(
            self.worker,
            requests,
            generation.stops,
            self._tokenizer,
            answer,
            self._limits.max_seconds,
        )
        if generation.is_stream:
            return Events(completions, len(requests), generation.has_usage)
        with completions:
            pieces: dict[int, list[Piece]] = {i: [] for i in range(len(requests))}
            async with watched(completions, request.receive):
                async for piece in completions.pieces():
                    pieces[piece.choice].append(piece)
            return JSONResponse(answer.whole(pieces))

    async def _body(self, request: Request) -> bytes:
        most, body = self._limits.max_body_bytes, b""
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise ApiError(413, f"The body has more than {most} bytes.")
        return body

    def _check_model(self, model: Any) -> None:
        if not isinstance(model, str):
            raise ApiError(400, "model must be a model's name.", param="model")
        if model != self._model:
            raise ApiError(
                404,
                f"The model {model[:80]!r} is not served; this is {self._model!r}.",
                param="model",
                code="model_not_found",
            )

    # About the server.

    async def _page(self, _: Request) -> Response:
        headers = {"content-security-policy": SECURITY, "cache-control": "no-cache"}
        return HTMLResponse(page(self._model), headers=headers)

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _one_model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return JSONResponse(self._described())

    def _described(self) -> dict[str, Any]:
        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "dualpipe_jax",
        }

    async def _metrics(self, _: Request) -> Response:
        metrics = layers = None
        with contextlib.suppress(ApiError):  # there is no engine to ask
            metrics, layers = await self.worker.call(
                lambda engine: (engine.metrics(), engine.layer_metrics())
            )
        text = self.worker.measures.text(metrics, layers)
        return PlainTextResponse(text, media_type=_PROMETHEUS)

    async def _health(self, _: Request) -> Response:
        if self.worker.failure is not None:
            self.worker.check_running()
        return JSONResponse({"status": "ok"})

    async def _ready(self, _: Request) -> Response:
        self._check_open()
        return JSONResponse({"status": "ready"})

    def _check_open(self) -> Engine:
        """Returns the engine, if it takes new requests."""
        if self.is_draining:
            raise ApiError(503, "The server is ending.", code="shutting_down")
        return self.worker.check_running()


def _error(error: ApiError) -> Response:
    return JSONResponse(error.content(), error.status, headers=error.headers)


async def _answer_error(_: Request, error: ApiError) -> Response:
    return _error(error)


async def _answer_http_error(request: Request, error: HTTPException) -> Response:
    what = f"{request.method} {request.url.path}: {error.detail}."
    return _error(ApiError(error.status_code, what))


async def _answer_fault(_: Request, error: Exception) -> Response:
    return _error(ApiError(500, f"The server has a fault ({type(error).__name__})."))
