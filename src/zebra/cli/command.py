"""The command `with`: another tool's command, with attention "zebra" registered in its processes."""

from __future__ import annotations

from typing import Annotated

import typer

from zebra.integrations.command import execute


def with_(
    command: Annotated[
        list[str], typer.Argument(help="A command and its arguments; -- -m MODULE or a .py file is run by this Python.")
    ],
) -> None:
    """Run another tool's command where attn_implementation=zebra works, in the processes that it starts too.

    How: PYTHONPATH, which launchers such as accelerate and torchrun pass on, has one more folder. Its entry point is
    loaded by torch when that is imported, and registers the attention before the first model. Nothing is installed.

    This process becomes the command: arguments, stdin, signals and the exit code are the command's own.
    """
    execute(command)
