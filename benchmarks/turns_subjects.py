"""The subjects of benchmarks/turns.py: conversations with zebra, in the process or served, and with other servers."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from zebra.conversation import Conversation
from zebra.model.load_options import loaded_layout_name
from zebra_bench.servers import free_port, llama_process, response_lines, running

ANSWER = 64
"""Tokens of an answer, at most."""


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
    log_sizes = ("-lv", "4")  # it says what its cache takes at this verbosity alone
    with llama_process(gguf, context, torch.get_num_threads(), more=log_sizes) as (port, log):

        def read_bytes() -> float | None:
            log.seek(0)
            sizes = re.findall(r"KV buffer size = +([\d.]+) MiB", log.read())
            return sum(map(float, sizes)) * 2**20 if sizes else None

        yield Served(port, gguf.stem, "full", read_bytes)
