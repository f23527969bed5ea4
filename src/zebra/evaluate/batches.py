"""Sequences that run together, as many as fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def batches(items: Iterable[T], fits: Callable[[list[T], T], bool]) -> Iterator[list[T]]:
    """Lists of neighbours, in order: an item joins the batch before it where it fits, and begins another one otherwise.

    Args:
        fits: whether an item may join a batch, which has at least one.
    """
    batch: list[T] = []
    for item in items:
        if batch and not fits(batch, item):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch
