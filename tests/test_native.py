"""The kernel in C++ equals the formula, output, log-sum-exp and gradients; how it is built, and what it declines."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import some
from test_kernels import relative, with_gradients
from torch import Tensor

from zebra.kernels import KERNELS, Mask, Request, attend, choose, compiler, native, only, reference


def request(inputs: list[Tensor], mask: Mask, scale: float = 0.3, **options: Any) -> Request:
    q, k, v = inputs
    return Request(q, k, v, mask, scale, **options)


_REQUEST = request([torch.zeros(1, 1, 256, 64)] * 3, Mask())
_REASON = native.KERNEL.declines(_REQUEST)
needs_native = pytest.mark.skipif(_REASON is not None, reason=f"native: {_REASON}")

DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)]
SIZES = (32, 64, 80, 96, 128, 256)
TOLERANCE = {  # of out, lse and gradients, relative; at most half of it was measured
    torch.float32: (2e-6, 1e-6, 1e-5),
    torch.bfloat16: (6e-3, 1e-6, 2e-2),
    torch.float16: (1e-3, 1e-6, 4e-3),
}
EVERY = [(size, dtype) for size in SIZES for dtype in TOLERANCE]
KINDS = ("plain", "left", "right", "both", "packed", "packed and padded", "nothing in a row")


def drawn(
    queries: int, keys: int, *, size: int = 64, dtype: torch.dtype = torch.float32, kv_heads: int = 1, group: int = 2
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 * queries + keys)
    shapes = (2, kv_heads * group, queries, size), *[(2, kv_heads, keys, size)] * 2
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def masked(window: int | None, keys: int, kind: str) -> Mask:
    real = torch.ones(2, keys, dtype=torch.bool)
    if kind in ("left", "both", "packed and padded"):
        real[1, : keys // 3] = False
    if kind in ("right", "both", "packed and padded"):
        real[0, keys - keys // 5 :] = False
        real[1, keys - 3 :] = False
    if kind == "nothing in a row":
        real[0], real[1, :70] = False, False
    starts = torch.zeros(2, keys, dtype=torch.long)
    starts[0, 1::50] = starts[1, 64::64] = 1
    documents = starts.cumsum(dim=1) if "packed" in kind else None
    return Mask(window, None if kind in ("plain", "packed") else real, documents)


def everything(
    run: Any, inputs: list[Tensor], mask: Mask, scale: float = 0.3, with_lse: bool = True, **options: Any
) -> dict[str, Tensor]:
    """As `with_gradients`, with the function of a kernel."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return with_gradients(*run(request(leaves, mask, scale, with_lse=with_lse, **options)), leaves)


def agree(inputs: list[Tensor], mask: Mask, **options: Any) -> dict[str, Tensor]:
    """Compare the kernel, for any length, with the formula in float64."""
    actual = everything(native.native, inputs, mask, **options)
    expected = everything(reference.KERNEL.run, [x.double() for x in inputs], mask, **options)
    out, lse, gradient = TOLERANCE[inputs[0].dtype]
    limits = {"out": out, "lse": lse, "dq": gradient, "dk": gradient, "dv": gradient}
    for name, tensor in actual.items():
        if name == "unseen":
            assert torch.equal(tensor, expected[name])
            continue
        assert tensor.isfinite().all(), name
        assert tensor.dtype == (torch.float32 if name == "lse" else inputs[0].dtype)
        error = relative(tensor, expected[name])
        assert error <= limits[name], f"{name} is off by {error:.1e}"
    unread = expected["dv"] == 0
    assert not actual["dv"][unread].any()
    assert not actual["dk"][unread].any()
    if "unseen" in actual:
        assert not actual["out"][actual["unseen"]].any()
        assert not actual["dq"][actual["unseen"]].any()
    return actual


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", some(SIZES, 64))
@pytest.mark.parametrize("window", some([1, 2, 63, 64, 65, 500, None], 65, None))
def test_windows_and_lengths_equal_the_formula(window: int | None, size: int, dtype: torch.dtype) -> None:
    for queries, keys in [(1, 1), (31, 31), (32, 33), (63, 65), (64, 64), (65, 65), (129, 129), (70, 301), (255, 256)]:
        agree(drawn(queries, keys, size=size, dtype=dtype), Mask(window))


