"""An answer token by token. The beginning of its prompt that an earlier text has too comes from that text's cache.

    prompt     [ cached | chunk | chunk | rest ]  ->  token -> token -> ...
                 PrefixCache.take                                        PrefixCache.put

A prompt is read in chunks; it can be cancelled between them, and a snapshot is taken after each. transformers' own
`generate` reads the rest of the prompt and writes the answer.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from zebra.decoding import Decoding
from zebra.errors import ZebraError
from zebra.generation import Generated, end_tokens, generate_with, reason_of_end
from zebra.model.context import longest_text, ways_beyond
from zebra.model.local import local_attention_of
from zebra.model.prefix_cache import CachedText, PrefixCache
from zebra.model.rope import as_rope
from zebra.model.self_extend import self_extend_of
from zebra.text_writer import TextWriter

_CHUNK = 1024
"""Tokens of a prompt that are read at a time, where `Decoding` has no `prefill_chunk`."""
_REST = 32
"""The last tokens of a prompt, which `generate` reads: few to read again, and a short question is read in one pass."""


class ContextLengthError(ZebraError):
    """A prompt that is longer than the model reads."""


@dataclass(frozen=True)
class Step:
    """A token of an answer.

    Attributes:
        token: None in a last step, whose text was held back: bytes that are no whole character.
        text: the whole characters that the token adds; empty where it adds none yet, and for a token without text.
        logprob: log softmax of the model's logits, before any temperature or filter; None unless it was requested.
        top: the likeliest tokens and their log-probabilities, as many as were requested.
    """

    token: int | None
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def check_streamed(decoding: Decoding) -> None:
    """Raise a ZebraError for beams."""
    if decoding.num_beams != 1:
        raise ZebraError(
            f"an answer comes token by token, and beams are chosen at its end; got num_beams={decoding.num_beams}. "
            "Leave it out."
        )


def context_room(model: PreTrainedModel, tokens: int) -> int | None:
    """How many tokens a model reads after a prompt of `tokens`, at least 1; None without a limit.

    Raises:
        ContextLengthError: the prompt is longer than the model reaches, with Self-Extend and its rope.
    """
    setting = self_extend_of(model)
    reach = longest_text(model.config, setting)
    if reach is None or tokens < reach:
        return None if reach is None else reach - tokens
    ways = ways_beyond(model.config, setting, as_rope(None))
    target = 1 << tokens.bit_length()
    raise ContextLengthError(
        f"the conversation has {tokens:,} tokens, and this model reads {reach:,}, with the answer. Shorten it, or "
        f"load the model with {ways.replace('Self-Extend', f'Self-Extend (--self-extend auto:{target})', 1)}."
    )


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    decoding: Decoding,
    prefixes: PrefixCache,
    *,
    logprobs: int | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
    on_prefill: Callable[[int, int], None] = lambda read, total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Generated:
    """Continue a prompt from the stored cache that shares most of its beginning; the answer is stored there too.

    The answer equals that of `generate` for the whole prompt, in float32 token for token. Calls that share a
    `PrefixCache` run one after another.

    Args:
        ids: (N).
        logprobs: also the log-probability of each token, and of this many of the likeliest.
        on_step: called with each token as it comes.
        on_prefill: called with the number of prompt tokens read so far, and of all that must be read.
        cancelled: called between chunks of the prompt and after each token; True ends the answer.

    Raises:
        ContextLengthError: as `context_room`, before anything is read.
        ZebraError: beams, which have no stream; logits that are not finite.
    """
    check_streamed(decoding)
    room = context_room(model, len(ids))
    limit = decoding.max_new_tokens if room is None else min(room, decoding.max_new_tokens)
    limited = replace(decoding, max_new_tokens=limit, prefill_chunk=None)
    with prefixes.lock:
        start, text, sequence = time.perf_counter(), prefixes.take(ids), ids
        cached = len(text)
        on_first = functools.partial(on_prefill, len(ids) - cached, len(ids) - cached)
        ends = end_tokens(model, tokenizer)

        def is_last(token: int, text: str) -> bool:
            return cancelled() or token in ends or any(string in text for string in decoding.stop)

        steps = _Steps(model, tokenizer, ids, logprobs, on_step, on_first, is_last)
        if _read(model, text, ids, len(ids) - _REST, decoding.prefill_chunk, on_prefill, cancelled):
            arguments: dict[str, Any] = {"past_key_values": text.cache, "stopping_criteria": [steps]}
            with steps.watching_logits():
                output = generate_with(model, tokenizer, ids.to(model.device)[None], limited, **arguments)
            steps.end()
            sequence = output.sequences[0].cpu()
        seconds = time.perf_counter() - start
        # Under full decoding a later prompt reads the answer by the window: only the prompt's part is stored.
        stored = text.cut(len(ids)) if local_attention_of(model).full_decode else text
        if stored is not None:
            prefixes.put(sequence, stored)
    tokens = sequence[len(ids) :].tolist()
    ended = reason_of_end(tokens, steps.text, limited, ends)
    if ended == "length" and limit < decoding.max_new_tokens:
        ended = "context"
    return Generated(
        text=steps.text,
        tokens=tuple(tokens),
        prompt_tokens=len(ids),
        ended="cancel" if cancelled() and ended == "stop" else ended,
        seconds_to_first_token=steps.first - start,
        seconds=seconds,
        cache_bytes=text.cache.kv_bytes(),
        cached_tokens=cached,
    )


def read(
    model: PreTrainedModel,
    ids: Tensor,
    prefixes: PrefixCache,
    *,
    chunk: int | None = None,
    on_prefill: Callable[[int, int], None] = lambda read, total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Read the beginning of a prompt, (N), into the store.

    Args:
        chunk: tokens at a time.
        on_prefill, cancelled: as `answer` has them.

    Raises:
        ContextLengthError: as `context_room`.
    """
    context_room(model, len(ids))
    with prefixes.lock:
        text = prefixes.take(ids)
        _read(model, text, ids, len(ids), chunk, on_prefill, cancelled)
        prefixes.put(ids, text)


