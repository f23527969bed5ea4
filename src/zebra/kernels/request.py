"""What a kernel is asked, and how it declines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from zebra import masks


@dataclass(frozen=True)
class Mask:
    """Which keys a causal query sees. All parts apply together; None leaves a part out.

    Attributes:
        window: keys that a query sees, its own included; None is global.
        keys: (B, S) bool, True where a key is a real token and False where it is padding, left or right.
        documents: (B, S) integers, the document of each key, never falling along S: packed documents stand one after
            another and do not see each other.
        sinks: first real tokens of a row, or of each of its documents, that are seen beside the window.
    """

    window: int | None = None
    keys: Tensor | None = None
    documents: Tensor | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"a window counts the keys that a query sees, its own included: at least 1; got {self.window}."
            )

    def visible(self, i: Tensor, j: Tensor) -> Tensor:
        """The mask as a tensor over key indices, (1 or B, 1, queries, keys), for queries at `i` and keys at `j`."""
        row, column = i[:, None], j[None, :]
        seen: Tensor = masks.causal(row, column) if self.window is None else masks.within(row, column, self.window)
        seen = seen[None, None]
        if self.window is not None and self.sinks:
            first = self.first_tokens(int(j.max()) + 1, j.device)[:, None, None, j]
            seen = seen | (masks.causal(row, column) & masks.sink(column, first, self.sinks))
        if self.documents is not None:
            seen = seen & masks.same_document(self.documents[:, None, i, None], self.documents[:, None, None, j])
        if self.keys is not None:
            seen = seen & self.keys[:, None, None, j]
        return seen

    def first_tokens(self, count: int, device: torch.device) -> Tensor:
        """The first real token of each key's document, (1 or B, count): `count` where there is none."""
        index = torch.arange(count, device=device)
        first = torch.zeros_like(index)[None]
        if self.documents is not None:
            begins = nn.functional.pad(self.documents.diff(dim=1) != 0, (1, 0))
            first = torch.where(begins, index, 0).cummax(dim=1).values
        if self.keys is not None:
            next_real = torch.where(self.keys.bool(), index, count).flip(1).cummin(dim=1).values.flip(1)
            first = next_real.gather(1, first.expand(len(next_real), -1))
        return first

    def after(self, start: int) -> Mask:
        """The same mask for the keys from `start` on."""
        return replace(
            self,
            keys=None if self.keys is None else self.keys[:, start:],
            documents=None if self.documents is None else self.documents[:, start:],
        )

    def before(self, end: int) -> Mask:
        """The same mask for the keys before `end`."""
        return replace(
            self,
            keys=None if self.keys is None else self.keys[:, :end],
            documents=None if self.documents is None else self.documents[:, :end],
        )

    def without_window(self) -> Mask:
        """The same mask with a global reach."""
        return replace(self, window=None)


@dataclass(frozen=True)
class Request:
    """The arguments of `attend`, checked and completed. `arguments` holds only what nobody has taken yet."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    scale: float
    softcap: float | None = None
    slopes: Tensor | None = None
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
        """Whether a backward may follow."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.q, self.k, self.v))


@dataclass(frozen=True)
class Kernel:
    """A kernel: its name, what it says of itself for `zebra doctor`, and its two functions.

    What it can do stands in the fields, so that the common reasons to decline are written once.
    """

    name: str
    summary: str
    run: Callable[[Request], tuple[Tensor, Tensor | None]]
    devices: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
    backward: bool = True
    lse: bool = True
    softcap: bool = False
    sinks: bool = False
    slopes: bool = False
    min_queries: int = 1
    """Queries, below which it does not pay."""
    unsupported_reason: Callable[[Request], str | None] = lambda request: None

    def declines(self, request: Request) -> str | None:
        """Why the kernel cannot serve this request, or None where it can."""
        q, k, v = request.q, request.k, request.v
        if self.devices is not None and q.device.type not in self.devices:
            return f"it runs on {', '.join(sorted(self.devices))}, not on {q.device.type}"
        if not q.dtype == k.dtype == v.dtype:
            return f"q, k and v have one dtype, not {q.dtype}, {k.dtype} and {v.dtype}"
        if q.dtype not in self.dtypes:
            return f"it does not take {q.dtype}"
        if request.arguments:
            return f"it does not know the argument {', '.join(sorted(request.arguments))}"
        if request.queries < self.min_queries:
            return f"it does not pay for fewer than {self.min_queries} queries"
        return self._lacks(request) or self.unsupported_reason(request)

    def _lacks(self, request: Request) -> str | None:
        if request.softcap is not None and not self.softcap:
            return "it has no softcap"
        if request.slopes is not None and not self.slopes:
            return "it has no ALiBi"
        if request.mask.sinks and request.mask.window is not None and not self.sinks:
            return "it has no sinks, which zebra.kernels.sinks merges"
        if request.with_lse and not self.lse:
            return "it gives no log-sum-exp"
        if not self.backward and request.wants_gradient:
            return "it has no backward"
        return None