@needs_native
@pytest.mark.parametrize(("size", "dtype"), some(EVERY, (80, torch.bfloat16)))
def test_head_sizes_equal_the_formula(size: int, dtype: torch.dtype) -> None:
    agree(drawn(130, 200, size=size, dtype=dtype), Mask(70), scale=size**-0.5)
    agree(
        drawn(130, 200, size=size, dtype=dtype), masked(None, 200, "packed and padded"), scale=size**-0.5, softcap=2.0
    )


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_a_softcap_equals_the_formula(softcap: float, dtype: torch.dtype) -> None:
    """Below, at and far above the scores."""
    for mask in (Mask(70), masked(None, 200, "packed and padded")):
        agree(drawn(140, 200, dtype=dtype), mask, softcap=softcap)
    q, k, v = drawn(100, 100, dtype=dtype)
    actual = everything(native.native, [q * 300, k, v], Mask(50), softcap=softcap)
    assert all(tensor.isfinite().all() for tensor in actual.values())


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", some(KINDS, "plain", "packed and padded"))
def test_alibi_equals_the_formula(kind: str, dtype: torch.dtype) -> None:
    """One slope per head, groups of three heads, and one slope so steep that hidden scores would overflow."""
    slopes = torch.tensor([0.0, 0.02, 0.5, 1.0, 3.0, 8.0])
    for queries, window in ((301, None), (301, 70), (130, None)):
        agree(drawn(queries, 301, dtype=dtype, kv_heads=2, group=3), masked(window, 301, kind), slopes=slopes)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", some([1, 63, 100, None], 63))
def test_padding_and_documents_equal_the_formula(window: int | None, kind: str, dtype: torch.dtype) -> None:
    for queries, keys in [(257, 257), (67, 300)]:
        actual = agree(drawn(queries, keys, dtype=dtype), masked(window, keys, kind))
        if kind == "nothing in a row":
            assert actual["unseen"][0].all()


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "group"), some([(3, 1), (1, 4), (2, 3)], (2, 3)))
def test_groups_of_heads_equal_the_formula(kv_heads: int, group: int, dtype: torch.dtype) -> None:
    for mask in (Mask(70), masked(None, 200, "packed and padded")):
        agree(drawn(140, 200, dtype=dtype, kv_heads=kv_heads, group=group), mask)
        agree(drawn(140, 200, dtype=dtype, kv_heads=kv_heads, group=group), mask, with_lse=False)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_longer_than_a_block_of_the_backward_equal_the_formula(dtype: torch.dtype) -> None:
    """Longer than a block of the backward, with a run of keys that no query sees."""
    agree(drawn(1500, 1500, dtype=dtype), Mask(100))
    real = torch.ones(2, 1500, dtype=torch.bool)
    real[0, :1000], real[1, 300:] = False, False
    agree(drawn(1500, 1500, dtype=dtype), Mask(100, real, torch.arange(1500).div(300).long().expand(2, -1)))
    agree(drawn(40, 1500, dtype=dtype), masked(None, 1500, "packed"))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_equals_the_formula(dtype: torch.dtype) -> None:
    plain = drawn(130, 200, dtype=dtype, kv_heads=2)
    expected = agree(plain, Mask(70))
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in plain]
    sliced = [torch.cat([x, x], dim=-1)[..., ::2].copy_(x) for x in plain]
    shifted = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in plain]
    for layout in (transposed, sliced, shifted):
        actual = everything(native.native, layout, Mask(70))
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
    agree([x[:1, :1].expand(2, x.shape[1], -1, -1) for x in plain], Mask(70))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["ones", "transposed"])
