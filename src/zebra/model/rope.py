"""Changes of a model's rotary position embedding (rope): other `rope_parameters` in its config.

    linear:8          every angle divided by 8 (position interpolation, arXiv 2306.15595)
    yarn:8            slow angles divided, fast ones unchanged, a ramp between (YaRN, arXiv 2309.00071)
    llama3:8          the same with Llama 3.1's ramp
    base:5000000      a larger base: slow angles become slower (arXiv 2309.16039)
    dynamic:1         dynamic NTK: a base that grows with the text beyond the trained length; evaluation only
    none              no change

transformers computes the frequencies. In a model with one rope for each kind of layer, only that of the global layers
changes: a local layer never looks beyond its window, except at attention sinks.
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zebra.errors import ZebraError
from zebra.positions import LARGEST_FACTOR, LENGTH_DEPENDENT, rope_type, ropes_of
from zebra.stripes import GLOBAL, LOCAL

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_STRETCHING = ("linear", "yarn", "llama3")
_FACTORS = (*_STRETCHING, "dynamic")
_UNCHANGED = ("rope_theta", "partial_rotary_factor")


@dataclass(frozen=True)
class Rope:
    """A change of the rope: its kind, and the factor or the base.

    Raises:
        ZebraError: an unknown kind, a kind without its number or `none` with one, a factor that does not extend.

    Example:
        >>> Rope.parse("yarn:8").amount
        8.0
    """

    kind: str
    amount: float | None = None

    def __post_init__(self) -> None:
        if self.kind == "none" and self.amount is None:
            return
        least = 1.0 if self.kind in ("dynamic", "base") else math.nextafter(1.0, 2.0)
        known = self.kind in (*_FACTORS, "base")
        if not known or self.amount is None or not least <= self.amount <= LARGEST_FACTOR:
            raise ZebraError(
                "a rope must be none, base:THETA, linear, yarn or llama3 with a factor above 1, or dynamic with a "
                f"factor of at least 1; got {self}. Write, for example, yarn:8 or base:5000000."
            )

    @classmethod
    def parse(cls, text: str) -> Rope:
        """Parse the notation that `str()` prints."""
        kind, colon, amount = str(text).strip().partition(":")
        if colon and not re.fullmatch(r"\s*[0-9]+(\.[0-9]*)?([eE][+]?[0-9]+)?\s*", amount):
            raise ZebraError(f"a rope must be written KIND:NUMBER; got {text!r}. Write, for example, yarn:8, or none.")
        return cls(kind.strip().lower(), float(amount) if colon else None)

    def __str__(self) -> str:
        return self.kind if self.amount is None else f"{self.kind}:{self.amount:.15g}"

    def apply(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The config with this rope; linear, yarn and llama3 also multiply max_position_embeddings by the factor.

        Raises:
            ZebraError: as `reason_against`: a rope that is scaled already, a base that is not larger, no rope, ...
        """
        if self.kind == "none":
            return config
        if reason := self.reason_against(config):
            raise ZebraError(f"the rope of this {config.model_type} cannot be changed to {self}: {reason}.")
        by_kind = GLOBAL in config.rope_parameters
        old = config.rope_parameters[GLOBAL] if by_kind else config.rope_parameters
        new = {name: old[name] for name in _UNCHANGED if name in old}
        if self.kind == "base":
            new |= {"rope_type": "default", "rope_theta": self.amount}
        else:
            new |= {"rope_type": self.kind, "factor": self.amount}
        if self.kind in ("yarn", "llama3"):
            new["original_max_position_embeddings"] = config.max_position_embeddings
        if self.kind == "llama3":
            new |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        result = copy.deepcopy(config)
        result.rope_parameters = {**config.rope_parameters, GLOBAL: new} if by_kind else new
        if self.kind in _STRETCHING:
            result.max_position_embeddings = round(config.max_position_embeddings * self.amount)
        return result

    def reason_against(self, config: PreTrainedConfig) -> str | None:
        """Why a model's rope cannot be changed into this one, with the remedy; None where it can."""
        parameters = getattr(config, "rope_parameters", None) or {}
        by_kind = GLOBAL in parameters
        old = parameters[GLOBAL] if by_kind else parameters
        if (positions := getattr(config, "position_embedding", "rotary")) != "rotary":
            return f"its positions are {positions}. Leave the rope out"
        if config.model_type == "cohere2":
            return "only its local layers have one, and they never see beyond their window. Leave the rope as it is"
        if self.kind == "base" and getattr(config, "layer_rope_theta", None):
            return "each layer has its own base (layer_rope_theta). Use yarn, linear or llama3"
        if self.kind == "dynamic" and by_kind:
            return "each kind of layer has its own, and dynamic NTK supports only one. Use yarn, linear or llama3"
        if not old:
            return "it has none. Leave the rope out"
        if old.get("rope_type", "default") != "default":
            has = ", ".join(f"{name} {value}" for name, value in old.items() if not isinstance(value, list))
            return f"it is already scaled ({has}). Start from the unscaled checkpoint, or leave the rope as it is"
        if self.kind == "base" and self.amount <= old["rope_theta"]:
            return f"the base must be larger than the current {old['rope_theta']:,.0f}. Raise it"
        return None


