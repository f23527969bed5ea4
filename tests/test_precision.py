import logging
import subprocess
import sys

import pytest
import torch

from zebra.kernels import precision
from zebra.kernels.precision import fast_float32


@pytest.fixture(autouse=True)
def _restored():
    before = torch.get_float32_matmul_precision()
    yield
    assert torch.get_float32_matmul_precision() == before


def test_the_switch_is_on_only_inside_and_stays_accurate():
    with fast_float32() as on:
        assert on == (precision.product_error() <= precision.TOLERANCE)
        assert torch.get_float32_matmul_precision() == ("medium" if on else "highest")
    assert torch.get_float32_matmul_precision() == "highest"


def test_an_inaccurate_product_leaves_it_off_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(precision, "product_error", lambda: 3e-3)
    with caplog.at_level(logging.WARNING), fast_float32() as on:
        assert not on
        assert torch.get_float32_matmul_precision() == "highest"
    assert "off by 3.0e-03" in caplog.text


def test_the_error_is_that_of_the_product(monkeypatch):
    """bfloat16 inside, as on a CPU with matrix units, must be seen."""
    exact = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: exact(a.bfloat16(), b.bfloat16()).float())
    assert precision.product_error() > 1e-3


def test_the_newer_setting_of_torch_leaves_it_off_and_is_kept():
    """It does not mix with the older one, which torch then refuses to read."""
    code = (
        "import torch; torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "from zebra.kernels import Mask, attend, only\n"
        "from zebra.kernels.precision import fast_float32\n"
        "q = torch.randn(1, 2, 64, 16)\n"
        "with only('banded'): attend(q, q, q, Mask(8))\n"
        "with fast_float32() as on: assert not on\n"
        "assert torch.backends.cuda.matmul.fp32_precision == 'tf32'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fast float32 stays off" in done.stderr


def test_an_exception_inside_restores_the_setting():
    with pytest.raises(RuntimeError, match="inside"), fast_float32():
        raise RuntimeError("inside")
