"""Runs commands of zebra, each in a fork of this warm process: a process of its own imports for seconds.

A request is a line of JSON on stdin (`Request` of `harness.py`), a reply one on stdout. What a child imported first,
this process imports too, so that the next child need not.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from contextlib import suppress
from typing import Any, NoReturn

from zebra.cli import main

WARM = ("zebra", "torch", "transformers", "accelerate", "trl", "peft", "datasets", "numpy", "matplotlib", "gguf")


def run(request: dict[str, Any], modules: int) -> NoReturn:
    """One command, in the child."""
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with this process
    for number, stream in enumerate((os.devnull, request["stdout"], request["stderr"])):
        os.dup2(os.open(stream, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), number)
    os.chdir(request["cwd"])
    os.environ |= request["environment"]
    if request["megabytes"]:
        resource.setrlimit(resource.RLIMIT_AS, (request["megabytes"] << 20,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (request["cpu_seconds"],) * 2)
    before, code = {*sys.modules}, 1
    ctypes.CDLL(None).fault_begin()
    sys.argv = ["zebra", *request["arguments"]]
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os.write(modules, "\n".join(sorted({*sys.modules} - before)).encode()[:60_000])
    os._exit(code)


def wait(child: int, seconds: float) -> tuple[int, resource.struct_rusage]:
    """The status and the resources of a child, which is killed, with what it started, when its time is over."""
    end = time.monotonic() + seconds
    while True:
        pid, status, used = os.wait4(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status), used
        if time.monotonic() > end:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
            return (os.wait4(child, 0)[1], resource.getrusage(resource.RUSAGE_CHILDREN))
        time.sleep(0.005)


def learn(names: str) -> None:
    """Import what a child imported."""
    with warnings.catch_warnings(action="ignore"):
        for name in names.split("\n"):
            if name.split(".")[0] in WARM:
                with suppress(Exception):
                    importlib.import_module(name)


def serve() -> None:
    """Answer requests until stdin ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            run(request, writer)
        os.close(writer)
        code, used = wait(child, request["seconds"])
        with os.fdopen(reader) as pipe:
            learn(pipe.read())
        reply = {
            "number": request["number"],
            "code": code,
            "cpu_seconds": used.ru_utime + used.ru_stime,
            "megabytes": used.ru_maxrss / 1024,
        }
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    serve()
