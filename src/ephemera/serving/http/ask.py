"""Between HTTP and the engine: queueing, listening, noticing that the client is gone, errors as OpenAI words them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ephemera.serving.engine.messages import Busy, Event, Failed, Job
from ephemera.serving.engine.scheduler import Engine
from ephemera.serving.http.errors import ApiError, envelope
from ephemera.serving.http.schema import where
from ephemera.serving.metrics import Metrics

Events = asyncio.Queue[tuple[int, Event]]


@dataclass
class _Bridge:
    """Carries one job's events from the engine's thread to the event loop."""

    loop: asyncio.AbstractEventLoop
    events: Events
    prompt: int

    def __call__(self, event: Event) -> None:
        self.loop.call_soon_threadsafe(self.events.put_nowait, (self.prompt, event))


def submit(engine: Engine, jobs: list[Job]) -> Events:
    """Queue jobs; where their events will arrive. 429 where the queue is full."""
    events: Events = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for prompt, job in enumerate(jobs):
        job.emit = _Bridge(loop, events, prompt)
    try:
        engine.submit(jobs)
    except Busy as busy:
        after = {"Retry-After": str(busy.seconds)}
        if busy.closed:
            raise ApiError(503, str(busy), code="shutting_down", headers=after) from None
        message = f"{busy} Try again in {busy.seconds} s."
        raise ApiError(429, message, code="queue_full", headers=after) from None
    return events


async def listen(
    request: Request, jobs: list[Job], events: Events, done: Callable[[], bool]
) -> AsyncGenerator[tuple[int, Event]]:
    """Events until all is done; ends early, and cancels the jobs, when the client is gone or stops listening."""
    gone = asyncio.ensure_future(_gone(request))
    try:
        while not done():
            coming = asyncio.ensure_future(events.get())
            try:
                await asyncio.wait({coming, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    return
                yield coming.result()
            finally:
                coming.cancel()
    finally:
        gone.cancel()
        for job in jobs:
            job.cancelled = True


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def raise_failed(failed: Failed | None) -> None:
    if failed is not None:
        headers = {"Retry-After": "5"} if failed.status == 503 else {}
        raise ApiError(failed.status, failed.message, code=failed.code, headers=headers)


def say_errors(app: FastAPI) -> None:
    """Every error in OpenAI's envelope, and none of FastAPI's 422 in the document."""

    @app.exception_handler(ApiError)
    async def api_error(_request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        message, field = where(error.errors())
        sent = request.headers.get("content-type", "")
        kind = sent.partition(";")[0].strip().lower()
        if not (kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))):
            given = f"the Content-Type {sent!a}" if sent else "no Content-Type"
            message, field = f"the body was sent with {given}; send it with 'Content-Type: application/json'.", None
        return JSONResponse(envelope(400, message, param=field), status_code=400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}."
        if error.status_code == 400:  # FastAPI's own, of bodies that json.loads refuses otherwise than by its error
            message = "the body is no valid JSON: it is not UTF-8, nested too deeply, or has a number that is too long."
        return JSONResponse(envelope(error.status_code, message), status_code=error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def failed(_request: Request, _error: Exception) -> JSONResponse:
        return JSONResponse(envelope(500, "the server failed; its log says where."), status_code=500)


class Counting:
    """ASGI middleware: counts responses by path and status. Unknown paths count as one."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            route: Any = scope.get("route")
            path = getattr(route, "path", "other")
            self.metrics.responses.labels(path, str(status)).inc()
