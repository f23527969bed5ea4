"""Run a job: turn the tokens of `zebra.streaming` into pieces of text, reasoning, tool calls and log-probabilities."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.utils import ReasoningText, ToolCall, response_events_to_chunks

from zebra.model.prefix_cache import PrefixCache
from zebra.serve.engine import Ticket
from zebra.serve.events import Finish, Piece, Progress, TokenLogprob
from zebra.serve.jobs import Job
from zebra.serve.metrics import Metrics
from zebra.serve.scores import scored_token
from zebra.serve.stops import StopFilter
from zebra.streaming import Step, answer
from zebra.text_writer import TextWriter

_MAX_TEXTS = 256
"""The maximum number of texts whose KV caches are kept; `cache_memory` may allow fewer."""


class Answerer:
    """Answers jobs one at a time with one model, and keeps the KV caches of recent conversations.

    Args:
        tokenizer: only the engine's thread may use it, because tokenizers are not thread-safe.
        cache_memory: limit of the KV caches in bytes; the least recently used are evicted first.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache_memory: int, metrics: Metrics
    ) -> None:
        self._model, self._tokenizer, self._metrics = model, tokenizer, metrics
        self._prefixes = PrefixCache(model, max_texts=_MAX_TEXTS, max_bytes=cache_memory)

    def __call__(self, ticket: Ticket[Job]) -> Finish | None:
        """Answer a job and send its pieces to the ticket; return None if the request was cancelled."""
        job, pieces = ticket.job, _Pieces(ticket, self._tokenizer)
        generated = answer(
            self._model,
            self._tokenizer,
            torch.tensor(job.ids),
            job.decoding,
            self._prefixes,
            logprobs=job.scores,
            on_step=pieces.put,
            on_prefill=pieces.prefill,
            cancelled=lambda: ticket.cancelled or pieces.stopped,
        )
        self._metrics.cache_bytes.set(self._prefixes.kv_bytes())
        self._metrics.caches.set(len(self._prefixes))
        if ticket.cancelled:
            return None
        pieces.end()
        return Finish(
            reason="stop" if pieces.stopped or generated.ended in ("end", "stop") else "length",
            prompt_tokens=generated.prompt_tokens,
            cached_tokens=generated.cached_tokens,
            new_tokens=len(generated.tokens),
            prompt_seconds=generated.seconds_to_first_token,
            seconds=generated.seconds - generated.seconds_to_first_token,
        )


class _Pieces:
    """Converts the steps of an answer to pieces.

    If transformers has a response parser for the model family, the tokens are decoded again with their special
    tokens, because the parser needs them. Otherwise the text of the steps is sent. Log-probabilities are sent with
    the piece that is emitted next.
    """

    def __init__(self, ticket: Ticket[Job], tokenizer: PreTrainedTokenizerBase) -> None:
        self._ticket, self._tokenizer, self._parser = ticket, tokenizer, ticket.job.parser
        self._stops, self._scored = StopFilter(ticket.job.stop), list[TokenLogprob]()
        self._start = time.perf_counter()
        self._unread = ""  # text that the parser received but has not emitted yet
        self._writer: TextWriter | None = None
        if self._parser is not None:
            self._writer = TextWriter(tokenizer, self._text, special=True)
            self._writer.put(torch.tensor(ticket.job.ids))
            self._send(response_events_to_chunks(self._parser.initial_events))

    @property
    def stopped(self) -> bool:
        """Whether a stop string was generated."""
        return self._stops.stopped

    def prefill(self, read: int, total: int) -> None:
        """Report that `read` of the `total` prompt tokens without a cache entry were processed."""
        job, seconds = self._ticket.job, time.perf_counter() - self._start
        if job.progress:
            cached = len(job.ids) - total
            self._ticket.send(Piece(progress=Progress(len(job.ids), cached, cached + read, seconds)))

    def put(self, step: Step) -> None:
        """Process one step of the answer."""
        if self.stopped:
            return
        if step.logprob is not None and step.token is not None:
            top = tuple(scored_token(self._tokenizer, token, logprob) for token, logprob in step.top)
            self._scored.append(scored_token(self._tokenizer, step.token, step.logprob, top))
        if self._writer is None:
            self._text(step.text)
        elif step.token is not None:
            self._writer.put(torch.tensor([step.token]))

    def end(self) -> None:
        """Send the text that was held back."""
        if self._writer is not None:
            self._writer.end()
        if not self.stopped:
            self._parsed(self._stops.end())
        if self._parser is not None:
            try:
                chunks = response_events_to_chunks(self._parser.finalize()[1])
            except Exception:  # the answer ended inside a tool call
                chunks = []
            self._send(chunks)

    def _text(self, text: str) -> None:
        self._parsed(self._stops.put(text))

    def _parsed(self, text: str) -> None:
        if self._parser is None:
            self._send([text])
            return
        self._unread += text
        try:
            chunks = response_events_to_chunks(self._parser.feed(text))
        except Exception:  # a tool call that the parser cannot read: send everything from there on as text
            chunks, self._parser, self._writer = [self._unread], None, None
        if chunks:
            self._unread = ""
        self._send(chunks)

    def _send(self, chunks: list[Any]) -> None:
        for chunk in chunks:
            scored, self._scored = tuple(self._scored), []
            if isinstance(chunk, ToolCall):
                self._ticket.send(Piece(tool=chunk, tokens=scored))
            elif isinstance(chunk, ReasoningText):
                self._ticket.send(Piece(reasoning=chunk, tokens=scored))
            elif chunk or scored:
                self._ticket.send(Piece(chunk, tokens=scored))
