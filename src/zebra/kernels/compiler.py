"""Compile a C++ source file to a shared library for this machine's CPU, once, into the user's cache."""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from zebra.files import atomic_file, user_cache_dir

OPTIONS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread")
IS_ARM = platform.machine() in ("aarch64", "arm64")
CPU = "-mcpu=native" if IS_ARM else "-march=native"
"""The option that names this machine's CPU."""
_PATIENCE = 300
"""Timeout of the compiler in seconds."""
_DIGEST = 32
"""Bytes of a SHA-256."""

_log = logging.getLogger(__name__)


class Unbuilt(Exception):
    """The library could not be built; the message says why."""


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The CPU's instruction sets from /proc/cpuinfo; empty without that file, or without such a line in it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    names = ("flags", "Features")  # x86 and ARM
    return frozenset(next((line.split(":", 1)[1] for line in lines if line.startswith(names)), "").split())


def library(source: Path, *options: str) -> ctypes.CDLL:
    """Load a source file as a library, compiled with `OPTIONS` and `options`; from the cache if it is there.

    Its name there is a hash of the source, the headers beside it, compiler, options and CPU, because machines may share
    a home folder. The file ends in the SHA-256 of what precedes it, so that a damaged file is compiled again and never
    loaded. Nor is a file that others could have written: where others can write into the cache, the library is in a
    private temporary folder until the process ends.

    Raises:
        Unbuilt: no compiler, a failed compilation, or a library that cannot be stored or loaded.
    """
    command = [*_compiler(), *OPTIONS, *options]
    try:
        version = subprocess.run([*_compiler(), "--version"], capture_output=True, timeout=_PATIENCE).stdout
        code = b"".join(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h"))))
        target = repr((command, version, platform.machine(), sorted(cpu_flags()))).encode()
        name = hashlib.sha256(code + target).hexdigest()[:32]
        path = _private_folder() / f"{source.stem}-{name}.so"
        if not _is_intact(path):
            _compile(source, path, command)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home folder
        raise Unbuilt(f"{source.name} could not be compiled and loaded: {error}") from error


def _compile(source: Path, path: Path, command: list[str]) -> None:
    defined = ", ".join(option.removeprefix("-D") for option in command if option.startswith("-D"))
    _log.warning("compiling %s (%s) for this CPU, once; this takes some seconds", source.name, defined)
    with tempfile.TemporaryDirectory() as temporary, atomic_file(path) as partial:
        output = Path(temporary) / path.name
        command = [*command, str(source), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE)
        if done.returncode:
            errors = (line for line in done.stderr.splitlines() if "error" in line)
            raise Unbuilt(f"the compiler {command[0]} failed: {next(errors, f'exit code {done.returncode}')}")
        code = output.read_bytes()
        partial.write_bytes(code + hashlib.sha256(code).digest())


def _is_intact(path: Path) -> bool:
    """Whether a file belongs to this user, and ends in the SHA-256 of what precedes it."""
    if not path.is_file() or path.is_symlink() or path.stat().st_uid != os.getuid():
        return False
    content = path.read_bytes()
    return hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]


def _private_folder() -> Path:
    """The user's cache if nobody else can write into it or replace it, else a temporary folder of this process."""
    folder = user_cache_dir("kernels")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    resolved = folder.resolve()
    return folder if all(map(_is_private, (resolved, *resolved.parents))) else _temporary_folder()


def _is_private(folder: Path) -> bool:
    """Whether a folder is this user's or root's, and others cannot write into it, or only add to it (sticky bit).

    A group whose number is the user's is taken for the user's private group, by convention.
    """
    status = folder.stat()
    by_others = status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and status.st_gid != status.st_uid)
    return status.st_uid in (os.getuid(), 0) and not (by_others and not status.st_mode & stat.S_ISVTX)


@functools.cache
def _temporary_folder() -> Path:
    _log.warning("the cache of compiled kernels is writable by other users, so it is not used")
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    path = shutil.which("g++") or shutil.which("clang++")
    if path is None:
        raise Unbuilt("there is no C++ compiler: install g++ or clang++, or set CXX")
    return [path]
