"""Masks as predicates over two positions: may the query at `i` see the key at `j`?

Every function takes ints and tensors alike, so that one definition serves arithmetic, the reference kernel and the
drawings below. In a drawing rows are queries, columns are keys, `x` is visible.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Position = TypeVar("Position", int, "Tensor")
"""An int, or an integer tensor that broadcasts against the other positions. The result is a bool, or a bool tensor."""


def causal(i: Position, j: Position) -> Position:
    """A query sees itself and what came before: `j <= i`.

    x . . . .
    x x . . .
    x x x . .
    x x x x .
    x x x x x
    """
    return j <= i


def within(i: Position, j: Position, window: int) -> Position:
    """A query sees the `window` newest keys, its own included: `0 <= i - j < window`. Here window = 2.

    x . . . .
    x x . . .
    . x x . .
    . . x x .
    . . . x x
    """
    return (j <= i) & (i - j < window)


def sink(j: Position, first: Position | int, sinks: int) -> Position:
    """The first `sinks` tokens of a text, which begins at `first`. Here within a window of 2, or a sink of 1.

    x . . . .
    x x . . .
    x x x . .
    x . x x .
    x . . x x
    """
    return (j >= first) & (j - first < sinks)


def same_document(query_document: Position, key_document: Position) -> Position:
    """Packed documents never see each other. Here with `causal`, for the documents 0 0 0 1 1.

    x . . . .
    x x . . .
    x x x . .
    . . . x .
    . . . x x
    """
    return query_document == key_document
