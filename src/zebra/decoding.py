"""How the next token is chosen, and when a text ends."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from transformers import GenerationConfig

from zebra.data.documents import names_of
from zebra.errors import ZebraError

_LEAST_DIVISOR = 1e-6
"""The least temperature above 0, and the least penalty: logits that are divided by much less overflow."""
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
        ZebraError: a value that is no number of its range, such as a negative temperature, or one so small that logits
            overflow; a filter such as top_p without a temperature; an empty stop string.
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
                kind = "a whole number" if whole else "0 or a number" if name == "temperature" else "a number"
                to = f" to {most:,}" if most < _MOST else ""
                raise ZebraError(f"{name} is {kind} from {least:g}{to}; got {value!r}. Change it or leave it out.")
        object.__setattr__(self, "stop", tuple(names_of(self.stop)))  # one string, and not its letters
        if not all(self.stop):
            raise ZebraError("a stop string has at least one character; got an empty one. Leave it out.")
        if self.temperature == 0 and (filters := [name for name in _FILTERS if getattr(self, name) is not None]):
            raise ZebraError(
                f"{', '.join(filters)} filter what is drawn, and temperature 0 draws nothing. Raise it, for example to "
                "0.8."
            )

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
