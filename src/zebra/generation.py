"""Generate text with transformers' own `generate`: bounded KV cache, chunked prefill, streamed text.

prompt  [chunk][chunk][ch]  →  first token  →  token → token → ...
└─ seconds_to_first_token ──────────────┘      tokens_per_second
"""

from __future__ import annotations

import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from zebra.data.chat_template import apply_chat_template
from zebra.data.encoding import prompt_tokens
from zebra.decoding import Decoding
from zebra.errors import ZebraError
from zebra.model.cache import StripedCache
from zebra.model.context import check_learned_positions, context_length, ways_beyond
from zebra.model.default_cache import LENGTH_REMINDER
from zebra.model.finite import checking_logits
from zebra.model.load_options import LoadOptions
from zebra.model.rope import Rope, as_rope, check_fixed_rope
from zebra.model.self_extend import self_extend_of
from zebra.positions import SelfExtend
from zebra.progress import bar, only_errors
from zebra.text_writer import TextWriter


@dataclass(frozen=True)
class Generated:
    """The generated text, with its token counts and times.

    Attributes:
        text: the new text, without special tokens; the whole text is prompt + text.
        tokens: the new tokens, including the token that ended the text.
        prompt_tokens: number of prompt tokens, including those that the tokenizer or the chat template adds.
        ended: why generation stopped: "end" (an end token), "stop" (a stop string) or "length" (max_new_tokens). An
            answer of `zebra.streaming` may also end by "context" (the model's context is full) or "cancel".
        seconds_to_first_token: time of the prefill and of choosing one token, without loading and tokenizing; NaN if
            there is no token.
        seconds: time from the start of the prefill to the last token.
        cache_bytes: size of the bounded KV cache at the end, over all beams; None if another cache was used.
        cached_tokens: number of prompt tokens that came from the KV cache of an earlier text.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    ended: str
    seconds_to_first_token: float
    seconds: float
    cache_bytes: int | None
    cached_tokens: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second after the first token; None for fewer than two tokens."""
        after = self.seconds - self.seconds_to_first_token
        return (len(self.tokens) - 1) / after if len(self.tokens) > 1 and after > 0 else None


def generate(
    model: PreTrainedModel | str | os.PathLike[str],
    prompt: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chat: bool = False,
    on_text: Callable[[str], None] | None = None,
    **options: Any,
) -> Generated:
    """Continue a prompt: greedily, unless a temperature is given.

    Warns if the text may exceed the model's context length, except under a rope `base:THETA`, whose range is unknown.
    The caller's random state does not change.

    Args:
        model: a checkpoint, or a model of `zebra.load`.
        tokenizer: None uses that of the checkpoint.
        chat: put the prompt into the tokenizer's chat template, as one user message.
        on_text: called with each new piece of text, whole characters only; with beams once, at the end.
        options: the fields of `Decoding`: max_new_tokens, temperature, top_p, stop, seed, prefill_chunk, ...; and for a
            checkpoint those of `zebra.model.load_options.LoadOptions`: stripes, rope, self_extend, window,
            full_decode, dtype, device, trust_remote_code.

    Raises:
        ZebraError: an empty prompt; no tokenizer, or no chat template with `chat`; a rope that changes with length;
            more tokens than learned positions; loading options for a model that is already loaded; non-finite logits;
            and as `Decoding` and `zebra.load`.

    Example:
        >>> zebra.generate("./Llama-3.1-8B", "Once upon a time", stripes="GLLL:4096", max_new_tokens=20).text
    """
    loading, rest = LoadOptions.of(options, Decoding)
    decoding = Decoding(**rest)
    if not isinstance(prompt, str):
        raise ZebraError(f"the prompt must be a string; got a {type(prompt).__name__}. Pass one text per call.")
    if not prompt:
        raise ZebraError("the prompt is empty. Give at least one character.")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ZebraError("the prompt has an unpaired surrogate: its bytes were not UTF-8. Encode it as UTF-8.")
    config, tokenizer = loading.config_and_tokenizer(model, tokenizer)
    loaded = model if isinstance(model, PreTrainedModel) else None
    setting = loading.self_extend_setting(config) if loaded is None else self_extend_of(loaded)
    check_fixed_rope(config, "generating")
    ids = encode_prompt(prompt, tokenizer, chat)
    check_learned_positions(config, len(ids) + decoding.max_new_tokens - 1)
    rope = as_rope(loading.rope)
    if setting is not None or rope.kind != "base":
        _warn_beyond(config, setting, rope, len(ids), decoding.max_new_tokens)
    return _run(loaded or loading.model(model), tokenizer, ids, decoding, on_text)