def as_rope(rope: Rope | str | None) -> Rope:
    """Return a `Rope` from one, from its notation, or from None for no change."""
    return rope if isinstance(rope, Rope) else Rope.parse(rope or "none")


def changes_with_length(config: PreTrainedConfig) -> str | None:
    """The type of a rope whose frequencies depend on the text's length, so that a KV cache would mix them; or None."""
    return next((kind for kind in map(rope_type, ropes_of(vars(config))) if kind in LENGTH_DEPENDENT), None)


def with_explicit_yarn_factor(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config with the factor of its YaRN rope written out.

    Without it transformers derives the factor from max_position_embeddings: a model that is loaded with more positions
    would have another rope.
    """
    result = copy.deepcopy(config)
    for rope in ropes_of(vars(result)):
        if rope.get("rope_type") == "yarn" and rope.get("factor") is None:
            rope["factor"] = config.max_position_embeddings / rope["original_max_position_embeddings"]
    return result


_LOCAL_BASE = {"gemma3_text": "rope_local_base_freq", "olmo3": None}
"""Families with a rope for each kind of layer in transformers 4, and the field there for the local layers' base."""


def older_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """A config's rope in the fields of transformers 4, which does not know `rope_parameters` and would use defaults.

    Where those fields cannot describe the rope, or the class there ignores `layer_types`, `rope_theta` is a string that
    makes transformers 4 stop with an error.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    by_kind = GLOBAL in rope
    if not rope or (by_kind and config.model_type not in _LOCAL_BASE):
        return {}  # no class of transformers 4 reads it
    old = rope[GLOBAL] if by_kind else rope
    fields = {name: old[name] for name in _UNCHANGED if name in old} | {"rope_scaling": None}
    if old.get("rope_type", "default") != "default":
        fields["rope_scaling"] = {name: value for name, value in old.items() if name not in _UNCHANGED}
    same = config.model_type != "qwen2_moe" or LOCAL not in (config.layer_types or ())
    if by_kind:
        local, own_base = rope[LOCAL], _LOCAL_BASE[config.model_type]
        base = old["rope_theta"] if own_base is None else local["rope_theta"]
        same = local == {"rope_type": "default", "rope_theta": base}
        fields |= {} if own_base is None else {own_base: base}
    return fields if same else {"rope_theta": "transformers 4 would compute another model; see rope_parameters"}


def check_fixed_rope(config: PreTrainedConfig, purpose: str) -> None:
    """Check that a model's frequencies do not depend on the text's length.

    Args:
        purpose: what needs a cache, chunks or sequences of one length, such as "generating".

    Raises:
        ZebraError: dynamic NTK or longrope.
    """
    kind = changes_with_length(config)
    if kind is not None:
        raise ZebraError(
            f"{purpose} requires fixed frequencies; those of a rope of type {kind} change with the length of the "
            "text, so cached and new keys would not match. Use yarn, linear, llama3 or base; "
            f"{kind} supports only `zebra evaluate perplexity`."
        )


def length_dependent_rope_hook(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook for a rope that changes with length: no cache, and frequencies by each text's own length.

    Raises:
        ZebraError: a call with a cache.
    """
    if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
        raise ZebraError(
            f"the rope type {changes_with_length(module.config)} does not support a KV cache: its frequencies change "
            "with the length, so cached and new keys would not match. Pass use_cache=False, or use yarn to generate."
        )
    import torch  # recipes read the notation without it

    # transformers remembers the longest text; a short one resets it to the frequencies of the trained length.
    start = torch.zeros(1, 1, dtype=torch.long, device=module.device)
    by_kind = [{"layer_type": kind} for kind in (GLOBAL, LOCAL) if kind in module.config.rope_parameters]
    for kind in by_kind or [{}]:
        module.get_decoder().rotary_emb(start.float(), start, **kind)
    return args, kwargs | {"use_cache": False}
