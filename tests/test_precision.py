import logging

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


def test_an_exception_inside_restores_the_setting():
    with pytest.raises(RuntimeError, match="inside"), fast_float32():
        raise RuntimeError("inside")
