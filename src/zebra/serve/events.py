"""What the engine hands to the answer of one request: pieces of text, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from transformers.cli.serving.utils import ToolCall


class ScoredToken(NamedTuple):
    """A token of an answer.

    Attributes:
        text: what it adds to the answer, `\\ufffd` for bytes that are no whole character.
        logprob: its log-probability under the model.
        bytes: of its text; None where the tokenizer does not say.
        top: the likeliest tokens in its place.
    """

    text: str
    logprob: float
    bytes: bytes | None
    top: tuple[ScoredToken, ...] = ()


@dataclass(frozen=True)
class Progress:
    """How far a prompt has been read.

    Attributes:
        total: its tokens.
        cached: those that a cache held.
        processed: those that were read or cached.
        seconds: of reading.
    """

    total: int
    cached: int
    processed: int
    seconds: float

    def fields(self) -> dict[str, Any]:
        """The fields that llama.cpp's server names `prompt_progress`."""
        milliseconds = round(1000 * self.seconds)
        return {"total": self.total, "cache": self.cached, "processed": self.processed, "time_ms": milliseconds}


@dataclass(frozen=True)
class Piece:
    """A piece of an answer: a text, reasoning, a call of a tool, or the progress of reading; with scores its tokens."""

    text: str = ""
    reasoning: str = ""
    tool: ToolCall | None = None
    tokens: tuple[ScoredToken, ...] = ()
    progress: Progress | None = None


@dataclass(frozen=True)
class Finish:
    """How an answer ended, and what it took.

    Attributes:
        reason: "stop" at a token or a string that ends it, "length" at the most tokens.
        cached_tokens: those of the prompt that a cache held.
        prompt_seconds: reading the rest of the prompt, to the first token.
        seconds: of all tokens after the first.
    """

    reason: Literal["stop", "length"]
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    prompt_seconds: float
    seconds: float

    def timings(self) -> dict[str, Any]:
        """The fields that llama.cpp's server names `timings`."""
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
