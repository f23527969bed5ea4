"""What is measured: a checkpoint, how it is loaded, and how long a text it can read."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from zebra.errors import ZebraError
from zebra.model.checkpoint import load_tokenizer
from zebra.model.families import layout
from zebra.model.load import device_name
from zebra.model.load_options import LoadOptions, loaded_layout_name
from zebra.model.rope import as_rope, refuse_changing_rope
from zebra.model.self_extend import check_learned_positions, longest_text
from zebra.positions import SelfExtend


@dataclass(frozen=True)
class EvalTarget:
    """A checkpoint and how it is loaded. All that can be refused without the weights is refused here.

    Raises:
        ZebraError: what `LoadOptions` refuses, and a rope that changes with length.
    """

    checkpoint: str | os.PathLike[str]
    loading: LoadOptions

    def __post_init__(self) -> None:
        self.loading.check()
        refuse_changing_rope(self.config, "generating")
        _ = self.setting

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The config with the rope."""
        return self.loading.config(self.checkpoint)

    @cached_property
    def setting(self) -> SelfExtend | None:
        """Self-Extend's, reckoned."""
        return self.loading.self_extend_setting(self.config)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's own."""
        return load_tokenizer(self.checkpoint, self.config)

    @property
    def reach(self) -> int | None:
        """The longest text that it is made for; None where nobody knows, as under another base of the rope."""
        return None if as_rope(self.loading.rope).kind == "base" else longest_text(self.config, self.setting)

    def check_length(self, length: int, beyond: bool) -> None:
        """Refuse a length beyond what the model was trained for or reaches, or warn where it is told to go beyond.

        Raises:
            ZebraError: a length beyond, and nobody told to measure there; learned positions, which have no beyond.
        """
        check_learned_positions(self.config, length)
        if self.reach is None or length <= self.reach:
            return
        passes = f"a length of {length:,} tokens passes the {self.reach:,} positions that this model "
        passes += "was trained for" if self.setting is None else f"reaches with Self-Extend {self.setting}"
        if not beyond:
            raise ZebraError(
                f"{passes}. Take a shorter one, a rope such as yarn:8, Self-Extend or a checkpoint that was adapted, "
                "or say beyond (--beyond) to measure there all the same."
            )
        warnings.warn(f"{passes}: what is measured there is how it fails.", stacklevel=3)

    def load(self) -> PreTrainedModel:
        """The model, in its place."""
        return self.loading.model(self.checkpoint)

    def columns(self, model: PreTrainedModel | None = None) -> dict[str, Any]:
        """What the rows of results say about it; without a model they are about the checkpoint's data alone."""
        if model is None:
            return {"model": str(self.checkpoint), "layout": layout(self.config)}
        named = loaded_layout_name(model, self.loading.rope)
        return {"model": str(self.checkpoint), "layout": named, "device": device_name(model.device)}
