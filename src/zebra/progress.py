"""The console for messages, and progress bars on it; where stderr is no terminal there are no bars.

Names come from files of others. What they hold is shown and not obeyed: no markup, no control characters.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from zebra.errors import printable


class TextConsole(Console):
    """A console that shows `printable` text, and no markup but that of `rich.text.Text`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render an object to pieces of text with their styles."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


console = TextConsole(stderr=True)
"""Stderr, for everything that is not output."""


@contextmanager
def only_errors(name: str) -> Iterator[None]:
    """A logger logs errors alone, until the last thread that asked for it is done."""
    logger = logging.getLogger(name)
    with _QUIET_LOCK:
        users, level = _QUIET.get(name, (0, logger.level))
        _QUIET[name] = users + 1, level
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        with _QUIET_LOCK:
            users, level = _QUIET.pop(name)
            if users > 1:
                _QUIET[name] = users - 1, level
            else:
                logger.setLevel(level)


_QUIET: dict[str, tuple[int, int]] = {}
"""By logger: how many asked for errors alone, and its level before the first."""
_QUIET_LOCK = threading.Lock()


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
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total, unit=unit, note="")

        def advance(units: float = 0, note: str | None = None) -> None:
            progress.update(task, advance=units)
            if note is not None:
                progress.update(task, note=note)

        yield advance
