"""A plug-in for axolotl: stripes, Self-Extend and attention "zebra", set by one key of axolotl's config.

    base_model: ./Llama-3.1-8B
    zebra: {stripes: "GLLL:4096", self_extend: null}

axolotl discovers it by the entry point `axolotl.plugins`. Without the key it does nothing.

    register           base_model becomes a copy with stripes in output_dir. Its weights are hard links where the file
                       system allows. Everything that reads the config afterwards sees the copy.
    axolotl's checks   `ZebraArgs` validates the key
    post_model_build   sets attention "zebra", the checkpoint's attention sinks, Self-Extend
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, Field, ValidationError, field_validator
from transformers import PreTrainedModel

from zebra.errors import ZebraError
from zebra.model.attention import NAME
from zebra.model.checkpoint import read_local_attention
from zebra.model.load import convert, converted_config
from zebra.model.local import layout_name, set_local_attention
from zebra.model.self_extend import resolve_self_extend, set_self_extend
from zebra.positions import SelfExtend
from zebra.stripes import Stripes
from zebra.train.recipe import RecipeSection

_REPLACED = ("lora_qkv_kernel", "lora_o_kernel")
"""Keys that axolotl may set by itself for adapters; they replace the attention layers of transformers."""


class ZebraKeys(RecipeSection):
    """The value of the key `zebra`. An empty one only sets the attention."""

    stripes: str | None = Field(None, description="the layout, such as GLLL:512; the checkpoint's own without it")
    self_extend: str | None = Field(None, description="GROUP:WINDOW such as 8:1024, or auto:LENGTH; off without it")

    @field_validator("stripes")
    @classmethod
    def _layout(cls, stripes: str | None) -> str | None:
        return None if stripes is None else str(Stripes.parse(stripes))

    @field_validator("self_extend")
    @classmethod
    def _setting(cls, self_extend: str | None) -> str | None:
        if self_extend is not None and not self_extend.startswith("auto:"):  # auto needs the model's config
            SelfExtend.parse(self_extend)
        return self_extend


class ZebraArgs(BaseModel):
    """The key that the plug-in adds to axolotl's config."""

    zebra: ZebraKeys | None = None


class ZebraPlugin(BasePlugin):
    """The hooks that axolotl calls; the module's docstring has their order."""

    def get_input_args(self) -> str:
        """The full name of the class that validates the key."""
        return f"{__name__}.{ZebraArgs.__name__}"

    def register(self, cfg: dict[str, Any]) -> None:
        """Convert `base_model` to a checkpoint with stripes and point the config to it.

        Args:
            cfg: axolotl's config, before axolotl validates it; changed in place.

        Raises:
            ZebraError: as `zebra.convert`; a `base_model_config` other than `base_model`; a different conversion that
                is already in output_dir.
        """
        try:
            keys = _keys(cfg)
        except ValidationError:  # axolotl's own validation reports it
            return
        if keys is None or keys.stripes is None:
            return
        source, config = str(cfg["base_model"]), cfg.get("base_model_config")
        if config not in (None, source):
            raise ZebraError(
                f"zebra.stripes requires the config of base_model; got base_model_config: {config}. Remove that key."
            )
        target = Path(cfg.get("output_dir") or "model-out") / "striped-base"
        if source != str(target):
            cfg["base_model"] = str(_converted(source, target, keys.stripes))
        cfg.pop("base_model_config", None)  # axolotl requires a string if the key is present

    def post_model_build(self, cfg: Mapping[str, Any], model: PreTrainedModel) -> None:
        """Set the attention of the model, before adapters are added.

        Raises:
            ZebraError: as `set_local_attention`, `resolve_self_extend` and `set_self_extend`; Self-Extend together
                with axolotl's own attention layers.
        """
        keys = _keys(cfg)
        if keys is None:
            return
        model.set_attn_implementation(NAME)
        if local := read_local_attention(cfg["base_model"]):
            set_local_attention(model, local)
        if keys.self_extend is not None:
            if on := [name for name in _REPLACED if cfg.get(name)]:
                raise ZebraError(
                    f"zebra.self_extend needs the attention layers of transformers, which {on[0]} replaces. Set "
                    f"{', '.join(f'{name}: false' for name in _REPLACED)}."
                )
            set_self_extend(model, resolve_self_extend(keys.self_extend, model.config))


def _keys(cfg: Mapping[str, Any]) -> ZebraKeys | None:
    value = cfg.get("zebra")
    return None if value is None else ZebraKeys.model_validate(dict(value) if isinstance(value, Mapping) else value)


def _converted(source: str, target: Path, stripes: str) -> Path:
    """Convert the checkpoint, or reuse the same conversion by another process or an earlier run."""
    try:
        return convert(source, target, stripes)
    except ZebraError:
        if not (target / "zebra.json").is_file():
            raise
    layout = layout_name(*converted_config(Path(source), stripes))
    earlier = json.loads((target / "zebra.json").read_text(encoding="utf-8"))
    if (earlier["source"], earlier["layout"]) != (str(Path(source)), layout):
        raise ZebraError(
            f"{target} holds {earlier['source']} as {earlier['layout']}, but the recipe has {source} as {layout}. "
            "Change output_dir, or remove that directory."
        )
    return target
