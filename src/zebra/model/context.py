"""The longest text that a model can read."""

from __future__ import annotations

from transformers import PreTrainedConfig

from zebra.errors import ZebraError
from zebra.model.rope import Rope, changes_with_length
from zebra.positions import SelfExtend, reach_of


def context_length(config: PreTrainedConfig, setting: SelfExtend | None = None) -> int | None:
    """The longest text that a model was made for, with its rope, or reads under Self-Extend; None without a limit."""
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    if longest is None:
        return None
    trained = reach_of(longest, vars(text))
    return trained if setting is None else setting.reach(trained)


def ways_beyond(config: PreTrainedConfig, setting: SelfExtend | None, rope: Rope) -> str:
    """For a message: what this model can use to read a longer text.

    Args:
        setting, rope: what it was loaded with.
    """
    ways = []
    if rope.amount is not None:
        ways.append("a larger factor of the rope")
    elif Rope("yarn", 8.0).reason_against(config) is None:
        ways.append("a rope such as yarn:8")
    if setting is not None:
        ways.append("a larger group of Self-Extend")
    elif getattr(config, "rope_parameters", None) and not changes_with_length(config):
        ways.append("Self-Extend")
    return ", ".join([*ways, "or a checkpoint that was adapted"])


def check_learned_positions(config: PreTrainedConfig, length: int) -> None:
    """Check that a text is not longer than a model's table of learned positions.

    Raises:
        ZebraError: it is.
    """
    rows = config.max_position_embeddings if getattr(config, "position_embedding", None) == "absolute" else length
    if length > rows:
        raise ZebraError(
            f"a text must not be longer than this model's {rows:,} learned positions; got {length:,} tokens. Use fewer "
            "tokens, or a model with other positions."
        )
