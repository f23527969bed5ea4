"""Atomic files and directories: complete or absent, even if the process is killed or the power fails.

Also locks, the inputs on which a directory's results depend, and the user's cache.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from zebra.errors import ZebraError


@contextmanager
def atomic_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary directory that is renamed to `target` when the body succeeds, and removed otherwise.

    If `target` is a symbolic link, the directory is created where the link points.

    Raises:
        ZebraError: the target exists and is not an empty directory.
    """
    target = Path(os.path.realpath(target))  # `.` has no name, and a directory cannot replace a link
    check_new_directory(target)
    with _partial(target, Path.mkdir) as partial:
        yield partial
        try:
            _rename(partial, target)
        except OSError:
            check_new_directory(target)  # another process has created it
            raise


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file that is renamed to `path` when the body succeeds, and removed otherwise.

    Whatever happens, the file at `path` is the complete new one, the old one, or absent. The body must write into the
    temporary file, and not replace it.

    Raises:
        ZebraError: the path is a folder, a device or a pipe.
    """
    path = Path(os.path.abspath(path))
    check_regular_file(path)
    with _partial(path, Path.touch) as partial:
        yield partial
        _rename(partial, path)


def atomic_write(path: str | os.PathLike[str], text: str) -> None:
    """Write a text with `atomic_file`."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def append_lines(path: str | os.PathLike[str], text: str) -> None:
    """Append lines to a file, all or none; they start on a new line even if the last line of the file has no end."""
    path = Path(os.path.abspath(path))
    check_regular_file(path)
    make_folder(path.parent)
    with path.open("a+b", buffering=0) as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        lines = (b"" if file.read(1) in (b"", b"\n") else b"\n") + text.encode()
        try:
            while lines:
                lines = lines[file.write(lines) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(end)
            raise
    _sync(path.parent)


def read_log(file: Path, parse: Callable[[dict[str, Any]], None], noun: str) -> None:
    """Parse each line of a log, a file to which JSON objects are appended line by line, if it exists.

    An incomplete last line, which a kill or a full disk left, is removed from the file.

    Raises:
        ZebraError: a line is not a `noun`: it is not JSON, or `parse` raises a KeyError, TypeError or ValueError.
    """
    text = file.read_bytes() if file.exists() else b""
    complete = text.rfind(b"\n") + 1
    if complete < len(text):
        os.truncate(file, complete)
    for number, line in enumerate(text[:complete].splitlines(), start=1):
        try:
            parse(dict(json.loads(line)))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ZebraError(
                f"{file}, line {number} is not a {noun}. Remove the line to measure it again, or name another folder."
            ) from None


def append_to_log(file: Path, entry: Mapping[str, Any]) -> None:
    """Append a line to a log that `read_log` reads, in one write."""
    line = json.dumps(entry) + "\n"
    with file.open("a", encoding="utf-8") as log:
        log.write(line)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Check that a file can be written, as far as possible without writing it; leave nothing behind.

    Raises:
        ZebraError: the file cannot be written.
    """
    path = Path(os.path.abspath(path))
    try:
        check_regular_file(path)
        if path.exists():
            path.open("ab").close()
        folder = next(parent for parent in path.parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\n")
    except OSError as error:
        raise ZebraError(f"{path} cannot be written: {error.strerror}. Name another file.") from None


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents, and sync the folders that contain them."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def sync(top: Path) -> None:
    """Flush a file, or a folder with all files in it, to disk, so that it survives a power failure after its rename."""
    for path in (top, *top.rglob("*")):
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            _sync(path)


def _rename(partial: Path, target: Path) -> None:
    sync(partial)
    os.replace(partial, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # file systems that cannot sync folders
            raise
    finally:
        os.close(descriptor)


def check_regular_file(path: Path) -> None:
    """Check that a path is a file or absent: reading a device such as /dev/zero, or a pipe, may never end.

    Raises:
        ZebraError: a folder, a device or a pipe.
    """
    if path.exists() and not path.is_file():
        raise ZebraError(f"{path} is a folder, a device or a pipe. Name a file.")


@contextmanager
def _partial(target: Path, create: Callable[[Path], None]) -> Iterator[Path]:
    """Yield a temporary path beside the target, which is removed at the end if it is still there.

    It is locked while this process lives, and the next writer of the target removes leftovers without a lock. Unlike
    process ids, locks also work between containers. Errors name the target instead of the temporary path.
    """
    try:
        make_folder(target.parent)
        for leftover in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 8}.partial"):
            _remove_unlocked(leftover)
        partial, lock = _create_locked(target, create)
        try:
            yield partial
        finally:
            _remove(partial)
            os.close(lock)
    except Exception as error:
        private = re.compile(rf"\.({re.escape(target.name)})\.[0-9a-f]{{8}}\.partial")
        error.args = tuple(private.sub(r"\1", one) if isinstance(one, str) else one for one in error.args)
        if isinstance(error, OSError) and error.filename is not None:
            error.filename = private.sub(r"\1", str(error.filename))
        raise


def _create_locked(target: Path, create: Callable[[Path], None]) -> tuple[Path, int]:
    while True:
        partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        create(partial)
        with suppress(FileNotFoundError):  # another writer removed it before the lock
            lock = os.open(partial, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if partial.exists():
                return partial, lock
            os.close(lock)


def _remove_unlocked(partial: Path) -> None:
    with suppress(OSError):  # it is locked, or gone, or the file system has no locks
        lock = os.open(partial, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(partial)
        finally:
            os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_inputs(file: Path, inputs: Mapping[str, object], *, instead: str, partly: bool = False) -> None:
    """Compare the inputs that a directory's results depend on with those in its `inputs.json`, if that exists.

    Args:
        instead: what the user can do instead of restoring the inputs, such as "name another run".
        partly: compare only the inputs that both have; otherwise an input that only one has counts as changed.

    Raises:
        ZebraError: the file is damaged; the directory began with other inputs.
    """
    if not file.exists():
        return
    try:
        first = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError):
        raise ZebraError(f"{file} is damaged. Remove {file.parent}, or {instead}.") from None
    names = {*inputs} & {*first} if partly else {*inputs, *first}
    changed = [_changed(name, inputs.get(name), first.get(name)) for name in sorted(names)]
    changed = [name for name in changed if name]
    if changed:
        raise ZebraError(
            f"{file.parent} was created with other inputs: {' and '.join(changed)} changed since. "
            f"Restore them to resume it, or {instead}."
        )


def _changed(name: str, one: object, other: object) -> str:
    """What changed in an input: its name, with the changed entries if it is a dict; empty if nothing changed."""
    if isinstance(one, dict) and isinstance(other, dict):
        entries = sorted(entry for entry in {*one, *other} if one.get(entry) != other.get(entry))
        return f"{name} ({', '.join(entries)})" if entries else ""
    return name if one != other else ""


def file_digest(file: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def user_cache_dir(kind: str) -> Path:
    """The directory for one kind of cached files, shared by all runs of this user.

    Raises:
        RuntimeError: the user has no home directory.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zebra" / kind


def check_new_directory(target: Path) -> None:
    """Check that `atomic_directory` can create a target.

    Raises:
        ZebraError: the target exists and is not an empty directory.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ZebraError(f"the target {target} exists already. Name another, or remove it first.")


def is_vacant(path: Path) -> bool:
    """Whether a path is absent, or a folder with only hidden files, such as those that a killed writer leaves."""
    return not path.exists() or (path.is_dir() and all(file.name.startswith(".") for file in path.iterdir()))


@contextmanager
def directory_lock(directory: Path) -> Iterator[None]:
    """Lock a directory for this process. It is created if absent, and removed at the end if it is empty.

    The operating system releases the lock when the process ends, even if it is killed.

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
                raise ZebraError(f"another process is using {directory}. Wait for it, or name another.") from None
        try:
            yield
        finally:
            with suppress(OSError):  # it is not empty
                directory.rmdir()
    finally:
        os.close(descriptor)
