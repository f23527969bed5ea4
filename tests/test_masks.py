"""Masks equal the drawings in the docstrings, and a window shows the right number of keys."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from zebra import masks

CAUSAL = """
x . . . .
x x . . .
x x x . .
x x x x .
x x x x x
"""
WITHIN_2 = """
x . . . .
x x . . .
. x x . .
. . x x .
. . . x x
"""
SAME_DOCUMENT = """
x . . . .
x x . . .
x x x . .
. . . x .
. . . x x
"""
SINK_1 = """
x . . . .
x x . . .
x x x . .
x . x x .
x . . x x
"""
DOCUMENTS = [0, 0, 0, 1, 1]


def document_of(i: Any) -> Any:
    return torch.tensor(DOCUMENTS)[i] if isinstance(i, torch.Tensor) else DOCUMENTS[i]


DRAWINGS: list[tuple[str, Callable[[Any, Any], Any], Callable[..., Any]]] = [
    (CAUSAL, masks.causal, masks.causal),
    (WITHIN_2, lambda i, j: masks.within(i, j, 2), masks.within),
    (
        SINK_1,
        lambda i, j: masks.causal(i, j) & (masks.within(i, j, 2) | masks.sink(j, 0, 1)),
        masks.sink,
    ),
    (
        SAME_DOCUMENT,
        lambda i, j: masks.same_document(document_of(i), document_of(j)) & masks.causal(i, j),
        masks.same_document,
    ),
]
drawings = pytest.mark.parametrize(
    ("drawing", "predicate", "operator"), DRAWINGS, ids=["causal", "within", "sink", "same_document"]
)


def parsed(drawing: str) -> list[list[bool]]:
    return [[mark == "x" for mark in line.split()] for line in drawing.strip().splitlines()]


@drawings
def test_the_drawing_stands_in_the_docstring(drawing: str, predicate: Any, operator: Any) -> None:
    lines = [line for line in inspect.cleandoc(operator.__doc__).splitlines() if re.fullmatch(r"[x.]( [x.])+", line)]
    assert lines == drawing.strip().splitlines()


@drawings
def test_ints_draw_it(drawing: str, predicate: Any, operator: Any) -> None:
    assert [[bool(predicate(i, j)) for j in range(5)] for i in range(5)] == parsed(drawing)


@drawings
def test_tensors_draw_it(drawing: str, predicate: Any, operator: Any) -> None:
    i = torch.arange(5)
    seen = predicate(i[:, None], i[None, :])
    assert seen.dtype == torch.bool
    assert seen.tolist() == parsed(drawing)


@pytest.mark.parametrize("window", [1, 2, 5])
def test_a_query_sees_as_many_keys_as_the_window_says(window: int) -> None:
    assert [sum(masks.within(i, j, window) for j in range(10)) for i in range(10)] == [
        min(i + 1, window) for i in range(10)
    ]


def test_a_window_past_the_length_hides_nothing() -> None:
    i, j = torch.arange(7)[:, None], torch.arange(7)[None, :]
    assert torch.equal(masks.within(i, j, 7), masks.causal(i, j))
    assert not torch.equal(masks.within(i, j, 6), masks.causal(i, j))
