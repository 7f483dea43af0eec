"""The routes: OpenAI's completions, adaptation by itself, health, metrics and the page."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse

from ephemera import __version__
from ephemera.saving import finite
from ephemera.serving.engine.messages import Failed, Report
from ephemera.serving.engine.scheduler import Engine
from ephemera.serving.http.answers import Answering
from ephemera.serving.http.ask import Counting, listen, raise_failed, say_errors, submit
from ephemera.serving.http.auth import Guard, Keys
from ephemera.serving.http.errors import ApiError
from ephemera.serving.http.requests import Reader
from ephemera.serving.http.schema import AdaptRequest, ChatRequest, CompletionRequest, ErrorEnvelope
from ephemera.serving.metrics import Metrics

CLIENT_GONE = 499  # never sent: there is nobody to send it to
PAGE = Path(__file__).parent.parent / "playground"
PAGE_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorEnvelope, "description": words}
    for status, words in {
        400: "A field is wrong or not supported; `param` names it.",
        401: "No valid API key.",
        404: "No such model.",
        413: "The body or the prompt is too long.",
        422: "The model's chat template refuses these messages.",
        429: "The queue is full; `Retry-After` says when to come back.",
        500: "The server failed.",
        503: "Out of memory, past the deadline, or shutting down.",
    }.items()
}


@dataclass(frozen=True)
class Settings:
    """What the operator decides."""

    keys: tuple[str, ...] = ()
    cors: tuple[str, ...] = ()
    max_body: int = 1 << 20
    drain: float = 30.0  # seconds that the end waits for answers under way


def create_app(engine: Engine, reader: Reader, metrics: Metrics, settings: Settings) -> FastAPI:
    """The application around a running engine; it closes the engine when it ends."""

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI):
        yield
        await asyncio.to_thread(engine.close, settings.drain)

    app = FastAPI(title="Ephemera", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.engine = engine  # for whoever runs the application elsewhere than in uvicorn
    say_errors(app)
    _answer_routes(app, engine, reader)
    _adapt_route(app, engine, reader)
    _state_routes(app, engine, reader, metrics)
    app.add_middleware(Counting, metrics=metrics)
    app.add_middleware(Guard, keys=Keys(settings.keys), max_body=settings.max_body)
    if settings.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app


def _answer_routes(app: FastAPI, engine: Engine, reader: Reader) -> None:
    @app.post("/v1/chat/completions", responses=ERRORS)
    async def chat(body: ChatRequest, request: Request) -> Response:
        ids = await asyncio.to_thread(reader.chat, body.messages)
        return await complete(body, [ids], request, chat=True)

    @app.post("/v1/completions", responses=ERRORS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        ids = await asyncio.to_thread(lambda: [reader.plain(p) for p in body.prompts])
        return await complete(body, ids, request, chat=False)

    async def complete(
        body: ChatRequest | CompletionRequest, prompts: list[list[int]], request: Request, *, chat: bool
    ) -> Response:
        jobs = reader.jobs(body, prompts)
        events = submit(engine, jobs)
        answering = Answering(
            jobs, body.model, chat=chat, wants_logprobs=body.told is not None, wants_usage=body.wants_usage
        )
        heard = listen(request, jobs, events, lambda: answering.done)
        if body.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(answering.stream(heard), media_type="text/event-stream", headers=headers)
        async for prompt, event in heard:
            answering.take(prompt, event)
        raise_failed(answering.failed)
        return JSONResponse(finite(answering.body())) if answering.done else Response(status_code=CLIENT_GONE)


def _adapt_route(app: FastAPI, engine: Engine, reader: Reader) -> None:
    @app.post("/v1/adapt", responses=ERRORS)
    async def adapt(body: AdaptRequest, request: Request) -> Response:
        if body.messages is not None:
            ids = await asyncio.to_thread(reader.chat, body.messages)
        else:
            ids = await asyncio.to_thread(reader.plain, body.prompt or "")
        wants_zip = "application/zip" in request.headers.get("accept", "")
        job = reader.adaptation(body, ids, adapter=body.adapter or wants_zip)
        found: list[Report | Failed] = []
        events = submit(engine, [job])
        async for _, event in listen(request, [job], events, lambda: bool(found)):
            if isinstance(event, Report | Failed):
                found.append(event)
        if not found:
            return Response(status_code=CLIENT_GONE)
        event = found[0]
        if isinstance(event, Failed):
            raise_failed(event)
        assert isinstance(event, Report)
        if wants_zip:
            headers = {"Content-Disposition": 'attachment; filename="adapter.zip"'}
            return Response(event.adapter, media_type="application/zip", headers=headers)
        packed = base64.b64encode(event.adapter).decode() if event.adapter is not None else None
        answer = {"object": "adaptation", "model": body.model, "ephemera": event.facts, "adapter": packed}
        return JSONResponse(finite(answer))


def _state_routes(app: FastAPI, engine: Engine, reader: Reader, metrics: Metrics) -> None:
    created = int(time.time())

    @app.get("/v1/models", responses={401: ERRORS[401]})
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": reader.described(created)}

    @app.get("/v1/models/{model_id:path}", responses={401: ERRORS[401], 404: ERRORS[404]})
    async def model(model_id: str) -> dict[str, Any]:
        return reader.describe(model_id, created)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", responses={503: ERRORS[503], 401: ERRORS[401]})
    async def ready() -> dict[str, str]:
        if not engine.alive:
            raise ApiError(503, "the engine is not running.", code="not_ready")
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, responses={401: ERRORS[401]})
    async def show_metrics() -> Response:
        metrics.waiting.set(len(engine.waiting))
        metrics.decoding.set(len(engine.batch.answers))
        return Response(metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return _page_file("index.html")

    @app.get("/playground/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        return _page_file(name)


def _page_file(name: str) -> Response:
    """A file of the page's own folder, by a name that is in it."""
    path = PAGE / name
    if name not in {p.name for p in PAGE.glob("*.*")}:
        raise ApiError(404, f"the page has no file {name!r}.")
    return FileResponse(path, headers=PAGE_HEADERS, media_type=PAGE_TYPES.get(path.suffix))
