"""Chat templates: the only place where they are rendered.

A chat template is a program by the author of the checkpoint. transformers runs it in a sandbox, which limits neither
its running time nor which errors it raises.
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
"""Limit for one rendering. An ordinary one takes milliseconds, one of megabytes about a second."""


class ChatTokenizer(Protocol):
    """What rendering needs from a tokenizer; those of transformers provide it."""

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
    """Call `tokenizer.apply_chat_template` with a time limit, and turn whatever it raises into one clear error.

    Args:
        messages: dicts with a role and a content, as transformers takes them.
        source, remedy, where: see `rendering`.
        options: those of transformers, such as `tools`, `add_generation_prompt` and `return_dict`.

    Raises:
        ZebraError: the tokenizer has no template; as `rendering`.
    """
    if not (options.get("chat_template") or tokenizer.chat_template):
        raise ZebraError(f"the tokenizer of {source} has no chat template. {remedy}")
    with rendering(source, remedy, where):
        return tokenizer.apply_chat_template(list(messages), **options)


@contextmanager
def rendering(source: str, remedy: str, where: str | None = None) -> Iterator[None]:
    """Limit the time of the body, which renders the template of `source`, and turn its errors into a `ZebraError`.

    Args:
        source: the checkpoint or file that has the template.
        remedy: a sentence that says what to do if rendering fails.
        where: the file and line of the conversation.

    Raises:
        ZebraError: the template rejects the messages, fails, or does not end in time.
    """
    subject = f"{where}: the" if where else "the"
    try:
        with _time_limit(_MAX_SECONDS):
            yield
    except TimeoutError:
        raise ZebraError(
            f"{subject} chat template of {source} did not finish within {_MAX_SECONDS:g} s and was stopped. {remedy}"
        ) from None
    except Exception as error:  # a template may raise anything
        text = first_line(error).rstrip(" .")
        name, of_jinja = type(error).__name__, type(error).__module__.startswith("jinja2")
        if not (isinstance(error, ValueError) or of_jinja or text.startswith(name)):
            text = f"{name}: {text}"
        raise ZebraError(f"{subject} chat template of {source} cannot be rendered: {text}. {remedy}") from None


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise a TimeoutError in this thread after some seconds: of CPU time in the main thread, of real time elsewhere.

    In the main thread a signal interrupts even one long built-in operation. Other threads do not handle signals.
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
        if time.thread_time() - start >= seconds:  # the timer counts the CPU time of all threads
            raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)
