"""Sinks in local layers: equal to their formula however they are run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import some
from torch import Tensor

from zebra.kernels import Mask, Request, attend, only, reference
from zebra.kernels import sinks as sinks_module
from zebra.kernels.sinks import NO_POSITION, Sinks, sink_attention


def drawn(length: int, queries: int, heads: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length + queries)
    shapes = [(2, heads, queries, 8), (2, 2, length, 8), (2, 2, length, 8)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def hidden_by(what: str, length: int) -> dict[str, Tensor]:
    """Rows of real tokens with padding, and documents of many lengths."""
    keys = torch.ones(2, length, dtype=torch.bool)
    if what in ("left", "both"):
        keys[1, : length // 2] = False
    if what in ("right", "both"):
        keys[:, length * 4 // 5 :] = False
    actual = {} if what in ("nothing", "documents") else {"keys": keys}
    if what in ("documents", "both"):
        steps = torch.rand(2, length, generator=torch.Generator().manual_seed(3)) < 0.07
        actual["documents"] = steps.cumsum(dim=1)
    return actual


@pytest.fixture(autouse=True, params=[7, 1024], ids=["parts", "whole"])
def rows(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries are read in parts, or at once."""
    monkeypatch.setattr(sinks_module, "_ROWS", request.param)


@pytest.mark.parametrize("what", ["nothing", "left", "right", "documents", "both"])
@pytest.mark.parametrize(
    ("length", "queries"), some([(1, 1), (40, 40), (61, 61), (61, 17), (61, 1)], (61, 61), (61, 17))
)
@pytest.mark.parametrize(("window", "sinks"), some([(1, 1), (5, 3), (3, 20), (9, 100), (70, 4)], (5, 3), (3, 20)))
def test_band_and_sinks_are_one_softmax(what: str, length: int, queries: int, window: int, sinks: int) -> None:
    q, k, v = drawn(length, queries)
    mask = Mask(window=window, sinks=sinks, **hidden_by(what, length))
    expected = reference.reference(Request(q, k, v, mask, 0.3, softcap=2.0))
    for kernel in ("banded", "reference"):
        with only(kernel):
            out, lse = sink_attention(q, k, v, mask, scale=0.3, softcap=2.0, with_lse=True)
        torch.testing.assert_close(out, expected[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse, expected[1], rtol=1e-12, atol=1e-12)
    assert sink_attention(q, k, v, mask)[1] is None


@pytest.mark.parametrize("what", ["nothing", "left", "right", "documents", "both"])
@pytest.mark.parametrize("queries", [40, 9])
def test_gradients_are_those_of_one_softmax(what: str, queries: int) -> None:
    inputs = [x.requires_grad_() for x in drawn(40, queries)]
    mask = Mask(window=5, sinks=3, **hidden_by(what, 40))
    seeds = [torch.randn(2, 4, queries, 8, dtype=torch.float64), torch.randn(2, 4, queries, dtype=torch.float64)]
    gradients = []
    for out, lse in (sink_attention(*inputs, mask, with_lse=True), attend(*inputs, mask)):
        seen = ~lse.isneginf()
        roots = (out * seeds[0]).where(seen.unsqueeze(-1), 0.0).sum() + (lse * seeds[1])[seen].sum()
        gradients.append(torch.autograd.grad(roots, inputs))
    for actual, expected in zip(*gradients, strict=True):
        assert expected.abs().sum() > 0
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("queries", [7, 1])
def test_kept_sinks_serve_where_the_band_has_let_go_of_them(queries: int) -> None:
    q, k, v = drawn(40, queries)
    mask = Mask(window=5, sinks=3)
    positions = torch.tensor([0, 1, 2]).view(1, 1, 3)
    cached = Sinks(k[:, :, None, :3], v[:, :, None, :3], positions)
    recent = 5 - 1 + queries
    for sinks in (cached, cached._replace(last=2)):
        out, _ = sink_attention(q, k[:, :, -recent:], v[:, :, -recent:], mask, cached=sinks, start=40 - recent)
        torch.testing.assert_close(out, attend(q, k, v, mask)[0], rtol=1e-12, atol=1e-12)
    absent = cached._replace(positions=positions.masked_fill(positions == 1, NO_POSITION))
    out, _ = sink_attention(q, k[:, :, -recent:], v[:, :, -recent:], mask, cached=absent, start=40 - recent)
    keys = torch.ones(2, 40, dtype=torch.bool)
    keys[:, 1] = False
    torch.testing.assert_close(out, attend(q, k, v, Mask(window=5, sinks=3, keys=keys))[0], rtol=1e-12, atol=1e-12)


def test_every_other_kernel_declines_them() -> None:
    q, k, v = drawn(40, 40)
    with only("banded"), pytest.raises(NotImplementedError, match="does not support sinks"):
        attend(q, k, v, Mask(window=5, sinks=3))
