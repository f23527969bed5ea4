"""The checks before every route: body size and time, token, host and origin, and whether the server is stopping."""

from __future__ import annotations

import asyncio
import base64
import hmac
from collections.abc import Callable
from typing import Any

from zebra.serve.engine import stopping
from zebra.serve.errors import ApiError
from zebra.serve.metrics import Metrics
from zebra.serve.settings import ServeSettings

_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; frame-ancestors 'none'"
)
"""The page's Content-Security-Policy: gradio needs inline scripts; nothing is loaded from other sites."""
_OPEN = ("/", "/health")
"""Paths that need no token."""
_PASSWORD = 'Basic realm="any name, and the token as the password", charset="UTF-8"'
"""The WWW-Authenticate header that makes a browser ask for the token."""
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]", "::1")


class Guard:
    """ASGI middleware that reads the whole body, so that a slow or oversized one never reaches a route.

    Args:
        draining: whether the server is stopping.
        paths: the API paths that have their own label in the metrics; all others are counted as "other".
        page: path of the chat page. All of it needs the token: gradio would parse a body before its own login.
    """

    def __init__(
        self,
        app: Any,
        *,
        settings: ServeSettings,
        metrics: Metrics,
        draining: Callable[[], bool],
        paths: frozenset[str],
        page: str,
    ) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._draining, self._paths, self._page = draining, paths, page

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Check a request and pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        counted = path if path in self._paths else "other"
        of_page = path == self._page or path.startswith(f"{self._page}/")

        async def counting(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(counted, message["status"]).inc()
                if of_page:
                    message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
            await send(message)

        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            self._check(path, of_page, scope["method"], headers)
            receive = await self._whole_body(receive, headers)
        except ApiError as error:
            scheme = {"www-authenticate": _PASSWORD} if of_page and error.status == 401 else {}
            await error.response(connection="close", **scheme)(scope, receive, counting)
            return
        await self._app(scope, receive, counting)

    def _check(self, path: str, of_page: bool, method: str, headers: dict[str, str]) -> None:
        local = self._settings.on_loopback and self._settings.api_key is None
        if local:
            _check_host(headers.get("host", ""), self._settings.host)
        if local or of_page:
            _check_origin(headers)
        if path in _OPEN:
            return
        if (key := self._settings.api_key) is not None:
            token = _token(headers.get("authorization", ""), of_page)
            if not hmac.compare_digest(token, key.encode()):
                raise ApiError(
                    401,
                    "this server requires the header Authorization: Bearer TOKEN. The token of the request is "
                    + ("wrong." if token else "missing."),
                    code="invalid_api_key",
                )
        if of_page:
            return
        if method == "POST" and self._draining():
            raise stopping()
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":  # a browser sends other types cross-site
            raise ApiError(415, f"requests must be JSON with Content-Type: application/json; got {kind!r}.")

    async def _whole_body(self, receive: Any, headers: dict[str, str]) -> Any:
        """Read the whole body; return a `receive` that yields it in one message, then what the connection sends."""
        most, seconds = self._settings.max_body, self._settings.read_seconds
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client disconnected before its request was complete.")
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise self._too_large()
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ApiError(
                408, f"the request did not arrive completely within {seconds:g} s.", code="timeout"
            ) from None
        first = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Any:
            return first.pop() if first else await receive()

        return replay

    def _too_large(self) -> ApiError:
        most = self._settings.max_body
        return ApiError(
            413,
            f"a request's body must have at most {most:,} bytes. Send a shorter document, or start the server with a "
            "larger --max-body.",
            code="body_too_large",
        )


def _token(authorization: str, of_page: bool) -> bytes:
    """The token of an Authorization header; for the page, browsers send it as the password of Basic."""
    scheme, _, value = authorization.partition(" ")
    if of_page and scheme.lower() == "basic":
        try:
            return base64.b64decode(value).partition(b":")[2]
        except ValueError:
            return b""
    # Bytes, because compare_digest rejects non-ASCII strings.
    return value.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


def _check_host(host: str, address: str) -> None:
    """Reject host names of other sites that resolve to this machine (DNS rebinding)."""
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    if name.lower() not in (*_LOOPBACK_NAMES, address):
        raise ApiError(403, f"this server only answers requests to localhost; the request's Host is {host!r}.")


def _check_origin(headers: dict[str, str]) -> None:
    """Reject cross-site requests (CSRF): a browser would add the page's password to them by itself."""
    origin = headers.get("origin")
    # A proxy that changes Host sets X-Forwarded-Host; a page of another site cannot set either.
    if origin is not None and origin.partition("://")[2] not in (headers.get("host"), headers.get("x-forwarded-host")):
        raise ApiError(403, f"this server only answers its own page; the request's Origin is {origin!r}.")
