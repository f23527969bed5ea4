"""The kernel in C++ equals the formula, output, log-sum-exp and gradients; how it is built, and what it declines."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kernels import some
from torch import Tensor

from zebra.kernels import KERNELS, Mask, Request, attend, choose, compiler, native, only, reference


def request(inputs: list[Tensor], mask: Mask, scale: float = 0.3, **options: Any) -> Request:
    q, k, v = inputs
    return Request(q, k, v, mask, scale, **options)


_REQUEST = request([torch.zeros(1, 1, 256, 64)] * 3, Mask())
_REASON = native.KERNEL.declines(_REQUEST)
needs_native = pytest.mark.skipif(_REASON is not None, reason=f"native: {_REASON}")
needs_bfloat16 = pytest.mark.skipif("avx512_bf16" not in compiler.cpu_flags(), reason="no AVX-512 for bfloat16")

DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)]
TOLERANCE = {  # of out, lse and gradients, relative; at most half of it was measured
    torch.float32: (2e-6, 1e-6, 1e-5),
    torch.bfloat16: (6e-3, 1e-6, 2e-2),
}
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
    run: Any, inputs: list[Tensor], mask: Mask, scale: float = 0.3, with_lse: bool = True
) -> dict[str, Tensor]:
    """Output, log-sum-exp (-inf as 0), where it was -inf, and gradients of both, by a kernel's own function."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = run(request(leaves, mask, scale, with_lse=with_lse))
    generator = torch.Generator().manual_seed(9)
    roots, seeds = [out], [torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out.dtype)]
    actual = {"out": out}
    if with_lse:
        unseen = lse.isneginf()
        roots, actual = [*roots, lse], actual | {"lse": lse.masked_fill(unseen, 0.0), "unseen": unseen}
        seeds.append(torch.randn(lse.shape, dtype=torch.float64, generator=generator).to(lse.dtype))
    gradients = torch.autograd.grad(roots, leaves, seeds)
    return {name: x.detach() for name, x in (actual | dict(zip(("dq", "dk", "dv"), gradients, strict=True))).items()}


def agree(inputs: list[Tensor], mask: Mask, **options: Any) -> dict[str, Tensor]:
    """The kernel, whatever the length, against the formula in float64."""
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
        error = (tensor.double() - expected[name]).norm() / expected[name].norm().clamp(min=0.1 * tensor.numel() ** 0.5)
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
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("window", some([1, 2, 63, 64, 65, 500, None], 65, None))
def test_windows_and_lengths_equal_the_formula(window: int | None, size: int, dtype: torch.dtype) -> None:
    for queries, keys in [(1, 1), (31, 31), (32, 33), (63, 65), (64, 64), (65, 65), (129, 129), (70, 301), (255, 256)]:
        agree(drawn(queries, keys, size=size, dtype=dtype), Mask(window))


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
    """Longer than what the backward holds at a time, with a stretch of keys that nobody sees."""
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
@needs_bfloat16
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


@needs_native
def test_memory_grows_with_the_length() -> None:
    """Law 7, of the tensors; the threads' own memory is a copy of a head and its gradients."""
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
    assert chosen(255, 512, Mask(64)) == chosen(512, 512, Mask(64), softcap=9.0) == "banded"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"size": 96}, "64 and 128, not 96"),
        ({"queries": 255}, "fewer than 256"),
        ({"dtype": torch.float64}, "float64"),
        ({"scale": -1.0}, "positive"),
        ({"softcap": 2.0}, "softcap"),
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


def test_a_cpu_that_has_no_avx_512_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "cpu_flags", lambda: frozenset({"avx512f", "avx2"}))
    assert native.KERNEL.declines(_REQUEST) == "this CPU does not say that it has avx512bw, avx512dq"
    assert choose(_REQUEST).name in {"fused", "banded"}
    assert [kernel.name for kernel in KERNELS].index("native") < [kernel.name for kernel in KERNELS].index("banded")


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
    assert "attention runs by the kernel banded, because native: " in err
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
