"""How many layers may stay global: a number, a share, or as many as a limit on the cost allows.

    8                      8 layers
    0.25                   at most a quarter of the model's global layers
    flops:0.5              as many as keep a prefill within half of the unchanged model's FLOPs
    cache:4GiB@131072      as many as keep the KV cache within 4 GiB at 131,072 tokens

All global layers of a model cost the same, so a limit on the cost is a limit on their number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from zebra.errors import ZebraError
from zebra.plan.cost import Run, flops
from zebra.plan.fit import parse_bytes
from zebra.plan.memory import kv_bytes
from zebra.stripes import Stripes

_NOTATION = "Write 8 for 8 layers, 0.25 for a share of them, flops:0.5 or cache:4GiB@131072 for a cost."


def layers_within(budget: str, candidates: Sequence[int], local: Stripes, run: Callable[[int | None], Run]) -> int:
    """Count the layers that may stay global within a budget, whose notation this module explains.

    Args:
        candidates: the indices of the model's global layers.
        local: the layout that gives the window and sinks of the layers that become local.
        run: returns a prefill of the unchanged model at a length; None stands for the length the caller chooses. Only
            called for a limit on the cost.

    Raises:
        ZebraError: another notation, a share that is not between 0 and 1, a budget that keeps none or all of them.
    """
    unit, size, length = parse_budget(budget)
    most = len(candidates)
    if unit is None:
        count = size if isinstance(size, int) else int(size * most + 1e-9)
        if not 1 <= count < most:
            raise ZebraError(
                f"a selection must keep 1 to {most - 1} of this model's {most} global layers; "
                f"a budget of {size} keeps {count}. Change the budget."
            )
        return count
    unchanged = run(length)
    layouts = (replace(local, pattern=None, global_layers=tuple(candidates[:k])) for k in range(1, most + 1))
    runs = [replace(unchanged, stripes=stripes) for stripes in layouts]
    if unit == "flops":
        costs, limit = [sum(flops(one).values()) for one in runs], size * sum(flops(unchanged).values())
    else:
        costs, limit = [kv_bytes(one) for one in runs], size
    if costs[0] > limit or costs[-1] <= limit:
        scale, name = (1, "FLOPs") if unit == "flops" else (2**20, "MiB")
        first, every, allowed = (f"{cost / scale:,.4g} {name}" for cost in (costs[0], costs[-1], limit))
        raise ZebraError(
            f"a budget must be between the costs of one global layer and of all {most}, {first} and {every} at "
            f"{unchanged.length:,} tokens; got {allowed}. Change the budget."
        )
    return sum(cost <= limit for cost in costs)


def parse_budget(budget: str) -> tuple[str | None, float, int | None]:
    """Read a budget: its unit ("flops", "cache", or None for layers), its size, and the length it applies to, if any.

    Raises:
        ZebraError: another notation, a share that is not between 0 and 1.
    """
    match = re.fullmatch(r"(?:(flops|cache):)?([0-9.]+[A-Za-z]*)(?:@([0-9_]+))?", budget.strip())
    if match is None or (match[3] and not match[1]):
        raise ZebraError(f"a budget must be a number of global layers, a share or a cost; got {budget!r}. {_NOTATION}")
    unit, amount, length = match.groups()
    if unit == "cache":
        size: float = parse_bytes(amount)
    else:
        size = int(amount) if unit is None and amount.isdecimal() and int(amount) else _share(amount)
    return unit, size, int(length) if length else None


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ZebraError(f"a share must be between 0 and 1; got {text!r}. {_NOTATION}")
    return share
