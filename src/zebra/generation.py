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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation import BaseStreamer

from zebra.errors import ZebraError
from zebra.model.cache import StripedCache
from zebra.model.checkpoint import load_tokenizer
from zebra.model.load_options import LoadOptions
from zebra.model.rope import as_rope, refuse_cache
from zebra.model.self_extend import check_learned_positions, self_extend_of
from zebra.positions import SelfExtend
from zebra.progress import bar


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen, and when to stop. What is not given here is not done, whatever the checkpoint's
    generation_config.json recommends; its tokens that end a text hold.

    Args:
        max_new_tokens: tokens to make at most.
        temperature: 0 takes the likeliest token; above it tokens are drawn from softmax(logits / temperature).
        top_p: draw from the likeliest tokens that together have this probability.
        top_k: draw from this many of the likeliest.
        min_p: draw from tokens at least this times as probable as the likeliest.
        repetition_penalty: divides the positive logits of tokens that were there already, multiplies the negative ones.
        num_beams: beams of a beam search.
        stop: strings that end the text, which keeps them.
        seed: of the draws.
        prefill_chunk: tokens of the prompt that are read at a time, None for all at once: the same to rounding, and a
            long prompt's activations take less memory.

    Raises:
        ZebraError: a number out of its range, or a cut of a distribution that is not drawn from.
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
        cuts = {"top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        given = [name for name, value in cuts.items() if value is not None]
        if given and self.temperature == 0:
            raise ZebraError(
                f"{', '.join(given)} cut what is drawn from, but temperature 0 draws nothing. Give a temperature above "
                f"0, such as 0.8, or leave {', '.join(given)} out."
            )
        whole = {"max_new_tokens": self.max_new_tokens, "top_k": self.top_k, "num_beams": self.num_beams}
        for name, count in (whole | {"prefill_chunk": self.prefill_chunk}).items():
            if count is not None and count < 1:
                raise ZebraError(f"{name} is a whole number of at least 1; got {count}. Raise it or leave it out.")
        for name, share in (("top_p", self.top_p), ("min_p", self.min_p)):
            if share is not None and not 0 < share <= 1:
                raise ZebraError(f"{name} is a probability above 0 and at most 1; got {share}. Write for example 0.9.")
        if not 0 <= self.temperature < math.inf:
            raise ZebraError(f"a temperature is at least 0; got {self.temperature}. 0 takes the likeliest token.")
        if not 0 < self.repetition_penalty < math.inf:
            raise ZebraError(f"a repetition penalty is above 0; got {self.repetition_penalty}. 1 leaves logits alone.")
        if not 0 <= self.seed < 2**63:
            raise ZebraError(f"a seed is a whole number from 0 to 2^63 - 1; got {self.seed}. Choose another.")
        if not all(self.stop):
            raise ZebraError("a stop string has at least one character; got an empty one. Leave it out.")

    def to_generation_config(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
        """In the host's words, neutral where nothing was asked: the host fills gaps from the checkpoint's defaults."""
        drawn = self.temperature > 0
        ends = _ends(model, tokenizer)
        own: Any = model.generation_config
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=drawn,
            temperature=self.temperature if drawn else 1.0,
            top_p=self.top_p or 1.0,
            top_k=(self.top_k or 0) if drawn else 50,  # the host's default, which only sampling reads; 0 is none
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            num_beams=self.num_beams,
            stop_strings=list(self.stop) or None,
            prefill_chunk_size=self.prefill_chunk,
            eos_token_id=ends or None,
            pad_token_id=next((i for i in (own.pad_token_id, tokenizer.pad_token_id, *ends) if i is not None), 0),
            use_cache=True,
            return_dict_in_generate=True,
        )


@dataclass(frozen=True)
class Generated:
    """What was generated, and how long it took.

    Attributes:
        text: the new text alone, so that prompt + text is the whole; tokens that are no text left out.
        tokens: the new tokens, the one that ended the text included.
        prompt_tokens: tokens of the prompt, with those that the tokenizer or the chat template adds.
        ended: by "end" (a token that ends texts), "stop" (a stop string) or "length" (max_new_tokens).
        seconds_to_first_token: reading the prompt and choosing one token; loading and tokenising are not counted.
        seconds: all of it, to the last token.
        cache_bytes: what the bounded cache held at the end, all beams together; None where another cache served.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    ended: str
    seconds_to_first_token: float
    seconds: float
    cache_bytes: int | None

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
    """Go on with a prompt; greedily, unless a temperature is given.

    The caller's random state is left as it was.

    Args:
        model: a checkpoint, or a model of `zebra.load`.
        tokenizer: the checkpoint's own where None.
        chat: put the prompt into the tokenizer's chat template, as one message of the user.
        on_text: called with each piece of text as it comes, whole characters only; with beams once, at the end.
        options: the fields of `Decoding`: max_new_tokens, temperature, top_p, stop, seed, prefill_chunk, ...; and for a
            checkpoint those of `zebra.model.load_options.LoadOptions`: stripes, rope, self_extend, window,
            full_decode, dtype, device.

    Raises:
        ZebraError: an empty prompt, no tokenizer, no chat template where one is to be used, a rope that changes with
            length, more tokens than there are learned positions, arguments for loading beside a loaded model, what
            `Decoding` and `load` refuse.

    Example:
        >>> zebra.generate("./Llama-3.1-8B", "Once upon a time", stripes="GLLL:4096", max_new_tokens=20).text
    """
    names = {field.name for field in fields(LoadOptions)}
    loading = LoadOptions(**{name: value for name, value in options.items() if name in names})
    chosen = Decoding(**{name: value for name, value in options.items() if name not in names})
    if not prompt:
        raise ZebraError("the prompt is empty. Give at least one character.")
    ready = model if isinstance(model, PreTrainedModel) else None
    if isinstance(model, PreTrainedModel):
        if given := loading.given():
            raise ZebraError(f"{', '.join(given)} are for loading, and this model is loaded. Give them to zebra.load.")
        if tokenizer is None and not model.name_or_path:
            raise ZebraError("this model was made without a checkpoint, so that it has no tokenizer. Pass tokenizer=.")
        source, config = model.name_or_path, model.config
    else:
        source, config = model, loading.config(model)
    refuse_cache(config, "generating")
    tokenizer = tokenizer or load_tokenizer(source, config)
    inputs = encode_prompt(prompt, tokenizer, chat)
    check_learned_positions(config, inputs["input_ids"].shape[1] + chosen.max_new_tokens - 1)
    setting = loading.self_extend_setting(config) if ready is None else self_extend_of(ready)
    if setting is not None or as_rope(loading.rope).kind != "base":
        _warn_beyond(config, setting, inputs["input_ids"].shape[1], chosen.max_new_tokens)
    return _run(ready or loading.model(source), tokenizer, inputs, chosen, on_text)


def encode_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase, chat: bool) -> dict[str, Tensor]:
    """A prompt as tokens (1, T), `input_ids` and `attention_mask`, in the chat template where it is asked for.

    Raises:
        ZebraError: no chat template, a prompt without tokens.
    """
    if chat and not tokenizer.chat_template:
        raise ZebraError(
            "this checkpoint's tokenizer has no chat template. Leave chat out and write the prompt in full."
        )
    if chat:
        message = [{"role": "user", "content": prompt}]
        found: Any = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        found = tokenizer(prompt, return_tensors="pt")
    if found["input_ids"].numel() == 0:
        raise ZebraError(f"the prompt {prompt!r} has no tokens under this tokenizer. Give another.")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def generate_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    there: Tensor | None = None,
    **decoding: Any,
) -> list[list[int]]:
    """The new tokens behind each of several prompts, as tokens (B, T).

    Args:
        there: (B, T), 0 where a shorter prompt is padded, on its left; all are of one length where None.
        decoding: the fields of `Decoding`.

    Raises:
        ZebraError: what `Decoding` refuses.
    """
    chosen = Decoding(**decoding)
    with _deterministic(model, chosen.seed), _one_warning():
        host: Any = model.generate(
            ids,
            attention_mask=torch.ones_like(ids) if there is None else there,
            generation_config=chosen.to_generation_config(model, tokenizer),
            tokenizer=tokenizer,
        )
    return host.sequences[:, ids.shape[1] :].tolist()


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: dict[str, Tensor],
    decoding: Decoding,
    on_text: Callable[[str], None] | None,
) -> Generated:
    ids = inputs["input_ids"].to(model.device)
    writer, clock = _Writer(tokenizer, on_text), _Clock()
    streams = decoding.num_beams == 1  # the host has no stream of beams: the best is known at the end
    told = _one_warning("zebra.model.self_extend")
    with _deterministic(model, decoding.seed), told, _reading(model, ids.shape[1], decoding.prefill_chunk):
        start = time.perf_counter()
        try:
            host: Any = model.generate(
                ids,
                attention_mask=inputs["attention_mask"].to(model.device),
                generation_config=decoding.to_generation_config(model, tokenizer),
                tokenizer=tokenizer,
                streamer=writer if streams else None,
                stopping_criteria=[clock],
            )
        except BaseException:
            writer.end()  # an interrupt leaves the text so far
            raise
        tokens = host.sequences[0, ids.shape[1] :].tolist()
        seconds = time.perf_counter() - start
    if not streams:
        for part in (ids.cpu(), torch.tensor(tokens)):
            writer.put(part)
        writer.end()
    stopped = any(string in writer.text for string in decoding.stop) or len(tokens) < decoding.max_new_tokens
    cache = host.past_key_values
    return Generated(
        text=writer.text,
        tokens=tuple(tokens),
        prompt_tokens=ids.shape[1],
        ended="end" if tokens[-1] in _ends(model, tokenizer) else "stop" if stopped else "length",
        seconds_to_first_token=clock.first - start,
        seconds=seconds,
        cache_bytes=cache.kv_bytes() if isinstance(cache, StripedCache) else None,
    )


class _Writer(BaseStreamer):
    """Tokens to text as they come: whole characters, with the space that the tokenizer puts behind what is before.

    A token's text depends on its neighbours (a leading space, bytes of one character), so a few tokens before the new
    ones are decoded again, and what is longer is new. transformers' own streamer starts anew behind each line, without
    the space that may follow; the one of tokenizers ends in an error on bytes that are no UTF-8.
    """

    _BEFORE, _BYTES = 8, 4
    """Tokens decoded again; tokens that one character may take."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None] | None):
        self._tokenizer, self._on_text = tokenizer, on_text
        self._ids: list[int] | None = None
        self._pending = 0
        self.text = ""

    def put(self, value: Tensor) -> None:
        """The prompt first, then new tokens."""
        new = value.flatten().tolist()
        if self._ids is None:
            self._ids = new[-self._BEFORE :]
            return
        for token in new:
            self._ids.append(token)
            self._pending += 1
            if self._pending >= self._BYTES or not self._decoded(self._ids).endswith("\ufffd"):
                self.end()

    def end(self) -> None:
        """Write what is held back."""
        if self._ids is None or not self._pending:
            return
        before = self._ids[: -self._pending]
        piece = self._decoded(self._ids)[len(self._decoded(before)) :]
        self._ids, self._pending = self._ids[-self._BEFORE :], 0
        self.text += piece
        if piece and self._on_text is not None:
            self._on_text(piece)

    def _decoded(self, ids: list[int]) -> str:
        text: Any = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


class _Clock(StoppingCriteria):
    """When the first token was there. It stops nothing; the host asks it after each token, of beams too."""

    first = math.nan

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if math.isnan(self.first):
            input_ids[0, -1].item()  # waits for the device
            self.first = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _reading(model: PreTrainedModel, tokens: int, chunk: int | None) -> Iterator[None]:
    """A bar while a prompt is read in chunks; it is gone before the first text is written."""
    with ExitStack() as work:
        if chunk is not None and chunk < tokens:
            advance, read = work.enter_context(bar("prompt", tokens, "tokens")), 0

            def after(module: Any, arguments: Any, named: dict[str, Any], output: Any) -> None:
                nonlocal read
                read += named["input_ids"].shape[1]
                advance(named["input_ids"].shape[1])
                if read >= tokens:
                    work.close()

            work.callback(model.register_forward_hook(after, with_kwargs=True).remove)
        yield


@contextmanager
def _deterministic(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Draws by the seed; the caller's random state comes back."""
    kind = model.device.type
    devices = [] if kind == "cpu" else list(range(torch.get_device_module(kind).device_count()))
    with torch.random.fork_rng(devices, device_type=kind if devices else "cuda"):
        # torch.manual_seed seeds every device there is; a model on the CPU draws by one generator alone.
        (torch.manual_seed if devices else torch.default_generator.manual_seed)(seed)
        yield


@contextmanager
def _one_warning(*ours: str) -> Iterator[None]:
    """Ours about the length comes before any work and names the remedy: the host's, on the way, is left out.

    Args:
        ours: loggers of ours that are left out too.
    """
    loggers = [logging.getLogger(name) for name in ("transformers.generation.stopping_criteria", *ours)]
    before = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for one, level in zip(loggers, before, strict=True):
            one.setLevel(level)


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: the checkpoint's, else the tokenizer's."""
    own: Any = model.generation_config
    found = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    return [] if found is None else found if isinstance(found, list) else [found]


def _warn_beyond(config: PreTrainedConfig, setting: SelfExtend | None, prompt: int, new: int) -> None:
    trained = getattr(config.get_text_config(), "max_position_embeddings", None)
    if trained is None or prompt + new <= (trained if setting is None else setting.reach(trained)):
        return
    if setting is None:
        passed = f"{trained:,} positions that this model was trained for"
        remedy = "Shorten them, or give self_extend, a rope such as yarn:8, or a checkpoint that was adapted."
    else:
        passed = f"{setting.reach(trained):,} that Self-Extend {setting} takes this model to"
        remedy = f"Shorten them, raise the group, or write auto:{prompt + new}."
    warnings.warn(
        f"{prompt:,} tokens of prompt and up to {new:,} new ones pass the {passed}: the text may become noise. "
        + remedy,
        stacklevel=3,
    )
