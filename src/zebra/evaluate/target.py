"""What is evaluated: a checkpoint, how it is loaded, and how long a text it can read."""

from __future__ import annotations

import os
import warnings
from typing import Any

from transformers import PreTrainedModel

from zebra.errors import ZebraError
from zebra.model.context import check_learned_positions, context_length, ways_beyond
from zebra.model.families import layout
from zebra.model.load import device_name
from zebra.model.load_options import LoadOptions, loaded_layout_name
from zebra.model.rope import as_rope, check_fixed_rope


class EvalTarget:
    """A checkpoint and how it is loaded. Everything that can fail without the weights fails here.

    Args:
        purpose: a use that needs a RoPE that does not change with length, such as "generating"; None allows any RoPE.
        loading: the fields of `LoadOptions`.

    Attributes:
        config: the config, with the RoPE of the options.
        self_extend: the setting of Self-Extend, or None.
        tokenizer: the checkpoint's tokenizer.
        context_length: the longest text that the model is made for; None if unknown, as with another base of the RoPE.

    Raises:
        ZebraError: options that do not fit the checkpoint; with a purpose, a RoPE that changes with length.
    """

    def __init__(self, checkpoint: str | os.PathLike[str], *, purpose: str | None = "generating", **loading: Any):
        self._options, _ = LoadOptions.of(loading)
        self._options.check()
        self.checkpoint = str(checkpoint)
        self.config = self._options.config(checkpoint)
        if purpose is not None:
            check_fixed_rope(self.config, purpose)
        self.self_extend = self._options.self_extend_setting(self.config)
        self.tokenizer = self._options.tokenizer(checkpoint, self.config)
        other_base = as_rope(self._options.rope).kind == "base"
        self.context_length = None if other_base else context_length(self.config, self.self_extend)

    def check_length(self, length: int, beyond: bool | None = None) -> None:
        """Reject a length beyond `context_length`, or warn of it if `beyond`; None rejects without naming that option.

        Raises:
            ZebraError: a length beyond `context_length` without `beyond`; one beyond learned positions.
        """
        check_learned_positions(self.config, length)
        if self.context_length is None or length <= self.context_length:
            return
        passes = f"a length of {length:,} tokens exceeds the {self.context_length:,} positions that this model "
        passes += f"reaches with Self-Extend {self.self_extend}" if self.self_extend else "was trained for"
        if not beyond:
            remedy = "" if beyond is None else "; or measure beyond them anyway (--beyond)"
            raise ZebraError(f"{passes}. Use a shorter one, {self.ways_beyond()}{remedy}.")
        warnings.warn(f"{passes}: results beyond them show how it fails.", stacklevel=3)

    def ways_beyond(self) -> str:
        """Ways to read texts beyond `context_length`, as text for a message."""
        return ways_beyond(self.config, self.self_extend, as_rope(self._options.rope))

    def load(self) -> PreTrainedModel:
        """Load the model to its device.

        Raises:
            ZebraError: as `LoadOptions.model`.
        """
        return self._options.model(self.checkpoint)

    def columns(self, model: PreTrainedModel | None = None) -> dict[str, Any]:
        """The columns of results that describe the loaded model, or without one the checkpoint."""
        if model is None:
            return {"model": self.checkpoint, "layout": layout(self.config)}
        name = loaded_layout_name(model, self._options.rope)
        return {"model": self.checkpoint, "layout": name, "device": device_name(model.device)}
