"""Self-Extend (arXiv 2401.01325) for a loaded model: set on its layers (`apply`), in one layer (`layer`), as its
formula reads (`formula`, the oracle).
"""

from __future__ import annotations

from zebra.model.self_extend.apply import (
    Layer,
    attention_layers,
    bounded_cache,
    extend,
    reach,
    refuse_off_the_table,
    resolve_self_extend,
    setting_of,
)
from zebra.model.self_extend.layer import Extension, Rope, turn_between, turned

__all__ = [
    "Extension",
    "Layer",
    "Rope",
    "attention_layers",
    "bounded_cache",
    "extend",
    "reach",
    "refuse_off_the_table",
    "resolve_self_extend",
    "setting_of",
    "turn_between",
    "turned",
]
