"""Self-Extend (arXiv 2401.01325) for a loaded model.

`probe` tests whether its layers can have it, `apply` sets it on them, `layer` computes it in one layer, and `formula`
is the oracle, the paper's formula.
"""

from __future__ import annotations

from zebra.model.self_extend.apply import (
    bounded_cache,
    resolve_self_extend,
    self_extend_of,
    set_self_extend,
)
from zebra.model.self_extend.layer import GroupedRotation, SelfExtendAttention, rotate, rotation_between
from zebra.model.self_extend.probe import AttentionLayer, attention_layers

__all__ = [
    "AttentionLayer",
    "GroupedRotation",
    "SelfExtendAttention",
    "attention_layers",
    "bounded_cache",
    "resolve_self_extend",
    "rotate",
    "rotation_between",
    "self_extend_of",
    "set_self_extend",
]
