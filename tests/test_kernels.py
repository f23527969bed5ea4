"""Every kernel equals the formula (output, log-sum-exp, gradients), and that independent ones; bands cost O(N)."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from conftest import some
from torch import Tensor

from zebra import kernels
from zebra.kernels import KERNELS, Mask, Request, attend, banded, choose, fused, only, reference
from zebra.kernels.tiles import COLUMNS, Tile, Tiles
from zebra.stripes import visible_pairs

LENGTHS = (1, 2, 63, 64, 65, 127, 129, 200, 257)
WINDOWS = (None, 1, 2, 63, 64, 65, 127, 128, 129, 191, 10_000)
PADDINGS = ("none", "left", "right", "both")
ORACLE = "reference"
TOLERANCE = {  # of out, lse and gradients; at most half of it was measured
    torch.float64: (1e-14, 1e-14, 2e-14),
    torch.float32: (1e-6, 1e-6, 6e-6),
    torch.bfloat16: (6e-3, 1e-6, 2e-2),
    torch.float16: (1e-3, 1e-6, 4e-3),
}


def drawn(
    queries: int,
    keys: int,
    *,
    batch: int = 2,
    heads: int = 2,
    group: int = 2,
    size: int = 8,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + 1000 * queries + keys)
    q = torch.randn(batch, heads * group, queries, size, dtype=torch.float64, generator=generator) * 2
    k, v = torch.randn(2, batch, heads, keys, size, dtype=torch.float64, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def padding(kind: str, batch: int, keys: int) -> Tensor | None:
    """A different number of padded keys in each row: none in the first, all but one in the last."""
    if kind == "none":
        return None
    real = torch.ones(batch, keys, dtype=torch.bool)
    for b in range(1, batch):
        n = keys - 1 if b == batch - 1 else (keys * b) // (2 * batch)
        left, right = {"left": (n, 0), "right": (0, n), "both": (n // 2, n - n // 2)}[kind]
        real[b, :left] = False
        real[b, keys - right :] = False
    return real


def packed(batch: int, keys: int, seed: int = 0) -> Tensor:
    """Documents that begin at different positions in each row, with numbers that skip some."""
    generator = torch.Generator().manual_seed(seed + keys)
    starts = torch.rand(batch, keys, generator=generator) < 0.03
    starts[:, keys // 2 :: 50] = True
    return starts.cumsum(dim=1) * 3 + 5


def relative(actual: Tensor, expected: Tensor) -> float:
    """The Frobenius norm of the error over that of the expected value, unless that is near 0 by cancellation."""
    expected = expected.double()
    return (actual.double() - expected).norm().item() / max(expected.norm().item(), 0.1 * expected.numel() ** 0.5)


def with_gradients(out: Tensor, lse: Tensor | None, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Output, log-sum-exp (-inf as 0, and where it was -inf) and the gradients of both through all inputs."""
    generator = torch.Generator().manual_seed(9)
    result, roots = {"out": out}, [out]
    if lse is not None:
        unseen = lse.isneginf()
        result, roots = result | {"lse": lse.masked_fill(unseen, 0.0), "unseen": unseen}, [out, lse]
    seeds = [torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.dtype) for x in roots]
    gradients = torch.autograd.grad(roots, inputs, seeds)
    return {n: t.detach() for n, t in (result | dict(zip(("dq", "dk", "dv"), gradients, strict=True))).items()}


def everything(
    name: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, with_lse: bool = True, **arguments: Any
) -> dict[str, Tensor]:
    """As `with_gradients`, by the named kernel."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    with only(name):
        out, lse = attend(*inputs, mask, with_lse=with_lse, **arguments)
    assert (lse is not None) == with_lse
    return with_gradients(out, lse, inputs)


def request_of(q: Tensor, k: Tensor, v: Tensor, mask: Mask, **arguments: Any) -> Request:
    """The request as `attend` makes it, for inputs that want a gradient."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    k, v, mask = kernels._trim(q, k, v, mask)
    return Request(q, k, v, mask, q.shape[-1] ** -0.5, **arguments)


def agree(q: Tensor, k: Tensor, v: Tensor, mask: Mask, **arguments: Any) -> set[str]:
    """Compare every kernel that accepts the request with the formula in float64; return their names."""
    limits = dict(
        zip(("out", "lse", "dq", "dk", "dv"), (*TOLERANCE[q.dtype], *TOLERANCE[q.dtype][2:] * 2), strict=True)
    )
    wide = [x.double() for x in (q, k, v)]
    served = set()
    for with_lse in (True, False):
        # The oracle of rows without gradient through lse is another number.
        expected = everything(ORACLE, *wide, mask, with_lse=with_lse, **arguments)
        for kernel in KERNELS:
            if kernel.name == ORACLE and q.dtype == torch.float64:
                continue
            capped = {name: arguments[name] for name in ("softcap", "slopes") if name in arguments}
            if kernel.declines(request_of(q, k, v, mask, with_lse=with_lse, **capped)) is not None:
                continue
            served.add(kernel.name)
            actual = everything(kernel.name, q, k, v, mask, with_lse=with_lse, **arguments)
            assert actual.keys() == expected.keys()
            for name, tensor in actual.items():
                assert tensor.isfinite().all(), (kernel.name, name)
                assert tensor.shape == expected[name].shape
                dtypes = {"unseen": torch.bool, "lse": torch.promote_types(q.dtype, torch.float32)}
                assert tensor.dtype == dtypes.get(name, q.dtype)
                if name == "unseen":
                    assert torch.equal(tensor, expected[name])
                    continue
                error = relative(tensor, expected[name])
                assert error <= limits[name], f"{kernel.name}: {name} is off by {error:.1e}"
    return served


def small_tiles(monkeypatch: pytest.MonkeyPatch, block: int, part: int, span: int) -> None:
    """One head at a time, in tiles of `block` queries by `part` keys, `span` queries gathered at once."""
    sizes = {"_BLOCKS": (block,) * len(banded._BLOCKS), "_PART": part, "_SPAN": span, "_SCORES_AT_ONCE": 1}
    for name, size in sizes.items():
        monkeypatch.setattr(banded, name, size)


