"""The subjects of benchmarks/turns.py: conversations with zebra, in the process or served, and with other servers."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from zebra.conversation import Conversation
from zebra.errors import ZebraError
from zebra.model.load_options import loaded_layout_name

ANSWER = 64
"""Tokens of an answer, at most."""


def response_lines(port: int, path: str, body: bytes | None = None) -> Iterator[bytes]:
    """The lines of an answer as they come."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=7200)
    try:
        connection.request("POST" if body else "GET", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise ZebraError(f"{path} answered with status {response.status}: {response.read(500).decode()}")
        yield from response
    finally:
        connection.close()


class Chat(Protocol):
    """A conversation with one subject.

    Attributes:
        layout: of the model, as results name it.
    """

    layout: str

    def ask(self, content: str) -> Iterator[str]:
        """The answer to a message, in pieces."""

    def clear(self) -> None:
        """Begin anew."""

    def counts(self) -> dict[str, float]:
        """Of the last answer, what the subject says of it: tokens of its prompt, those that a cache held."""

    def cache_bytes(self) -> float | None:
        """Bytes of all that is cached now; None where the subject does not say."""


class InProcess:
    """`zebra.Conversation`."""

    def __init__(self, checkpoint: Path, loading: Mapping[str, Any]) -> None:
        self._chat = Conversation(checkpoint, max_new_tokens=ANSWER, **loading)
        self.layout = loaded_layout_name(self._chat.model, loading.get("rope"))

    def ask(self, content: str) -> Iterator[str]:
        return self._chat.reply(content)

    def clear(self) -> None:
        self._chat = Conversation(self._chat.model, max_new_tokens=ANSWER)

    def counts(self) -> dict[str, float]:
        last = self._chat.last
        assert last is not None
        return {"prompt_tokens": last.prompt_tokens, "cached_tokens": last.cached_tokens}

    def cache_bytes(self) -> float | None:
        return self._chat.cache_bytes


class Served:
    """A server's streaming chat endpoint.

    Args:
        port, model, layout: of the server.
        read_bytes: how to read what its cache holds.
    """

    def __init__(
        self, port: int, model: str, layout: str = "full", read_bytes: Callable[[], float | None] = lambda: None
    ) -> None:
        self.layout, self.cache_bytes = layout, read_bytes
        self._port, self._model = port, model
        self._messages: list[dict[str, str]] = []
        self._usage: dict[str, Any] = {}

    def ask(self, content: str) -> Iterator[str]:
        self._messages.append({"role": "user", "content": content})
        body = {"model": self._model, "messages": self._messages, "max_tokens": ANSWER, "temperature": 0}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        text = ""
        for line in response_lines(self._port, "/v1/chat/completions", json.dumps(body).encode()):
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                self._usage = event.get("usage") or self._usage
                piece = event["choices"][0]["delta"].get("content") if event["choices"] else None
                if piece:
                    text += piece
                    yield piece
        self._messages.append({"role": "assistant", "content": text})

    def clear(self) -> None:
        self._messages.clear()

    def counts(self) -> dict[str, float]:
        cached = (self._usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        prompt = {"prompt_tokens": self._usage["prompt_tokens"]} if self._usage else {}
        return prompt | ({} if cached is None else {"cached_tokens": cached})


@contextmanager
def in_process(checkpoint: Path, loading: Mapping[str, Any]) -> Iterator[Chat]:
    yield InProcess(checkpoint, loading)


@contextmanager
def zebra_serve(checkpoint: Path, loading: Mapping[str, Any]) -> Iterator[Chat]:
    port = free_port()
    options = [part for name, value in loading.items() for part in (f"--{name.replace('_', '-')}", value)]
    command = [sys.executable, "-m", "zebra", "serve", str(checkpoint), "--port", str(port), "--no-page", *options]

    def all_bytes() -> float:
        return float(re.findall(rb"^zebra_cache_bytes (.+)$", b"".join(response_lines(port, "/metrics")), re.M)[0])

    with running([*command, "--timeout", "7200"], port):
        card = json.loads(b"".join(response_lines(port, "/v1/models")))["data"][0]
        others = 0.0

        class ZebraServed(Served):
            def clear(self) -> None:
                """The server goes on holding the text so far; what it takes counts no more."""
                nonlocal others
                super().clear()
                others = all_bytes()

        yield ZebraServed(port, card["id"], card["layout"], lambda: all_bytes() - others)


@contextmanager
def transformers_serve(checkpoint: Path) -> Iterator[Chat]:
    port, program = free_port(), str(Path(sys.executable).parent / "transformers")
    command = [program, "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "auto"]
    with running(command, port):
        yield Served(port, str(checkpoint.absolute()))


@contextmanager
def llama_server(gguf: Path, context: int) -> Iterator[Chat]:
    port = free_port()
    command = ["llama-server", "-m", str(gguf), "-c", str(context), "-t", str(torch.get_num_threads()), "-np", "1"]
    # Else it holds a slot to the trained length; and says what its cache takes at this verbosity alone.
    command += ["--override-kv", f"llama.context_length=int:{context}", "-lv", "4", "--port", str(port)]
    with running(command, port) as log:

        def read_bytes() -> float | None:
            log.seek(0)
            sizes = re.findall(r"KV buffer size = +([\d.]+) MiB", log.read())
            return sum(map(float, sizes)) * 2**20 if sizes else None

        yield Served(port, gguf.stem, "full", read_bytes)


@contextmanager
def running(command: Sequence[str], port: int) -> Iterator[IO[str]]:
    """A server that listens, and what it writes."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 600
            while not _is_up(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise ZebraError(f"{' '.join(command)} does not come up: {log.read()[-500:]}")
                time.sleep(0.5)
            yield log
        finally:
            process.terminate()
            process.wait(timeout=120)


def _is_up(port: int) -> bool:
    try:
        return bool(list(response_lines(port, "/health")))
    except (OSError, ZebraError, http.client.HTTPException):
        return False


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
