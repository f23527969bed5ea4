"""Peak memory of one variant in a process of its own: `python -m zebra_bench.alone`, asked on stdin by `pairing`.

    inputs made │ level ... the call ... peak │      extra = peak - level - bytes of the outputs
                                                     of a work that is `whole`, the peak as it is

On a CPU the level and the peak are the process's resident memory, which Linux tells; on a GPU the allocator's. A
variant of ours runs its gate before, and what compiles runs once, so that libraries have taken what they keep.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import pickle
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import benchmark

from zebra.model.load import read_device
from zebra_bench.pairing import Work, case_of

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def main() -> None:
    """Answer one question: bytes, or `unknown`."""
    sizes, name, suffix, threads = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    device = read_device(sizes.device)
    torch.mm(*torch.ones(2, 256, 256, device=device))  # the library's own buffers
    case = case_of(sizes)
    variant = next(one for one in case.variants if one.name == name)
    work = next(one for one in variant.works if one.suffix == suffix)
    if variant.gate is not None:
        variant.gate()
    elif variant.may_fail:
        work.prepare()()  # it compiles
    found = peak_bytes(work, device) if work.whole else extra_bytes(work, device)
    print("unknown" if found is None else found)


def extra_bytes(work: Work, device: str) -> int | None:
    """Peak bytes of one call beyond the level before it and the outputs after it."""
    call = None if work.prepares_extra else work.prepare()
    gc.collect()
    level = _start(device)
    if level is None:
        return None
    outputs = (call or work.prepare())()
    benchmark.timer()  # waits for a GPU
    return max(0, _peak(device) - level - _bytes(outputs))


def peak_bytes(work: Work, device: str) -> int | None:
    """Peak bytes of this process, whatever is in them, at the end of one call; on a GPU the allocator's."""
    if not device.startswith("cuda") and not _STATUS.is_file():
        return None
    work.prepare()()
    benchmark.timer()  # waits for a GPU
    return _peak(device)


def _start(device: str) -> int | None:
    """Forget the peak so far; the bytes in use now, None where the system does not tell."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not _STATUS.is_file():
        return None
    _return_freed_memory()
    with contextlib.suppress(OSError):  # not allowed: then the peak must exceed that of making the inputs
        _CLEAR.write_text("5")
    return _resident("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else _resident("VmHWM")


def _bytes(outputs: Sequence[Tensor]) -> int:
    """Bytes of storage, what several share once."""
    return sum({s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in outputs)}.values())


def _resident(line: str) -> int:
    found = re.search(rf"^{line}:\s*(\d+) kB$", _STATUS.read_text(), flags=re.MULTILINE)
    assert found is not None, line
    return 1024 * int(found.group(1))


def _return_freed_memory() -> None:
    """What was freed goes back to the system, or the next allocation would hide in it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    main()
