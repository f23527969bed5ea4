"""Search for the layers that stay global: two orders of selection, and the layouts that they are compared with.

    round 1    LGGGG 2.31    GLGGG 2.95    GGLGG 2.30    GGGLG 2.42    GGGGL 2.33     the source GGGGG 2.29
    once       the layers whose loss as local layers is highest stay global
    greedy     the layer with the lowest loss becomes local, and the others are measured again, until the budget is met

If two layers do the same work, each looks unnecessary while the other is global: `once` may lose both, `greedy` keeps
one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from zebra.evaluate.calibration import CalibrationBatch
from zebra.evaluate.losses import Advance, Losses
from zebra.evaluate.scoring import no_progress


def _candidates(kinds: str) -> dict[str, int]:
    """The layouts with one global layer fewer, each with the layer that becomes local, from the first layer on."""
    return {kinds[:i] + "L" + kinds[i + 1 :]: i for i in global_layers(kinds)}


def once(losses: Losses, source: str, count: int, advance: Advance = no_progress) -> str:
    """Keep the `count` global layers whose loss as local layers is highest; in a tie, the earlier ones."""
    candidates = _candidates(source)
    losses.measure(source, [*candidates], advance=advance)
    needed = sorted(candidates, key=losses.mean, reverse=True)[:count]
    return layout_of([candidates[kinds] for kinds in needed], len(source))


def greedy(losses: Losses, source: str, count: int, advance: Advance = no_progress) -> str:
    """Make one layer after another local, each time the one with the lowest loss, until `count` global layers are left.

    In a tie, the later layer becomes local.
    """
    kinds = source
    while kinds.count("G") > count:
        candidates = [*_candidates(kinds)]
        losses.measure(kinds, candidates, advance=advance)
        kinds = min(reversed(candidates), key=losses.mean)
    return kinds


def strides(source: str, count: int) -> list[str]:
    """Layouts by the paper's stride, over the global layers of the source.

    The smallest stride that keeps at most `count` layers, at every offset; and larger strides from the first global
    layer that keep exactly `count`. For five layers and two to keep: GLLGL, LGLLG, LLGLL (stride 3), GLLLG (stride 4).
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
    """The layout of `depth` layers in which these are global."""
    return "".join("G" if i in layers else "L" for i in range(depth))


class SearchCost(NamedTuple):
    """An estimate of the forward passes of a search.

    Attributes:
        rounds: each is one full pass over the selection sequences, and its candidates.
        candidates: each runs only the layers from the changed one on, half a pass on average.
        passes: the cost of all rounds and candidates, in full passes over the sequences.
        sequences, batches: their numbers, without those held out.
    """

    rounds: int
    candidates: int
    passes: float
    sequences: int
    batches: int

    @classmethod
    def of(cls, source: str, count: int, order: str, batches: Sequence[CalibrationBatch]) -> SearchCost:
        """Estimate the cost; which layers the later rounds of greedy will try is not known yet."""
        which = global_layers(source)
        by_round = range(len(which), count if order == "greedy" else len(which) - 1, -1)
        tail = sum(len(source) - i for i in which) / len(which) / len(source)
        sizes = [len(batch.ids) for batch in batches if not batch.held_out]
        return cls(len(by_round), sum(by_round), len(by_round) + sum(by_round) * tail, sum(sizes), len(sizes))

    def __str__(self) -> str:
        rounds = "1 round" if self.rounds == 1 else f"{self.rounds:,} rounds"
        passes = f"about {self.passes:,.0f} passes over {self.sequences:,} sequences"
        return f"{self.candidates:,} candidates in {rounds}, {passes}"
