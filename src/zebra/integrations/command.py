"""Run another tool's command with attention "zebra" registered in its processes. Standard library only.

    zebra with -- lm_eval ...
       │  PYTHONPATH = entry_point/ : old PYTHONPATH     a folder with the metadata of one entry point, and no module
       └─ exec lm_eval ...                               this process becomes the command
            └─ import torch                              loads the entry points of the group "torch.backends"
                 └─ zebra.integrations.autoload          registers when the first model's module is imported
            └─ processes of accelerate or torchrun       inherit the environment

Nothing is installed or patched, and no sitecustomize is needed. torch loads entry points to support extensions that a
script does not import: https://docs.pytorch.org/tutorials/unstable/python_extension_autoload.html
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from zebra.errors import ZebraError

ENTRY_POINT = Path(__file__).with_name("entry_point")
_SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"


def resolved(command: Sequence[str]) -> list[str]:
    """Resolve the program of a command: first in this Python's environment, then on the PATH.

    A file that ends in .py, and `-m MODULE`, are run by this Python.

    Raises:
        ZebraError: there is no such program or file.
    """
    program = command[0]
    if program == "-m" or program.endswith(".py"):
        if program != "-m" and not Path(program).is_file():
            raise ZebraError(
                f"zebra with runs a command or a file; got {program}, which is not a file. Check its path."
            )
        return [sys.executable, *command]
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    if (where := shutil.which(program, path=path)) is None:
        raise ZebraError(
            f"zebra with runs a command of this environment or on the PATH; got {program!r}, which is neither. "
            f"Install it next to zebra, in {sys.prefix}."
        )
    return [where, *command[1:]]


def environment(before: Mapping[str, str]) -> dict[str, str]:
    """The command's environment variables: those of `before`, with zebra's entry point first on PYTHONPATH.

    Raises:
        ZebraError: TORCH_DEVICE_BACKEND_AUTOLOAD switches torch's entry points off.
    """
    if before.get(_SWITCH, "1") != "1":
        raise ZebraError(
            f"zebra with requires the entry points that torch loads; got {_SWITCH}={before[_SWITCH]}, which disables "
            "them. Unset it."
        )
    paths = [str(ENTRY_POINT), *filter(None, [before.get("PYTHONPATH")])]
    return {**before, "PYTHONPATH": os.pathsep.join(paths)}


def execute(command: Sequence[str]) -> None:
    """Replace this process by the command, which gets stdin and signals and sets the exit code. Does not return.

    Raises:
        ZebraError: as `resolved` and `environment`; a file that the system cannot execute.
    """
    words, variables = resolved(command), environment(os.environ)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(words[0], words, variables)
    except OSError as error:
        raise ZebraError(f"{words[0]} cannot be executed: {error.strerror}. Name a program or a .py file.") from None
