"""The door before replicas: passes requests on, and says in OpenAI's envelope that a replica was lost."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ephemera.serving.http.errors import ApiError, send_error

log = logging.getLogger("ephemera.serving")
Ask = Callable[[dict[str, Any], bytes], AsyncGenerator[Message]]
# What of a request goes to another process; the rest is this server's own
PASSED = (
    "type",
    "asgi",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "headers",
)


class Front:
    """ASGI middleware that answers every request by a replica.

    `ask`: the replica's messages for a request. `told`: the error to give for an exception of `ask`.
    """

    def __init__(self, app: ASGIApp, *, ask: Ask, told: Callable[[Exception], ApiError]):
        self.app, self.ask, self.told = app, ask, told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            body = await _body(receive)
        except ApiError as error:
            return await send_error(send, error.status_code, error.body, _headers(error))
        if body is None:
            return None
        request = {key: scope[key] for key in PASSED if key in scope}
        await self._answer({**request, "client": scope.get("client")}, body, send)

    async def _answer(self, request: dict[str, Any], body: bytes, send: Send) -> None:
        begun = streams = ended = False
        try:
            async with aclosing(self.ask(request, body)) as messages:
                async for message in messages:
                    if message["type"] == "http.response.start":
                        begun, streams = True, _is_stream(message)
                    elif message["type"] == "http.response.body":
                        ended = not message.get("more_body", False)
                    await send(message)
        except Exception as error:
            log.warning("a replica failed: %s", type(error).__name__)  # its words may quote a prompt
            if ended:
                return
            answer = self.told(error)
            if not begun:
                await send_error(send, answer.status_code, answer.body, _headers(answer))
            elif streams:  # its status is sent already: the stream says so itself, as the server's own errors do
                line = f"data: {json.dumps(answer.body)}\n\n".encode()
                await send({"type": "http.response.body", "body": line, "more_body": False})
            else:
                raise  # half a body: the connection breaks, which the client sees


async def _body(receive: Receive) -> bytes | None:
    """The request's body; None if the client is gone."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _is_stream(start: Message) -> bool:
    kinds = [value for name, value in start.get("headers", []) if name.lower() == b"content-type"]
    return any(value.startswith(b"text/event-stream") for value in kinds)


def _headers(error: ApiError) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items()]
