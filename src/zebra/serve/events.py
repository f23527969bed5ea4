"""What the engine sends for one request: pieces of the answer, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from transformers.cli.serving.utils import ToolCall


class TokenLogprob(NamedTuple):
    """A token of an answer with its log-probability.

    Attributes:
        text: the text that it adds to the answer, with `\\ufffd` for an incomplete character.
        logprob: its log-probability under the model.
        bytes: its UTF-8 bytes; None if the tokenizer does not reveal them.
        top: the most likely tokens at its position.
    """

    text: str
    logprob: float
    bytes: bytes | None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Progress:
    """The progress of a prefill.

    Attributes:
        total: tokens of the prompt.
        cached: prompt tokens that came from a KV cache.
        processed: prompt tokens processed so far, including the cached ones.
        seconds: time spent on the request by the engine so far.
    """

    total: int
    cached: int
    processed: int
    seconds: float

    def fields(self) -> dict[str, Any]:
        """The fields of `prompt_progress`, as in llama.cpp's server."""
        milliseconds = round(1000 * self.seconds)
        return {"total": self.total, "cache": self.cached, "processed": self.processed, "time_ms": milliseconds}


@dataclass(frozen=True)
class Piece:
    """A piece of an answer: text, reasoning, a tool call or the prefill progress.

    Attributes:
        tokens: the tokens since the piece before, if log-probabilities were requested.
    """

    text: str = ""
    reasoning: str = ""
    tool: ToolCall | None = None
    tokens: tuple[TokenLogprob, ...] = ()
    progress: Progress | None = None


@dataclass(frozen=True)
class Finish:
    """How an answer ended, with its token counts and times.

    Attributes:
        reason: "stop" at an end token or a stop string, "length" at the token limit or the end of the context.
        cached_tokens: prompt tokens that came from a KV cache.
        prompt_seconds: time to the first token: prefill of the other prompt tokens, and one decoding step.
        seconds: time of all tokens after the first.
    """

    reason: Literal["stop", "length"]
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    prompt_seconds: float
    seconds: float

    def timings(self) -> dict[str, Any]:
        """The fields of `timings`, as in llama.cpp's server."""
        read, after = self.prompt_tokens - self.cached_tokens, max(self.new_tokens - 1, 0)
        return {
            "cache_n": self.cached_tokens,
            "prompt_n": read,
            "prompt_ms": 1000 * self.prompt_seconds,
            "prompt_per_second": read / self.prompt_seconds if self.prompt_seconds else None,
            "predicted_n": self.new_tokens,
            "predicted_ms": 1000 * self.seconds,
            "predicted_per_second": after / self.seconds if self.seconds else None,
        }