def test_a_gradient_of_any_layout(kind: str, dtype: torch.dtype) -> None:
    inputs = [x.requires_grad_() for x in drawn(100, 100, dtype=dtype)]
    out, _ = native.native(request(inputs, Mask(30)))
    same = torch.ones_like(out.transpose(1, 2)).transpose(1, 2) if kind == "transposed" else torch.ones(()).to(dtype)
    actual = torch.autograd.grad(out, inputs, same.expand_as(out), retain_graph=True)
    for one, other in zip(actual, torch.autograd.grad(out, inputs, torch.ones(out.shape, dtype=dtype)), strict=True):
        assert torch.equal(one, other)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", some(KINDS, "plain", "packed and padded", "nothing in a row"))
def test_all_of_every_output_is_written(poisoned: None, kind: str, dtype: torch.dtype) -> None:
    assert torch.empty(9).isnan().all()
    for window, queries in [(None, 201), (9, 201), (9, 70), (65, 70)]:
        agree(drawn(queries, 201, dtype=dtype), masked(window, 201, kind))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_hidden_and_finite_changes_nothing(dtype: torch.dtype) -> None:
    plain = drawn(200, 200, dtype=dtype)
    mask = masked(50, 200, "left")
    changed = [x.clone() for x in plain]
    for x in changed[1:]:
        x[1, :, : 200 // 3] = 3e38
    actual = [everything(native.native, inputs, mask) for inputs in (plain, changed)]
    assert all(torch.equal(actual[0][name], actual[1][name]) for name in actual[0])


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_any_size_do_not_overflow(dtype: torch.dtype) -> None:
    q, k, v = drawn(200, 200, dtype=dtype)
    for factor in (300.0, 1e-30):
        actual = everything(native.native, [q * factor, k, v], Mask(50))
        assert all(tensor.isfinite().all() for tensor in actual.values())


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_does_not_show(dtype: torch.dtype) -> None:
    inputs, threads, actual = drawn(300, 300, dtype=dtype, kv_heads=3), torch.get_num_threads(), []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            actual.append(everything(native.native, inputs, masked(100, 300, "both")))
    finally:
        torch.set_num_threads(threads)
    for other in actual[1:]:
        assert all(torch.equal(actual[0][name], other[name]) for name in other)


@needs_native
def test_autocast_is_bfloat16_inputs() -> None:
    narrow = drawn(256, 256, dtype=torch.bfloat16)
    leaves, plain = [x.float().requires_grad_() for x in narrow], [x.clone().requires_grad_() for x in narrow]
    with only("native"):
        with torch.autocast("cpu", torch.bfloat16):
            out, _ = attend(*leaves, Mask(64))
            actual = torch.autograd.grad(out.sum(), leaves)
        expected, _ = attend(*plain, Mask(64))
    assert torch.equal(out, expected)
    for one, other in zip(actual, torch.autograd.grad(expected.sum(), plain), strict=True):
        assert torch.equal(one, other.float())


@needs_native
def test_gradients_only_of_what_asks_for_them_once_and_none_in_inference() -> None:
    inputs = drawn(256, 256)
    full = everything(native.native, inputs, Mask(64), 0.125, with_lse=False)
    inputs[1].requires_grad_()
    with only("native"):
        out, _ = attend(*inputs, Mask(64))
        seed = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).float()
        (actual,) = torch.autograd.grad(out, inputs[1], seed)
        assert torch.equal(actual, full["dk"])
        (twice,) = torch.autograd.grad(attend(*inputs, Mask(64))[0].square().sum(), inputs[1], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            twice.sum().backward()
        with torch.inference_mode():
            assert torch.equal(attend(*(x + 0 for x in inputs), Mask(64))[0], out)


# -- decode


def decoded(inputs: list[Tensor], mask: Mask, **options: Any) -> list[Tensor]:
    """Compare the decode kernel, for any number of keys, with the formula in float64; return output and log-sum-exp."""
    actual = native.decode(request(inputs, mask, **options))
    expected = reference.KERNEL.run(request([x.double() for x in inputs], mask, **options))
    tensors = []
    for one, other, limit in zip(actual, expected, TOLERANCE[inputs[0].dtype], strict=False):
        assert one is not None
        assert other is not None
        assert one.shape == other.shape
        assert torch.equal(one.isneginf(), other.isneginf())
        truth = other.masked_fill(other.isneginf(), 0.0)
        error = (one.double().masked_fill(other.isneginf(), 0.0) - truth).norm() / truth.norm().clamp(min=1e-30)
        assert error <= limit, f"off by {error:.1e}"
        tensors.append(one)
    return tensors


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 3, 16])
def test_decode_equals_the_formula(queries: int, dtype: torch.dtype) -> None:
    for keys, window in [(queries, None), (64, None), (65, 50), (1030, None), (2100, 1200)]:
        decoded(drawn(queries, keys, dtype=dtype), Mask(window))
    for kv_heads, group in [(3, 1), (2, 7)]:
        decoded(drawn(queries, 300, dtype=dtype, kv_heads=kv_heads, group=group), Mask(), softcap=2.0)
    for kind in KINDS:
        decoded(drawn(queries, 1100, dtype=dtype), masked(None, 1100, kind))


