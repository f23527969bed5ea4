"""Chat templates: the one place where they are rendered.

A checkpoint's template is a program of whoever made it. transformers runs it in a sandbox, which bounds neither its
time nor the kinds of its errors.
"""

from __future__ import annotations

import ctypes
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from zebra.errors import ZebraError, first_line

_MAX_SECONDS = 20.0
"""Of one rendering. An ordinary one takes milliseconds, and one of megabytes about a second."""


class ChatTokenizer(Protocol):
    """What rendering needs of a tokenizer; those of transformers have it."""

    chat_template: Any

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...  # noqa: D102


def apply_chat_template(
    tokenizer: ChatTokenizer,
    messages: Sequence[dict[str, Any]],
    *,
    source: str,
    remedy: str,
    where: str | None = None,
    **options: Any,
) -> Any:
    """`tokenizer.apply_chat_template`, in a bounded time, and whatever it raises as one clear error.

    Args:
        messages: each with its role and content, as transformers takes them.
        source, remedy, where: see `rendering`.
        options: those of transformers, such as `tools`, `add_generation_prompt` and `return_dict`.

    Raises:
        ZebraError: no template; as `rendering`.
    """
    if not (options.get("chat_template") or tokenizer.chat_template):
        raise ZebraError(f"the tokenizer of {source} has no chat template. {remedy}")
    with rendering(source, remedy, where):
        return tokenizer.apply_chat_template(list(messages), **options)


@contextmanager
def rendering(source: str, remedy: str, where: str | None = None) -> Iterator[None]:
    """Within this context the template of `source` is rendered.

    Args:
        source: the checkpoint or file of the template.
        remedy: a sentence that says what to do when it fails.
        where: the file and line of the conversation.

    Raises:
        ZebraError: the template rejects the messages, fails, or does not end.
    """
    subject = f"{where}: the" if where else "the"
    try:
        with _time_limit(_MAX_SECONDS):
            yield
    except TimeoutError:
        raise ZebraError(
            f"{subject} chat template of {source} does not end: it was stopped after {_MAX_SECONDS:g} s. {remedy}"
        ) from None
    except Exception as error:  # a template may raise anything
        text = first_line(error).rstrip(" .")
        name, of_jinja = type(error).__name__, type(error).__module__.startswith("jinja2")
        if not (isinstance(error, ValueError) or of_jinja or text.startswith(name)):
            text = f"{name}: {text}"
        raise ZebraError(f"{subject} chat template of {source} does not take it: {text}. {remedy}") from None


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise a TimeoutError in this thread after some seconds.

    In the main thread a signal interrupts even a long operation of Python's own; elsewhere Python handles no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        thread, error = ctypes.c_ulong(threading.get_ident()), ctypes.py_object(TimeoutError)
        timer = threading.Timer(seconds, ctypes.pythonapi.PyThreadState_SetAsyncExc, (thread, error))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
        return
    start = time.thread_time()

    def stop(*_: object) -> None:
        if time.thread_time() - start >= seconds:  # the timer counts all threads
            raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)
