"""What each request passes before it reaches the API: its size, its time, its token, and whether the server stops."""

from __future__ import annotations

import asyncio
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
"""The page's Content-Security-Policy: gradio writes scripts into its page, and nothing comes from another site."""
_OPEN = ("/", "/health")
"""Paths that need no token, beside those of the page."""
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]", "::1")


class Guard:
    """ASGI middleware. It reads the whole body, so that a slow or a huge one never reaches a route.

    Args:
        draining: whether the server stops.
        paths: the paths of the API; others count as one in the metrics.
        page: where the chat page lies, which has a login of its own.
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
        """One request."""
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
            if path.startswith("/v1/"):
                receive = await self._whole_body(receive, headers)
        except ApiError as error:
            await error.response(connection="close")(scope, receive, counting)
            return
        await self._app(scope, receive, counting)

    def _check(self, path: str, of_page: bool, method: str, headers: dict[str, str]) -> None:
        if self._settings.on_loopback and self._settings.api_key is None:
            _check_site(headers.get("host", ""), headers.get("origin"), self._settings.host)
        if path in _OPEN or of_page:
            return
        if (key := self._settings.api_key) is not None:
            scheme, _, token = headers.get("authorization", "").partition(" ")
            # Latin-1 as it came: compare_digest takes no text beyond ASCII.
            same = hmac.compare_digest(token.strip().encode("latin-1"), key.encode())
            if scheme.lower() != "bearer" or not same:
                raise ApiError(
                    401,
                    "this server needs its token: the header Authorization: Bearer TOKEN. The one that came is "
                    + ("another." if token else "missing."),
                    code="invalid_api_key",
                )
        if method == "POST" and self._draining():
            raise stopping()
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":  # a browser sends other kinds from any site
            raise ApiError(415, f"a request's body is JSON, with Content-Type: application/json; got {kind!r}.")

    async def _whole_body(self, receive: Any, headers: dict[str, str]) -> Any:
        """`receive` that hands out the body at once and then what the connection brings."""
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
                        raise ApiError(400, "the client left in the middle of its request.")
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise self._too_large()
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ApiError(408, f"the request did not arrive within {seconds:g} s.", code="timeout") from None
        first = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Any:
            return first.pop() if first else await receive()

        return replay

    def _too_large(self) -> ApiError:
        most = self._settings.max_body
        return ApiError(
            413,
            f"a request's body has at most {most:,} bytes. Send a shorter document, or start the server with a larger "
            "--max-body.",
            code="body_too_large",
        )


def _check_site(host: str, origin: str | None, address: str) -> None:
    """Reject what a page of another site makes a browser send: by a name that leads here, or from its own origin."""
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    if name.lower() not in (*_LOOPBACK_NAMES, address):
        raise ApiError(403, f"this server answers to localhost alone; the request's Host is {host!r}.")
    if origin is not None and origin.partition("://")[2] != host:
        raise ApiError(403, f"this server answers to its own page alone; the request's Origin is {origin!r}.")
