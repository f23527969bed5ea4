"""Faster float32 matrix products on a CPU, for those who ask: as accurate as before, or not switched on.

torch's own float32 products go through MKL, which on some CPUs runs older instructions than the CPU has. The setting
`medium` sends them through oneDNN instead. It permits bfloat16 inside, which oneDNN takes only on CPUs with matrix
units (AMX); elsewhere the result is float32 to the last bits. So the switch tests what it would give, each time.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch

_log = logging.getLogger(__name__)

TOLERANCE = 1e-5
"""The relative error that a float32 product may have: rounding gives about 4e-7, bfloat16 inside about 4e-3."""


@contextlib.contextmanager
def fast_float32() -> Iterator[bool]:
    """Within this context float32 products take the faster way, if it is as accurate here; the setting is restored.

    The setting is the process's own, other threads included; on a GPU it would permit TF32.

    Yields:
        Whether it is on. Where the products are off by more than `TOLERANCE`, or somebody chose a precision by torch's
        newer `torch.backends...fp32_precision`, it stays off and a warning says so.

    Example:
        >>> with fast_float32() as faster:
        ...     product = torch.ones(8, 8) @ torch.ones(8, 8)
    """
    before = setting()
    if before is None:
        _log.warning("fast float32 stays off: torch.backends' fp32_precision was set, which does not mix with it")
        yield False
        return
    torch.set_float32_matmul_precision("medium")
    try:
        error = product_error()
        accurate = error <= TOLERANCE
        if not accurate:
            torch.set_float32_matmul_precision(before)
            _log.warning("fast float32 stays off: its products are off by %.1e here, more than %.0e", error, TOLERANCE)
        yield accurate
    finally:
        torch.set_float32_matmul_precision(before)


def setting() -> str | None:
    """torch's float32 precision: highest, high or medium; None where it was set by the newer way, which torch does not
    let the older one read.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def product_error(size: int = 512) -> float:
    """The relative error, in the Frobenius norm, of a float32 product of random matrices against float64."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, dtype=torch.float32) for _ in range(2))
    exact = a.double() @ b.double()
    return float((torch.mm(a, b).double() - exact).norm() / exact.norm())
