"""How the next token is chosen, and when a text ends."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from transformers import GenerationConfig
from transformers.generation import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from zebra.data.documents import names_of
from zebra.errors import ZebraError, first_line

_LEAST_DIVISOR = 1e-6
"""The least temperature above 0, and the least penalty: logits that are divided by much less overflow."""

_FILTERS: dict[str, Any] = {"top_p": TopPLogitsWarper, "top_k": TopKLogitsWarper, "min_p": MinPLogitsWarper}
"""The classes of transformers that filter which tokens may be drawn; each checks its own value."""

_WHOLE = ("max_new_tokens", "top_k", "num_beams", "seed", "prefill_chunk")


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen, and when to stop: fields of transformers' `GenerationConfig`, with other defaults.

    Of the checkpoint's generation_config.json only the tokens that end a text are used.

    Args:
        max_new_tokens: new tokens, at most.
        temperature: 0 takes the likeliest token; above it tokens are drawn from softmax(logits / temperature).
        top_p, top_k, min_p, repetition_penalty, num_beams: as in `GenerationConfig`.
        stop: strings that end the text, which contains them.
        seed: of the draws.
        prefill_chunk: tokens of the prompt that are read at a time, None for all at once: the same to rounding, and a
            long prompt's activations take less memory.

    Raises:
        ZebraError: values that transformers rejects, such as a negative temperature, or top_p without a temperature; a
            temperature or a penalty so small that logits overflow.
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
        self._check_types()
        for name, count in (("num_beams", self.num_beams), ("prefill_chunk", self.prefill_chunk)):
            if count is not None and count < 1:
                raise ZebraError(f"{name} is a whole number of at least 1; got {count}. Raise it or leave it out.")
        if not 0 <= self.seed < 2**64:
            raise ZebraError(f"a seed is a whole number from 0 to 2^64 - 1; got {self.seed}. Choose another.")
        object.__setattr__(self, "stop", tuple(names_of(self.stop)))  # one string, and not its letters
        if not all(self.stop):
            raise ZebraError("a stop string has at least one character; got an empty one. Leave it out.")
        filters = {name: getattr(self, name) for name in _FILTERS if getattr(self, name) is not None}
        if filters and self.temperature == 0:
            names = ", ".join(filters)
            raise ZebraError(
                f"{names} filter what is drawn, and temperature 0 draws nothing. Raise it, for example to 0.8."
            )
        try:
            self.to_generation_config()
            TemperatureLogitsWarper(float(self.temperature) or 1.0)
            RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty))
            for name, value in filters.items():
                _FILTERS[name](value)
        except ValueError as error:
            raise ZebraError(f"these options of decoding cannot be used: {first_line(error)}") from None
        self._check_divisors()

    def to_generation_config(self, **tokens: Any) -> GenerationConfig:
        """transformers' config: every field that the checkpoint's own would fill is set, to a neutral value by default.

        Not of it are the stop strings, which transformers would look for in the end of the prompt too.

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
            prefill_chunk_size=self.prefill_chunk,
            use_cache=True,
            return_dict_in_generate=True,
            **tokens,
        )

    def _check_types(self) -> None:
        for field in fields(self):
            value, whole = getattr(self, field.name), field.name in _WHOLE
            if field.name == "stop" or (value is None and field.default is None):
                continue
            if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
                kind = "whole number" if whole else "number"
                raise ZebraError(f"{field.name} is a {kind}; got {value!r}. Give one, or leave it out.")

    def _check_divisors(self) -> None:
        divisors = {"temperature above 0": self.temperature or 1.0, "repetition_penalty": self.repetition_penalty}
        for name, value in divisors.items():
            if not _LEAST_DIVISOR <= value < float("inf"):
                raise ZebraError(f"{name} is a number from {_LEAST_DIVISOR:g}; got {value:g}. Choose another.")
