"""What this machine has: versions, devices, which kernel serves which request, and why other kernels decline."""

from __future__ import annotations

import itertools
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zebra.kernels import KERNELS, Mask, Request, find, native
from zebra.provenance import processor, versions


@dataclass(frozen=True)
class Serving:
    """A kind of attention request, the kernel that serves it, and why other kernels decline it."""

    request: str
    dtype: str
    kernel: str
    declines: dict[str, str]


def machine() -> dict[str, str]:
    """Versions and devices, by name."""
    facts = dict(versions())
    facts["platform"] = platform.platform()
    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    facts["cpu"] = f"{processor()}, {os.cpu_count()} cores, {threads} threads, {capability}"
    facts["native kernel"] = native.instructions()
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        facts[f"cuda:{i}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return facts if torch.cuda.is_available() else facts | {"cuda": "none"}


LENGTH, WINDOW = 2048, 512
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels() -> list[Serving]:
    """Find the kernel that serves each typical request in each dtype on this machine, with heads of dimension 64."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    token = torch.arange(LENGTH, device=device)[None]
    padding, documents = token >= LENGTH // 4, token // WINDOW
    cases: dict[str, tuple[int, Mask, dict[str, Any]]] = {
        "global, training": (LENGTH, Mask(), {}),
        "global, prefill": (LENGTH, Mask(), {}),
        "global, prefill, 512 tokens": (512, Mask(), {}),
        "global, chunk after earlier keys": (WINDOW, Mask(), {}),
        "global, prefill with log-sum-exp": (LENGTH, Mask(), {"with_lse": True}),
        "local, training": (LENGTH, Mask(WINDOW), {}),
        "local, prefill": (LENGTH, Mask(WINDOW), {}),
        "local, prefill, 128 tokens": (128, Mask(32), {}),
        "local, chunk after earlier keys": (WINDOW, Mask(WINDOW), {}),
        "decode": (1, Mask(), {}),
        "decode, padded batch": (1, Mask(keys=padding), {}),
        "padded batch": (LENGTH, Mask(keys=padding), {}),
        "packed documents, training": (LENGTH, Mask(documents=documents), {}),
        "softcap": (LENGTH, Mask(), {"softcap": 30.0}),
    }
    servings = []
    for (name, (queries, mask, options)), dtype in itertools.product(cases.items(), DTYPES):
        keys = queries if name.endswith(" tokens") else LENGTH
        q = torch.zeros(1, 4, queries, 64, dtype=dtype, device=device, requires_grad="training" in name)
        k = torch.zeros(1, 2, keys, 64, dtype=dtype, device=device)
        request = Request(q=q, k=k, v=k, mask=mask, scale=0.125, **{"with_lse": False, **options})
        kernel, _ = find(request)
        assert kernel is not None  # the reference serves them all
        reasons = {one.name: reason for one in KERNELS if (reason := one.declines(request)) is not None}
        servings.append(Serving(name, str(dtype).removeprefix("torch."), kernel.name, reasons))
    return servings


def reasons_by_kernel(servings: Sequence[Serving]) -> dict[str, list[str]]:
    """For each kernel, the distinct reasons why it declines some of the requests."""
    return {
        kernel.name: list(dict.fromkeys(s.declines[kernel.name] for s in servings if kernel.name in s.declines))
        for kernel in KERNELS
    }