def encode_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase, chat: bool) -> Tensor:
    """Encode a prompt as token IDs (N); with `chat`, in the chat template.

    Tokens that the tokenizer appends to every text, such as its end-of-text token, are left out.

    Raises:
        ZebraError: no chat template, or one that fails; a prompt without tokens.
    """
    if chat:
        remedy = "Leave chat out and write the prompt in full."
        ids = encode_messages([{"role": "user", "content": prompt}], tokenizer, remedy=remedy)
    else:
        ids = torch.tensor(prompt_tokens(tokenizer, prompt))
    if not len(ids):
        raise ZebraError(f"the prompt {prompt!r} has no tokens under this tokenizer. Give another.")
    return ids


def encode_messages(
    messages: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    remedy: str,
    source: str | None = None,
    **options: Any,
) -> Tensor:
    """Encode a conversation with the tokenizer's chat template, as token IDs (N) that the answer follows.

    Args:
        messages: each with its role and content.
        remedy: the last sentence of errors: what to do if there is no template, or it fails.
        source: the model's name in errors; None uses the tokenizer's `name_or_path`.
        options: further arguments of transformers' `apply_chat_template`, such as `tools` or `add_generation_prompt`.

    Raises:
        ZebraError: no chat template, or one that fails.
    """
    defaults: dict[str, Any] = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    source = source or tokenizer.name_or_path or "this model"
    encoding = apply_chat_template(tokenizer, messages, source=source, remedy=remedy, **defaults | options)
    return encoding["input_ids"][0]


def generate_with(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    decoding: Decoding,
    *,
    attention_mask: Tensor | None = None,
    stopping_criteria: Sequence[StoppingCriteria] = (),
    **kwargs: Any,
) -> Any:
    """Call `model.generate` with these options and return its output; the caller's random state is restored.

    torch's random generators are global to the process. So threads that sample take turns, one whole text at a time.

    Args:
        ids: token IDs of the prompts (B, T).
        attention_mask: (B, T), 0 at left padding; None if there is none.
        kwargs: further arguments of `model.generate`, such as `streamer` and `past_key_values`.
    """
    attention_mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    ends = end_tokens(model, tokenizer)
    padding = (getattr(model.generation_config, "pad_token_id", None), tokenizer.pad_token_id, *ends, 0)
    pad_token_id = next(token for token in padding if token is not None)
    config = decoding.to_generation_config(eos_token_id=ends or None, pad_token_id=pad_token_id)
    stops = [_AnswerStops(tokenizer, decoding.stop, ids.shape[1])] if decoding.stop else []
    kwargs["stopping_criteria"] = StoppingCriteriaList([*stopping_criteria, *stops])
    quiet = only_errors(LENGTH_REMINDER)  # zebra's own warning comes before the prefill
    draws = _seeded(decoding.seed, model.device.type) if config.do_sample else nullcontext()
    with draws, quiet, checking_logits(model):
        return model.generate(ids, attention_mask=attention_mask, generation_config=config, **kwargs)


@contextmanager
def _seeded(seed: int, kind: str) -> Iterator[None]:
    devices = [] if kind == "cpu" else list(range(torch.get_device_module(kind).device_count()))
    with _DRAWING, torch.random.fork_rng(devices, device_type=kind if devices else "cuda"):
        # torch.manual_seed would also seed the GPUs, whose state is not restored here for a model on the CPU.
        (torch.manual_seed if devices else torch.default_generator.manual_seed)(seed)
        yield


