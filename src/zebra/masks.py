"""Attention masks as predicates: may the query at position `i` see the key at position `j`?

Every function takes ints or tensors, so that arithmetic and the kernels share one definition. In the drawings rows are
queries, columns are keys, and `x` is visible.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Position = TypeVar("Position", int, "Tensor")
"""An int, or an integer tensor that broadcasts against the other positions. The result is a bool, or a bool tensor."""


def causal(i: Position, j: Position) -> Position:
    """A query sees its own key and all earlier ones: `j <= i`.

    x . . . .
    x x . . .
    x x x . .
    x x x x .
    x x x x x
    """
    return j <= i


def within(i: Position, j: Position, window: int) -> Position:
    """A query sees the last `window` keys, its own included: `0 <= i - j < window`. Drawn for window = 2.

    x . . . .
    x x . . .
    . x x . .
    . . x x .
    . . . x x
    """
    return (j <= i) & (i - j < window)


def sink(j: Position, first: Position | int, sinks: int) -> Position:
    """The key is one of the first `sinks` tokens of a text that begins at `first`. Drawn: a window of 2 or 1 sink.

    x . . . .
    x x . . .
    x x x . .
    x . x x .
    x . . x x
    """
    return (j >= first) & (j - first < sinks)


def same_document(query_document: Position, key_document: Position) -> Position:
    """Query and key are in the same packed document. Drawn with `causal`, for the documents 0 0 0 1 1.

    x . . . .
    x x . . .
    x x x . .
    . . . x .
    . . . x x
    """
    return query_document == key_document
