"""The block mask by arithmetic equals torch's from the full mask; the mask and score functions equal the formula.

torch's dense form has no backward on a CPU: gradients are tested on a GPU, in test_kernels_on_gpu.py.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from conftest import some
from test_kernels import chunks, drawn, packed, padding
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torch_flex
from torch.utils._python_dispatch import TorchDispatchMode

from zebra.kernels import Mask, Request, flex, reference

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's uncompiled form; it says once that it is slow."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torch_flex, "_WARNINGS_SHOWN", {"flex_attention_performance"})


def masks(window: int | None, kind: str, documents: bool, keys: int) -> Mask:
    return Mask(window, padding(kind, 3, keys), packed(3, keys) if documents else None)


@pytest.mark.parametrize("keys", some([1, 127, 128, 129, 300, 512], 300))
@pytest.mark.parametrize("window", some([None, 1, 129], None, 129))
@pytest.mark.parametrize("kind", ["none", "both"])
@pytest.mark.parametrize("documents", [False, True], ids=["one", "packed"])
def test_the_block_mask_is_the_one_of_the_whole_mask(documents: bool, kind: str, window: int | None, keys: int) -> None:
    mask = masks(window, kind, documents, keys)
    for queries in chunks(keys):
        actual = flex.block_mask(mask, 3, queries, keys, CPU)
        expected = torch_flex.create_block_mask(actual.mask_mod, 3, None, queries, keys, device="cpu")
        j = torch.arange(keys)
        visible = mask.visible(j[keys - queries :], j).expand(3, 1, -1, -1)
        dense = torch_flex.create_mask(actual.mask_mod, 3, 1, queries, keys, device="cpu")
        assert torch.equal(dense, visible)
        for part in ("kv", "full_kv", "q", "full_q"):
            count = getattr(actual, f"{part}_num_blocks")
            assert torch.equal(count, getattr(expected, f"{part}_num_blocks")), part
            ours, other = getattr(actual, f"{part}_indices"), getattr(expected, f"{part}_indices")
            used = torch.arange(ours.shape[-1]) < count[..., None]
            assert torch.equal(ours[used], other[used]), part
        assert actual.shape == expected.shape
        assert actual.BLOCK_SIZE == expected.BLOCK_SIZE


@pytest.mark.parametrize("block", some([1, 2, 3, 8], 3, 8))
def test_blocks_of_every_size_by_counting(block: int) -> None:
    """Small blocks meet every edge: documents shorter than a block, padding inside, windows that end in one."""
    generator = torch.Generator().manual_seed(block)
    for keys in (1, 7, 16, 23):
        for window in (None, 1, 3, 8, 11):
            for queries in chunks(keys):
                real = torch.rand(3, keys, generator=generator) < 0.8
                numbers = (torch.rand(3, keys, generator=generator) < 0.15).cumsum(1)
                for mask in (
                    Mask(window),
                    Mask(window, real),
                    Mask(window, None, numbers),
                    Mask(window, real, numbers),
                ):
                    first, end = mask.key_ranges(queries, keys, CPU)
                    partial, full = flex.blocks(first, end, mask.keys, keys, block)
                    j = torch.arange(keys)
                    visible = mask.visible(j[keys - queries :], j)[:, 0]
                    for row in range(partial.shape[1]):
                        for column in range(partial.shape[2]):
                            tile = visible[:, row * block :, column * block :][:, :block, :block]
                            seen = tile.flatten(1).sum(1).expand(len(partial))
                            assert torch.equal(full[:, row, column], seen == block * block)
                            assert torch.equal(partial[:, row, column], (seen > 0) & (seen < block * block))


@pytest.mark.parametrize("dtype", some([torch.float64, torch.float32, torch.bfloat16], torch.float64))
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("kind", some(["none", "left", "both"], "both"))
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_output_and_lse_equal_the_formula(softcap: float | None, kind: str, window: int | None, dtype: Any) -> None:
    for documents in (False, True):
        mask = masks(window, kind, documents, 150)
        for queries in (150, 40, 1):
            q, k, v = drawn(queries, 150, batch=3, size=16, dtype=dtype)
            request = Request(q, k, v, mask, 0.3, softcap)
            out, lse = flex.flex(request)
            expected, expected_lse = reference.reference(request)
            tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
            torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
            assert lse is not None
            assert expected_lse is not None
            torch.testing.assert_close(lse.to(expected_lse.dtype), expected_lse, rtol=tolerance, atol=tolerance)
            assert flex.flex(Request(q, k, v, mask, 0.3, softcap, with_lse=False))[1] is None


@pytest.mark.parametrize("compilations", some([3, 12], 3))
def test_lengths_and_windows_share_one_compilation(compilations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than torch's limit of eight compilations are compiled too, not run dense."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    torch.compiler.reset()
    attention = flex._compiled.__wrapped__()

    def run(queries: int, keys: int, window: int | None, **options: Any) -> int:
        q, k, v = drawn(queries, keys, dtype=torch.float32, **options)
        mask = flex.block_mask(Mask(window), 2, queries, keys, CPU)
        out, _ = attention(q, k, v, block_mask=mask, enable_gqa=True, return_aux=torch_flex.AuxRequest(lse=True))
        expected, _ = reference.reference(Request(q, k, v, Mask(window), q.shape[3] ** -0.5))
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        return int(counter.frame_count)

    assert run(300, 300, 50, size=16) == 1
    for length, window in ((400, 50), (401, 51), (700, None)):
        assert run(length, length, window, size=16) == 1
    assert run(150, 700, 90, size=16) == run(151, 800, 91, size=16) == 2  # a chunk
    for n in range(3, compilations):
        assert run(300, 300, 50, size=8 + 8 * n) == n
    torch.compiler.reset()


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_has_the_size_of_the_mask() -> None:
    length = 8192
    mask = Mask(500, torch.arange(length)[None] > 70, (torch.arange(length) // 3000)[None])
    with Largest() as mode:
        flex.block_mask(mask, 1, length, length, CPU)
    assert mode.elements <= max(2 * length, (length // flex.BLOCK + 1) ** 2)


def test_why_it_declines() -> None:
    q, k, v = drawn(4, 4, size=16, dtype=torch.float32)
    assert "not on cpu" in str(flex.KERNEL.declines(Request(q, k, v, Mask(), 1.0)))
    small: list[Tensor] = [x[..., :8] for x in (q, k, v)]
    assert "at least 16" in str(flex.KERNEL.unsupported_reason(Request(*small, Mask(), 1.0)))
    assert flex.KERNEL.unsupported_reason(Request(q, k, v, Mask(), 1.0)) is None
