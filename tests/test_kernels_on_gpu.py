"""Every kernel on a CUDA device equals the formula in float64 there: output, log-sum-exp and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_kernels import TOLERANCE, chunks, drawn, packed, padding, relative
from torch import Tensor

from zebra.kernels import KERNELS, Mask, Request, attend, only

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NAMES = [kernel.name for kernel in KERNELS if kernel.name != "reference"]
KINDS = ("plain", "left", "right", "both", "packed", "packed and padded")
EXPECTED = {
    torch.bfloat16: {"plain": "varlen", "left": "varlen", "right": "varlen", "both": "varlen", "packed": "varlen"},
    torch.float32: {"plain": "flex", "left": "flex", "right": "flex", "both": "flex", "packed": "flex"},
}


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def mask_of(kind: str, window: int | None, keys: int) -> Mask:
    real = padding(kind if kind in ("left", "right", "both") else "none", 3, keys)
    if kind == "packed and padded":
        real = padding("both", 3, keys)
    documents = packed(3, keys).cuda() if kind.startswith("packed") else None
    return Mask(window, None if real is None else real.cuda(), documents)


def results(
    name: str, inputs: list[Tensor], mask: Mask, *, with_lse: bool, backward: bool, **options: Any
) -> dict[str, Tensor]:
    leaves = [x.detach().requires_grad_(backward) for x in inputs]
    with only(name):
        out, lse = attend(*leaves, mask, with_lse=with_lse, **options)
    actual = {"out": out.detach()}
    generator = torch.Generator().manual_seed(9)
    root = (out * torch.randn(out.shape, generator=generator).to(out)).sum(dtype=torch.float64)
    if lse is not None:
        actual |= {"unseen": lse.isneginf(), "lse": lse.detach().masked_fill(lse.isneginf(), 0.0)}
        weight = torch.randn(lse.shape, generator=generator).to(lse)
        root = root + (lse.masked_fill(lse.isneginf(), 0.0) * weight).sum(dtype=torch.float64)
    if backward:
        actual |= dict(zip(("dq", "dk", "dv"), torch.autograd.grad(root, leaves), strict=True))
    return actual


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 1, 65, 200])
def test_every_kernel_equals_the_formula(name: str, dtype: torch.dtype, kind: str, window: int | None) -> None:
    kernel = next(kernel for kernel in KERNELS if kernel.name == name)
    served = 0
    for keys, size, group, softcap in ((257, 64, 2, None), (129, 40, 4, 3.0), (300, 128, 1, None), (65, 24, 3, None)):
        for queries in chunks(keys):
            mask = mask_of(kind, window, keys)
            inputs = [x.cuda() for x in drawn(queries, keys, batch=3, group=group, size=size, dtype=dtype)]
            for with_lse, backward in ((True, True), (True, False), (False, True)):
                leaves = [x.detach().requires_grad_(backward) for x in inputs]
                request = Request(*leaves, mask, size**-0.5, softcap=softcap, with_lse=with_lse)
                if kernel.declines(request) is not None:
                    continue
                served += 1
                how: dict[str, Any] = {"with_lse": with_lse, "backward": backward, "softcap": softcap}
                actual = results(name, inputs, mask, **how)
                expected = results("reference", [x.double() for x in inputs], mask, **how)
                limits = dict(zip(("out", "lse", "dq"), TOLERANCE[dtype], strict=True))
                for part, tensor in actual.items():
                    if part == "unseen":
                        assert torch.equal(tensor, expected[part])
                        continue
                    limit = 4 * limits.get(part, limits["dq"])
                    assert tensor.isfinite().all(), part
                    assert relative(tensor, expected[part]) <= limit, (part, keys, queries, softcap)
    if not served:
        pytest.skip("another kernel's requests")


@pytest.mark.parametrize("dtype", list(EXPECTED))
@pytest.mark.parametrize("kind", ["plain", "left", "right", "both", "packed"])
def test_the_kernel_that_is_meant_serves(dtype: torch.dtype, kind: str) -> None:
    inputs = [x.cuda() for x in drawn(200, 200, batch=3, size=64, dtype=dtype)]
    leaves = [x.requires_grad_() for x in inputs]
    request = Request(*leaves, mask_of(kind, 65, 200), 0.125, with_lse=False)
    assert next(kernel.name for kernel in KERNELS if kernel.declines(request) is None) == EXPECTED[dtype][kind]


@pytest.mark.parametrize("name", NAMES)
def test_strided_inputs_and_a_gradient_of_stride_zero(name: str) -> None:
    kernel = next(kernel for kernel in KERNELS if kernel.name == name)
    plain = [x.cuda() for x in drawn(130, 130, size=64, dtype=torch.bfloat16)]
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in plain]
    window = None if name == "fused" else 40
    assert kernel.declines(Request(*plain, Mask(window), 0.125, with_lse=False)) is None
    gradients = []
    for inputs in (plain, views):
        leaves = [x.detach().requires_grad_() for x in inputs]
        with only(name):
            out, _ = attend(*leaves, Mask(window), with_lse=False)
        gradients.append(torch.autograd.grad(out.sum(), leaves))
    for one, other in zip(*gradients, strict=True):
        assert relative(one, other.double()) <= 1e-2
