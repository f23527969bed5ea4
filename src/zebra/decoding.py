"""Decoding options: how the next token is chosen, and when generation stops."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from transformers import GenerationConfig

from zebra.data.documents import names_of
from zebra.errors import ZebraError

_LEAST_DIVISOR = 1e-6
"""The smallest positive temperature, and the smallest penalty: logits divided by less could overflow."""
_MOST = sys.float_info.max
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("temperature", "repetition_penalty"), (_LEAST_DIVISOR, _MOST)),
    **dict.fromkeys(("top_p", "min_p"), (0, 1)),
    **dict.fromkeys(("max_new_tokens", "top_k", "num_beams", "prefill_chunk"), (1, _MOST)),
    "seed": (0, 2**64 - 1),
}
_WHOLE = ("max_new_tokens", "top_k", "num_beams", "prefill_chunk", "seed")
_FILTERS = ("top_p", "top_k", "min_p")


@dataclass(frozen=True)
class Decoding:
    """Options of decoding: fields of transformers' `GenerationConfig`, with other defaults.

    The checkpoint's generation_config.json is ignored, except for the tokens that end or pad a text.

    Args:
        max_new_tokens: maximum number of new tokens.
        temperature: 0 decodes greedily; otherwise tokens are sampled from softmax(logits / temperature).
        top_p, top_k, min_p, repetition_penalty, num_beams: as in `GenerationConfig`.
        stop: strings that end the text; the text includes them.
        seed: random seed of sampling.
        prefill_chunk: number of prompt tokens per forward pass, None for all at once. Chunks of a long prompt need less
            memory for activations; the result is the same up to rounding.

    Raises:
        ZebraError: a value out of range, such as a negative temperature, or one so small that logits overflow; top_p,
            top_k or min_p without a temperature; an empty stop string.
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
        for name, (least, most) in _RANGES.items():
            value, whole = getattr(self, name), name in _WHOLE
            if value is None and getattr(type(self), name) is None:
                continue
            fits = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
            if not (fits and (least <= value <= most or (name == "temperature" and value == 0))):
                kind = "an integer" if whole else "0 or a number" if name == "temperature" else "a number"
                to = f" to {most:,}" if most < _MOST else " up"
                raise ZebraError(f"{name} must be {kind} from {least:g}{to}; got {value!r}. Change it or leave it out.")
        object.__setattr__(self, "stop", tuple(names_of(self.stop)))  # a single string is not split into letters
        if not all(self.stop):
            raise ZebraError("a stop string must have at least one character; got an empty one. Leave it out.")
        if self.temperature == 0 and (filters := [name for name in _FILTERS if getattr(self, name) is not None]):
            raise ZebraError(
                f"{', '.join(filters)} filter the tokens to sample from, and temperature 0 does not sample. Raise the "
                "temperature, for example to 0.8."
            )

    def to_generation_config(self, **tokens: Any) -> GenerationConfig:
        """Convert to a `GenerationConfig`, with neutral values set so that the checkpoint's own do not apply.

        The stop strings are left out, because transformers would also match one that begins in the prompt.

        Args:
            tokens: further fields: the tokens that end and pad a text.
        """
        draws = self.temperature != 0
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=draws,
            temperature=self.temperature if draws else 1.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=(0 if draws else 50) if self.top_k is None else self.top_k,  # 50 is neutral in greedy decoding
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            num_beams=self.num_beams,
            prefill_chunk_size=self.prefill_chunk,
            use_cache=True,
            return_dict_in_generate=True,
            **tokens,
        )
