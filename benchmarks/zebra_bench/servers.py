"""Servers as subjects: started, waited for, asked over HTTP, and ended."""

from __future__ import annotations

import http.client
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from zebra.errors import ZebraError


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
    """A port that nothing listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def llama_process(
    gguf: Path, context: int, threads: int, *, program: str = "llama-server", more: Sequence[str] = ()
) -> Iterator[tuple[int, IO[str]]]:
    """llama.cpp's server of a GGUF file with one slot, by its own defaults besides: its port, and what it writes.

    Args:
        more: further arguments.
    """
    port = free_port()
    command = [program, "-m", str(gguf), "-c", str(context), "-np", "1", "-t", str(threads), "-tb", str(threads)]
    # Else it holds a slot to the trained length.
    command += ["--override-kv", f"llama.context_length=int:{context}", "--port", str(port), *more]
    with running(command, port) as log:
        yield port, log
