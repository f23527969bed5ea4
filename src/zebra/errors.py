"""The one error for input that cannot be served, and what to quote of another library's."""

from __future__ import annotations


class ZebraError(ValueError):
    """Bad input, rejected before any work is lost. The message states the rule, the value seen and the remedy.

    The command line prints it as one line and exits with code 2.
    """


def first_line(error: Exception) -> str:
    """The first line of a library's error, without the advice behind it; all lines where the first ends in a colon."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines)[:300] if lines[0].endswith(":") else lines[0]