@needs_native
@pytest.mark.parametrize(("size", "dtype"), some(EVERY, (80, torch.bfloat16)))
def test_decode_of_any_head_size_equals_the_formula(size: int, dtype: torch.dtype) -> None:
    decoded(drawn(2, 1100, size=size, dtype=dtype), Mask(), scale=size**-0.5)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_of_any_layout_by_any_threads_is_the_same(poisoned: None, dtype: torch.dtype) -> None:
    plain, threads = drawn(2, 1100, dtype=dtype, kv_heads=3), torch.get_num_threads()
    expected = decoded(plain, Mask(900))
    layouts = [
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in plain],
        [torch.cat([x, x], dim=2)[:, :, : x.shape[2]] for x in plain],
        [torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for x in plain],
    ]
    try:
        for count, inputs in zip((1, 2, 7), layouts, strict=True):
            torch.set_num_threads(count)
            assert all(map(torch.equal, decoded(inputs, Mask(900)), expected))
    finally:
        torch.set_num_threads(threads)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_any_size_do_not_overflow_in_decode(dtype: torch.dtype) -> None:
    q, k, v = drawn(2, 2000, dtype=dtype)
    for factor in (300.0, 1e-30):
        for softcap in (None, 2.0):
            out, lse = native.decode(request([q * factor, k, v], Mask(), softcap=softcap))
            assert out.isfinite().all()
            assert lse is not None
            assert lse.isfinite().all()


@needs_native
def test_decode_serves_few_queries_over_many_keys(caplog: pytest.LogCaptureFixture) -> None:
    def chosen(queries: int, keys: int, dtype: torch.dtype, **options: Any) -> str:
        q, k = torch.zeros(1, 2, queries, 64, dtype=dtype), torch.zeros(1, 1, keys, 64, dtype=dtype)
        return choose(Request(q, k, k, options.pop("mask", Mask()), 1.0, **options)).name

    for dtype in (torch.float32, torch.bfloat16):
        assert chosen(1, 512, dtype) == chosen(16, 512, dtype) == chosen(1, 512, dtype, softcap=9.0) == "decode"
        assert chosen(1, 511, dtype) == "fused"
    assert chosen(17, 4096, torch.bfloat16) == chosen(2, 300, torch.bfloat16, mask=Mask(9)) == "banded"
    assert not [message for message in caplog.messages if "attention uses" in message]
    q, k = torch.zeros(1, 1, 1, 64, requires_grad=True), torch.zeros(1, 1, 4096, 64)
    assert native.DECODE.declines(Request(q, k, k, Mask(), 1.0)) == "it has no gradient"


@needs_native
def test_memory_grows_with_the_length() -> None:
    """Law 7 for tensors; besides them each thread needs a copy of one head and its gradients."""
    bytes_of = []
    for length in (1024, 2048, 4096):
        inputs = [x.requires_grad_() for x in drawn(length, length)]
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            out, _ = native.native(request(inputs, Mask(64)))
            torch.autograd.grad(out.sum(), inputs)
        bytes_of.append(sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages()))
    assert bytes_of[2] <= 4.1 * bytes_of[0]
    assert bytes_of[1] <= 2.1 * bytes_of[0]


