"""How many layers may stay global: a number, a share, or as many as a cost allows.

    8                      8 layers
    0.25                   at most a quarter of them
    flops:0.5              as many as keep a prefill within half of the model's own FLOPs
    cache:4GiB@131072      as many as keep keys and values within 4 GiB, at 131,072 tokens

Every global layer costs the same, so a cost is a number of layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from zebra.errors import ZebraError
from zebra.plan.cost import Run, flops
from zebra.plan.fit import parse_bytes
from zebra.plan.memory import kv_bytes
from zebra.stripes import Stripes

_NOTATION = "Write 8 for 8 layers, 0.25 for a share of them, flops:0.5 or cache:4GiB@131072 for a cost."


@dataclass(frozen=True)
class Budget:
    """A budget of global layers, see the module.

    Attributes:
        unit: layers, share, flops or cache.
        amount: a number of layers, a share, or bytes.
        length: tokens of context at which a cost is estimated; None where the caller decides.
    """

    unit: str
    amount: float
    length: int | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read a budget.

        Raises:
            ZebraError: another notation, zero layers, a share that is not between 0 and 1.
        """
        match = re.fullmatch(r"(?:(flops|cache):)?([0-9.]+[A-Za-z]*)(?:@([0-9_]+))?", text.strip())
        if match is None or (match[3] and not match[1]):
            raise ZebraError(f"a budget is a number of global layers, a share or a cost; got {text!r}. {_NOTATION}")
        length = int(match[3]) if match[3] else None
        if match[1] == "cache":
            return cls("cache", parse_bytes(match[2]), length)
        if match[1] is None and match[2].isdecimal():
            if int(match[2]) < 1:
                raise ZebraError(f"a budget leaves at least 1 layer global; got {text!r}. {_NOTATION}")
            return cls("layers", int(match[2]))
        try:
            share = float(match[2])
        except ValueError:
            share = 0.0
        if not 0 < share < 1:
            raise ZebraError(f"a share lies between 0 and 1; got {text!r}. {_NOTATION}")
        return cls(match[1] or "share", share, length)

    def layers(self, candidates: Sequence[int], local: Stripes, run: Callable[[int | None], Run]) -> int:
        """How many of the model's global layers, the candidates, may stay global.

        Args:
            local: the layout that gives the window and sinks of the layers that become local.
            run: a prefill of the unchanged model at a length; called only for a budget of cost.

        Raises:
            ZebraError: a budget that leaves none, or that leaves all of them.
        """
        most = len(candidates)
        if self.unit in ("layers", "share"):
            count = int(self.amount if self.unit == "layers" else self.amount * most + 1e-9)
            if not 1 <= count < most:
                raise ZebraError(
                    f"of this model's {most} global layers a selection keeps 1 to {most - 1}; "
                    f"a budget of {self.amount:g} keeps {count}. Give another number."
                )
            return count
        unchanged = run(self.length)
        layouts = (replace(local, pattern=None, global_layers=tuple(candidates[:k])) for k in range(1, most + 1))
        runs = [replace(unchanged, stripes=stripes) for stripes in layouts]
        if self.unit == "flops":
            costs, limit = [sum(flops(one).values()) for one in runs], self.amount * sum(flops(unchanged).values())
        else:
            costs, limit = [kv_bytes(one) for one in runs], self.amount
        if costs[0] > limit or costs[-1] <= limit:
            scale, unit = (1, "FLOPs") if self.unit == "flops" else (2**20, "MiB")
            one, every, budget = (f"{cost / scale:,.4g} {unit}" for cost in (costs[0], costs[-1], limit))
            raise ZebraError(
                f"at {unchanged.length:,} tokens one global layer costs {one} and all {most} cost {every}; "
                f"a budget of {budget} leaves no choice. Give one between."
            )
        return sum(cost <= limit for cost in costs)
