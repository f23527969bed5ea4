"""The console for messages, and its progress bars, which are off if stderr is not a terminal.

Names may come from untrusted files. They are shown literally, without markup and control characters.
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
    """A console that shows `printable` text; only `rich.text.Text` has styles, as markup is off."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render an object to segments of printable text with their styles."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


console = TextConsole(stderr=True)
"""Stderr, for everything but the output of a command."""


@contextmanager
def only_errors(name: str) -> Iterator[None]:
    """Within this context a logger logs only errors; its level returns when the last thread leaves the context."""
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
"""For each logger, how many contexts are open, and its level before the first."""
_QUIET_LOCK = threading.Lock()


class _Rate(ProgressColumn):
    """Units per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {task.fields['unit']}/s" if speed else "", style="progress.data.speed")


@contextmanager
def bar(description: str, total: float, unit: str) -> Iterator[Callable[..., None]]:
    """Show a progress bar.

    Yields:
        A function that takes the units done since its last call, and a `note` to show at the end of the bar.
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