def chunks(keys: int) -> list[int]:
    """T == S, a chunk, and decode."""
    return sorted({keys, max(1, keys // 3), 1}, reverse=True)


@pytest.mark.parametrize("keys", some(LENGTHS, 1, 129))
@pytest.mark.parametrize("window", some(WINDOWS, None, 65))
def test_windows_equal_the_formula(window: int | None, keys: int) -> None:
    for queries in chunks(keys):
        served = agree(*drawn(queries, keys), Mask(window=window))
        assert "banded" in served
        whole = window is None or window >= keys or (queries == 1 and window < keys)
        assert ("fused" in served) == (whole and queries in (1, keys))


@pytest.mark.parametrize("keys", some([1, 2, 64, 65, 129, 257], 129))
@pytest.mark.parametrize("window", some([None, 1, 65, 129], None, 65))
@pytest.mark.parametrize("kind", some(PADDINGS, "none", "both"))
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_padding_and_documents_equal_the_formula(documents: bool, kind: str, window: int | None, keys: int) -> None:
    real = padding(kind, 3, keys)
    mask = Mask(window=window, keys=real, documents=packed(3, keys) if documents else None)
    for queries in chunks(keys):
        assert "banded" in agree(*drawn(queries, keys, batch=3, heads=1), mask)


@pytest.mark.parametrize(("heads", "group"), some([(4, 1), (2, 2), (2, 4), (1, 4), (1, 1), (3, 2)], (3, 2)))
@pytest.mark.parametrize("window", some([None, 5, 70], None, 70))
@pytest.mark.parametrize("queries", some([150, 40, 1], 150))
def test_groups_of_heads_equal_the_formula(heads: int, group: int, window: int | None, queries: int) -> None:
    q, k, v = drawn(queries, 150, heads=heads, group=group)
    assert "banded" in agree(q, k, v, Mask(window=window))
    agree(q, k, v, Mask(window=window, keys=padding("left", 2, 150), documents=packed(2, 150)))


@pytest.mark.parametrize("dtype", some([torch.float64, torch.float32, torch.bfloat16], torch.float64, torch.bfloat16))
@pytest.mark.parametrize("softcap", some([0.3, 2.0, 50.0], 2.0))
@pytest.mark.parametrize("window", some([None, 2, 65], None, 65))
@pytest.mark.parametrize("queries", some([150, 40, 1], 150))
def test_capped_scores_equal_the_formula(dtype: torch.dtype, softcap: float, window: int | None, queries: int) -> None:
    q, k, v = drawn(queries, 150, dtype=dtype, size=16)
    assert "banded" in agree(q * 2, k, v, Mask(window=window), softcap=softcap)
    mask = Mask(window=window, keys=padding("left", 2, 150), documents=packed(2, 150))
    assert agree(q * 2, k, v, mask, softcap=softcap) <= {"banded", "reference"}


@pytest.mark.parametrize("dtype", some([torch.float32, torch.bfloat16, torch.float16], torch.float32, torch.bfloat16))
@pytest.mark.parametrize("queries", some([257, 100, 1], 257, 1))
@pytest.mark.parametrize("window", some([None, 2, 65, 200], 65))
@pytest.mark.parametrize("kind", ["none", "left"])
def test_narrow_dtypes_equal_the_wide_formula(dtype: torch.dtype, queries: int, window: int | None, kind: str) -> None:
    q, k, v = drawn(queries, 257, dtype=dtype, size=16)
    assert {"banded", "reference"} <= agree(q, k, v, Mask(window=window, keys=padding(kind, 2, 257)))
    agree(q, k, v, Mask(window=window, documents=packed(2, 257)))


@pytest.mark.parametrize("scale", [1.0, 0.03])
def test_the_scale_is_the_callers(scale: float) -> None:
    assert {"banded", "fused"} <= agree(*drawn(70, 70), Mask(), scale=scale)
    agree(*drawn(70, 70), Mask(window=9), scale=scale)


def test_a_scale_that_is_not_positive_is_not_for_the_fused_kernel() -> None:
    """torch's causal kernel gives NaN for it on a CPU."""
    q, k, v = drawn(70, 70)
    with only(ORACLE):
        expected, _ = attend(q, k, v, scale=-0.5, with_lse=False)
    actual, _ = attend(q, k, v, scale=-0.5, with_lse=False)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("dtype", "length", "size", "names"),
    [
        (torch.float32, 1024, 64, ("native", "fused")),
        pytest.param(torch.float32, 1024, 32, ("native", "fused"), marks=pytest.mark.full),
        (torch.float32, 1023, 64, ("fused",)),
        pytest.param(torch.float16, 1024, 64, ("native", "fused"), marks=pytest.mark.full),
        (torch.bfloat16, 1024, 64, ("native", "banded")),
        (torch.bfloat16, 1023, 64, ("fused",)),
        (torch.bfloat16, 1024, 56, ("fused",)),
    ],
)
def test_long_global_layers_go_by_tiles(dtype: torch.dtype, length: int, size: int, names: tuple[str, ...]) -> None:
    """The first of the kernels that this machine has."""
    q = torch.zeros(1, 1, length, size, dtype=dtype)
    request = Request(q, q, q, Mask(), 1.0, with_lse=False)
    has = [kernel.name for kernel in KERNELS if kernel.name != "native" or kernel.declines(request) is None]
    assert choose(request).name == next(name for name in names if name in has)


def test_the_scale_is_one_over_the_root_of_the_head_size_by_default() -> None:
    q, k, v = drawn(9, 9, size=16)
    for name in ("fused", "banded", "reference"):
        with only(name):
            out, _ = attend(q, k, v, with_lse=False)
            same, _ = attend(q, k, v, with_lse=False, scale=0.25)
            other, _ = attend(q, k, v, with_lse=False, scale=0.2)
        assert torch.equal(out, same)
        assert not torch.allclose(out, other)


@pytest.mark.parametrize(
    ("block", "part", "span"),
    some([(16, 7, 16), (16, 1000, 48), (7, 30, 7), (1, 1, 2), (200, 9, 1)], (16, 7, 16), (7, 30, 7)),
)
def test_the_size_of_the_tiles_does_not_show(block: int, part: int, span: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, block, part, span)
    for mask in (Mask(), Mask(window=1), Mask(window=15), Mask(window=17), Mask(window=40)):
        for queries in (75, 20, 1):
            agree(*drawn(queries, 75), mask)
            agree(*drawn(queries, 75), Mask(mask.window, padding("both", 2, 75), packed(2, 75)))


@pytest.mark.parametrize("window", [None, 5, 100])
def test_scores_of_any_size_do_not_overflow(window: int | None) -> None:
    q, k, v = drawn(150, 150, dtype=torch.float32)
    q = q * 300
    expected = everything(ORACLE, q.double(), k.double(), v.double(), Mask(window))
    assert expected["lse"].max() > 500
    assert expected["lse"].min() < -500 or window != 5
    actual = everything("banded", q, k, v, Mask(window))
    for name, tensor in actual.items():
        assert tensor.isfinite().all()
        assert relative(tensor, expected[name].double()) <= 1e-3


# -- rows that see nothing


@pytest.mark.parametrize("name", ["banded", "reference"])
@pytest.mark.parametrize("window", [None, 3, 80])
def test_a_row_that_sees_no_key_gives_zero(name: str, window: int | None) -> None:
    q, k, v = drawn(100, 100, dtype=torch.float32)
    real = torch.ones(2, 100, dtype=torch.bool)
    real[0, :70] = False
    real[1] = False
    actual = everything(name, q, k, v, Mask(window=window, keys=real))
    unseen = torch.zeros(2, 4, 100, dtype=torch.bool)
    unseen[0, :, :70] = True
    unseen[1] = True
    assert torch.equal(actual["unseen"], unseen)
    assert not actual["out"][unseen].any()
    assert actual["out"][~unseen].any(dim=-1).all()
    assert not actual["dq"][unseen].any()
    assert not actual["dk"][1].any()
    assert not actual["dv"][0, :, :70].any()
    for tensor in actual.values():
        assert tensor.isfinite().all()


def test_decode_that_sees_no_key_gives_zero_in_the_first_kernel() -> None:
    q, k, v = drawn(1, 8)
    real = torch.ones(2, 8, dtype=torch.bool)
    real[1] = False
    out, lse = attend(q, k, v, Mask(keys=real), with_lse=False)
    assert lse is None
    assert not out[1].any()
    assert out[0].any()


# -- memory: layouts, poison, autocast


@pytest.mark.parametrize("window", some([None, 9, 70], 70))
@pytest.mark.parametrize("queries", some([130, 50, 1], 130, 1))
def test_strided_inputs_and_gradients_equal_contiguous_ones(window: int | None, queries: int) -> None:
    size, keys = 8, 130
    plain = drawn(queries, keys, batch=3, heads=2, group=2)
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in plain]
    sliced = [torch.cat([x, x], dim=-1)[..., ::2] for x in plain]
    for layout in (transposed, sliced):
        assert queries == 1 or not layout[0].is_contiguous()
        agree(*layout, Mask(window=window))
    q, k, v = (x[:1, :1].expand(3, x.shape[1], -1, -1) for x in plain)
    assert q.stride()[:2] == (0, 0)
    agree(q, k, v, Mask(window=window))
    one = plain[0][..., :1].expand(-1, -1, -1, size)
    agree(one, one[:, :2].expand(-1, -1, keys, -1) if queries == 1 else plain[1], plain[2], Mask(window=window))
    real, documents = padding("left", 3, keys)[2:].expand(3, -1), packed(1, keys).expand(3, -1)  # type: ignore[index]
    agree(*plain, Mask(window=window, keys=real, documents=documents))


@pytest.mark.parametrize("queries", some([200, 70, 1], 200))
@pytest.mark.parametrize("window", some([None, 1, 65], 65))
def test_no_uninitialised_memory_is_read(poisoned: None, queries: int, window: int | None) -> None:
    assert torch.empty(9).isnan().all()
    for kind in PADDINGS:
        for documents in (None, packed(2, 200)):
            mask = Mask(window=window, keys=padding(kind, 2, 200), documents=documents)
            agree(*drawn(queries, 200), mask)


# -- what is hidden


HIDING = [
    (1, Mask(), "padding"),
    (140, Mask(), "padding"),
    (50, Mask(window=65), "padding"),
    (140, Mask(window=9), "padding"),
    (140, Mask(), "documents"),
    (60, Mask(window=30), "documents"),
    (50, Mask(window=20), "window"),
    (1, Mask(window=20), "window"),
]


def hiding(queries: int, mask: Mask, kind: str, *, huge: float) -> tuple[list[Tensor], list[Tensor], Mask, Tensor]:
    """Inputs, the same with other values at keys that no compared query sees, the mask, and these keys."""
    inputs = drawn(queries, 140)
    hidden = torch.zeros(2, 140, dtype=torch.bool)
    if kind == "padding":
        hidden[0, :30] = True
        mask = replace(mask, keys=~hidden)
    elif kind == "documents":
        hidden[:, :80] = True
        mask = replace(mask, documents=(torch.arange(140) >= 80).long().expand(2, -1))
    else:
        hidden[:, : 140 - queries - 19] = True
    changed = [x.clone() for x in inputs]
    for x in changed[1:]:
        x[hidden[:, None].expand(-1, x.shape[1], -1)] = huge
    return list(inputs), changed, mask, hidden


@pytest.mark.parametrize(
    ("name", "queries", "mask", "kind"),
    [("fused", *HIDING[0]), ("fused", *HIDING[-1]), *((n, *case) for n in ("banded", "reference") for case in HIDING)],
)
def test_what_is_hidden_and_finite_changes_nothing(name: str, queries: int, mask: Mask, kind: str) -> None:
    plain, changed, mask, hidden = hiding(queries, mask, kind, huge=-1e9)
    with_lse = name != "fused"
    visible_queries = slice(None) if kind != "documents" else slice(max(0, queries - 60), None)
    actual = []
    for inputs in (plain, changed):
        leaves = [x.detach().requires_grad_() for x in inputs]
        with only(name):
            out, lse = attend(*leaves, mask, with_lse=with_lse)
        out = out[:, :, visible_queries]
        root = out.square().sum()
        if lse is not None:
            lse = lse[:, :, visible_queries].masked_fill(lse[:, :, visible_queries].isneginf(), 0.0)
            root = root + lse.sum()
        gradients = torch.autograd.grad(root, leaves)
        for gradient in gradients[1:]:
            assert not gradient[hidden[:, None].expand(-1, gradient.shape[1], -1)].any()
        actual.append((out, *gradients, *([] if lse is None else [lse])))
    for one, other in zip(*actual, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("name", "queries"), [("fused", 1), ("banded", 50), ("banded", 1), ("reference", 50), ("reference", 1)]
)
def test_keys_beyond_all_windows_are_never_read(name: str, queries: int, bad: float) -> None:
    plain, changed, mask, _ = hiding(queries, Mask(window=20), "window", huge=bad)
    expected = everything(name, *plain, mask, with_lse=False)
    for key, tensor in everything(name, *changed, mask, with_lse=False).items():
        assert torch.equal(tensor, expected[key])


def test_a_hidden_nan_spreads_in_the_formula() -> None:
    """Callers must not rely on padding that holds NaN; `attend` documents this."""
    _, changed, mask, _ = hiding(140, Mask(), "padding", huge=math.nan)
    assert everything(ORACLE, *changed, mask)["out"][0].isnan().any()


@pytest.mark.parametrize(("name", "queries"), [("fused", 140), ("fused", 1), ("banded", 140), ("reference", 140)])
def test_a_gradient_of_stride_zero(name: str, queries: int) -> None:
    """As from out.sum(), and from a transposed view in the next layer."""
    plain = drawn(queries, 140)
    gradients = []
    for kind in ("ones", "expanded", "transposed"):
        leaves = [x.detach().requires_grad_() for x in plain]
        with only(name):
            out, _ = attend(*leaves, with_lse=False)
        seed = {
            "ones": torch.ones_like(out),
            "expanded": torch.ones((), dtype=out.dtype).expand_as(out),
            "transposed": torch.ones_like(out.transpose(1, 3)).transpose(1, 3),
        }[kind]
        gradients.append(torch.autograd.grad(out, leaves, seed))
    for other in gradients[1:]:
        for one, same in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(one, same)


@pytest.mark.parametrize(
    ("name", "queries", "window"),
    [
        ("fused", 140, None),
        ("fused", 1, None),
        ("banded", 140, 65),
        *(
            pytest.param(name, queries, w, marks=pytest.mark.full)
            for name in ("banded", "reference")
            for queries in (140, 50, 1)
            for w in (None, 65)
        ),
    ],
)
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_is_bfloat16_inputs(name: str, queries: int, window: int | None, backward_inside: bool) -> None:
    narrow = drawn(queries, 140, dtype=torch.bfloat16)
    mask, with_lse = Mask(window=window), name != "fused"
    leaves = [x.float().requires_grad_() for x in narrow]
    plain = [x.clone().requires_grad_() for x in narrow]
    with only(name):
        with torch.autocast("cpu", torch.bfloat16):
            out, lse = attend(*leaves, mask, with_lse=with_lse)
            assert out.dtype == torch.bfloat16
            if backward_inside:
                gradients = torch.autograd.grad(out.sum(), leaves)
        if not backward_inside:
            gradients = torch.autograd.grad(out.sum(), leaves)
        expected, expected_lse = attend(*plain, mask, with_lse=with_lse)
        expected_gradients = torch.autograd.grad(expected.sum(), plain)
    assert torch.equal(out, expected)
    if with_lse:
        assert lse is not None
        assert expected_lse is not None
        assert lse.dtype == torch.float32
        assert torch.equal(lse, expected_lse)
    for actual, expected in zip(gradients, expected_gradients, strict=True):
        assert actual.dtype == torch.float32
        if name == "banded":  # its backward switches autocast off
            assert torch.equal(actual, expected.float())
        assert relative(actual, expected) <= 1e-2


def test_queries_are_not_changed() -> None:
    for name in ("fused", "banded", "reference"):
        q, k, v = (x.requires_grad_() for x in drawn(70, 70))
        before = [x.detach().clone() for x in (q, k, v)]
        with only(name):
            out, _ = attend(q, k, v, with_lse=False)
        out.sum().backward()
        for one, other in zip((q, k, v), before, strict=True):
            assert torch.equal(one, other)


# -- the formula and the world


def scalar(
    q: Tensor, k: Tensor, v: Tensor, visible: Any, scale: float, softcap: float | None = None
) -> tuple[list[Any], list[Any]]:
    """Three loops in plain Python: heads, queries, keys."""
    outs, lses = [], []
    heads, queries, size = q.shape[1:]
    keys = k.shape[2]
    for h in range(heads):
        h_k = h // (heads // k.shape[1])
        for t in range(queries):
            i = keys - queries + t
            scores = {}
            for j in range(keys):
                if visible(i, j):
                    s = scale * sum(float(q[0, h, t, d]) * float(k[0, h_k, j, d]) for d in range(size))
                    scores[j] = softcap * math.tanh(s / softcap) if softcap else s
            total = sum(math.exp(s) for s in scores.values())
            lses.append(math.log(total) if total else -math.inf)
            outs.append(
                [sum(math.exp(s) / total * float(v[0, h_k, j, d]) for j, s in scores.items()) for d in range(size)]
            )
    return outs, lses


@pytest.mark.parametrize("queries", some([6, 4, 1], 4))
@pytest.mark.parametrize("window", some([None, 1, 2, 3], None, 2))
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_the_formula_is_three_loops(queries: int, window: int | None, softcap: float | None) -> None:
    q, k, v = drawn(queries, 6, batch=1, heads=2, group=2, size=3)
    real = [False, True, True, False, True, True]
    documents = [4, 4, 4, 4, 7, 7]

    def visible(i: int, j: int) -> bool:
        inside = j <= i and (window is None or i - j <= window - 1)
        return inside and real[j] and documents[i] == documents[j]

    outs, lses = scalar(q, k, v, visible, 0.4, softcap)
    mask = Mask(window, torch.tensor([real]), torch.tensor([documents]))
    for name in ("reference", "banded"):
        with only(name):
            out, lse = attend(q, k, v, mask, scale=0.4, softcap=softcap)
        assert lse is not None
        torch.testing.assert_close(out, torch.tensor(outs, dtype=torch.float64).view_as(out))
        torch.testing.assert_close(lse, torch.tensor(lses, dtype=torch.float64).view_as(lse))


@pytest.mark.parametrize("queries", some([40, 15, 1], 40, 15))
@pytest.mark.parametrize("window", some([None, 1, 2, 7, 40], None, 7))
@pytest.mark.parametrize("kind", some(PADDINGS, "none", "both"))
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_the_formula_is_what_torch_computes(queries: int, window: int | None, kind: str, documents: bool) -> None:
    keys = 40
    q, k, v = drawn(queries, keys, group=4)
    real = padding(kind, 2, keys)
    numbers = packed(2, keys) if documents else None
    seen = torch.zeros(2, 1, queries, keys, dtype=torch.bool)
    for b in range(2):
        for t in range(queries):
            i = keys - queries + t
            for j in range(i + 1):
                seen[b, 0, t, j] = (
                    (window is None or i - j < window)
                    and (real is None or bool(real[b, j]))
                    and (numbers is None or bool(numbers[b, i] == numbers[b, j]))
                )
    some = seen.any(dim=-1).expand(-1, 8, -1)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    world = torch.nn.functional.scaled_dot_product_attention(*leaves, attn_mask=seen, enable_gqa=True)
    expected = torch.autograd.grad(world[some].square().sum(), leaves)
    with only("reference"):
        out, _ = attend(*leaves, Mask(window, real, numbers))
    torch.testing.assert_close(out[some], world[some])
    for one, other in zip(torch.autograd.grad(out[some].square().sum(), leaves), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("inputs_with_gradient", [(0,), (1,), (2,), (0, 2)])
def test_gradients_only_of_what_asks_for_them(inputs_with_gradient: tuple[int, ...]) -> None:
    inputs = list(drawn(70, 70))
    full = everything(ORACLE, *inputs, Mask(window=9), with_lse=False)
    for index in inputs_with_gradient:
        inputs[index].requires_grad_()
    with only("banded"):
        out, _ = attend(*inputs, Mask(window=9), with_lse=False)
    generator = torch.Generator().manual_seed(9)
    out.backward(torch.randn(out.shape, dtype=torch.float64, generator=generator))
    for index, name in enumerate(("dq", "dk", "dv")):
        if index in inputs_with_gradient:
            torch.testing.assert_close(inputs[index].grad, full[name])
        else:
            assert inputs[index].grad is None


def test_a_double_backward_is_an_error() -> None:
    q, k, v = (x.requires_grad_() for x in drawn(9, 9))
    with only("banded"):
        out, _ = attend(q, k, v, Mask(window=3))
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# -- the table


@pytest.mark.parametrize(
    ("queries", "mask", "with_lse", "name"),
    [
        (8, Mask(), False, "fused"),
        (8, Mask(window=8), False, "fused"),
        (8, Mask(window=7), False, "banded"),
        (8, Mask(), True, "banded"),
        (8, Mask(keys=torch.ones(2, 8, dtype=torch.bool)), False, "banded"),
        (8, Mask(documents=torch.zeros(2, 8, dtype=torch.int64)), False, "banded"),
        (3, Mask(), False, "banded"),
        (3, Mask(window=2), False, "banded"),
        (1, Mask(), False, "fused"),
        (1, Mask(window=3), False, "fused"),
        (1, Mask(keys=torch.tensor([[True] * 8, [False] * 7 + [True]])), False, "fused"),
        (1, Mask(keys=torch.tensor([[True] * 8, [False] * 8])), False, "banded"),
        (1, Mask(documents=torch.zeros(2, 8, dtype=torch.int64)), False, "banded"),
        (1, Mask(), True, "banded"),  # its inputs want a gradient
    ],
)
def test_the_fastest_that_can_is_chosen(
    queries: int, mask: Mask, with_lse: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (x.requires_grad_() for x in drawn(queries, 8))
    request = request_of(q, k, v, mask, with_lse=with_lse)
    assert choose(request).name == name
    seen: list[Request] = []
    chosen = choose

    def spy(request: Request) -> Any:
        seen.append(request)
        return chosen(request)

    monkeypatch.setattr(kernels, "choose", spy)
    _, lse = attend(q, k, v, mask, with_lse=with_lse)
    assert (lse is not None) == with_lse
    assert chosen(seen[0]).name == name


@pytest.mark.parametrize("dtype", some(TOLERANCE, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("queries", [1, 70])
def test_the_fused_kernel_gives_an_lse_where_no_gradient_is_wanted(
    queries: int, padded: bool, dtype: torch.dtype
) -> None:
    """A contract with torch: its operator behind `scaled_dot_product_attention` on a CPU."""
    q, k, v = drawn(queries, 70, dtype=dtype)
    mask = Mask(keys=padding("left", 2, 70) if padded and queries == 1 else None)
    with only("fused"):
        out, lse = attend(q, k, v, mask)
    with only("reference"):
        expected, expected_lse = attend(q.double(), k.double(), v.double(), mask)
    assert lse is not None
    assert expected_lse is not None
    assert out.dtype == dtype
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    assert out.shape == expected.shape
    assert lse.shape == expected_lse.shape
    assert relative(out, expected) <= TOLERANCE[dtype][0]
    # Its exponentials of half-precision inputs are approximate: 5e-6 was measured.
    assert relative(lse, expected_lse) <= (TOLERANCE[dtype][1] if dtype.itemsize > 2 else 1e-5)
    q.requires_grad_()
    assert "no gradient" in str(fused.KERNEL.declines(request_of(q, k, v, mask)))
    with torch.no_grad():
        assert fused.KERNEL.declines(request_of(q, k, v, mask)) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("heads", "group"), some([(2, 1), (2, 2), (1, 4)], (2, 2)))
@pytest.mark.parametrize(("queries", "keys"), some([(2, 3), (2, 300), (65, 66), (70, 130), (299, 300)], (70, 130)))
@pytest.mark.parametrize("with_lse", [False, True])
def test_a_chunk_by_the_fused_kernel_is_two_calls_without_a_mask(
    queries: int, keys: int, heads: int, group: int, with_lse: bool, dtype: torch.dtype
) -> None:
    q, k, v = drawn(queries, keys, heads=heads, group=group, dtype=dtype)
    for states in ((q, k, v), tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))):
        assert choose(Request(*states, Mask(), 0.3, with_lse=with_lse)).name == "fused"
        with only("fused"):
            out, lse = attend(*states, scale=0.3, with_lse=with_lse)
        with only("reference"):
            expected, expected_lse = attend(*(x.double() for x in states), scale=0.3, with_lse=True)
        assert out.dtype == dtype
        assert relative(out, expected) <= TOLERANCE[dtype][0]
        assert (lse is not None) == with_lse
        if lse is not None and expected_lse is not None:
            assert relative(lse, expected_lse) <= TOLERANCE[dtype][1]


@pytest.mark.parametrize(
    ("mask", "dtype"),
    [
        (Mask(keys=padding("left", 2, 70)), torch.float32),
        (Mask(documents=packed(2, 70)), torch.float32),
        (Mask(window=9), torch.float32),
        (Mask(), torch.bfloat16),
    ],
    ids=["padding", "documents", "window", "16 bits"],
)
def test_other_chunks_are_for_the_tiles(mask: Mask, dtype: torch.dtype) -> None:
    q, k, v = drawn(20, 70, dtype=dtype)
    assert choose(Request(q, k, v, mask, 0.3)).name == "banded"
    q, k, v = (x.float() for x in drawn(20, 70, size=132))
    assert choose(Request(q, k, v, Mask(), 0.3)).name == "banded"
    q, k, v = (x.float().requires_grad_() for x in drawn(20, 70))
    assert "its log-sum-exp has no gradient" in str(fused.KERNEL.declines(Request(q, k, v, Mask(), 0.3)))


def test_without_torchs_operator_the_tiles_give_the_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_LSE", None)
    q, k, v = drawn(70, 70)
    assert "if torch has the operator" in str(fused.KERNEL.declines(Request(q, k, v, Mask(), 0.3)))
    assert choose(Request(q, k, v, Mask(), 0.3)).name == "banded"
    assert choose(Request(q[:, :, :9], k, v, Mask(), 0.3, with_lse=False)).name == "banded"


def test_the_table() -> None:
    assert [kernel.name for kernel in KERNELS] == ["fused", "varlen", "flex", "native", "decode", "banded", "reference"]
    assert KERNELS[-1] is reference.KERNEL
    for kernel in KERNELS:
        assert kernel.summary


def test_an_unknown_argument_is_declined_by_all() -> None:
    q, k, v = drawn(4, 4, dtype=torch.float32)
    with pytest.raises(NotImplementedError) as error:
        attend(q, k, v, sinks=torch.zeros(4), dropout=0.0, other=None)
    for kernel in KERNELS:
        declined = f"{kernel.name}: it does not support the argument dropout, sinks" in str(error.value)
        assert declined or f"{kernel.name}: it runs on cuda, not on cpu" in str(error.value)
    assert "other" not in str(error.value)
    assert torch.equal(attend(q, k, v, sinks=None, dropout=None)[0], attend(q, k, v)[0])


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_warned", set())


def test_what_no_other_serves_falls_to_the_formula_with_one_warning(
    silent: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = replace(banded.KERNEL, softcap=False)
    monkeypatch.setattr(kernels, "KERNELS", (fused.KERNEL, without, reference.KERNEL))
    q, k, v = drawn(6, 6)
    with caplog.at_level(logging.WARNING, logger="zebra.kernels"):
        actual, lse = attend(q, k, v, Mask(window=3), softcap=2.0)
        attend(q, k, v, Mask(window=3), softcap=2.0)
    (record,) = caplog.records
    assert "uses the dense formula" in record.getMessage()
    assert "banded: it does not support a softcap" in record.getMessage()
    scores = q @ k.repeat_interleave(2, dim=1).mT / math.sqrt(8)
    i = torch.arange(6)
    hidden = (i[:, None] < i) | (i[:, None] - i >= 3)
    scores = (2 * torch.tanh(scores / 2)).masked_fill(hidden, -math.inf)
    torch.testing.assert_close(actual, scores.softmax(-1) @ v.repeat_interleave(2, dim=1))
    torch.testing.assert_close(lse, scores.logsumexp(-1))


def test_a_kernel_for_this_device_that_declines_says_so_once(
    silent: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As varlen does on a GPU: the next kernel serves, with one line for each reason."""
    picky = kernels.Kernel(
        "picky",
        "no head size but 64",
        run=reference.reference,
        devices=frozenset({"cpu"}),
        unsupported_reason=lambda request: (
            None if request.q.shape[3] == 64 else f"it does not take head size {request.q.shape[3]}"
        ),
    )
    monkeypatch.setattr(kernels, "KERNELS", (fused.KERNEL, picky, *KERNELS[1:]))
    with caplog.at_level(logging.WARNING, logger="zebra.kernels"):
        for size in (64, 8, 8, 24, 8):
            attend(*drawn(6, 6, size=size), Mask(window=3))
        attend(*drawn(6, 6), with_lse=False)  # the fused kernel comes before
        with only("banded"):
            attend(*drawn(6, 6, size=40), Mask(window=3))
    assert [record.getMessage() for record in caplog.records] == [
        f"attention uses the kernel banded, because picky: it does not take head size {size}" for size in (8, 24)
    ]


def test_the_formula_on_demand_warns_of_nothing(silent: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), only("reference"):
        attend(*drawn(6, 6), softcap=2.0)
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("fused", {"softcap": 2.0, "with_lse": False}, "fused: it does not support a softcap"),
        ("fused", {"with_lse": False, "mask": Mask(window=2)}, "fused: it does not support a window"),
        (
            "fused",
            {"with_lse": False, "mask": Mask(documents=torch.zeros(2, 4, dtype=torch.int64))},
            "fused: .* documents apart",
        ),
        ("fused", {"with_lse": False, "mask": Mask(keys=torch.ones(2, 4).bool())}, "fused: .* mask for padding"),
    ],
)
def test_only_one_kernel_serves_or_says_why_not(name: str, arguments: dict[str, Any], reason: str) -> None:
    with only(name), pytest.raises(NotImplementedError, match=reason) as error:
        attend(*drawn(4, 4), **arguments)
    for other in {"fused", "banded", "reference"} - {name}:
        assert f"{other}:" not in str(error.value)


def test_only_ends_with_its_context() -> None:
    q, k, v = drawn(4, 4)
    with pytest.raises(RuntimeError, match="stop"), only("reference"):
        raise RuntimeError("stop")
    assert choose(request_of(q, k, v, Mask(), with_lse=False)).name == "fused"
    with only("reference"):
        with only("banded"):
            assert choose(request_of(q, k, v, Mask())).name == "banded"
        assert choose(request_of(q, k, v, Mask())).name == "reference"


def test_only_knows_its_kernels() -> None:
    message = (
        r"no kernel 'flash'. Choose one of \['fused', 'varlen', 'flex', 'native', 'decode', 'banded', 'reference'\]"
    )
    with pytest.raises(ValueError, match=message), only("flash"):
        pass


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64, torch.float64), (torch.int64,) * 3])
def test_dtypes_that_no_kernel_takes(dtypes: tuple[torch.dtype, ...]) -> None:
    inputs = [x.to(dtype) for x, dtype in zip(drawn(4, 4), dtypes, strict=True)]
    with pytest.raises(NotImplementedError, match=r"one dtype|does not support"):
        attend(*inputs)


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((4, 3, 2), (1, 4, 3, 2), (1, 4, 3, 2)),
        ((1, 4, 3, 2), (1, 3, 3, 2), (1, 3, 3, 2)),
        ((1, 2, 3, 2), (1, 4, 3, 2), (1, 4, 3, 2)),
        ((1, 4, 3, 2), (1, 4, 2, 2), (1, 4, 2, 2)),
        ((1, 4, 0, 2), (1, 4, 3, 2), (1, 4, 3, 2)),
        ((2, 4, 3, 2), (1, 4, 3, 2), (1, 4, 3, 2)),
        ((1, 4, 3, 2), (1, 4, 3, 4), (1, 4, 3, 2)),
        ((1, 4, 3, 2), (1, 4, 3, 2), (1, 4, 5, 2)),
        ((1, 4, 3, 2), (1, 4, 3, 2), (1, 2, 3, 2)),
    ],
)
def test_shapes_that_do_not_fit(q: Any, k: Any, v: Any) -> None:
    with pytest.raises(ValueError, match="H a multiple of K and 1 <= T <= S; got q") as error:
        attend(torch.zeros(q), torch.zeros(k), torch.zeros(v))
    assert f"k {k}, v {v}" in str(error.value)


@pytest.mark.parametrize("name", ["keys", "documents"])
@pytest.mark.parametrize("shape", [(2, 3), (1, 4), (4,), (2, 1, 4)])
def test_masks_that_do_not_fit(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"mask\.{name} must have one entry per key, \(B, S\) = \(2, 4\); got"):
        attend(*drawn(3, 4), Mask(**{name: torch.ones(shape, dtype=torch.bool)}))


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_below_one_is_an_error(window: int) -> None:
    with pytest.raises(ValueError, match="window"):
        attend(*drawn(4, 4), Mask(window=window))


def test_parts_of_a_mask() -> None:
    mask = Mask(5, torch.ones(2, 8).bool(), torch.arange(16).view(2, 8))
    later = mask.sliced(3)
    assert later.window == 5
    assert later.keys is not None
    assert later.documents is not None
    assert later.keys.shape == (2, 5)
    assert later.documents.tolist() == [[3, 4, 5, 6, 7], [11, 12, 13, 14, 15]]
    assert Mask(5).sliced(3) == Mask(5)


def test_key_ranges_are_the_runs_of_the_mask() -> None:
    """Every query sees the keys [first, end), less the padding between them; neither end falls."""
    generator = torch.Generator().manual_seed(0)
    for keys in (1, 7, 23):
        holes = torch.rand(3, keys, generator=generator) < 0.7
        for real in (None, *(padding(kind, 3, keys) for kind in PADDINGS[1:]), holes, torch.zeros_like(holes)):
            for window in (None, 1, 3, 30):
                for documents in (None, packed(3, keys)):
                    mask = Mask(window, real, documents)
                    for queries in chunks(keys):
                        j = torch.arange(keys)
                        first, end = mask.key_ranges(queries, keys, j.device)
                        inside = (j >= first[..., None]) & (j < end[..., None])
                        if real is not None:
                            inside = inside & real[:, None]
                        visible = mask.visible(j[keys - queries :], j)[:, 0]
                        assert torch.equal(*torch.broadcast_tensors(inside, visible))
                        assert all((x.diff(dim=1) >= 0).all() for x in (first, end))


def test_the_first_tokens_of_documents_and_padding_between_tokens() -> None:
    real = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 0], [1, 1, 1, 1, 0, 0, 0, 0]]).bool()
    documents = torch.tensor([[0, 0, 0, 0, 2, 2, 3, 3], [0, 0, 0, 0, 0, 1, 1, 1]])
    cpu = torch.device("cpu")
    mask = Mask(None, real, documents)
    assert mask.document_starts(8, cpu).tolist() == [[0, 0, 0, 0, 4, 4, 6, 6], [0, 0, 0, 0, 0, 5, 5, 5]]
    assert mask.first_tokens(8, cpu).tolist() == [[2, 2, 2, 2, 4, 4, 6, 6], [0, 0, 0, 0, 0, 8, 8, 8]]
    assert Mask(3).first_tokens(4, cpu).tolist() == [[0] * 4]
    assert Mask(keys=real).first_tokens(8, cpu)[:, 0].tolist() == [2, 0]
    assert mask.has_padding_holes()
    assert not mask.has_padding_holes(within_documents=True)
    assert Mask(None, real, documents // 4).has_padding_holes(within_documents=True)
    assert not Mask(None, real[1:]).has_padding_holes()
    assert not Mask(None, None, documents).has_padding_holes()


def test_a_kernel_gives_way_to_a_faster_one_that_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = replace(reference.KERNEL, name="slow", slower_than=lambda request: "fast" if request.queries > 3 else None)
    fast = replace(reference.KERNEL, name="fast", dtypes=frozenset({torch.float64}))
    monkeypatch.setattr(kernels, "KERNELS", (slow, fast))
    assert choose(request_of(*drawn(4, 4), Mask())).name == "fast"
    assert choose(request_of(*drawn(3, 4), Mask())).name == "slow"
    assert choose(request_of(*drawn(4, 4, dtype=torch.float32), Mask())).name == "slow"
    with only("slow"):
        assert choose(request_of(*drawn(4, 4), Mask())).name == "slow"


# -- law 7: the cost of a local layer grows linearly


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of each executed tile, one entry for each."""
    elements: list[int] = []
    hide = Tiles.hide

    def counting(self: Tiles, scores: Tensor, tile: Tile) -> None:
        elements.append(scores[0].numel())
        hide(self, scores, tile)

    monkeypatch.setattr(Tiles, "hide", counting)
    return elements


def executed(elements: list[int], length: int, mask: Mask) -> int:
    elements.clear()
    everything("banded", *drawn(length, length, batch=1, heads=1, group=1, size=2, dtype=torch.float32), mask)
    return sum(elements)


@pytest.mark.parametrize("window", some([1, 32, 64, 65, 128, 129, 200], 65))
def test_executed_tiles_grow_linearly(counted: list[int], window: int) -> None:
    block = 64
    costs = [executed(counted, length, Mask(window=window)) for length in (512, 1024, 2048)]
    for length, cost in zip((512, 1024, 2048), costs, strict=True):
        assert 2 * visible_pairs(length, window) <= cost <= 2 * length * (window + block + COLUMNS)  # both ways
    assert costs[2] - costs[1] == 2 * (costs[1] - costs[0])  # a straight line


def test_executed_tiles_of_a_global_layer_are_half_the_square(counted: list[int]) -> None:
    for length in (512, 1024):
        assert executed(counted, length, Mask()) == length * (length + 256)


def test_executed_tiles_of_packed_documents_grow_linearly(counted: list[int]) -> None:
    costs = []
    for length in (512, 1024, 2048):
        documents = (torch.arange(length) // 100)[None]
        costs.append(executed(counted, length, Mask(documents=documents)))
        assert costs[-1] <= 2 * length * (100 + 128)
        assert executed(counted, length, Mask(window=30, documents=documents)) <= 2 * length * (30 + 64 + COLUMNS)


def test_executed_tiles_of_a_chunk_are_those_of_its_queries(counted: list[int]) -> None:
    inputs = drawn(100, 1000, batch=1, heads=1, group=1)
    everything("banded", *inputs, Mask(window=50))
    assert sum(counted) <= 2 * 100 * (50 + 64 + COLUMNS)
    counted.clear()
    documents = (torch.arange(1000) // 60)[None]
    everything("banded", *inputs, Mask(documents=documents))
    assert sum(counted) <= 2 * 100 * (60 + 128)


def peak_bytes(name: str, length: int, mask: Mask) -> int:
    """The most bytes alive at once beyond the inputs, forward and backward, by the allocator's own record."""
    inputs = drawn(length, length, batch=1, heads=2, group=2, size=16, dtype=torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        everything(name, *inputs, mask)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("window", some([1, 64, 200], 64))
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_peak_bytes_of_a_local_layer_grow_linearly(window: int, masked: bool) -> None:
    """Each doubling of the length adds twice as many bytes as the one before: growth is linear."""
    peaks = []
    for length in (2048, 4096, 8192):
        index = torch.arange(length)[None]
        mask = Mask(window, index > 70, index // 300) if masked else Mask(window)
        peaks.append(peak_bytes("banded", length, mask))
    assert peaks[1] > peaks[0]
    assert peaks[2] - peaks[1] <= 2.05 * (peaks[1] - peaks[0])
    per_token = 4 * (4 * 16 + 2 * 2 * 16)  # float32 queries, keys and values
    assert peaks[2] <= 8 * per_token * 8192


def test_peak_bytes_of_the_formula_grow_with_the_square() -> None:
    """Shows that the test above can fail."""
    peaks = [peak_bytes("reference", length, Mask(64)) for length in (128, 256, 512)]
    assert peaks[2] - peaks[1] > 3 * (peaks[1] - peaks[0])


@pytest.mark.parametrize("window", some([None, 1, 64, 65], None, 65))
@pytest.mark.parametrize("queries", some([1, 63, 129], 129))
@pytest.mark.parametrize("dtype", some([torch.float64, torch.float32], torch.float64))
def test_alibi_equals_the_formula(dtype: torch.dtype, window: int | None, queries: int) -> None:
    q, k, v = drawn(queries, 129, dtype=dtype)
    slopes = torch.tensor([0.5, 0.1, 0.02, 3.0])
    assert "banded" in agree(q, k, v, Mask(window=window), slopes=slopes)
    mask = Mask(window=window, keys=padding("both", 2, 129), documents=packed(2, 129))
    assert agree(q, k, v, mask, slopes=slopes) <= {"banded", "reference"}


def test_alibi_is_a_bias_of_sdpa() -> None:
    q, k, v = drawn(9, 9, group=1)
    slopes = torch.tensor([0.5, 0.1], dtype=torch.float64)
    bias = -slopes[:, None, None] * (torch.arange(9)[:, None] - torch.arange(9))
    bias = bias.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), float("-inf"))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(attend(q, k, v, slopes=slopes)[0], expected)


def test_the_newer_precision_setting_of_torch_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses to read the older setting where the newer one was set."""
    q, k, v = drawn(64, 64, dtype=torch.float32)
    with only("banded"):
        expected, _ = attend(q, k, v, Mask(8))

        def unreadable() -> str:
            raise RuntimeError("mixed use of the older and the newer setting")

        monkeypatch.setattr(torch, "get_float32_matmul_precision", unreadable)
        out, _ = attend(q, k, v, Mask(8))
    torch.testing.assert_close(out, expected)
