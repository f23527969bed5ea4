"""The search for the layers that stay global: two orders of choice, and the layouts that they are compared with.

    round 1    LGGGG 2.31    GLGGG 2.95    GGLGG 2.30    GGGLG 2.42    GGGGL 2.33     the source GGGGG 2.29
    once       the layers of the highest losses stay global
    greedy     the layer of the lowest loss becomes local, and the others are measured again, until the budget is met

Of two layers that do the same work each looks unnecessary while the other is global: `once` may lose both, `greedy`
keeps one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from zebra.evaluate.calibration import CalibrationBatch
from zebra.evaluate.losses import Advance, Losses
from zebra.evaluate.scoring import no_progress


def _candidates(kinds: str) -> dict[str, int]:
    """The layouts with one global layer less, from the first layer on, each with the layer that becomes local."""
    return {kinds[:i] + "L" + kinds[i + 1 :]: i for i in global_layers(kinds)}


def once(losses: Losses, source: str, count: int, advance: Advance = no_progress) -> str:
    """The layout with the `count` global layers whose loss as local layers is highest; of equals, the earlier ones."""
    candidates = _candidates(source)
    losses.measure(source, [*candidates], advance=advance)
    needed = sorted(candidates, key=losses.mean, reverse=True)[:count]
    return layout_of([candidates[kinds] for kinds in needed], len(source))


def greedy(losses: Losses, source: str, count: int, advance: Advance = no_progress) -> str:
    """The layout that is left when layer after layer becomes local, each time the one of the lowest loss.

    Of equals, the later one.
    """
    kinds = source
    while kinds.count("G") > count:
        candidates = [*_candidates(kinds)]
        losses.measure(kinds, candidates, advance=advance)
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


class SearchCost(NamedTuple):
    """An estimate of what a search runs.

    Attributes:
        rounds: each is a forward pass over the sequences that choose, and all candidates.
        candidates: each runs the layers from its first difference on, half a pass on average.
        passes: all of these, as whole forward passes over the sequences.
        sequences, batches: those that choose.
    """

    rounds: int
    candidates: int
    passes: float
    sequences: int
    batches: int

    @classmethod
    def of(cls, source: str, count: int, order: str, batches: Sequence[CalibrationBatch]) -> SearchCost:
        """An estimate: which layers greedy selection will try in its later rounds is not known yet."""
        which = global_layers(source)
        by_round = range(len(which), count if order == "greedy" else len(which) - 1, -1)
        tail = sum(len(source) - i for i in which) / len(which) / len(source)
        sizes = [len(batch.ids) for batch in batches if not batch.held_out]
        return cls(len(by_round), sum(by_round), len(by_round) + sum(by_round) * tail, sum(sizes), len(sizes))

    def __str__(self) -> str:
        rounds = "1 round" if self.rounds == 1 else f"{self.rounds:,} rounds"
        passes = f"about {self.passes:,.0f} passes over {self.sequences:,} sequences"
        return f"{self.candidates:,} candidates in {rounds}, {passes}"
