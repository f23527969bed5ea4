"""The search for the layers that stay global: the loss of each candidate, and two orders of choice.

A layout is a string with a letter for each layer, G or L.

    round 1    LGGGG 2.31    GLGGG 2.95    GGLGG 2.30    GGGLG 2.42    GGGGL 2.33     the source GGGGG 2.29
    once       the layers of the highest losses stay global
    greedy     the layer of the lowest loss becomes local, and the others are measured again, until the budget is met

Of two layers that do the same work each looks unnecessary while the other is global: `once` may lose both, `greedy`
keeps one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from zebra.errors import ZebraError
from zebra.evaluate.calibration import CalibrationBatch
from zebra.evaluate.loss_cache import LossCache
from zebra.model.layerwise import Layerwise
from zebra.model.loss import head_of, losses_at

Advance = Callable[..., None]


def _nothing(units: float) -> None:
    pass


class Losses:
    """The mean loss of layouts on the sequences that choose, and on those held out; none is measured twice.

    Args:
        model: with attention "zebra", in evaluation mode.
        window, sinks: of the layers that are local.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[CalibrationBatch],
        window: int,
        cache: LossCache | None = None,
        sinks: int = 0,
    ):
        self._layers, self._head, self._device = Layerwise(model, window, sinks), head_of(model), model.device
        self._batches, self._cache = batches, cache or LossCache()
        self.candidates: dict[str, None] = {}
        """The layouts that were measured on the sequences that choose, in order."""

    def measure(self, base: str, layouts: Sequence[str], *, held_out: bool, advance: Advance = _nothing) -> bool:
        """Measure layouts, each from the first layer in which it differs from `base`; whether any was new."""
        new = False
        if not held_out:
            self.candidates |= dict.fromkeys(layouts)
        for i, batch in enumerate(self._batches):
            if batch.held_out != held_out:
                continue
            missing = [kinds for kinds in layouts if (kinds, i) not in self._cache]
            advance(len(layouts) - len(missing))
            if not missing:
                continue
            new = True
            ids, scored = batch.tensors(self._device)
            states = self._layers.states(ids, base)
            for kinds in missing:
                start = _first_difference(kinds, base)
                hidden = states[-1] if kinds == base else self._layers.resume(ids, kinds, start, states[start])
                losses = losses_at(hidden, self._head, ids, scored).double()
                if not bool(losses.isfinite().all()):
                    raise ZebraError(f"the loss of the layout {kinds} is not finite. Measure in float32 or bfloat16.")
                self._cache.add(kinds, i, [sequence.sum().item() for sequence in losses.split(_counts(batch))])
                advance(1)
        return new

    def batches(self, held_out: bool) -> int:
        """How many batches there are."""
        return sum(batch.held_out == held_out for batch in self._batches)

    def sums(self, kinds: str, held_out: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of a measured layout: each sequence's sum of losses (n,), and its number of scored tokens (n,)."""
        which = [i for i, batch in enumerate(self._batches) if batch.held_out == held_out]
        counts = [count for i in which for count in _counts(self._batches[i])]
        return np.array([value for i in which for value in self._cache[kinds, i]]), np.array(counts, dtype=np.float64)

    def mean(self, kinds: str) -> float:
        """The mean loss of a layout, in nats a token, on the sequences that choose."""
        sums, counts = self.sums(kinds, False)
        return float(sums.sum() / counts.sum())


def _counts(batch: CalibrationBatch) -> list[int]:
    return batch.scored.sum(axis=1).tolist()


def _first_difference(kinds: str, base: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(kinds, base, strict=True)) if a != b), 0)


def _toggled(kinds: str) -> list[str]:
    """Each layout with one global layer less, from the first layer on."""
    return [kinds[:i] + "L" + kinds[i + 1 :] for i, kind in enumerate(kinds) if kind == "G"]


def once(losses: Losses, source: str, count: int, advance: Advance = _nothing) -> str:
    """The layout with the `count` global layers whose loss as local layers is highest; of equals, the earlier ones."""
    candidates = _toggled(source)
    losses.measure(source, candidates, held_out=False, advance=advance)
    needed = sorted(candidates, key=losses.mean, reverse=True)[:count]
    return layout_of([_first_difference(kinds, source) for kinds in needed], len(source))


def greedy(losses: Losses, source: str, count: int, advance: Advance = _nothing) -> str:
    """The layout that is left when layer after layer becomes local, each time the one of the lowest loss.

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
    which = global_layers(source)
    smallest = -(-len(which) // count)
    layouts = [which[offset::smallest] for offset in range(smallest)]
    layouts += [layers for stride in range(smallest + 1, len(which)) if len(layers := which[::stride]) == count]
    return [layout_of(layers, len(source)) for layers in layouts]


def global_layers(kinds: str) -> list[int]:
    """The indices of a layout's global layers."""
    return [i for i, kind in enumerate(kinds) if kind == "G"]


def layout_of(layers: Sequence[int], depth: int) -> str:
    """The layout of these global layers."""
    return "".join("G" if i in layers else "L" for i in range(depth))
