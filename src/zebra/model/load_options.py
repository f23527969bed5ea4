"""The options for loading a model, declared once for all that loads one: generating, perplexity, retrieval."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from zebra.errors import ZebraError, check_names
from zebra.model.checkpoint import load_tokenizer, read_config
from zebra.model.load import load, read_device, read_dtype
from zebra.model.local import layout_name, local_attention_of
from zebra.model.rope import Rope, as_rope
from zebra.model.self_extend import resolve_self_extend, self_extend_of
from zebra.positions import SelfExtend
from zebra.stripes import Stripes


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """The arguments of `zebra.load` that every measurement takes, and where the model runs.

    Attributes:
        stripes, rope, self_extend, window, full_decode: as `zebra.load` has them.
        dtype: None takes the checkpoint's own.
        device: None takes a GPU if there is one.
        trust_remote_code: run a tokenizer that is Python code of the checkpoint's own. Models are always classes of
            transformers.
    """

    stripes: Stripes | str | None = None
    rope: Rope | str | None = None
    self_extend: SelfExtend | str | None = None
    window: int | None = None
    full_decode: bool | None = None
    dtype: torch.dtype | str | None = None
    device: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any], others: type[Any] | None = None) -> tuple[LoadOptions, dict[str, Any]]:
        """Split options into those for loading and the rest.

        Args:
            others: a dataclass whose fields are the other options.

        Raises:
            ZebraError: an option that neither class has.
        """
        own = [field.name for field in fields(cls)]
        check_names(options, own + [field.name for field in (fields(others) if others else ())])
        loading = {name: value for name, value in options.items() if name in own}
        return cls(**loading), {name: value for name, value in options.items() if name not in own}

    def names(self) -> list[str]:
        """The names of the options that are set."""
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]

    def check(self) -> None:
        """Check that the device and the dtype exist here, before any work.

        Raises:
            ZebraError: as `read_device` and `read_dtype`.
        """
        read_device(self.device)
        if self.dtype is not None:
            read_dtype(self.dtype)

    def config(self, checkpoint: str | os.PathLike[str]) -> PreTrainedConfig:
        """The checkpoint's config with `rope` applied but not `stripes`, before any weights are read.

        Raises:
            ZebraError: as `read_config` and the rope.
        """
        routed = self.self_extend is None or self.stripes is not None or self.window is not None
        return as_rope(self.rope).apply(read_config(checkpoint, routed=routed))

    def self_extend_setting(self, config: PreTrainedConfig) -> SelfExtend | None:
        """The setting of Self-Extend for a model; None without it.

        Raises:
            ZebraError: as `resolve_self_extend`.
        """
        return None if self.self_extend is None else resolve_self_extend(self.self_extend, config)

    def tokenizer(self, checkpoint: str | os.PathLike[str], config: PreTrainedConfig) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer.

        Raises:
            ZebraError: as `load_tokenizer`.
        """
        return load_tokenizer(checkpoint, config, trust_remote_code=self.trust_remote_code)

    def config_and_tokenizer(
        self, model: PreTrainedModel | str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None
    ) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
        """The config and the tokenizer of a loaded model, or of a checkpoint before its weights are read.

        Args:
            tokenizer: the checkpoint's own where None.

        Raises:
            ZebraError: loading options, or no tokenizer to find, for a loaded model; as `config` and `tokenizer`.
        """
        if not isinstance(model, PreTrainedModel):
            config = self.config(model)
            return config, tokenizer or self.tokenizer(model, config)
        if names := self.names():
            raise ZebraError(
                f"{', '.join(names)} must be set when a model is loaded; got a loaded model. Pass them to zebra.load."
            )
        if tokenizer is None and not model.name_or_path:
            raise ZebraError("this model was not loaded from a checkpoint, so it has no tokenizer. Pass tokenizer=.")
        return model.config, tokenizer or self.tokenizer(model.name_or_path, model.config)

    def model(self, checkpoint: str | os.PathLike[str]) -> PreTrainedModel:
        """Load the model onto its device.

        Raises:
            ZebraError: as `read_device` and `load`.
        """
        device = read_device(self.device)
        options: dict[str, Any] = {name: getattr(self, name) for name in self.names() if name not in _NOT_THE_MODEL}
        if self.dtype is not None:
            options["dtype"] = read_dtype(self.dtype)
        return load(checkpoint, **options).to(device)


_NOT_THE_MODEL = ("device", "trust_remote_code")


def loaded_layout_name(model: PreTrainedModel, rope: Rope | str | None = None) -> str:
    """The layout of a loaded model in results, with a change of the rope, full decoding and Self-Extend."""
    setting = self_extend_of(model)
    name = layout_name(model.config, local_attention_of(model), rope)
    return name + (f", self-extend {setting}" if setting else "")
