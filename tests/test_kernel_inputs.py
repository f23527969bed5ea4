"""Unusual inputs to attention: every kernel that accepts them equals the formula, or they are an error."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_kernels import ORACLE, drawn, everything, padding, relative
from torch import Tensor

from zebra.kernels import KERNELS, Mask, Request, attend, choose, fused, native, only
from zebra.model.attention import zebra_attention

UNREAD = 1e4
"""What lies between the numbers of a layout with gaps: reading it shows."""
LAYOUTS = {
    "heads behind tokens": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "gaps in a head": lambda x: torch.stack([x, torch.full_like(x, UNREAD)], dim=4).flatten(3)[..., ::2],
    "gaps between tokens": lambda x: torch.stack([x, torch.full_like(x, UNREAD)], dim=3).flatten(2, 3)[:, :, ::2],
    "one number": lambda x: x[..., :1].expand(x.shape),
    "one token": lambda x: x[:, :, :1].expand(x.shape),
    "one head": lambda x: x[:, :1].expand(x.shape),
    "one for all": lambda x: x[:1, :1, :1, :1].expand(x.shape),
    "shifted": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "negated": lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
}


def results(name: str, inputs: list[Tensor], mask: Mask, with_lse: bool, gradient: bool) -> list[Tensor] | None:
    """Output, log-sum-exp (-inf as 0) and gradients by a kernel; None where it declines."""
    leaves = [x.detach().requires_grad_(gradient) for x in inputs]
    try:
        with only(name):
            out, lse = attend(*leaves, mask, with_lse=with_lse)
    except NotImplementedError:
        return None
    parts = [out] if lse is None else [out, lse.masked_fill(lse.isneginf(), 0.0)]
    if gradient:
        seeds = [torch.cos(torch.arange(x.numel())).view(x.shape).to(x.dtype) for x in parts]
        parts += torch.autograd.grad(parts, leaves, seeds)
    return [x.detach() for x in parts]


def compare(
    inputs: list[Tensor], mask: Mask, limit: float, plain: Mask | None = None
) -> dict[tuple[bool, bool], set[str]]:
    """Compare every kernel on the inputs as given with the formula on contiguous float64 copies; return who served."""
    served = {}
    for case in ((True, False), (False, False), (True, True), (False, True)):
        with_lse, gradient = case
        compact = [x.contiguous().double() for x in inputs]
        expected = results(ORACLE, compact, plain or mask, with_lse, gradient)
        assert expected is not None
        actual = {kernel.name: results(kernel.name, inputs, mask, with_lse, gradient) for kernel in KERNELS}
        served[case] = {name for name, parts in actual.items() if parts is not None}
        for name in served[case]:
            for part, truth in zip(actual[name] or [], expected, strict=True):
                assert part.shape == truth.shape
                assert relative(part, truth) <= limit, name
    return served


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_the_inputs_equals_the_formula(layout: str) -> None:
    everywhere = set()
    for queries, keys in ((1, 70), (70, 70), (20, 70), (256, 300)):
        inputs = drawn(queries, keys, size=64 if queries > 200 else 8, dtype=torch.float32)
        served = compare([LAYOUTS[layout](x) for x in inputs], Mask(), 2e-5)
        everywhere |= set().union(*served.values())
        assert "fused" in served[True, False]
    assert {"fused", "banded", ORACLE} <= everywhere
    assert ("native" in everywhere) == (native.KERNEL.declines(request(size=64)) is None)


def test_a_layout_of_16_bits_equals_the_formula() -> None:
    for layout in ("transposed", "gaps in a head", "one number"):
        inputs = [LAYOUTS[layout](x) for x in drawn(70, 70, dtype=torch.bfloat16)]
        compare(inputs, Mask(), 5e-2)


def test_any_layout_of_a_mask_equals_the_formula() -> None:
    real, documents = padding("left", 2, 300), torch.tensor([[3], [-5]]) + torch.arange(300).div(100).long()
    assert real is not None
    layouts = (
        lambda x: x.T.contiguous().T,
        lambda x: torch.stack([x, ~x], dim=2).flatten(1)[:, ::2],
        lambda x: torch.cat([x[:, :1], x], dim=1)[:, 1:],
        lambda x: x[1:].expand(2, -1),
    )
    for layout in layouts:
        laid = Mask(70, layout(real), layout(documents))
        assert laid.keys is not None
        assert laid.documents is not None
        same = Mask(70, laid.keys.contiguous(), laid.documents.contiguous())
        for queries in (300, 20, 1):
            compare(list(drawn(queries, 300, size=64, dtype=torch.float32)), laid, 2e-5, plain=same)
    decode = Mask(keys=layouts[1](real))
    assert (
        "fused" in compare(list(drawn(1, 300, dtype=torch.float32)), decode, 2e-5, plain=Mask(keys=real))[True, False]
    )


# -- values of another head size than keys (as in latent attention)


@pytest.mark.parametrize("size", [4, 24])
def test_values_of_another_head_size_equal_the_formula_or_are_declined(size: int) -> None:
    for queries, keys in ((1, 70), (70, 70), (20, 70)):
        q, k, _ = drawn(queries, keys, dtype=torch.float32)
        v = drawn(queries, keys, size=size, dtype=torch.float32, seed=7)[2]
        for mask in (Mask(), Mask(9), Mask(None, padding("left", 2, keys), None)):
            served = compare([q, k, v], mask, 2e-5)
            assert all({"banded", ORACLE} <= names for names in served.values())
    assert attend(q, k, v)[0].shape == (*q.shape[:3], size)
    long = drawn(256, 256, size=64, dtype=torch.float32)
    compare([*long[:2], long[2][..., :32].contiguous()], Mask(), 2e-5)
    other = request(size=64, value_size=size)
    assert native.KERNEL.declines(other) == f"it supports only values of the keys' head size, 64, not {size}"
    assert "another head size" in str(fused.KERNEL.declines(other))
    decode = request(queries=1, value_size=size, with_lse=False)
    assert choose(decode).name == "fused"


def request(
    queries: int = 256, size: int = 8, value_size: int | None = None, dtype: torch.dtype = torch.float32, **options: Any
) -> Request:
    q, k = torch.zeros(1, 2, queries, size, dtype=dtype), torch.zeros(1, 1, 256, size, dtype=dtype)
    return Request(q, k, torch.zeros(1, 1, 256, value_size or size, dtype=dtype), Mask(), 1.0, **options)


# -- what is an error, whichever kernel would serve


REAL = torch.ones(2, 5, dtype=torch.bool)
ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"no {name}": ({name: 0}, "none empty, with H a multiple of K and 1 <= T <= S")
        for name in ("batch", "heads", "kv_heads", "queries", "keys", "size", "value_size")
    },
    "slopes of fewer heads": (
        {"slopes": torch.ones(3)},
        r"slopes must have one entry per head, \(H,\) = \(4,\); got \(3",
    ),
    "slopes of more heads": ({"slopes": torch.ones(8)}, r"one entry per head, \(H,\) = \(4,\); got \(8,\)"),
    "one slope for all": ({"slopes": torch.ones(1)}, r"one entry per head, \(H,\) = \(4,\); got \(1,\)"),
    "slopes of each row": ({"slopes": torch.ones(2, 4)}, r"one entry per head, \(H,\) = \(4,\); got \(2, 4\)"),
    "slopes elsewhere": ({"slopes": torch.ones(4, device="meta")}, "on one device; got cpu, meta"),
    "a mask elsewhere": ({"mask": Mask(keys=REAL.to("meta"))}, "on one device; got cpu, meta"),
    "values elsewhere": ({"device": "meta"}, "on one device; got cpu, meta"),
    "a mask of ones and zeros": ({"mask": Mask(keys=REAL.long())}, "mask.keys must be bool, True for real tokens"),
    "a mask to be added": ({"mask": Mask(keys=REAL.float())}, "mask.keys must be bool, True for real tokens"),
    "documents of fractions": ({"mask": Mask(documents=REAL.float())}, "mask.documents must hold integers"),
    "documents that fall": (
        {"mask": Mask(documents=torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]))},
        "must not decrease",
    ),
    "a scale that is no number": ({"scale": math.nan}, "scale must be finite"),
    "no softcap": ({"softcap": 0.0}, "softcap positive and finite"),
    "a softcap below 0": ({"softcap": -1.0}, "softcap positive and finite"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_does_not_fit_is_an_error_in_every_kernel(case: str) -> None:
    options, message = ERRORS[case]
    sizes = {"batch": 2, "heads": 4, "kv_heads": 2, "queries": 5, "keys": 5, "size": 8, "device": "cpu"}
    sizes |= {name: options[name] for name in options if name in sizes}
    batch, heads, kv_heads, queries, keys, size, device = sizes.values()
    q, k = torch.ones(batch, heads, queries, size), torch.ones(batch, kv_heads, keys, size)
    v = torch.ones(batch, kv_heads, keys, options.get("value_size", size), device=device)
    arguments = {name: options[name] for name in ("mask", "slopes", "scale", "softcap") if name in options}
    for kernel in KERNELS:
        with only(kernel.name), pytest.raises(ValueError, match=message):
            attend(q, k, v, **arguments)


def test_slopes_that_are_trained_get_their_gradient() -> None:
    """The tiled kernels have no gradient for slopes; the formula serves."""
    inputs, slopes = drawn(9, 9), torch.tensor([0.5, 0.1, 0.02, 3.0], dtype=torch.float64)
    expected = everything(ORACLE, *inputs, Mask(4), slopes=slopes)["out"]
    out, _ = attend(*inputs, Mask(4), slopes=slopes.requires_grad_())
    torch.testing.assert_close(out.detach(), expected)
    (gradient,) = torch.autograd.grad(out.sum(), slopes)
    assert gradient.any()
    with torch.no_grad(), only("banded"):
        torch.testing.assert_close(attend(*inputs, Mask(4), slopes=slopes)[0], expected)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_learned_sinks_of_another_number_of_heads_are_an_error(count: int) -> None:
    q, k, v = drawn(5, 5)
    with pytest.raises(ValueError, match="s_aux must have one score for each of 4 heads; got shape"):
        zebra_attention(torch.nn.Module(), q, k, v, None, s_aux=torch.zeros(count))
