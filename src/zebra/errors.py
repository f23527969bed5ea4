"""The one error for input that cannot be served."""

from __future__ import annotations


class ZebraError(ValueError):
    """Bad input, refused before any work is lost. The message states the rule, the values seen and the remedy.

    The command line prints it as one line and exits with code 2.
    """
