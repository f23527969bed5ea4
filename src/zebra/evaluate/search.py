"""The search for the layers that stay global: what each candidate loses, and the orders to go by.

A layout is a string with a letter for each layer, G or L.

    round 1    LGGGG 2.31    GLGGG 2.95    GGLGG 2.30    GGGLG 2.42    GGGGL 2.33     the source GGGGG 2.29
    once       the layers of the highest losses stay global
    greedy     the layer of the lowest loss becomes local, and the others are tried again, until the budget is met

Two layers that do the same work each seem needless while the other is there: `once` may lose both, `greedy` keeps one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from zebra.errors import ZebraError
from zebra.evaluate.calibration import Part
from zebra.evaluate.loss_cache import LossCache
from zebra.model.layerwise import Layerwise
from zebra.model.loss import head_of, losses_at

Advance = Callable[..., None]


def _nothing(units: float) -> None:
    pass


class Losses:
    """The mean loss of a layout on the rows that choose, and on those held out; none is measured twice.

    Args:
        model: with attention "zebra", in evaluation mode.
        window, sinks: of the layers that are local.
    """

    def __init__(
        self, model: PreTrainedModel, parts: Sequence[Part], window: int, kept: LossCache | None = None, sinks: int = 0
    ):
        self._layers, self._head, self._device = Layerwise(model, window, sinks), head_of(model), model.device
        self._parts, self._kept = parts, kept or LossCache()
        self.candidates: dict[str, None] = {}
        """The layouts that were asked for on the rows that choose, in order."""

    def measure(self, base: str, layouts: Sequence[str], *, held_out: bool, advance: Advance = _nothing) -> bool:
        """Measure layouts, a letter for each layer, from where each parts from `base` on; whether any was not known."""
        anew = False
        if not held_out:
            self.candidates |= dict.fromkeys(layouts)
        for i, part in enumerate(self._parts):
            if part.held_out != held_out:
                continue
            missing = [kinds for kinds in layouts if (kinds, i) not in self._kept]
            advance(len(layouts) - len(missing))
            if not missing:
                continue
            anew = True
            ids, at = part.tensors(self._device)
            states = self._layers.states(ids, base)
            for kinds in missing:
                start = _parting(kinds, base)
                hidden = states[-1] if kinds == base else self._layers.resume(ids, kinds, start, states[start])
                found = losses_at(hidden, self._head, ids, at).double()
                if not bool(found.isfinite().all()):
                    raise ZebraError(f"the loss of the layout {kinds} is not finite. Measure in float32 or bfloat16.")
                self._kept.add(kinds, i, [row.sum().item() for row in found.split(_counts(part))])
                advance(1)
        return anew

    def parts(self, held_out: bool) -> int:
        """How many parts there are."""
        return sum(part.held_out == held_out for part in self._parts)

    def sums(self, kinds: str, held_out: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of a layout that was measured: each row's sum of losses, and the number of tokens in it."""
        which = [i for i, part in enumerate(self._parts) if part.held_out == held_out]
        counts = [count for i in which for count in _counts(self._parts[i])]
        return np.array([value for i in which for value in self._kept[kinds, i]]), np.array(counts, dtype=np.float64)

    def mean(self, kinds: str) -> float:
        """The mean loss of a layout, in nats a token, on the rows that choose."""
        sums, counts = self.sums(kinds, False)
        return float(sums.sum() / counts.sum())


def _counts(part: Part) -> list[int]:
    return part.at.sum(axis=1).tolist()


def _parting(kinds: str, base: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(kinds, base, strict=True)) if a != b), 0)


def _toggled(kinds: str) -> list[str]:
    """Each layout with one global layer fewer, from the first layer on."""
    return [kinds[:i] + "L" + kinds[i + 1 :] for i, kind in enumerate(kinds) if kind == "G"]


def once(losses: Losses, source: str, count: int, advance: Advance = _nothing) -> str:
    """The layout that keeps the `count` layers whose toggling costs the most; of equals, the earlier ones."""
    candidates = _toggled(source)
    losses.measure(source, candidates, held_out=False, advance=advance)
    needs = sorted(candidates, key=losses.mean, reverse=True)
    kept = {_parting(kinds, source) for kinds in needs[:count]}
    return "".join("G" if i in kept else "L" for i in range(len(source)))


def greedy(losses: Losses, source: str, count: int, advance: Advance = _nothing) -> str:
    """The layout that is left when layer after layer becomes local, each time the one that costs the least.

    Of equals, the later one.
    """
    kinds = source
    while kinds.count("G") > count:
        candidates = _toggled(kinds)
        losses.measure(kinds, candidates, held_out=False, advance=advance)
        kinds = min(reversed(candidates), key=losses.mean)
    return kinds


def strides(source: str, count: int) -> list[str]:
    """The paper's stride over the source's global layers: the smallest that keeps at most `count`, at every offset, and
    its own layouts, global layer first, of greater strides that keep just as many.

    Five layers, two to keep: GLLGL, LGLLG and LLGLL by stride 3, GLLLG by stride 4.
    """
    which = [i for i, kind in enumerate(source) if kind == "G"]
    least = -(-len(which) // count)
    kept = [which[offset::least] for offset in range(least)]
    kept += [layers for stride in range(least + 1, len(which)) if len(layers := which[::stride]) == count]
    return ["".join("G" if i in layers else "L" for i in range(len(source))) for layers in kept]
