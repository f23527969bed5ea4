"""Text from a checkpoint: transformers' own `generate`, with the bounded cache, prefill in chunks, text as it comes.

prompt  [chunk][chunk][ch]  →  first token  →  token → token → ...
        seconds_to_first_token                 tokens_per_second
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
from zebra.model.context import check_learned_positions, longest_text, ways_beyond
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
    """What was generated, and how long it took.

    Attributes:
        text: the new text alone, so that prompt + text is the whole; tokens that are no text left out.
        tokens: the new tokens, the one that ended the text included.
        prompt_tokens: tokens of the prompt, with those that the tokenizer or the chat template adds.
        ended: by "end" (a token that ends texts), "stop" (a stop string) or "length" (max_new_tokens); an answer of
            `zebra.streaming` also by "context" (all that the model reads) or "cancel".
        seconds_to_first_token: reading the prompt and choosing one token, NaN where there is none. Loading and
            tokenising are not counted.
        seconds: all of it, to the last token.
        cache_bytes: what the bounded cache held at the end, all beams together; None where another cache served.
        cached_tokens: tokens of the prompt that a cache of an earlier text held, so that they were not read again.
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
        """New tokens per second after the first; None where there was one alone."""
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
    """Continue a prompt; greedily, unless a temperature is given.

    The caller's random state is left as it was.

    Args:
        model: a checkpoint, or a model of `zebra.load`.
        tokenizer: the checkpoint's own where None.
        chat: put the prompt into the tokenizer's chat template, as one message of the user.
        on_text: called with each piece of text as it comes, whole characters only; with beams once, at the end.
        options: the fields of `Decoding`: max_new_tokens, temperature, top_p, stop, seed, prefill_chunk, ...; and for a
            checkpoint those of `zebra.model.load_options.LoadOptions`: stripes, rope, self_extend, window,
            full_decode, dtype, device, trust_remote_code.

    Raises:
        ZebraError: an empty prompt; no tokenizer, or no chat template with `chat`; a rope that changes with length;
            more tokens than there are learned positions; options for loading with a loaded model; logits that are not
            finite; and as `Decoding` and `zebra.load`.

    Example:
        >>> zebra.generate("./Llama-3.1-8B", "Once upon a time", stripes="GLLL:4096", max_new_tokens=20).text
    """
    loading, rest = LoadOptions.of(options, Decoding)
    decoding = Decoding(**rest)
    if not isinstance(prompt, str):
        raise ZebraError(f"a prompt is one text; got a {type(prompt).__name__}. Call it once for each text.")
    if not prompt:
        raise ZebraError("the prompt is empty. Give at least one character.")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise ZebraError("the prompt holds half a surrogate pair: its bytes were not UTF-8. Give it in UTF-8.")
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
    """A prompt as tokens (N), in the chat template with `chat`.

    Tokens that the tokenizer appends to every text, such as its end of text, are left out.

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
    """A conversation in the tokenizer's chat template, as tokens (N) behind which the answer comes.

    Args:
        messages: each with its role and content.
        remedy: a sentence that says what to do where there is no template, or where it fails.
        source: what errors call the model; where the tokenizer comes from where None.
        options: others of transformers' `apply_chat_template`, such as `tools` or `add_generation_prompt`.

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
    """What `model.generate` returns, drawn with the seed; the caller's random state is restored.

    torch's generators are the process's: threads that draw do so one after another, text by text.

    Args:
        ids: (B, T).
        attention_mask: (B, T), 0 where a shorter prompt is padded on its left; None where none is.
        kwargs: others of `model.generate`, such as `streamer` and `past_key_values`.
    """
    attention_mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    ends = end_tokens(model, tokenizer)
    padding = (getattr(model.generation_config, "pad_token_id", None), tokenizer.pad_token_id, *ends, 0)
    pad_token_id = next(token for token in padding if token is not None)
    config = decoding.to_generation_config(eos_token_id=ends or None, pad_token_id=pad_token_id)
    stops = [_AnswerStops(tokenizer, decoding.stop, ids.shape[1])] if decoding.stop else []
    kwargs["stopping_criteria"] = StoppingCriteriaList([*stopping_criteria, *stops])
    quiet = only_errors(LENGTH_REMINDER)  # our warning of the length comes before any work
    draws = _seeded(decoding.seed, model.device.type) if config.do_sample else nullcontext()
    with draws, quiet, checking_logits(model):
        return model.generate(ids, attention_mask=attention_mask, generation_config=config, **kwargs)


@contextmanager
def _seeded(seed: int, kind: str) -> Iterator[None]:
    devices = [] if kind == "cpu" else list(range(torch.get_device_module(kind).device_count()))
    with _DRAWING, torch.random.fork_rng(devices, device_type=kind if devices else "cuda"):
        # torch.manual_seed seeds every device there is; a model on the CPU draws by one generator alone.
        (torch.manual_seed if devices else torch.default_generator.manual_seed)(seed)
        yield


_DRAWING = threading.RLock()


class _AnswerStops(StopStringCriteria):
    """transformers' stop strings, in the answer alone: one that begins in the prompt is none."""

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
    streams = decoding.num_beams == 1  # transformers has no stream of beams: the best is known at the end
    with _prompt_bar(model, len(ids), decoding.prefill_chunk), only_errors("zebra.model.self_extend"):
        start = time.perf_counter()
        try:
            options: dict[str, Any] = {"streamer": writer if streams else None, "stopping_criteria": [clock]}
            output = generate_with(model, tokenizer, prompt, decoding, **options)
        except BaseException:
            writer.end()  # an interrupt leaves the text so far
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
    """The time of the first token. It stops nothing; transformers calls it after each token, of beams too."""

    first = math.nan

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if math.isnan(self.first):
            input_ids[0, -1].item()  # waits for the device
            self.first = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _prompt_bar(model: PreTrainedModel, tokens: int, chunk: int | None) -> Iterator[None]:
    """A bar while a prompt is read in chunks; it is gone before the first text is written."""
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
    """The tokens that end a text: the checkpoint's, else the tokenizer's."""
    tokens = getattr(model.generation_config, "eos_token_id", None)
    tokens = tokenizer.eos_token_id if tokens is None else tokens
    return [] if tokens is None else tokens if isinstance(tokens, list) else [tokens]


def reason_of_end(tokens: list[int], text: str, decoding: Decoding, ends: list[int]) -> str:
    """Why a text ended: "end", "stop" or "length", as `Generated` has them."""
    if tokens and tokens[-1] in ends:
        return "end"
    stopped = any(string in text for string in decoding.stop) or len(tokens) < decoding.max_new_tokens
    return "stop" if stopped else "length"


def _warn_beyond(config: PreTrainedConfig, setting: SelfExtend | None, rope: Rope, prompt: int, new: int) -> None:
    longest = longest_text(config, setting)
    if longest is None or prompt + new <= longest:
        return
    limit = "positions that this model was trained for"
    remedy = f"or take {ways_beyond(config, setting, rope)}"
    if setting is not None:
        limit = f"that Self-Extend {setting} takes this model to"
        remedy = f"raise the group, or write auto:{prompt + new}"
    warnings.warn(
        f"{prompt:,} tokens of prompt and up to {new:,} new ones pass the {longest:,} {limit}: the text may become "
        f"noise. Shorten them, {remedy}.",
        stacklevel=3,
    )
