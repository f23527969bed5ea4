"""Stream an answer token by token. Prompt tokens shared with an earlier text come from its KV cache (prefix caching).

    prompt     [ cached | chunk | chunk | rest ]  ->  token -> token -> ...
                 PrefixCache.take                                        PrefixCache.put

The prefill runs in chunks: it can be cancelled between them, and a snapshot of the cache is taken after each.
transformers' own `generate` reads the rest of the prompt and generates the answer.
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
from zebra.model.context import context_length, ways_beyond
from zebra.model.local import local_attention_of
from zebra.model.prefix_cache import CachedText, PrefixCache
from zebra.model.rope import as_rope
from zebra.model.self_extend import self_extend_of
from zebra.text_writer import TextWriter

_CHUNK = 1024
"""Default number of prompt tokens per chunk, if `Decoding.prefill_chunk` is None."""
_REST = 32
"""Number of last prompt tokens that are left to `generate`. A short question is thus read in one pass."""


class ContextLengthError(ZebraError):
    """A prompt leaves no room for an answer in the model's context."""


@dataclass(frozen=True)
class Step:
    """One token of an answer.

    Attributes:
        token: the token ID; None in a final step with text that was held back, an incomplete character.
        text: the complete characters that the token adds; empty if it completes none, and for special tokens.
        logprob: log_softmax of the raw logits, before temperature and filters; None unless requested.
        top: the most likely token IDs with their log-probabilities, as many as requested.
    """

    token: int | None
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def check_streamed(decoding: Decoding) -> None:
    """Raise a ZebraError for beam search, which cannot be streamed."""
    if decoding.num_beams != 1:
        raise ZebraError(f"beam search does not support streaming; got num_beams={decoding.num_beams}. Leave it out.")


def context_room(model: PreTrainedModel, tokens: int) -> int | None:
    """The number of tokens, at least 1, that fit after a prompt of `tokens`; None if the context is unlimited.

    Raises:
        ContextLengthError: the prompt fills the model's context, as extended by Self-Extend and the rope.
    """
    setting = self_extend_of(model)
    reach = context_length(model.config, setting)
    if reach is None or tokens < reach:
        return None if reach is None else reach - tokens
    ways = ways_beyond(model.config, setting, as_rope(None))
    target = 1 << tokens.bit_length()
    raise ContextLengthError(
        f"the conversation has {tokens:,} tokens, but this model reads {reach:,}, including the answer. Shorten it, or "
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
    """Continue a prompt, starting from the stored cache with the longest shared prefix; the result is stored too.

    The answer equals that of `generate` on the whole prompt, in float32 token for token. Calls that share a
    `PrefixCache` run one at a time.

    Args:
        ids: token IDs of the prompt (N).
        logprobs: number of top tokens to report with each token's log-probability; None reports none.
        on_step: called with each token.
        on_prefill: called with the number of uncached prompt tokens read so far, and their total.
        cancelled: called before each chunk of the prompt and after each token; True ends the answer.

    Raises:
        ContextLengthError: as `context_room`, before anything is read.
        ZebraError: beam search; non-finite logits.
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
        # Full decoding ignores the window, but a later prompt reads the answer with it: store only the prompt's part.
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
    """Read the beginning of a prompt (N) into the prefix cache.

    Args:
        chunk: tokens per forward pass; None uses the default.
        on_prefill, cancelled: as in `answer`.

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
    """Read tokens up to `end` in chunks, with a snapshot after each; return False if cancelled."""
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
    """`answer` as an iterator over its steps.

    The model runs in a separate thread, so an interrupt of the caller never stops it within a forward pass.

    Args:
        options: those of `answer` except `on_step` and `cancelled`. `on_prefill` is called in that thread.

    Attributes:
        result: the return value of `answer`, after the last step or `close`; None before that, and if it failed.
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
        """Wait for the next step and return it.

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
        """Stop after the token or chunk that is being computed, and wait for it."""
        self._cancel.set()
        self._thread.join()


class _Steps(StoppingCriteria):
    """Turns the tokens that `generate` chooses into steps, and stops it at the last one.

    A streamer would cancel one token late, because transformers calls the stopping criteria before it.

    Attributes:
        first: the time of the first token; NaN before it.
        text: the text so far.
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
        """Within this context, keep the logits of each forward pass if log-probabilities were requested.

        Other threads are ignored: they may run the same model with another `PrefixCache`.
        """
        own = threading.get_ident()

        def note(module: Any, args: Any, output: Any) -> None:
            if threading.get_ident() == own:
                self._logits = output.logits[0, -1]

        with nullcontext() if self._logprobs is None else self._model.register_forward_hook(note):
            yield

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Handle the newest token. On Apple's GPUs transformers computes and drops one more after the last token."""
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
        """Pass on the text that was held back."""
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
