"""The routes: `/v1/chat/completions`, `/v1/completions`, `/v1/responses`, `/v1/models`, `/health`, `/metrics`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from zebra.serve.answers import AnswerFormat, ChatFormat, CompletionFormat, ResponsesFormat, event
from zebra.serve.engine import Engine, Ticket
from zebra.serve.errors import ApiError, internal_error
from zebra.serve.events import Piece
from zebra.serve.guard import Guard
from zebra.serve.jobs import Job, Prompts
from zebra.serve.metrics import CONTENT_TYPE, Metrics
from zebra.serve.requests import ChatRequest, CompletionRequest, ResponsesRequest
from zebra.serve.settings import ServeSettings

PAGE = "/page"
Value = TypeVar("Value")


def build_app(prompts: Prompts, engine: Engine[Job], metrics: Metrics, settings: ServeSettings) -> FastAPI:
    """Build the application with all routes except those of the chat page.

    Args:
        prompts: converts request bodies to jobs.
        engine: answers jobs.
    """
    app = FastAPI(title="zebra", docs_url=None, redoc_url=None, openapi_url=None)
    _add_errors(app)
    _add_answers(app, prompts, engine)
    _add_facts(app, prompts, engine, metrics)
    app.add_middleware(
        Guard,
        settings=settings,
        metrics=metrics,
        draining=lambda: engine.draining,
        paths=frozenset(route.path for route in app.routes if "{" not in route.path),
        page=PAGE,
    )
    return app


def _add_answers(app: FastAPI, prompts: Prompts, engine: Engine[Job]) -> None:
    """Add the routes that run the model."""

    async def answered(request: Request, making: Coroutine[Any, Any, Job], form: AnswerFormat, stream: bool) -> Any:
        ticket = engine.submit(await making)
        if stream:
            return StreamingResponse(_events(ticket, form), media_type="text/event-stream")
        return JSONResponse(await _unless_client_leaves(request, _whole(ticket, form)))

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Any:
        form = ChatFormat(prompts.name, include_usage=body.stream_options.include_usage)
        return await answered(request, prompts.chat(body), form, body.stream)

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Any:
        form = CompletionFormat(prompts.name, include_usage=body.stream_options.include_usage)
        return await answered(request, prompts.completion(body), form, body.stream)

    @app.post("/v1/responses")
    async def responses(request: Request, body: ResponsesRequest) -> Any:
        return await answered(request, prompts.responses(body), ResponsesFormat(prompts.name), body.stream)


def _add_facts(app: FastAPI, prompts: Prompts, engine: Engine[Job], metrics: Metrics) -> None:
    """Add the routes that do not run the model."""
    card = {"object": "model", "created": int(time.time()), "owned_by": "zebra", **prompts.card()}

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        prompts.check_model(name)
        return card

    @app.post("/load_model")
    async def load_model() -> Any:
        """Say that the model is loaded: `transformers chat` waits for this."""
        ready = {"status": "ready", "model": prompts.name, "cached": True}
        return Response(event(json.dumps(ready)), media_type="text/event-stream")

    @app.get("/health")
    async def health() -> Any:
        if engine.draining:
            return JSONResponse({"status": "stopping"}, 503)
        return {"status": "ok"}

    @app.get("/metrics")
    async def show_metrics() -> Any:
        return Response(metrics.text(), media_type=CONTENT_TYPE)


def _add_errors(app: FastAPI) -> None:
    """Return every error as OpenAI's JSON."""

    async def api_error(request: Request, error: Any) -> Any:
        return error.response()

    async def invalid(request: Request, error: Any) -> Any:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return ApiError(400, f"the body is not JSON: {first['ctx']['error']}. Send a JSON object.").response()
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        text = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            text = f"this server does not support this field with the value {str(first['input'])[:60]!r}; leave it out"
        elif isinstance(first["input"], int | float | str):
            text += f"; got {str(first['input'])[:60]!r}"
        return ApiError(400, f"{where}: {text}." if where else f"{text}.", param=where or None).response()

    async def http_error(request: Request, error: Any) -> Any:
        return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}.").response()

    async def failed(request: Request, error: Any) -> Any:  # starlette raises it again, so it is logged
        return internal_error().response()

    app.add_exception_handler(Exception, failed)
    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http_error)


async def _events(ticket: Ticket[Job], form: AnswerFormat) -> AsyncIterator[str]:
    """The server-sent events of an answer; the request is cancelled if the client disconnects."""
    items = ticket.items()
    try:
        yield form.start()
        async for item in items:
            yield form.piece(item) if isinstance(item, Piece) else form.end(item)
    except ApiError as error:
        yield form.error(error)
    finally:
        ticket.cancel()
        await items.aclose()  # type: ignore[attr-defined]


async def _whole(ticket: Ticket[Job], form: AnswerFormat) -> dict[str, Any]:
    pieces: list[Piece] = []
    async for item in ticket.items():
        if not isinstance(item, Piece):
            return form.whole(pieces, item)
        pieces.append(item)
    raise AssertionError("an answer ends with a Finish")


async def _unless_client_leaves(request: Request, answer: Coroutine[Any, Any, Value]) -> Value:
    """The result of a coroutine, which is cancelled if the client disconnects first."""

    async def leaving() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, left = asyncio.ensure_future(answer), asyncio.ensure_future(leaving())
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ApiError(499, "the client disconnected.")
        return work.result()
    finally:
        work.cancel()
        left.cancel()
