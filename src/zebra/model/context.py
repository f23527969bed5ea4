"""How long a text a model reads."""

from __future__ import annotations

from transformers import PreTrainedConfig

from zebra.errors import ZebraError
from zebra.positions import SelfExtend


def longest_text(config: PreTrainedConfig, setting: SelfExtend | None = None) -> int | None:
    """The longest text that a model was trained for, or reaches with Self-Extend; None without a limit."""
    trained = getattr(config.get_text_config(), "max_position_embeddings", None)
    return trained if setting is None or trained is None else setting.reach(trained)


def check_learned_positions(config: PreTrainedConfig, length: int) -> None:
    """Refuse a text that is longer than a table of learned positions, which nothing can be read beyond.

    Raises:
        ZebraError: it is.
    """
    rows = config.max_position_embeddings if getattr(config, "position_embedding", None) == "absolute" else length
    if length > rows:
        raise ZebraError(
            f"this model has {rows:,} learned positions, and {length:,} tokens are to be read. Take fewer, or a model "
            "with other positions."
        )
