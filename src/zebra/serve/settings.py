"""The settings of a server, which are checked before torch is imported."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from zebra.errors import ZebraError

MIB = 2**20


@dataclass(frozen=True)
class ServeSettings:
    """The address of a server, its token and its limits.

    Args:
        host, port: the address to listen on; port 0 chooses a free one.
        api_key: the bearer token that clients must send; None for no authentication.
        cache_memory: limit in bytes of the KV caches that are kept for later turns of conversations.
        max_queue: maximum number of waiting requests; a further one gets 429.
        max_seconds: time limit of a request, including its time in the queue; after it the request gets 504.
        max_body: maximum size of a request's body in bytes; a larger one gets 413.
        max_tokens: limit of new tokens for requests that set none.
        read_seconds: time limit for sending a request; a slower client gets 408.
        page: whether to serve the chat page; None serves it on loopback if gradio is installed.

    Raises:
        ZebraError: an address beyond loopback without a token; a limit out of range; a token that is not printable
            ASCII, or that begins or ends with a space.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    cache_memory: int = 1024 * MIB
    max_queue: int = 64
    max_seconds: float = 600.0
    max_body: int = 32 * MIB
    max_tokens: int = 1024
    read_seconds: float = 30.0
    page: bool | None = None

    def __post_init__(self) -> None:
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise ZebraError("an API key must be printable ASCII with at least one character. Choose another.")
        if self.api_key is not None and self.api_key != self.api_key.strip():
            raise ZebraError("an API key cannot begin or end with a space. Choose another.")
        if self.api_key is None and not self.on_loopback:
            raise ZebraError(
                f"a server that other machines can reach requires a token; got host {self.host!r} and no token. Set "
                "ZEBRA_API_KEY or --api-key, or leave --host out."
            )
        for name, least in (("cache_memory", 0), ("max_queue", 1), ("max_body", 1), ("max_tokens", 1)):
            if getattr(self, name) < least:
                raise ZebraError(f"{name} must be at least {least}; got {getattr(self, name)}. Raise it.")
        for name in ("max_seconds", "read_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ZebraError(
                    f"{name} must be a finite number of seconds above 0; got {getattr(self, name)}. Change it."
                )

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
