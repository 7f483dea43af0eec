"""Before a request is read: who may ask, how large a body may be."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ephemera.serving.http.errors import ApiError, envelope, send_error

OPEN_PATHS = ("/", "/health")  # and the page's files: they hold nothing of anyone's


class Keys:
    """API keys as keyed hashes; comparing takes the same time wherever a wrong key differs."""

    def __init__(self, keys: Sequence[str]):
        self._salt = secrets.token_bytes(32)
        self._hashes = [self._hash(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def allow(self, key: str) -> bool:
        given = self._hash(key)
        same = [hmac.compare_digest(given, known) for known in self._hashes]
        return any(same)  # every one was compared

    def _hash(self, key: str) -> bytes:
        return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), key=self._salt).digest()


class Guard:
    """ASGI middleware: 401 without a known key, 413 for a body that is too large, whatever its headers say."""

    def __init__(self, app: ASGIApp, *, keys: Keys, max_body: int):
        self.app, self.keys, self.max_body = app, keys, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {k.lower(): v for k, v in scope["headers"]}
        if self.keys and not self._open(scope) and not self._known(headers.get(b"authorization", b"")):
            body = envelope(401, "no valid API key: send it as 'Authorization: Bearer KEY'.", code="invalid_api_key")
            return await send_error(send, 401, body, [(b"www-authenticate", b"Bearer")])
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body:
            return await send_error(send, 413, self._too_large(), [(b"connection", b"close")])
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self.max_body:
                    raise ApiError(413, self._too_large()["error"]["message"], code="body_too_large")
            return message

        await self.app(scope, counted, send)

    def _too_large(self) -> dict:
        return envelope(
            413, f"the body is larger than this server takes ({self.max_body} bytes).", code="body_too_large"
        )

    def _open(self, scope: Scope) -> bool:
        path = scope["path"]
        return scope["method"] in ("GET", "HEAD") and (path in OPEN_PATHS or path.startswith("/playground/"))

    def _known(self, header: bytes) -> bool:
        scheme, _, key = header.decode("latin-1").partition(" ")
        return scheme.lower() == "bearer" and self.keys.allow(key.strip())
