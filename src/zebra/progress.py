"""The console for messages, and progress bars on it; where stderr is no terminal there are no bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

console = Console(stderr=True)
"""Stderr, for everything that is not output."""


class _Rate(ProgressColumn):
    """Units per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {task.fields['unit']}/s" if speed else "", style="progress.data.speed")


@contextmanager
def bar(description: str, total: float, unit: str) -> Iterator[Callable[..., None]]:
    """A progress bar.

    Yields:
        A function that takes the units done since its last call, and as `note` a text for the end of the bar.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total, unit=unit, note="")

        def advance(units: float = 0, note: str | None = None) -> None:
            progress.update(task, advance=units)
            if note is not None:
                progress.update(task, note=note)

        yield advance
