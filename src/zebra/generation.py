"""Text from a checkpoint: transformers' own `generate`, with the bounded cache, prefill in chunks, text as it comes.

prompt  [chunk][chunk][ch]  →  first token  →  token → token → ...
        seconds_to_first_token                 tokens_per_second
"""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation import (
    BaseStreamer,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from zebra.data.chat_template import apply_chat_template
from zebra.data.encoding import decode, prompt_tokens
from zebra.errors import ZebraError, first_line
from zebra.model.cache import StripedCache
from zebra.model.context import check_learned_positions, longest_text, ways_beyond
from zebra.model.finite import checking_logits
from zebra.model.load_options import LoadOptions
from zebra.model.rope import Rope, as_rope, refuse_changing_rope
from zebra.model.self_extend import self_extend_of
from zebra.positions import SelfExtend
from zebra.progress import bar


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen, and when to stop: fields of transformers' `GenerationConfig`, by other defaults.

    Of the checkpoint's generation_config.json nothing is used but the tokens that end a text.

    Args:
        max_new_tokens: new tokens, at most.
        temperature: 0 takes the likeliest token; above it tokens are drawn from softmax(logits / temperature).
        top_p, top_k, min_p, repetition_penalty, num_beams: as in `GenerationConfig`.
        stop: strings that end the text, which contains them.
        seed: of the draws.
        prefill_chunk: tokens of the prompt that are read at a time, None for all at once: the same to rounding, and a
            long prompt's activations take less memory.

    Raises:
        ZebraError: what transformers rejects, such as a negative temperature, or top_p without a temperature.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    num_beams: int = 1
    stop: tuple[str, ...] = ()
    seed: int = 0
    prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        for name, count in (("num_beams", self.num_beams), ("prefill_chunk", self.prefill_chunk)):
            if count is not None and count < 1:
                raise ZebraError(f"{name} is a whole number of at least 1; got {count}. Raise it or leave it out.")
        if not all(self.stop):
            raise ZebraError("a stop string has at least one character; got an empty one. Leave it out.")
        filters = {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        names = ", ".join(name for name, value in filters.items() if value is not None)
        if names and self.temperature == 0:
            raise ZebraError(
                f"{names} filter what is drawn, and temperature 0 draws nothing. Raise it, for example to 0.8."
            )
        try:
            self.to_generation_config()
            TemperatureLogitsWarper(float(self.temperature) or 1.0)
            RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty))
            for kind, value in (
                (TopPLogitsWarper, self.top_p),
                (TopKLogitsWarper, self.top_k),
                (MinPLogitsWarper, self.min_p),
            ):
                if value is not None:
                    kind(value)
        except ValueError as error:
            raise ZebraError(f"these options of decoding cannot be used: {first_line(error)}") from None

    def to_generation_config(self, **tokens: Any) -> GenerationConfig:
        """transformers' config: every field that the checkpoint's own would fill is set, to a neutral value by default.

        Args:
            tokens: further fields: the tokens that end and pad a text.
        """
        draws = self.temperature != 0
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=draws,
            temperature=self.temperature if draws else 1.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=(0 if draws else 50) if self.top_k is None else self.top_k,  # 50 is neutral where nothing is drawn
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            num_beams=self.num_beams,
            stop_strings=list(self.stop) or None,
            prefill_chunk_size=self.prefill_chunk,
            use_cache=True,
            return_dict_in_generate=True,
            **tokens,
        )


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
    of_loading = {field.name for field in fields(LoadOptions)}
    loading = LoadOptions(**{name: value for name, value in options.items() if name in of_loading})
    decoding = Decoding(**{name: value for name, value in options.items() if name not in of_loading})
    if not prompt:
        raise ZebraError("the prompt is empty. Give at least one character.")
    config, tokenizer = loading.config_and_tokenizer(model, tokenizer)
    loaded = model if isinstance(model, PreTrainedModel) else None
    setting = loading.self_extend_setting(config) if loaded is None else self_extend_of(loaded)
    refuse_changing_rope(config, "generating")
    inputs = encode_prompt(prompt, tokenizer, chat)
    length = inputs["input_ids"].shape[1]
    check_learned_positions(config, length + decoding.max_new_tokens - 1)
    rope = as_rope(loading.rope)
    if setting is not None or rope.kind != "base":
        _warn_beyond(config, setting, rope, length, decoding.max_new_tokens)
    return _run(loaded or loading.model(model), tokenizer, inputs, decoding, on_text)


def encode_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase, chat: bool) -> dict[str, Tensor]:
    """A prompt as tokens (1, T): `input_ids` and `attention_mask`, in the chat template with `chat`.

    What the tokenizer puts behind every text, such as its end of text, is left out.

    Raises:
        ZebraError: no chat template, or one that fails; a prompt without tokens.
    """
    if chat:
        remedy = "Leave chat out and write the prompt in full."
        ids = encode_messages([{"role": "user", "content": prompt}], tokenizer, remedy=remedy)[None]
    else:
        ids = torch.tensor([prompt_tokens(tokenizer, prompt)])
    if ids.numel() == 0:
        raise ZebraError(f"the prompt {prompt!r} has no tokens under this tokenizer. Give another.")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def encode_messages(
    messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, remedy: str, **options: Any
) -> Tensor:
    """A conversation in the tokenizer's chat template, as tokens (N) behind which the answer comes.

    Args:
        messages: each with its role and content.
        remedy: a sentence that says what to do where there is no template, or where it fails.
        options: others of transformers' `apply_chat_template`, such as `tools` or `add_generation_prompt`.

    Raises:
        ZebraError: no chat template, or one that fails.
    """
    defaults: dict[str, Any] = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    source = tokenizer.name_or_path or "this model"
    encoding = apply_chat_template(tokenizer, messages, source=source, remedy=remedy, **defaults | options)
    return encoding["input_ids"][0]


