"""The band and the means of blocks, in one softmax: equal to the formula, in chunks, padded and packed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from zebra.kernels import Mask, attend, native
from zebra.study.model import alibi_slopes
from zebra.study.summary import naive_summary_attention, summary_attention

SLOPES = torch.tensor(alibi_slopes(4), dtype=torch.float64)


def _drawn(queries: int, keys: int, *, batch: int = 2, size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries + 7 * keys)
    shapes = ((batch, 4, queries, size), (batch, 2, keys, size), (batch, 2, keys, size))
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def _masks(keys: int, window: int) -> dict[str, Mask]:
    left = torch.ones(2, keys, dtype=torch.bool)
    left[1, :5] = False
    documents = torch.zeros(2, keys, dtype=torch.long)
    documents[0, keys // 3 :] = 1
    documents[1, 7:], documents[1, keys // 2 :] = 4, 9
    return {
        "plain": Mask(window),
        "padded": Mask(window, keys=left),
        "packed": Mask(window, documents=documents),
    }


CASES = [("padded", 4, 3, True), ("packed", 4, 3, False), ("plain", 1, 1, True), ("plain", 5, 8, False)]
ALL_CASES = [
    pytest.param(*case, marks=() if case in CASES else pytest.mark.full)
    for kind, (window, block), alibi in itertools.product(
        ("plain", "padded", "packed"), ((1, 1), (4, 3), (5, 8), (16, 2)), (False, True)
    )
    for case in [(kind, window, block, alibi)]
]


@pytest.mark.parametrize(("kind", "window", "block", "alibi"), ALL_CASES)
def test_it_equals_the_formula(
    kind: str, window: int, block: int, alibi: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zebra.study.layout.QUERIES", 7)
    inputs, mask = _drawn(23, 23), _masks(23, window)[kind]
    slopes = SLOPES if alibi else None
    out, _ = summary_attention(*inputs, mask, block=block, scale=0.4, slopes=slopes)
    real = torch.ones(2, 23, dtype=torch.bool) if mask.keys is None else mask.keys
    out = out.masked_fill(~real[:, None, :, None], 0.0)
    expected, _ = naive_summary_attention(*inputs, mask, block=block, scale=0.4, slopes=slopes)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    seed = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients, expected_gradients = (torch.autograd.grad(one, inputs, seed) for one in (out, expected))
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["plain", "padded", "packed", "padded right", "packed and padded"])
def test_runs_of_blocks_in_cpp_equal_the_scores_of_all_blocks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, queries = 333, 300
    right = torch.ones(2, keys, dtype=torch.bool)
    right[0, 290:] = False
    masks = _masks(keys, 20) | {"padded right": Mask(20, keys=right)}
    short = right.clone()
    short[0, 120:] = False  # 9 tokens behind the start of the last text, within whose window no block has ended
    masks["packed and padded"] = replace(masks["packed"], keys=short)
    mask = masks[kind]
    real = torch.ones_like(right) if mask.keys is None else mask.keys
    real = real[:, None, keys - queries :].expand(2, 4, queries)
    inputs = [x.detach().float().requires_grad_() for x in _drawn(queries, keys, size=32)]
    attend_ranges, served = native.attend_ranges, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        assert all(bool((edge.diff(dim=1) >= 0).all()) for edge in args[3:])  # as `attend_ranges` asks for
        served.append(attend_ranges(*args, **kwargs))
        return served[-1]

    def attended() -> list[Tensor]:
        out, lse = summary_attention(*inputs, mask, block=7, scale=0.4, with_lse=True)
        assert lse is not None
        out, lse = out[real], lse[real]
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        return [out, lse, *torch.autograd.grad((out * weights).sum() + lse.sum(), inputs)]

    monkeypatch.setattr(native, "attend_ranges", watched)
    fast = attended()
    assert served
    assert served[0] is not None
    monkeypatch.setattr(native, "attend_ranges", lambda *_, **__: None)
    torch.testing.assert_close(fast, attended(), rtol=1e-5, atol=1e-5)


def test_the_means_count_and_a_text_within_the_window_has_none() -> None:
    q, k, v = _drawn(37, 37)
    plain = attend(q, k, v, Mask(4))[0]
    assert not torch.allclose(summary_attention(q, k, v, Mask(4), block=3)[0], plain)
    torch.testing.assert_close(
        summary_attention(q, k, v, Mask(37), block=3)[0], attend(q, k, v)[0], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("cut", [1, 13, 36])
def test_the_last_queries_alone_get_what_they_get_together(cut: int) -> None:
    q, k, v = _drawn(37, 37)
    whole, lse = summary_attention(q, k, v, Mask(4), block=3, with_lse=True)
    part, part_lse = summary_attention(q[:, :, cut:], k, v, Mask(4), block=3, with_lse=True)
    torch.testing.assert_close(part, whole[:, :, cut:], rtol=1e-12, atol=1e-12)
    assert lse is not None
    torch.testing.assert_close(part_lse, lse[:, :, cut:], rtol=1e-12, atol=1e-12)


def test_a_block_of_one_is_full_attention() -> None:
    q, k, v = _drawn(37, 37)
    out = summary_attention(q, k, v, Mask(4), block=1, slopes=SLOPES)[0]
    torch.testing.assert_close(out, attend(q, k, v, slopes=SLOPES)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_near(dtype: torch.dtype) -> None:
    inputs = _drawn(80, 80)
    expected = summary_attention(*inputs, Mask(16), block=8)[0]
    out = summary_attention(*(x.detach().to(dtype) for x in inputs), Mask(16), block=8)[0]
    assert out.dtype == dtype
    assert (out.double() - expected).norm() / expected.norm() < {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]


def test_what_it_refuses() -> None:
    inputs = _drawn(9, 9)
    with pytest.raises(ValueError, match="requires a window"):
        summary_attention(*inputs, Mask(), block=3)
    with pytest.raises(ValueError, match="at least 1; got 4 and 0"):
        summary_attention(*inputs, Mask(4), block=0)
    with pytest.raises(NotImplementedError, match="softcap"):
        summary_attention(*inputs, Mask(4), block=3, softcap=2.0)
