"""SIGTERM, which schedulers send some time before they kill: end the process by an exception or at a chosen moment."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(SystemExit):
    """The end of a process by SIGTERM: exit code 143, as shells report it.

    Attributes:
        message: what was saved, and how to go on.
    """

    def __init__(self, message: str):
        super().__init__(128 + signal.SIGTERM)
        self.message = message


@contextmanager
def raising_terminated() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM, so that temporary files are removed as after an interrupt."""

    def end(*_: object) -> None:
        raise Terminated("terminated. No partial output was left; the same command resumes where it can.")

    with _handled(end, signal.SIGTERM):
        yield


@contextmanager
def collected(*numbers: int) -> Iterator[list[int]]:
    """Collect signals with these numbers in a list, in place of their effect; only in the main thread, else none."""
    received: list[int] = []
    with _handled(lambda number, _: received.append(number), *numbers):
        yield received


@contextmanager
def _handled(handler: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, one in before.items():
            signal.signal(number, one if one is not None else signal.SIG_DFL)