def generate_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> list[list[int]]:
    """The new tokens behind each of several prompts.

    Args:
        ids: (B, T).
        attention_mask: (B, T), 0 where a shorter prompt is padded, on its left; all are of one length where None.
        options: the fields of `Decoding`.

    Raises:
        ZebraError: as `Decoding`.
    """
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    return generate_with(model, tokenizer, ids, mask, Decoding(**options)).sequences[:, ids.shape[1] :].tolist()


def generate_with(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    attention_mask: Tensor,
    decoding: Decoding,
    **kwargs: Any,
) -> Any:
    """What `model.generate` returns, drawn by the seed; the caller's random state comes back.

    Args:
        ids, attention_mask: (B, T), as `generate_tokens` has them.
        kwargs: others of `model.generate`, such as `streamer` and `past_key_values`.
    """
    ends = end_tokens(model, tokenizer)
    padding = (getattr(model.generation_config, "pad_token_id", None), tokenizer.pad_token_id, *ends, 0)
    pad_token_id = next(token for token in padding if token is not None)
    config = decoding.to_generation_config(eos_token_id=ends or None, pad_token_id=pad_token_id)
    kind = model.device.type
    devices = [] if kind == "cpu" else list(range(torch.get_device_module(kind).device_count()))
    quiet = only_errors("transformers.generation.stopping_criteria")
    with torch.random.fork_rng(devices, device_type=kind if devices else "cuda"), quiet, checking_logits(model):
        # torch.manual_seed seeds every device there is; a model on the CPU draws by one generator alone.
        (torch.manual_seed if devices else torch.default_generator.manual_seed)(decoding.seed)
        return model.generate(
            ids, attention_mask=attention_mask, generation_config=config, tokenizer=tokenizer, **kwargs
        )


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: dict[str, Tensor],
    decoding: Decoding,
    on_text: Callable[[str], None] | None,
) -> Generated:
    ids = inputs["input_ids"].to(model.device)
    writer, clock = TextWriter(tokenizer, on_text), _Clock()
    streams = decoding.num_beams == 1  # transformers has no stream of beams: the best is known at the end
    with _prompt_bar(model, ids.shape[1], decoding.prefill_chunk), only_errors("zebra.model.self_extend"):
        start = time.perf_counter()
        try:
            mask, streamer = inputs["attention_mask"].to(model.device), writer if streams else None
            output = generate_with(model, tokenizer, ids, mask, decoding, streamer=streamer, stopping_criteria=[clock])
        except BaseException:
            writer.end()  # an interrupt leaves the text so far
            raise
        tokens = output.sequences[0, ids.shape[1] :].tolist()
        seconds = time.perf_counter() - start
    if not streams:
        writer.put(ids)
        writer.put(torch.tensor(tokens))
        writer.end()
    cache = output.past_key_values
    return Generated(
        text=writer.text,
        tokens=tuple(tokens),
        prompt_tokens=ids.shape[1],
        ended=reason_of_end(tokens, writer.text, decoding, end_tokens(model, tokenizer)),
        seconds_to_first_token=clock.first - start,
        seconds=seconds,
        cache_bytes=cache.kv_bytes() if isinstance(cache, StripedCache) else None,
    )


class TextWriter(BaseStreamer):
    """Tokens to text as they come: whole characters, with the space that the tokenizer puts behind what is before.

    A token's text depends on its neighbours (a leading space, bytes of one character), so a few tokens before the new
    ones are decoded again, and what is longer is new. transformers' own streamer starts anew behind each line, without
    the space that may follow; the one of tokenizers ends in an error on bytes that are no UTF-8.

    Args:
        on_text: called with each piece.
        special: special tokens are text too.
    """

    _BEFORE, _BYTES = 8, 4
    """Tokens decoded again; tokens that one character may take."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        on_text: Callable[[str], None] | None,
        *,
        special: bool = False,
    ):
        self._tokenizer, self._on_text = tokenizer, on_text
        self._special = special
        self._before: list[int] = []
        self._new: list[int] = []
        self.text = ""

    def put(self, value: Tensor) -> None:
        """The prompt first, then new tokens."""
        if not self._before:
            self._before = value.flatten().tolist()[-self._BEFORE :]
            return
        for token in value.flatten().tolist():
            self._new.append(token)
            if len(self._new) >= self._BYTES or not self._decoded(self._before + self._new).endswith("\ufffd"):
                self.end()

    def end(self) -> None:
        """Write what is held back."""
        before, whole = self._decoded(self._before), self._decoded(self._before + self._new)
        # Behind bytes that are no character a decoder may drop the characters that were whole before them.
        piece = whole[len(before) :] if whole.startswith(before) else self._decoded(self._new)
        self._before, self._new = (self._before + self._new)[-self._BEFORE :], []
        self.text += piece
        if piece and self._on_text is not None:
            self._on_text(piece)

    def _decoded(self, ids: list[int]) -> str:
        return decode(self._tokenizer, ids, special=self._special)


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

            work.callback(model.register_forward_hook(after, with_kwargs=True).remove)
        yield


@contextmanager
def only_errors(name: str) -> Iterator[None]:
    """A logger logs errors alone: our warning of the length comes before any work, and later ones are left out."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


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