# -- the table


@needs_native
def test_it_serves_what_it_is_made_for() -> None:
    def chosen(queries: int, keys: int, mask: Mask, **options: Any) -> str:
        q, k = torch.zeros(1, 2, queries, 64), torch.zeros(1, 1, keys, 64)
        return choose(Request(q, k, k, mask, 1.0, **options)).name

    assert chosen(512, 512, Mask(64)) == chosen(512, 600, Mask(64)) == "native"
    assert chosen(512, 512, Mask(keys=torch.arange(512)[None] < 500)) == "native"
    assert chosen(512, 512, Mask(), with_lse=False) == "fused"
    assert chosen(512, 512, Mask(64), softcap=9.0) == "native"
    assert (
        chosen(512, 512, Mask(64), slopes=torch.ones(2)) == chosen(512, 512, Mask(), slopes=torch.ones(2)) == "native"
    )
    assert chosen(255, 512, Mask(64)) == "banded"


@pytest.mark.parametrize("changed", [{"v": torch.zeros(1, 1, 9, 16)}, {"k": torch.zeros(1, 1, 9, 64).bfloat16()}])
def test_runs_of_keys_unlike_their_values_are_declined(changed: dict[str, Tensor]) -> None:
    """The kernel would read beyond them."""
    edges, keys = torch.zeros(1, 256, dtype=torch.long), {"k": torch.zeros(1, 1, 9, 64), "v": torch.zeros(1, 1, 9, 64)}
    tensors = {"q": torch.zeros(1, 1, 256, 64), **keys, **changed, "first": edges, "end": edges}
    assert native.attend_ranges(**tensors, scale=1.0) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"size": 72}, "80, 96, 128, 256, not 72"),
        ({"queries": 255}, "fewer than 256"),
        ({"dtype": torch.float64}, "float64"),
        ({"scale": -1.0}, "positive"),
        ({"slopes": torch.ones(1), "softcap": 2.0}, "ALiBi with a softcap"),
        ({"slopes": torch.ones(1, requires_grad=True)}, "no gradient"),
        ({"mask": Mask(keys=torch.arange(256)[None] % 100 != 50)}, "between the tokens"),
    ],
)
def test_what_it_declines(changes: dict[str, Any], reason: str) -> None:
    options = {"size": 64, "queries": 256, "dtype": torch.float32, "scale": 1.0, "mask": Mask(), **changes}
    size, queries, dtype = (options.pop(name) for name in ("size", "queries", "dtype"))
    q, k = torch.zeros(1, 1, queries, size, dtype=dtype), torch.zeros(1, 1, 256, size, dtype=dtype)
    declined = native.KERNEL.declines(Request(q=q, k=k, v=k, **options))
    assert declined is not None
    assert reason in declined


def test_an_x86_that_has_no_avx2_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "IS_ARM", False)
    monkeypatch.setattr(compiler, "cpu_flags", lambda: frozenset({"avx", "fma"}))
    assert native.KERNEL.declines(_REQUEST) == "this CPU does not report avx2, f16c"
    assert native.instructions() == native.KERNEL.declines(_REQUEST)
    assert choose(_REQUEST).name in {"fused", "banded"}
    assert [kernel.name for kernel in KERNELS].index("native") < [kernel.name for kernel in KERNELS].index("banded")


# -- other instruction sets


def agrees_everywhere(size: int, dtype: torch.dtype) -> None:
    """Windows, lengths, padding, documents, groups of heads, a softcap and ALiBi, in few calls."""
    for queries, keys, mask in [
        (129, 129, Mask(65)),
        (70, 301, Mask()),
        (67, 300, masked(63, 300, "packed and padded")),
        (90, 90, masked(None, 90, "nothing in a row")),
    ]:
        agree(drawn(queries, keys, size=size, dtype=dtype), mask, scale=size**-0.5)
    agree(drawn(100, 150, size=size, dtype=dtype, kv_heads=2, group=3), Mask(40), scale=size**-0.5, softcap=2.0)
    agree(drawn(100, 150, size=size, dtype=dtype), Mask(40), scale=size**-0.5, slopes=torch.tensor([0.1, 2.0]))
    decoded(drawn(3, 1100, size=size, dtype=dtype), masked(1070, 1100, "left"), scale=size**-0.5, softcap=2.0)


