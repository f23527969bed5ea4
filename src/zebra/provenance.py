"""Where a result comes from: the processor, the versions of libraries and the commit of zebra that produced it."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

_DISTRIBUTIONS = {
    "zebra": "zebra-llm",
    "torch": "torch",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "trl": "trl",
}


@functools.cache
def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that a result depends on; libraries not installed are left out."""
    installed = {"python": platform.python_version()}
    for name, distribution in _DISTRIBUTIONS.items():
        try:
            installed[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


@functools.cache
def processor() -> str:
    """The name of this machine's processor, such as `Apple M2`; `cpu` where the system does not tell it."""
    name = platform.processor()
    try:
        if sys.platform == "linux":
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
            name = next((line.split(":", 1)[1] for line in lines if line.startswith("model name")), name)
        elif sys.platform == "darwin":
            sysctl = ["sysctl", "-n", "machdep.cpu.brand_string"]
            name = subprocess.run(sysctl, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        pass
    return " ".join(name.split()) or "cpu"


@functools.cache
def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, 12 digits, with a `+` if it has uncommitted changes.

    None if the package does not run from a checkout, or git is not installed.
    """
    describe = "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"
    try:
        for arguments in (("ls-files", "--error-unmatch", __file__), describe):
            git = ["git", "-C", str(Path(__file__).parent), *arguments]
            text = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return text.strip()
