"""llama.cpp's server as a peer: milliseconds to read a text and of a token after it, by its own clock."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zebra_bench.servers import llama_process, response_lines

_CHOICES = 64
"""Log-probabilities that it is asked for."""


class LlamaServer:
    """A running server with one slot.

    Args:
        port: of the server.
    """

    def __init__(self, port: int) -> None:
        self._port = port

    def read(self, ids: Sequence[int]) -> float:
        """Milliseconds to read a text anew."""
        return float(self._complete(ids, 1, cache_prompt=False)["timings"]["prompt_ms"])

    def decode(self, ids: Sequence[int], steps: int) -> float:
        """Milliseconds of a token after a text, which it reads where it has not just done so."""
        return float(self._complete(ids, steps, cache_prompt=True)["timings"]["predicted_per_token_ms"])

    def log_probabilities(self, ids: Sequence[int]) -> dict[int, float]:
        """Of the tokens that it finds most likely after a text."""
        answer = self._complete(ids, 1, cache_prompt=False, n_probs=_CHOICES)
        return {one["id"]: one["logprob"] for one in answer["completion_probabilities"][0]["top_logprobs"]}

    def _complete(self, ids: Sequence[int], new: int, **options: Any) -> Any:
        body = {"prompt": list(ids), "n_predict": new, "temperature": 0.0, "ignore_eos": True} | options
        return json.loads(b"".join(response_lines(self._port, "/completion", json.dumps(body).encode())))


@contextmanager
def llama_server(program: str, gguf: Path, context: int, threads: int) -> Iterator[LlamaServer]:
    """A server of a GGUF file, with keys and values of 16 bits."""
    with llama_process(gguf, context, threads, program=program) as (port, _):
        yield LlamaServer(port)