@needs_native
@pytest.mark.skipif(compiler.IS_ARM, reason="not an x86")
@pytest.mark.parametrize(("size", "dtype"), some(EVERY, (80, torch.bfloat16)))
def test_avx2_equals_the_formula(size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "CPU", "-march=x86-64-v3")
    assert native.instructions() == "AVX2"
    agrees_everywhere(size, dtype)


@needs_native
@pytest.mark.full
@pytest.mark.skipif("avx512bw" not in compiler.cpu_flags(), reason="no AVX-512")
@pytest.mark.parametrize(("size", "dtype"), EVERY)
def test_avx_512_without_bfloat16_equals_the_formula(
    size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "CPU", "-march=skylake-avx512")
    assert native.instructions() == "AVX-512"
    agrees_everywhere(size, dtype)


@needs_native
@pytest.mark.skipif("amx_bf16" not in compiler.cpu_flags(), reason="no AMX")
@pytest.mark.parametrize("size", some(SIZES, 64))
def test_where_the_system_gives_no_matrix_registers_others_serve(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    library = compiler.library

    def refused(source: Path, *options: str) -> Any:
        built: Any = library(source, *options)
        built.permitted = lambda: False
        return built

    with_registers = native.instructions()
    monkeypatch.setattr(native, "_loaded", functools.cache(native._loaded.__wrapped__))
    monkeypatch.setattr(compiler, "library", refused)
    assert with_registers == "AVX-512, bfloat16 by matrix registers (AMX)"
    assert native.instructions() == "AVX-512, bfloat16 by dot products"
    agrees_everywhere(size, torch.bfloat16)


CROSS, EMULATOR = (
    shutil.which("aarch64-linux-gnu-g++"),
    shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static"),
)


class Emulated:
    """The library native.cpp as `ctypes` would load it, but each call is a process on an emulated ARM CPU."""

    def __init__(self, folder: Path, cpu: str, *options: str):
        self.program, self.memory = folder / "native", folder / "memory"
        command = [str(CROSS), cpu, "-O1", "-std=c++17", "-static", "-pthread", *options]
        main = Path(__file__).with_name("native_main.cpp")
        subprocess.run([*command, "-include", str(native.SOURCE), str(main), "-o", str(self.program)], check=True)

    def run(self, direction: str, tensors: dict[str, Tensor], *options: Any) -> None:
        call = native.arguments(tensors, *options)
        memory, offsets = bytearray(ctypes.sizeof(call)), {}
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in offsets:
                memory += bytes(-len(memory) % 64)
                offsets[storage.data_ptr()] = len(memory)
                memory += ctypes.string_at(storage.data_ptr(), storage.nbytes())
            offset = offsets[storage.data_ptr()] + tensor.data_ptr() - storage.data_ptr()
            field = getattr(call, name)
            setattr(call, name, offset) if isinstance(field, int) else setattr(field, "data", offset)
        memory[: ctypes.sizeof(call)] = bytes(call)
        self.memory.write_bytes(memory)
        subprocess.run([str(EMULATOR), "-cpu", "max", str(self.program), str(self.memory), direction], check=True)
        written = self.memory.read_bytes()
        for name in {"dq", "dk", "dv"} if direction == "backward" else {"out", "lse"}:
            storage = tensors[name].untyped_storage()
            start = offsets[storage.data_ptr()]
            ctypes.memmove(storage.data_ptr(), written[start : start + storage.nbytes()], storage.nbytes())


@pytest.mark.skipif(CROSS is None or EMULATOR is None, reason="no aarch64-linux-gnu-g++ and qemu-aarch64")
@pytest.mark.parametrize(
    ("size", "dtype", "cpu"),
    some(
        [*((*one, "armv8-a") for one in EVERY), *((size, torch.bfloat16, "armv8.6-a") for size in SIZES)],
        (64, torch.float32, "armv8-a"),
    ),
)
def test_neon_equals_the_formula(
    size: int, dtype: torch.dtype, cpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """armv8.6-a multiplies bfloat16."""
    emulated = Emulated(tmp_path, f"-march={cpu}", *native.options(dtype, size))
    monkeypatch.setattr(native, "_run", emulated.run)
    agrees_everywhere(size, dtype)


@needs_native
@pytest.mark.full
@pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang++")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_clang_equals_the_formula(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "clang++")
    monkeypatch.setattr(native, "_loaded", functools.cache(native._loaded.__wrapped__))
    agrees_everywhere(64, dtype)


# -- building

_ATTEND = (
    "import logging; logging.basicConfig(format='%(message)s')\n"
    "import torch; from zebra.kernels import Mask, attend\n"
    "x = torch.ones(1, 1, 256, 64); print(attend(x, x, x, Mask(9))[0].mean().item())"
)


def started(cache: Path, **environment: str) -> subprocess.Popen[str]:
    variables = {**os.environ, "XDG_CACHE_HOME": str(cache), **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", _ATTEND], env=variables, stdout=pipe, stderr=pipe, text=True)


@needs_native
@pytest.mark.full
def test_two_processes_may_build_at_once(tmp_path: Path) -> None:
    both = [started(tmp_path) for _ in range(2)]
    outputs = [one.communicate(timeout=120) for one in both]
    assert [out for out, _ in outputs] == ["1.0\n"] * 2, outputs
    assert all("banded" not in err for _, err in outputs)
    (library,) = (tmp_path / "zebra" / "kernels").iterdir()
    assert library.suffix == ".so"
    before = library.stat().st_mtime_ns
    assert started(tmp_path).communicate(timeout=120) == ("1.0\n", "")
    assert library.stat().st_mtime_ns == before


@needs_native
@pytest.mark.parametrize("command", some(["false", "no-such-compiler"], "false"))
def test_a_compiler_that_fails_leaves_the_request_to_the_next(command: str, tmp_path: Path) -> None:
    out, err = started(tmp_path, CXX=command).communicate(timeout=120)
    assert out == "1.0\n"
    assert "attention uses the kernel banded, because native: " in err
    assert command in err
    assert not list(tmp_path.rglob("*.so"))


def test_no_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(compiler.Unbuilt, match="no C\\+\\+ compiler"):
        compiler.library(native.SOURCE)


SMALL = 'extern "C" int answer() { return 42; }'


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The source of a library of one function, whose cache is in the same folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "small.cpp"
    source.write_text(SMALL)
    return source


@needs_native
@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_library_is_compiled_again_and_never_loaded(damage: str, small_library: Path) -> None:
    """Loading a truncated library kills the process."""
    assert compiler.library(small_library).answer() == 42
    (path,) = (small_library.parent / "cache").rglob("*.so")
    content = path.read_bytes()
    flipped = content[:-200] + bytes([content[-200] ^ 1]) + content[-199:]
    path.unlink()  # the one that is loaded stays whole
    path.write_bytes({"truncated": content[:4096], "flipped": flipped, "empty": b""}[damage])
    assert compiler.library(small_library).answer() == 42
    assert path.read_bytes()[-32:] == hashlib.sha256(path.read_bytes()[:-32]).digest()


@needs_native
def test_a_library_that_others_could_have_written_is_not_loaded(
    small_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where others can write, anything may stand in the cache, its checksum included."""
    cache = small_library.parent / "cache"
    compiler.library(small_library)
    monkeypatch.setattr(compiler.ctypes, "CDLL", Path)
    assert cache in compiler.library(small_library).parents
    cache.chmod(0o777)
    private = compiler.library(small_library)
    assert cache not in private.parents
    assert private.parent.stat().st_mode & 0o077 == 0
    cache.chmod(0o1777)  # others can add to it, and not replace what is this user's
    assert cache in compiler.library(small_library).parents
