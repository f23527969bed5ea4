"""What a kernel gets, a request with its mask, and what a kernel is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from zebra import masks


@dataclass(frozen=True)
class Mask:
    """Which keys a causal query sees. All parts apply together; a part that is None restricts nothing.

    Attributes:
        window: number of keys that a query sees, its own included; None is global.
        keys: (B, S) bool, True where a key is a real token and False where it is padding.
        documents: (B, S) integers, the document of each key, non-decreasing along S: packed documents follow one
            another and do not see each other.
        sinks: number of first real tokens of a sequence, or of each of its documents, seen in addition to the window.
    """

    window: int | None = None
    keys: Tensor | None = None
    documents: Tensor | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"a window must be at least 1, as it counts the keys that a query sees, its own included; got "
                f"{self.window}."
            )

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """The mask as a tensor, (1 or B, 1, n, m), for queries at the key indices i: (n,) and keys at j: (m,)."""
        row, column = i[:, None], j[None, :]
        seen = masks.causal(row, column) if self.window is None else masks.within(row, column, self.window)
        seen = seen[None, None]
        if self.window is not None and self.sinks:
            first = self.first_tokens(int(j.max()) + 1, j.device)[:, None, None, j]
            seen = seen | (masks.causal(row, column) & masks.sink(column, first, self.sinks))
        if self.documents is not None:
            seen = seen & masks.same_document(self.documents[:, None, i, None], self.documents[:, None, None, j])
        if self.keys is not None:
            seen = seen & self.keys[:, None, None, j]
        return seen

    def document_starts(self, keys: int, device: torch.device) -> Tensor:
        """The first key of each key's document, padding counted: (1 or B, S) int64."""
        index = torch.arange(keys, device=device)
        if self.documents is None:
            return torch.zeros_like(index)[None]
        starts = pad(self.documents[:, 1:] != self.documents[:, :-1], (1, 0))
        return torch.where(starts, index, 0).cummax(dim=1).values

    def first_tokens(self, keys: int, device: torch.device) -> Tensor:
        """The first real token of each key's document: (1 or B, S) int64, S where there is none."""
        starts = self.document_starts(keys, device)
        if self.keys is None:
            return starts
        index = torch.arange(keys, device=device)
        next_token = torch.where(self.keys.bool(), index, keys).flip(1).cummin(dim=1).values.flip(1)
        return next_token.gather(1, starts.expand_as(next_token))

    def key_ranges(self, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The contiguous run of keys that each query sees, [first, end): two (1 or B, T) int64.

            keys      . . . a a a a | b b b b .      padding, two packed documents, padding
            queries         [ ]
                            [   ]                    window 3
                              [   ]    [ ]           first = max(i - w + 1, the document's start, the first real key)
                                       [   ]         end   = min(i + 1, the end of the real keys)

        Neither decreases along T, and first >= end where a query sees no key. Padding between the tokens of a sequence
        (`has_padding_holes`) is included in the runs; sinks are not.
        """
        i = torch.arange(keys - queries, keys, device=device)
        if self.documents is None:
            first = torch.zeros_like(i)[None]
        else:
            first = self.document_starts(keys, device)[:, keys - queries :]
        if self.window is not None:
            first = torch.maximum(first, i - self.window + 1)
        end = (i + 1)[None]
        if self.keys is not None:
            real = self.keys.to(torch.int8)
            tokens = real.any(dim=1, keepdim=True)
            first = torch.maximum(first, torch.where(tokens, real.argmax(dim=1, keepdim=True), keys))
            padding_behind = real.flip(1).argmax(dim=1, keepdim=True)
            end = torch.minimum(end, torch.where(tokens, keys - padding_behind, 0))
        return first, end

    def has_padding_holes(self, *, within_documents: bool = False) -> bool:
        """Whether there is padding between the real tokens of a sequence, or of one of its packed documents."""
        if self.keys is None:
            return False
        real, keys = self.keys.bool(), self.keys.shape[1]
        starts = (self if within_documents else Mask()).document_starts(keys, real.device)
        follows = pad(real[:, :-1] & (starts[:, 1:] == starts[:, :-1]), (1, 0))
        runs = torch.zeros(real.shape, dtype=torch.int32, device=real.device)
        runs.scatter_add_(1, starts.expand(real.shape), (real & ~follows).int())
        return bool((runs > 1).any())

    def sliced(self, start: int = 0, end: int | None = None) -> Mask:
        """The same mask for the keys [start, end)."""
        keys, documents = (None if x is None else x[:, start:end] for x in (self.keys, self.documents))
        return replace(self, keys=keys, documents=documents)


def unit_stride(x: Tensor) -> Tensor:
    """The same values with stride 1 in the last dimension (..., D), as kernels and torch's operators read memory."""
    x = x.resolve_neg()
    return x if x.stride(-1) == 1 else x.contiguous()


@dataclass(frozen=True)
class Request:
    """The arguments of `attend`, checked, with defaults filled in; `arguments` are those that it does not know."""

    q: Tensor  # (B, H, T, D)
    k: Tensor  # (B, K, S, D)
    v: Tensor  # (B, K, S, D), or of another head size
    mask: Mask
    scale: float
    softcap: float | None = None
    slopes: Tensor | None = None  # (H,), ALiBi's
    with_lse: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def queries(self) -> int:
        """T."""
        return self.q.shape[2]

    @property
    def keys(self) -> int:
        """S."""
        return self.k.shape[2]

    @property
    def wants_gradient(self) -> bool:
        """Whether a backward pass may follow."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.q, self.k, self.v))


@dataclass(frozen=True)
class Kernel:
    """A kernel: its name, a line for `zebra doctor`, its function, and what it supports.

    Attributes:
        run: returns the output (B, H, T, D), and the log-sum-exp (B, H, T) or None.
        devices: device types; None for any.
        gradients: the backward outside autograd: returns the gradients of q, k and v from a request, its output, its
            log-sum-exp and the gradients of both. None where the kernel has none of its own.
        value_sizes: whether values may have another head size than keys.
        min_queries, max_queries, min_keys: bounds of T and S outside which another kernel is better.
        unsupported_reason: why it cannot serve a request that the other fields allow, or None.
        slower_than: the name of a kernel further down the table that is faster for this request, or None. That one
            runs if it accepts.
    """

    name: str
    summary: str
    run: Callable[[Request], tuple[Tensor, Tensor | None]]
    devices: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
    softcap: bool = False
    sinks: bool = False
    slopes: bool = False
    value_sizes: bool = False
    min_queries: int = 1
    max_queries: int | None = None
    min_keys: int = 1
    unsupported_reason: Callable[[Request], str | None] = lambda request: None
    gradients: Callable[[Request, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None
    slower_than: Callable[[Request], str | None] = lambda request: None

    def does_not_pay(self, request: Request) -> str | None:
        """Why the request is too small or too large for the kernel to be worth running, or None."""
        if request.queries < self.min_queries:
            return f"it is not efficient for fewer than {self.min_queries} queries"
        if self.max_queries is not None and request.queries > self.max_queries:
            return f"it is not efficient for more than {self.max_queries} queries"
        if request.keys < self.min_keys:
            return f"it is not efficient for fewer than {self.min_keys:,} keys"
        return None

    def declines(self, request: Request) -> str | None:
        """Why the kernel cannot serve this request, or None where it can."""
        q, k, v = request.q, request.k, request.v
        if self.devices is not None and q.device.type not in self.devices:
            return f"it runs on {', '.join(sorted(self.devices))}, not on {q.device.type}"
        if not q.dtype == k.dtype == v.dtype:
            return f"q, k and v must have one dtype, not {q.dtype}, {k.dtype} and {v.dtype}"
        if q.dtype not in self.dtypes:
            return f"it does not support {q.dtype}"
        if k.shape[3] != v.shape[3] and not self.value_sizes:
            return f"it supports only values of the keys' head size, {k.shape[3]}, not {v.shape[3]}"
        if request.arguments:
            return f"it does not support the argument {', '.join(sorted(request.arguments))}"
        if (reason := self.does_not_pay(request)) is not None:
            return reason
        if request.softcap is not None and not self.softcap:
            return "it does not support a softcap"
        if request.slopes is not None and not self.slopes:
            return "it does not support ALiBi"
        if request.mask.sinks and request.mask.window is not None and not self.sinks:
            return "it does not support sinks, which zebra.kernels.sinks merges"
        return self.unsupported_reason(request)
