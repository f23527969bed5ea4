"""The server process: uvicorn, with a graceful shutdown and a timeout for slow clients."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from zebra.errors import ZebraError
from zebra.serve.engine import Engine
from zebra.serve.settings import ServeSettings


class Server(uvicorn.Server):
    """uvicorn's server. On a signal it finishes the accepted requests, then exits; a second signal aborts them.

    Args:
        listener: a bound socket.
        engine: answers the requests.
        on_start: called with the URL when the server listens.
    """

    def __init__(
        self, config: uvicorn.Config, listener: socket.socket, engine: Engine[Any], on_start: Callable[[str], None]
    ) -> None:
        super().__init__(config)
        self._listener, self._engine, self._on_start = listener, engine, on_start
        self._ending = False
        self.address = ""
        """The URL, once the server listens; empty before."""

    async def startup(self, sockets: Any = None) -> None:
        """Listen, and report the URL."""
        await super().startup(sockets=[self._listener])
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        self.address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._on_start(self.address)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Handle a signal: the first lets requests finish, the second ends them with an error and stops uvicorn."""
        if self._ending:
            self._engine.abort()
            super().handle_exit(sig, frame)
            return
        self._ending = True
        self._engine.drain()

    async def on_tick(self, counter: int) -> bool:
        """Exit when draining is complete; uvicorn calls this ten times a second."""
        if self._ending and self._engine.idle:
            self.should_exit = True
        return await super().on_tick(counter)


def bound_socket(host: str, port: int) -> socket.socket:
    """Bind a socket without listening, so that address errors show before a model is loaded.

    Raises:
        ZebraError: the port is in use, or the address does not belong to this machine.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ZebraError(
            f"the server cannot listen on {host}, port {port}: {error.strerror}. Choose another --port or --host."
        ) from None
    return listener


def protocol(read_seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, which closes a connection that does not send the complete headers of a request in time."""

    class TimedProtocol(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._expect_request()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._expect_request()

        def _expect_request(self) -> None:
            self.loop.call_later(read_seconds, self._close_without_request, self.cycle)

        def _close_without_request(self, before: Any) -> None:
            if self.cycle is before and not self.transport.is_closing():
                self.transport.close()

    return TimedProtocol


def config(app: Any, settings: ServeSettings) -> uvicorn.Config:
    """The options of uvicorn."""
    return uvicorn.Config(
        app,
        http=protocol(settings.read_seconds),
        ws="none",
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=10,
    )
