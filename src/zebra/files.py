"""Directories and files that appear whole or not at all, whenever the process is killed; or that one process holds.

And the folder of the user's cache.
"""

from __future__ import annotations

import fcntl
import glob
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from zebra.errors import ZebraError


@contextmanager
def atomic_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a directory aside that becomes `target` by one rename when the body ends well, and vanishes otherwise.

    What a killed process of this machine left aside is removed first.

    Raises:
        ZebraError: the target exists and is not an empty directory.
    """
    target = Path(os.path.abspath(target))  # `.` has no name of its own
    refuse_existing(target)
    mine = f".{target.name}.{platform.node()}"
    for left in target.parent.glob(f"{glob.escape(mine)}.*.partial"):
        if not _alive(left.name.split(".")[-2]):
            shutil.rmtree(left, ignore_errors=True)
    aside = target.with_name(f"{mine}.{os.getpid()}.partial")
    aside.mkdir(parents=True)
    try:
        yield aside
        os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def atomic_write(path: str | os.PathLike[str], text: str) -> None:
    """Write a file aside, then rename it: under its name it is whole or absent."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def user_cache_dir(kind: str) -> Path:
    """Where things of a kind are kept for all runs of this user.

    Raises:
        RuntimeError: the user has no home folder.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zebra" / kind


def refuse_existing(target: Path) -> None:
    """Refuse a target that `staged` would.

    Raises:
        ZebraError: it exists and is not an empty directory.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ZebraError(f"the target {target} exists already. Name another, or remove it first.")


def _alive(pid: str) -> bool:
    if pid == str(os.getpid()):  # of an earlier process: in a container each may be number 1
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def directory_lock(directory: Path) -> Iterator[None]:
    """Hold a directory, made where it is absent, and gone again where nothing came of it.

    The hold is a lock of the operating system: it ends with the process, however that ends.

    Raises:
        ZebraError: another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    opened = os.open(directory, os.O_RDONLY)
    try:
        _lock(opened, directory)
        try:
            yield
        finally:
            with suppress(OSError):  # it is not empty
                directory.rmdir()
    finally:
        os.close(opened)


def _lock(opened: int, directory: Path) -> None:
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ZebraError(f"another process is at work in {directory}. Wait for it, or name another.") from None
    except OSError:  # a file system without locks
        return