def _read(
    model: PreTrainedModel,
    text: CachedText,
    ids: Tensor,
    end: int,
    chunk: int | None,
    on_prefill: Callable[[int, int], None],
    cancelled: Callable[[], bool],
) -> bool:
    """Read tokens up to `end` in chunks, with a snapshot after each; False where it was cancelled."""
    cached = len(text)
    text.cache.set_prompt_length(len(ids))
    on_prefill(0, len(ids) - cached)
    while not cancelled():
        if (start := len(text)) >= end:
            return True
        stop = min(start + (chunk or _CHUNK), end)
        with torch.no_grad():
            model(ids[None, start:stop].to(model.device), past_key_values=text.cache, use_cache=True, logits_to_keep=1)
        text.snapshot()
        on_prefill(stop - cached, len(ids) - cached)
    return False


class AnswerStream(Iterator[Step]):
    """`answer` as an iterator of its steps.

    The model runs in a thread of its own, so that an interrupt of the caller never stops it within a forward pass.

    Args:
        options: those of `answer` except `on_step` and `cancelled`. `on_prefill` is called in that thread.

    Attributes:
        result: what `answer` returns, at the end and after `close`; None before, and if it failed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        ids: Tensor,
        decoding: Decoding,
        prefixes: PrefixCache,
        **options: Any,
    ) -> None:
        self.result: Generated | None = None
        self._error: BaseException | None = None
        self._cancel, self._steps = threading.Event(), SimpleQueue[Step | None]()
        callbacks: dict[str, Any] = {"on_step": self._steps.put, "cancelled": self._cancel.is_set}

        def run() -> None:
            try:
                self.result = answer(model, tokenizer, ids, decoding, prefixes, **options, **callbacks)
            except BaseException as error:
                self._error = error
            finally:
                self._steps.put(None)

        self._thread = threading.Thread(target=run, name="zebra answer", daemon=True)
        self._thread.start()

    def __next__(self) -> Step:
        """The next step.

        Raises:
            ZebraError: as `answer`.
        """
        step = self._steps.get()
        if step is not None:
            return step
        self._steps.put(None)
        if self._error is not None:
            raise self._error
        raise StopIteration

    def close(self) -> None:
        """End the answer after the token or the chunk that is being computed, and wait for that."""
        self._cancel.set()
        self._thread.join()


class _Steps(StoppingCriteria):
    """The tokens that `generate` chooses as steps, and its end where one of them makes the caller cancel.

    transformers asks its criteria before it hands a token to a streamer: a streamer would cancel one token late.

    Attributes:
        first: the time of the first token.
        text: all of it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        ids: Tensor,
        logprobs: int | None,
        on_step: Callable[[Step], None],
        on_first: Callable[[], None],
        is_last: Callable[[int, str], bool],
    ):
        self._model, self._logprobs = model, logprobs
        self._on_step, self._on_first, self._is_last = on_step, on_first, is_last
        self._writer = TextWriter(tokenizer)
        self._writer.put(ids)
        self._logits: Tensor | None = None
        self._has_ended = False
        self.first = math.nan

    @property
    def text(self) -> str:
        return self._writer.text

    @contextmanager
    def watching_logits(self) -> Iterator[None]:
        """Within this context the logits of each forward pass are kept, where log-probabilities were requested.

        Only those of this thread: another may answer by the same model, with a store of its own.
        """
        own = threading.get_ident()

        def note(module: Any, args: Any, output: Any) -> None:
            if threading.get_ident() == own:
                self._logits = output.logits[0, -1]

        with nullcontext() if self._logprobs is None else self._model.register_forward_hook(note):
            yield

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """The token that came last. On Apple's GPUs transformers computes one more after the last, and undoes it."""
        if self._has_ended:
            return torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        before, last = len(self.text), input_ids[0, -1:].cpu()
        self._writer.put(last)
        if math.isnan(self.first):
            self.first = time.perf_counter()
            self._on_first()
        token = int(last)
        self._on_step(Step(token, self.text[before:], *self._probabilities(token)))
        self._has_ended = self._is_last(token, self.text)
        return torch.full((len(input_ids),), self._has_ended, device=input_ids.device)

    def end(self) -> None:
        """Hand on the text that was held back."""
        before = len(self.text)
        self._writer.end()
        if len(self.text) > before:
            self._on_step(Step(None, self.text[before:]))

    def _probabilities(self, token: int) -> tuple[float | None, tuple[tuple[int, float], ...]]:
        if self._logits is None or self._logprobs is None:
            return None, ()
        logprobs = self._logits.float().log_softmax(dim=-1)
        likeliest = logprobs.topk(self._logprobs)
        top = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        return float(logprobs[token]), tuple(top)
