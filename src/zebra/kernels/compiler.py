"""Compile a C++ source file to a library for this machine's CPU, once, into the user's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from zebra.files import atomic_file, user_cache_dir

OPTIONS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread")
_PATIENCE = 300
"""Timeout of the compiler in seconds."""

_log = logging.getLogger(__name__)


class Unbuilt(Exception):
    """The library could not be built; the message says why."""


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The CPU's instruction sets by /proc/cpuinfo; empty where there is no such file, or no such line in it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def library(source: Path) -> ctypes.CDLL:
    """The source as a library, from the cache or compiled into it.

    Its name there is a hash of source, compiler, options and CPU: home folders are shared between machines. It is
    written elsewhere and renamed, so that processes which compile at once never load a half-written file.

    Raises:
        Unbuilt: no compiler, a failed compilation, or a library that cannot be stored or loaded.
    """
    command = [*_compiler(), *OPTIONS]
    try:
        version = subprocess.run([*_compiler(), "--version"], capture_output=True, timeout=_PATIENCE).stdout
        target = repr((command, version, sorted(cpu_flags()))).encode()
        name = hashlib.sha256(source.read_bytes() + target).hexdigest()[:32]
        path = user_cache_dir("kernels") / f"{source.stem}-{name}.so"
        if not path.exists():
            _log.warning("compiling %s for this CPU, once: some seconds", source.name)
            with tempfile.TemporaryDirectory() as temporary, atomic_file(path) as partial:
                output = Path(temporary) / path.name
                command += [str(source), "-o", str(output)]
                done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_PATIENCE)
                if done.returncode:
                    errors = (line for line in done.stderr.splitlines() if "error" in line)
                    reason = next(errors, f"exit code {done.returncode}")
                    raise Unbuilt(f"the compiler {command[0]} failed: {reason}")
                shutil.copyfile(output, partial)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home folder
        raise Unbuilt(f"{source.name} could not be compiled and loaded: {error}") from error


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    path = shutil.which("g++") or shutil.which("clang++")
    if path is None:
        raise Unbuilt("there is no C++ compiler, g++ or clang++ or what CXX names")
    return [path]
