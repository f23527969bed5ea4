"""What a server is started with; checked before torch is imported."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from zebra.errors import ZebraError

MIB = 2**20


@dataclass(frozen=True)
class ServeSettings:
    """How a server listens, and what it takes.

    Args:
        host, port: where it listens; port 0 takes any free one.
        api_key: the bearer token that clients must send; None asks for none.
        cache_memory: bytes of key-value caches that are kept for the next turn of a conversation.
        max_queue: requests that wait for the model; one more gets 429.
        max_seconds: a request's time, waiting included; then it gets 504.
        max_body: bytes of a request's body; a longer one gets 413.
        max_tokens: tokens of an answer whose request names no number.
        read_seconds: a client's time to send its request; then it gets 408.
        page: whether the chat page is served; None: on loopback, where gradio is installed.

    Raises:
        ZebraError: an address beyond loopback without a token; a limit that is too small; a token that no header holds.
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
            raise ZebraError("an API key is printable ASCII of at least one character. Choose another.")
        if self.api_key is not None and self.api_key != self.api_key.strip():
            raise ZebraError("an API key neither begins nor ends with a space. Choose another.")
        if self.api_key is None and not self.on_loopback:
            raise ZebraError(
                f"a server that others can reach needs a token; got host {self.host!r} and no token. Set "
                "ZEBRA_API_KEY or --api-key, or leave --host out."
            )
        for name, least in (("cache_memory", 0), ("max_queue", 1), ("max_body", 1), ("max_tokens", 1)):
            if getattr(self, name) < least:
                raise ZebraError(f"{name} is at least {least}; got {getattr(self, name)}. Raise it.")
        for name in ("max_seconds", "read_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ZebraError(f"{name} is a number of seconds above 0; got {getattr(self, name)}. Change it.")

    @property
    def on_loopback(self) -> bool:
        """Whether nothing but this machine reaches the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