_DRAWING = threading.RLock()


class _AnswerStops(StopStringCriteria):
    """transformers' stop strings, matched in the answer only: a match that begins in the prompt does not count."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str], prompt_tokens: int):
        super().__init__(tokenizer, list(strings))
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return super().__call__(input_ids[:, self._prompt_tokens :], scores, **kwargs)


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    decoding: Decoding,
    on_text: Callable[[str], None] | None,
) -> Generated:
    prompt = ids.to(model.device)[None]
    writer, clock = TextWriter(tokenizer, on_text), _Clock()
    streams = decoding.num_beams == 1  # beams cannot be streamed: the best is known only at the end
    with _prompt_bar(model, len(ids), decoding.prefill_chunk), only_errors("zebra.model.self_extend"):
        start = time.perf_counter()
        try:
            options: dict[str, Any] = {"streamer": writer if streams else None, "stopping_criteria": [clock]}
            output = generate_with(model, tokenizer, prompt, decoding, **options)
        except BaseException:
            writer.end()  # on an interrupt, show the text so far
            raise
        tokens = output.sequences[0, len(ids) :].tolist()
        seconds = time.perf_counter() - start
    if not streams:
        writer.put(ids)
        writer.put(torch.tensor(tokens))
        writer.end()
    cache = output.past_key_values
    return Generated(
        text=writer.text,
        tokens=tuple(tokens),
        prompt_tokens=len(ids),
        ended=reason_of_end(tokens, writer.text, decoding, end_tokens(model, tokenizer)),
        seconds_to_first_token=clock.first - start,
        seconds=seconds,
        cache_bytes=cache.kv_bytes() if isinstance(cache, StripedCache) else None,
    )


class _Clock(StoppingCriteria):
    """Records the time of the first token. It never stops; transformers calls it after each token, with beams too."""

    first = math.nan

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if math.isnan(self.first):
            input_ids[0, -1].item()  # waits for the device
            self.first = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _prompt_bar(model: PreTrainedModel, tokens: int, chunk: int | None) -> Iterator[None]:
    """Show a progress bar during a chunked prefill; it is removed before the first text is written."""
    with ExitStack() as work:
        if chunk is not None and chunk < tokens:
            advance, read = work.enter_context(bar("prompt", tokens, "tokens")), 0

            def after(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
                nonlocal read
                read += kwargs["input_ids"].shape[1]
                advance(kwargs["input_ids"].shape[1])
                if read >= tokens:
                    work.close()

            work.enter_context(model.register_forward_hook(after, with_kwargs=True))
        yield


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token IDs that end a text: those of the generation config, or of the tokenizer if there are none."""
    tokens = getattr(model.generation_config, "eos_token_id", None)
    tokens = tokenizer.eos_token_id if tokens is None else tokens
    return [] if tokens is None else tokens if isinstance(tokens, list) else [tokens]


def reason_of_end(tokens: list[int], text: str, decoding: Decoding, ends: list[int]) -> str:
    """Why a text ended: "end", "stop" or "length", as in `Generated`."""
    if tokens and tokens[-1] in ends:
        return "end"
    stopped = any(string in text for string in decoding.stop) or len(tokens) < decoding.max_new_tokens
    return "stop" if stopped else "length"


def _warn_beyond(config: PreTrainedConfig, setting: SelfExtend | None, rope: Rope, prompt: int, new: int) -> None:
    longest = context_length(config, setting)
    if longest is None or prompt + new <= longest:
        return
    limit = "positions that this model was trained for"
    remedy = f"or use {ways_beyond(config, setting, rope)}"
    if setting is not None:
        limit = f"positions that this model reads with Self-Extend {setting}"
        remedy = f"raise the group, or use auto:{prompt + new}"
    warnings.warn(
        f"{prompt:,} prompt tokens and up to {new:,} new tokens exceed the {longest:,} {limit}: the text may become "
        f"noise. Shorten them, {remedy}.",
        stacklevel=3,
    )
