"""The command `with`: another tool's command, with attention "zebra" registered in its processes."""

from __future__ import annotations

from typing import Annotated

import typer

from zebra.integrations.command import execute


def with_(
    command: Annotated[
        list[str], typer.Argument(help="A command with its arguments. This Python runs .py files and -- -m MODULE.")
    ],
) -> None:
    """Run a command of another tool with attn_implementation=zebra available, also in its child processes.

    How: a folder is added to PYTHONPATH, which launchers such as accelerate and torchrun pass on. It has an entry point
    that torch loads when it is imported, and which registers the attention. Nothing is installed.

    This process becomes the command: arguments, stdin, signals and exit code are those of the command.
    """
    execute(command)
