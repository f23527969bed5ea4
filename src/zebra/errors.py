"""The error for bad input, what to quote from errors of other libraries, and text that is safe to print."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable


class ZebraError(ValueError):
    """Bad input, rejected before any work is lost. The message states the rule, the value seen and the remedy.

    The command line prints it as one line and exits with code 2.
    """


def missing_package(subject: str, packages: str, extra: str) -> ZebraError:
    """The error for an optional package that is not installed, with the extra of zebra that installs it."""
    return ZebraError(
        f"{subject} needs {packages}, not installed here. Run pip install '.[{extra}]' in a checkout of zebra."
    )


def check_names(names: Iterable[str], known: Iterable[str]) -> None:
    """Check the names of options that are passed on unchanged.

    Raises:
        ZebraError: a name is unknown; the error suggests the nearest known one.
    """
    every = [*known]
    for name in names:
        if name not in every:
            remedy = did_you_mean(name, every, f"the options are {', '.join(every)}.")
            raise ZebraError(f"there is no option {name!r}; {remedy}")


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The end of an error about an unknown name: the nearest known name, or `otherwise` if none is near."""
    near = difflib.get_close_matches(name, [*known], n=1)
    return f"did you mean {near[0]}?" if near else otherwise


def first_line(error: BaseException) -> str:
    """The first line of a library's error, without the advice that follows; all lines if the first ends in a colon."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, LookupError | ArithmeticError | AttributeError | RecursionError):
        # The text of these errors says little without their type.
        lines[0] = f"{type(error).__name__}: {lines[0]}"
    return " ".join(line.strip() for line in lines)[:400] if lines[0].rstrip().endswith(":") else lines[0]


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Characters that a terminal interprets, or that UTF-8 or XML do not allow."""


def printable(text: str) -> str:
    """Replace control characters, except line breaks and tabs, by visible symbols: `\N{SYMBOL FOR ESCAPE}[31m`."""
    return _CONTROL.sub(
        lambda match: chr(0x2400 + ord(match[0])) if match[0] < " " else "\N{REPLACEMENT CHARACTER}", text
    )


_REMEDIES = {
    errno.ENOSPC: "Free some space.",
    errno.EDQUOT: "Free some quota.",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Use a path that this user can write to."),
}
_DISK = re.compile(r"PytorchStreamWriter|unexpected pos \d|iostream error|I/O error|\d requested and \d+ written")
"""What torch, safetensors and numpy say if a file cannot be written."""
_MEMORY = re.compile(r"out of memory|[Cc]annot allocate memory|can't allocate memory|bad_alloc|ALLOC_FAILED")


def machine_fault(error: BaseException) -> str | None:
    """What is wrong with the machine or a library, not with the command, and the remedy; None for any other error.

    Covers a full disk, a file that cannot be written, and too little memory, as Python, torch, numpy and safetensors
    raise them; and a panic in a tokenizer's Rust code, which is not an `Exception`.
    """
    text = str(error)
    if type(error).__module__ == "pyo3_runtime":
        return f"a Rust library panicked, perhaps on a tokenizer's pattern: {text}. Use another tokenizer or text."
    if not isinstance(error, Exception):
        return None
    if isinstance(error, MemoryError) or _MEMORY.search(text):
        amount = re.search(r"allocate ([\d.,]+ \w+)", text)
        return (
            f"out of memory{f' when allocating {amount[1]}' if amount else ''}. Use a shorter length, a smaller batch, "
            "--dtype bfloat16 or a device with more memory; for a recipe, --dry-run estimates the memory."
        )
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (within := re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", text)):  # of Rust, of shutil
        number = int(within[1] or within[2])
    if number is not None:
        where = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
        remedy = _REMEDIES.get(number, "")
        return f"{os.strerror(number)}{where}. {remedy} No partial output was left."
    if _DISK.search(text):
        return f"a file cannot be written, is the disk full? ({first_line(error)}) No partial output was left."
    return None
