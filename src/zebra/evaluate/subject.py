"""What is measured: a checkpoint, how it is loaded, and how long a text it can read."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from zebra.model.checkpoint import load_tokenizer, read_config
from zebra.model.extend import reach, resolved, setting_of
from zebra.model.families import layout
from zebra.model.hosts import device_name, load, read_device, read_dtype
from zebra.model.rope import as_rope, refuse_cache
from zebra.positions import SelfExtend
from zebra.refusal import Refusal


@dataclass(frozen=True)
class Subject:
    """A checkpoint and the arguments of `zebra.load`. All that can be refused without the weights is refused here.

    Raises:
        Refusal: what `load` refuses of the arguments, and a rope that changes with length.
    """

    checkpoint: str | os.PathLike[str]
    stripes: str | None = None
    rope: str | None = None
    self_extend: SelfExtend | str | None = None
    dtype: torch.dtype | str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        read_device(self.device)
        if self.dtype is not None:
            read_dtype(self.dtype)
        refuse_cache(self.config, "an answer behind its prompt")
        _ = self.setting

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The config with the rope."""
        routed = self.self_extend is None or self.stripes is not None
        return as_rope(self.rope).changed(read_config(self.checkpoint, routed=routed))

    @cached_property
    def setting(self) -> SelfExtend | None:
        """Self-Extend's, reckoned."""
        return None if self.self_extend is None else resolved(self.self_extend, self.config)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's own."""
        return load_tokenizer(self.checkpoint, self.config)

    @property
    def reach(self) -> int | None:
        """The longest text that it is made for; None where nobody knows, as under another base of the rope."""
        return None if as_rope(self.rope).kind == "base" else reach(self.config, self.setting)

    def check_length(self, length: int, beyond: bool) -> None:
        """Refuse a length beyond the reach, or warn where it is told to go beyond."""
        check_reach(length, self.reach, self.setting, beyond)

    def load(self) -> PreTrainedModel:
        """The model, in its place."""
        own: dict[str, Any] = {} if self.dtype is None else {"dtype": read_dtype(self.dtype)}
        model = load(self.checkpoint, stripes=self.stripes, rope=self.rope, self_extend=self.self_extend, **own)
        return model.to(read_device(self.device))

    def columns(self, model: PreTrainedModel | None = None) -> dict[str, Any]:
        """What the rows of results say about it; without a model they are about the checkpoint's data alone."""
        if model is None:
            return {"model": str(self.checkpoint), "layout": layout(self.config)}
        setting = setting_of(model)
        named = " ".join(filter(None, (layout(model.config), self.rope)))
        named += f", self-extend {setting}" if setting else ""
        return {"model": str(self.checkpoint), "layout": named, "device": device_name(model.device)}


def check_reach(length: int, reach: int | None, setting: SelfExtend | None, beyond: bool) -> None:
    """Refuse a length beyond what a model was trained for or reaches, or warn where it is told to go beyond.

    Raises:
        Refusal: a length beyond, and nobody told to measure there.
    """
    if reach is None or length <= reach:
        return
    passes = f"a length of {length:,} tokens passes the {reach:,} positions that this model "
    passes += "was trained for" if setting is None else f"reaches with Self-Extend {setting}"
    if not beyond:
        raise Refusal(
            f"{passes}. Take a shorter one, a rope such as yarn:8, Self-Extend or a checkpoint that was adapted, or "
            "say beyond (--beyond) to measure there all the same."
        )
    warnings.warn(f"{passes}: what is measured there is how it fails.", stacklevel=3)
