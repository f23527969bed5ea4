"""Self-Extend (arXiv 2401.01325) for a loaded model: set on its layers (`apply`), in one layer (`layer`), as its
formula reads (`formula`, the oracle).
"""

from __future__ import annotations

from zebra.model.self_extend.apply import (
    AttentionLayer,
    attention_layers,
    bounded_cache,
    check_learned_positions,
    longest_text,
    resolve_self_extend,
    self_extend_of,
    set_self_extend,
)
from zebra.model.self_extend.layer import GroupedRotation, SelfExtendAttention, rotate, rotation_between

__all__ = [
    "AttentionLayer",
    "GroupedRotation",
    "SelfExtendAttention",
    "attention_layers",
    "bounded_cache",
    "check_learned_positions",
    "longest_text",
    "resolve_self_extend",
    "rotate",
    "rotation_between",
    "self_extend_of",
    "set_self_extend",
]
