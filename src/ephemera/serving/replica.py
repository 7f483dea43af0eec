"""One model of several that serve together: the whole application, asked in ASGI messages instead of over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from starlette.types import Message

from ephemera.config import Serve, check_config
from ephemera.serving.build import build


class Replica:
    """Holds a model and its engine. `settings`: those of `Serve`, as they are sent to another process."""

    def __init__(self, settings: dict[str, Any]):
        self.settings = check_config(Serve, settings)
        self.app = build(self.settings)

    async def ask(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Message]:
        """The application's response to a request, message by message. Whoever stops listening cancels the request."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        request: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if request:
                return request.pop()
            return await asyncio.Future()  # nothing more comes; a client that is gone cancels this

        async def answer() -> None:
            try:
                await self.app(scope, receive, sent.put)
            finally:
                sent.put_nowait(None)

        answering = asyncio.ensure_future(answer())
        try:
            while (message := await sent.get()) is not None:
                yield message
            await answering
        finally:
            answering.cancel()

    def check_health(self) -> None:
        """RuntimeError if the engine has ended: Ray Serve then starts another replica."""
        if not self.app.state.engine.alive:
            raise RuntimeError("the engine is not running.")

    async def close(self) -> None:
        """End the engine, once it has finished what it was asked."""
        await asyncio.to_thread(self.app.state.engine.close, self.settings.drain)
