"""The band and the means of blocks, in one softmax: equal to the formula, in chunks, padded and packed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zebra.kernels import Mask, attend
from zebra.positions import alibi_slopes
from zebra.study.summary import formula, summarised

SLOPES = torch.tensor(alibi_slopes(4), dtype=torch.float64)


def _drawn(queries: int, keys: int, *, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries + 7 * keys)
    shapes = ((batch, 4, queries, 8), (batch, 2, keys, 8), (batch, 2, keys, 8))
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


@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
@pytest.mark.parametrize(("window", "block"), [(1, 1), (4, 3), (5, 8), (16, 2)])
@pytest.mark.parametrize("alibi", [False, True])
def test_it_equals_the_formula(
    kind: str, window: int, block: int, alibi: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zebra.study.layout.QUERIES", 7)
    inputs, mask = _drawn(23, 23), _masks(23, window)[kind]
    slopes = SLOPES if alibi else None
    found, _ = summarised(*inputs, mask, block=block, scale=0.4, slopes=slopes)
    real = torch.ones(2, 23, dtype=torch.bool) if mask.keys is None else mask.keys
    found = found.masked_fill(~real[:, None, :, None], 0.0)
    wanted = formula(*inputs, mask, block=block, scale=0.4, slopes=slopes)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    seed = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.autograd.grad(out, inputs, seed) for out in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_the_means_count_and_a_text_within_the_window_has_none() -> None:
    q, k, v = _drawn(37, 37)
    plain = attend(q, k, v, Mask(4))[0]
    assert not torch.allclose(summarised(q, k, v, Mask(4), block=3)[0], plain)
    torch.testing.assert_close(summarised(q, k, v, Mask(37), block=3)[0], attend(q, k, v)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cut", [1, 13, 36])
def test_the_last_queries_alone_get_what_they_get_together(cut: int) -> None:
    q, k, v = _drawn(37, 37)
    whole, lse = summarised(q, k, v, Mask(4), block=3, with_lse=True)
    part, part_lse = summarised(q[:, :, cut:], k, v, Mask(4), block=3, with_lse=True)
    torch.testing.assert_close(part, whole[:, :, cut:], rtol=1e-12, atol=1e-12)
    assert lse is not None
    torch.testing.assert_close(part_lse, lse[:, :, cut:], rtol=1e-12, atol=1e-12)


def test_a_block_of_one_is_full_attention() -> None:
    q, k, v = _drawn(37, 37)
    found = summarised(q, k, v, Mask(4), block=1, slopes=SLOPES)[0]
    torch.testing.assert_close(found, attend(q, k, v, slopes=SLOPES)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_near(dtype: torch.dtype) -> None:
    inputs = _drawn(80, 80)
    wanted = summarised(*inputs, Mask(16), block=8)[0]
    found = summarised(*(x.detach().to(dtype) for x in inputs), Mask(16), block=8)[0]
    assert found.dtype == dtype
    assert (found.double() - wanted).norm() / wanted.norm() < {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]


def test_what_it_refuses() -> None:
    inputs = _drawn(9, 9)
    with pytest.raises(ValueError, match="before a window"):
        summarised(*inputs, Mask(), block=3)
    with pytest.raises(ValueError, match="at least 1; got 4 and 0"):
        summarised(*inputs, Mask(4), block=0)
    with pytest.raises(NotImplementedError, match="softcap"):
        summarised(*inputs, Mask(4), block=3, softcap=2.0)
