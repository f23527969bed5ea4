"""Running what others wrote: quiet, without the network, and with what it raises told in one line."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from zebra.errors import ZebraError, first_line

_TALKERS = ("lm_eval", "transformers.generation.stopping_criteria")
"""Who warns of a model that was loaded before, and of lengths, which are checked before any work."""


@contextmanager
def quiet() -> Iterator[None]:
    """Only errors of the harness and its host. What they or a task print is no result, and goes to stderr."""
    before = {name: logging.getLogger(name).level for name in _TALKERS}
    for name in _TALKERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


_SURROUNDINGS = {
    **{f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "all")},
    "no_proxy": "",
    "DISABLE_MULTIPROC": "1",  # the harness's bootstrap would fork a process with threads
}


@contextmanager
def offline() -> Iterator[None]:
    """Within this context what asks the network by a client that knows proxies gets no answer.

    Some tasks fetch their data themselves, whatever HF_HUB_OFFLINE says.
    """
    wanted = _SURROUNDINGS | {name.upper(): value for name, value in _SURROUNDINGS.items()}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def made(name: str, make: Callable[[], Any]) -> Any:
    """What makes a task of this name, or runs it, with all that it raises as a refusal.

    Raises:
        ZebraError: packages, a file or data that are not there, and whatever else was raised.
    """
    try:
        return make()
    except ZebraError:
        raise
    except ImportError as error:
        raise ZebraError(f"the task {name} needs packages that are not installed: {_said_by(error)}.") from error
    except FileNotFoundError as error:
        raise ZebraError(
            f"the data of the task {name} are not there: {_said_by(error)}. Put the file there, or name another in "
            "the task's data_files."
        ) from error
    except OSError as error:
        raise ZebraError(
            f"the data of the task {name} are not on this machine, and nothing is downloaded here: "
            f"{_said_by(error)}. Where there is a network, `lm_eval run --model dummy --tasks {name} --limit 1` "
            "brings what Hugging Face keeps into its cache."
        ) from error
    except Exception as error:
        raise ZebraError(f"the task {name} cannot be made: {type(error).__name__}: {_said_by(error)}.") from error


def _said_by(error: Exception) -> str:
    return first_line(error).rstrip(" .")
