"""What this machine has: versions, devices, which kernel serves which request, and why the others decline."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch

from zebra.kernels import KERNELS, Mask, Request
from zebra.provenance import versions


@dataclass(frozen=True)
class Served:
    """One kind of request: the kernel that serves it, and why each kernel declines (None: it can)."""

    request: str
    kernel: str
    declines: dict[str, str | None]


def machine() -> dict[str, str]:
    """Versions and devices."""
    found = dict(versions())
    found["platform"] = platform.platform()
    found["cpu"] = (
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            found[f"cuda:{i}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    else:
        found["cuda"] = "none"
    return found


def kernels() -> list[Served]:
    """Typical requests on this machine's device, and who serves them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    documents = (torch.arange(8, device=device) // 4).expand(1, 8)
    padding = torch.tensor([[False, False, *[True] * 6]], device=device)
    cases: list[tuple[str, int, Mask, dict[str, object]]] = [
        ("global, training", 8, Mask(), {}),
        ("local, training", 8, Mask(window=4), {}),
        ("local, training, 512 tokens", 512, Mask(window=64), {}),
        ("packed documents", 8, Mask(documents=documents), {}),
        ("padded prefill", 8, Mask(keys=padding), {}),
        ("chunked prefill", 3, Mask(), {}),
        ("decode", 1, Mask(), {}),
        ("decode, padded batch", 1, Mask(keys=padding), {}),
        ("log-sum-exp wanted", 8, Mask(), {"with_lse": True}),
        ("softcap", 8, Mask(), {"softcap": 30.0}),
    ]
    served = []
    for name, queries, mask, more in cases:
        q = torch.zeros(1, 4, queries, 64, device=device, requires_grad="training" in name)
        k = torch.zeros(1, 2, max(8, queries), 64, device=device)
        request = Request(q=q, k=k, v=k, mask=mask, scale=1.0, **{"with_lse": False, **more})  # type: ignore[arg-type]
        declines = {kernel.name: kernel.declines(request) for kernel in KERNELS}
        taken = next(kernel for kernel, reason in declines.items() if reason is None)
        served.append(Served(name, taken, declines))
    return served
