"""Packing for variable-length flash attention, with a placeholder for the one call of torch.

The real call runs in test_kernels_on_gpu.py."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import some
from test_kernels import PADDINGS, chunks, drawn, everything, packed, padding
from torch import Tensor
from torch.nn.attention import varlen as flash

from zebra import kernels
from zebra.kernels import Mask, Request, attend, only, reference, varlen


def naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Any:
    """Sequence by sequence, as flash attention aligns and bounds them; where it would be undefined, an error."""
    assert cu_seq_k is not None
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert seqused_k is block_table is num_splits is None
    assert enable_gqa == (query.shape[1] != key.shape[1])
    left, right = window_size
    left, right = -1 if left >= max_k else left, -1 if right >= max_k else right
    if left >= 0 and right < 0:
        right = max_k
    outs, lses = [], []
    bounds_q, bounds_k = cu_seq_q.tolist(), cu_seq_k.tolist()
    assert (bounds_q[0], bounds_q[-1], bounds_k[0], bounds_k[-1]) == (0, len(query), 0, len(key))
    for n in range(len(bounds_q) - 1):
        q, k, v = query[bounds_q[n] : bounds_q[n + 1]], *(x[bounds_k[n] : bounds_k[n + 1]] for x in (key, value))
        assert 0 < len(q) <= max_q
        assert 0 < len(k) <= max_k
        k, v = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        row, column = torch.arange(len(q))[:, None] + len(k) - len(q), torch.arange(len(k))
        hidden = torch.zeros(len(q), len(k), dtype=torch.bool)
        if left >= 0:
            hidden |= column < row - left
        if right >= 0:
            hidden |= column > row + right
        assert not hidden.all(dim=1).any(), "a query that sees no key"
        scores = scores.masked_fill(hidden, float("-inf"))
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
        lses.append(scores.logsumexp(-1).detach().float())
    out = torch.cat(outs)
    return (out, torch.cat(lses, dim=1)) if return_aux is not None and return_aux.lse else out


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """The kernel in the table without its device, in float64 too, over the placeholder."""
    monkeypatch.setattr(flash, "varlen_attn", naive)
    varlen._groups_heads.cache_clear()
    here = replace(varlen.KERNEL, devices=None, dtypes=frozenset({torch.float64, torch.float32}))
    monkeypatch.setattr(kernels, "KERNELS", (here, reference.KERNEL))
    yield naive
    varlen._groups_heads.cache_clear()


def same(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> None:
    """Output and gradients, and without a gradient the log-sum-exp, equal the formula's."""
    expected = everything("reference", q, k, v, mask, with_lse=False)
    actual = everything("varlen", q, k, v, mask, with_lse=False)
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-12)
    with torch.no_grad(), only("varlen"):
        out, lse = attend(q, k, v, mask)
    with torch.no_grad(), only("reference"):
        expected_out, expected_lse = attend(q, k, v, mask)
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-12)
    assert lse is not None
    assert expected_lse is not None
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, expected_lse.float())


def test_the_placeholder_has_the_signature_of_torch() -> None:
    """Of the newest torch; an older one lacks the last parameters, and the kernel asks before it uses one."""
    torchs = inspect.signature(flash.varlen_attn).parameters
    ours = inspect.signature(naive).parameters
    assert list(ours)[: len(torchs)] == list(torchs)
    for name, parameter in torchs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default)
    assert flash.AuxRequest(lse=True).lse


@pytest.mark.parametrize("keys", some([1, 2, 9, 40], 40))
@pytest.mark.parametrize("window", some([None, 1, 2, 7, 39], None, 7))
@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_packed_sequences_equal_the_formula(
    on_a_cpu: Any, documents: bool, kind: str, window: int | None, keys: int
) -> None:
    mask = Mask(window, padding(kind, 3, keys), packed(3, keys) if documents else None)
    for queries in chunks(keys):
        same(*drawn(queries, keys, batch=3, heads=1), mask)


