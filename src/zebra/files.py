"""Files and directories that are complete or absent even if the process is killed, and locks.

And what a directory depends on, and the user's cache.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from zebra.errors import ZebraError


@contextmanager
def atomic_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary directory that is renamed to `target` when the body succeeds, and removed otherwise.

    Temporary directories of the same target that killed processes of this machine left behind are removed first.

    Raises:
        ZebraError: the target exists and is not an empty directory.
    """
    target = Path(os.path.abspath(target))  # `.` has no name
    refuse_existing(target)
    prefix = f".{target.name}.{platform.node()}"
    for leftover in target.parent.glob(f"{glob.escape(prefix)}.*.partial"):
        if not _is_running(leftover.name.split(".")[-2]):
            shutil.rmtree(leftover, ignore_errors=True)
    partial = target.with_name(f"{prefix}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def atomic_write(path: str | os.PathLike[str], text: str) -> None:
    """Write a temporary file and rename it: the file at `path` is complete, the old one, or absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def check_inputs(file: Path, inputs: Mapping[str, object], *, instead: str, partly: bool = False) -> None:
    """Compare the inputs that a directory's results depend on with those in its `inputs.json`, where that exists.

    Args:
        instead: the remedy beside restoring the inputs, such as "name another run".
        partly: compare the inputs that both have; else one that either lacks has changed.

    Raises:
        ZebraError: the file is damaged; the directory began with other inputs.
    """
    if not file.exists():
        return
    try:
        first = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ZebraError(f"{file} is damaged. Remove {file.parent}, or {instead}.") from None
    names = {*inputs} & {*first} if partly else {*inputs, *first}
    changed = sorted(name for name in names if inputs.get(name) != first.get(name))
    if changed:
        raise ZebraError(
            f"{file.parent} began with other inputs: {' and '.join(changed)} changed since. "
            f"Restore them to go on with it, or {instead}."
        )


def file_digest(file: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def user_cache_dir(kind: str) -> Path:
    """The directory of one kind of cached files, shared by all runs of this user.

    Raises:
        RuntimeError: the user has no home directory.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zebra" / kind


def refuse_existing(target: Path) -> None:
    """Check that `atomic_directory` can create a target.

    Raises:
        ZebraError: it exists and is not an empty directory.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ZebraError(f"the target {target} exists already. Name another, or remove it first.")


def _is_running(pid: str) -> bool:
    """Whether a process other than this one has the number; in a container each may be number 1."""
    if pid == str(os.getpid()):
        return False
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, ValueError):
        return False
    return True


@contextmanager
def directory_lock(directory: Path) -> Iterator[None]:
    """Lock a directory for this process. It is created if absent, and removed if it is empty at the end.

    The lock is the operating system's: it ends with the process, however that ends.

    Raises:
        ZebraError: another process holds the lock.
    """
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ZebraError(f"another process is at work in {directory}. Wait for it, or name another.") from None
        try:
            yield
        finally:
            with suppress(OSError):  # it is not empty
                directory.rmdir()
    finally:
        os.close(descriptor)
