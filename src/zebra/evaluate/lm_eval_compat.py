"""Run third-party tasks quietly, without the network, and with one-line errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout

from zebra.errors import ZebraError, first_line
from zebra.progress import only_errors

_LOGGERS = ("lm_eval", "transformers.generation.stopping_criteria")
"""They warn that the model was loaded before, and of lengths, which are checked before any work."""
_PROXIES = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "all")} | {"no_proxy": ""}
_ENVIRONMENT = {
    **_PROXIES,
    **{name.upper(): value for name, value in _PROXIES.items()},
    "DISABLE_MULTIPROC": "1",  # else the harness's bootstrap forks a process that has threads
}


@contextmanager
def isolated() -> Iterator[None]:
    """Within this context, the harness logs only errors, prints go to stderr, and proxies point to a closed port.

    Some tasks fetch their data themselves, whatever HF_HUB_OFFLINE says; clients that use proxies cannot connect.
    """
    before = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    os.environ.update(_ENVIRONMENT)
    try:
        with ExitStack() as stack:
            for name in _LOGGERS:
                stack.enter_context(only_errors(name))
            stack.enter_context(redirect_stdout(sys.stderr))
            yield
    finally:
        for name in _ENVIRONMENT:
            os.environ.pop(name, None)
        os.environ.update(before)


@contextmanager
def task_errors(name: str) -> Iterator[None]:
    """Turn every exception of the body into a `ZebraError` that names this task.

    Raises:
        ZebraError: missing packages, files or data, and whatever else was raised.
    """
    try:
        yield
    except ZebraError:
        raise
    except Exception as error:
        text = first_line(error).rstrip(" .")
        if isinstance(error, ImportError):
            message = f"the task {name} requires packages that are not installed: {text}."
        elif isinstance(error, FileNotFoundError):
            message = (
                f"the data of the task {name} do not exist: {text}. Add the file, or name another in the task's "
                "data_files."
            )
        elif isinstance(error, OSError):
            message = (
                f"the data of the task {name} are not on this machine, and zebra downloads nothing here: {text}. With "
                f"a network, run `lm_eval run --model dummy --tasks {name} --limit 1` to put them into Hugging Face's "
                "cache."
            )
        else:
            message = f"the task {name} cannot be built: {type(error).__name__}: {text}."
        raise ZebraError(message) from error