@pytest.mark.parametrize("window", some([None, 1, 3, 6, 30], None, 3))
@pytest.mark.parametrize("queries", [24, 9, 1])
def test_short_texts_before_long_padding_equal_the_formula(on_a_cpu: Any, queries: int, window: int | None) -> None:
    """One real token before 23 of padding; padding alone; padding that ends a document in the middle of the row."""
    real = torch.ones(4, 24, dtype=torch.bool)
    real[0, 1:] = False
    real[1] = False
    real[2, 3:10] = False
    real[3, 20:] = False
    same(*drawn(queries, 24, batch=4), Mask(window, real, (torch.arange(24) // 10).expand(4, -1)))


@pytest.mark.parametrize(("heads", "group"), [(4, 1), (2, 3), (1, 4)])
def test_groups_of_heads(on_a_cpu: Any, heads: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn(20, 30, heads=heads, group=group)
    same(q, k, v, Mask(7, padding("left", 2, 30)))

    def older(
        query: Any,
        key: Any,
        value: Any,
        a: Any,
        b: Any,
        c: int,
        d: int,
        *,
        return_aux: Any,
        scale: Any,
        window_size: Any,
    ) -> Any:
        return naive(query, key, value, a, b, c, d, return_aux=return_aux, scale=scale, window_size=window_size)

    monkeypatch.setattr(flash, "varlen_attn", older)
    varlen._groups_heads.cache_clear()
    same(q, k, v, Mask(7, padding("left", 2, 30)))


def test_a_plain_band_moves_no_token(on_a_cpu: Any) -> None:
    (one,) = varlen.packings(Mask(window=5), 3, 4, 9, torch.device("cpu"))
    assert one.queries is one.keys is one.valid is None
    assert one.query_bounds.tolist() == [0, 4, 8, 12]
    assert one.key_bounds.tolist() == [0, 9, 18, 27]
    assert (one.max_queries, one.max_keys, one.window) == (4, 9, (4, 0))


def test_only_real_tokens_are_packed() -> None:
    """The drawing of the module."""
    real = torch.tensor([[False] * 2 + [True] * 7, [True] * 7 + [False] * 2])
    numbers = torch.tensor([[0] * 6 + [1] * 3, [4] * 9])
    first, second = varlen.packings(Mask(None, real, numbers), 2, 9, 9, torch.device("cpu"))
    assert first.query_bounds.tolist() == first.key_bounds.tolist() == [0, 4, 7, 14]
    assert first.queries is not None
    assert first.queries.tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    assert second.queries is not None
    assert (second.queries.tolist(), second.query_bounds.tolist(), second.key_bounds.tolist()) == (
        [16, 17],
        [0, 2],
        [0, 7],
    )
    # A chunk that holds only document 1 of the first row takes no key of document 0 along.
    first, *_ = varlen.packings(Mask(None, real, numbers), 2, 3, 9, torch.device("cpu"))
    assert (first.query_bounds.tolist(), first.key_bounds.tolist()) == ([0, 3, 4], [0, 3, 10])


def reason(mask: Mask, *, size: int = 8, with_lse: bool = False, scale: float = 1.0, grad: bool = False) -> str | None:
    q, k, v = drawn(6, 6, size=size, dtype=torch.bfloat16)
    request = Request(q.requires_grad_(grad), k, v, mask, scale, with_lse=with_lse)
    return replace(varlen.KERNEL, devices=None).declines(request)


def test_why_it_declines() -> None:
    holes = torch.tensor([[True, False, True, True, True, True], [True] * 6])
    assert reason(Mask(), grad=True) is None
    assert reason(Mask(3, ~holes.roll(2, 1)), size=256) is None
    assert "multiple of 8" in str(reason(Mask(), size=12))
    assert "up to 256" in str(reason(Mask(), size=264))
    assert reason(Mask(), with_lse=True) is None
    assert "log-sum-exp" in str(reason(Mask(), with_lse=True, grad=True))
    with torch.no_grad():
        assert reason(Mask(), with_lse=True, grad=True) is None
    assert "positive scales" in str(reason(Mask(), scale=-1.0))
    assert "between the tokens" in str(reason(Mask(None, holes)))
    assert reason(Mask(None, holes, torch.tensor([[0, 0, 1, 1, 1, 1], [0] * 6]))) is None
    assert "not on cpu" in str(varlen.KERNEL.declines(Request(*drawn(6, 6), Mask(), 1.0)))
    wide = replace(varlen.KERNEL, devices=None).declines(Request(*drawn(6, 6), Mask(), 1.0))
    assert wide == "it does not support torch.float64"
