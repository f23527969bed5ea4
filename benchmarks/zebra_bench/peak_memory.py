"""Peak memory of one variant in a process of its own: `python -m zebra_bench.peak_memory`, which `runner` starts.

    prepare │ level ... the call ... peak │      extra_bytes = peak - level - bytes of the outputs
                                                 peak_bytes = the peak, of a workload that is `whole_process`

On a CPU level and peak are the process's resident memory, which Linux reports; on a GPU the allocator's. A variant of
ours runs its gate first, and what compiles runs once, so that libraries have allocated what they keep.
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
from zebra_bench.runner import Workload, benchmark_of

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def main() -> None:
    """Answer one question: bytes, or `unknown`."""
    config, name, suffix, threads = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    device = read_device(config.device)
    torch.mm(*torch.ones(2, 256, 256, device=device))  # the library's own buffers
    variant = next(one for one in benchmark_of(config).variants if one.name == name)
    workload = next(one for one in variant.workloads if one.suffix == suffix)
    if variant.gate is not None:
        variant.gate()
    elif variant.may_fail:
        workload.prepare()()  # it compiles
    measured = peak_bytes(workload, device) if workload.whole_process else extra_bytes(workload, device)
    print("unknown" if measured is None else measured)


def extra_bytes(workload: Workload, device: str) -> int | None:
    """Peak bytes of one call beyond the level before it and the outputs after it."""
    call = None if workload.prepared_is_extra else workload.prepare()
    gc.collect()
    level = _start(device)
    if level is None:
        return None
    outputs = (call or workload.prepare())()
    benchmark.timer()  # waits for a GPU
    return max(0, _peak(device) - level - _bytes(outputs))


def peak_bytes(workload: Workload, device: str) -> int | None:
    """Peak bytes of this process, whatever is in them, at the end of one call; on a GPU the allocator's."""
    if not device.startswith("cuda") and not _STATUS.is_file():
        return None
    workload.prepare()()
    benchmark.timer()  # waits for a GPU
    return _peak(device)


def _start(device: str) -> int | None:
    """Forget the peak so far; the bytes in use now, None where the system does not report it."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not _STATUS.is_file():
        return None
    _return_freed_memory()
    with contextlib.suppress(OSError):  # where this is not allowed, the peak must exceed that of preparing the inputs
        _CLEAR.write_text("5")
    return _resident("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else _resident("VmHWM")


def _bytes(outputs: Sequence[Tensor]) -> int:
    """Bytes of the outputs' storages; a shared one counts once."""
    return sum({s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in outputs)}.values())


def _resident(line: str) -> int:
    match = re.search(rf"^{line}:\s*(\d+) kB$", _STATUS.read_text(), flags=re.MULTILINE)
    assert match is not None, line
    return 1024 * int(match.group(1))


def _return_freed_memory() -> None:
    """Return freed memory to the system, or the next allocation would hide in it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc only
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    main()
