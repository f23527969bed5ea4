"""Group sequences into batches, as many as fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def batches(items: Iterable[T], fits: Callable[[list[T], T], bool]) -> Iterator[list[T]]:
    """Group consecutive items: an item joins the current batch if it fits, and otherwise begins the next one.

    Args:
        fits: whether an item may join a batch, which has at least one item.
    """
    batch: list[T] = []
    for item in items:
        if batch and not fits(batch, item):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch
