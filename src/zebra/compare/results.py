"""The measurements of a comparison as results.

    perplexity-disjoint[-bos], retrieval-generate-TASK              as `zebra evaluate` names them
    compare-paired     loss_above_best: mean loss minus that of the best method of the compared checkpoint itself, not
                       of others such as a trained one, on the same tokens, in nats
    compare-cost       prefill_seconds, decode_seconds (per token), kv_bytes, and the same with _planned
    compare-trained    tokens that the checkpoint was trained to read, with the columns of the unchanged checkpoint
    compare-failed-*   what a method cannot do; the metric is the reason

Methods are compared on the windows and samples that all of them have measured. A method without any measurement of a
kind of unit, because it failed, does not count there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zebra.compare.measurements import COST, Measurement, Unit, hides_in_text
from zebra.evaluate.intervals import bootstrap_mean, wilson
from zebra.results import Result

MethodUnits = Mapping[Unit, Measurement]
"""The measurements of a method, by unit."""
_COSTS = ("prefill_seconds", "decode_seconds", "kv_bytes")


def comparison_results(
    methods: Sequence[MethodUnits], *, task: str, bounds: Sequence[int], trained: int | None, run: str, seed: int
) -> Iterator[Result]:
    """Yield the results of all methods, the checkpoint as it is first.

    Args:
        methods: each with at least one measurement, which holds its layout, model and device.
        task: the name of the task of perplexity results, as in `zebra evaluate`.
        bounds: of the buckets of positions, from 0 to the length.
        trained: the longest text that the checkpoint was trained for; None if unknown.
    """
    spans = [*itertools.pairwise(bounds)]
    spans += [(bounds[0], bounds[-1])] if len(spans) > 1 else []
    windows = _common(methods, lambda unit: unit.kind == "window")
    samples = _common(methods, lambda unit: unit.depth is not None)
    losses = [_losses(units, windows) for units in methods]
    models = [next(iter(units.values()))["model"] for units in methods]
    own = [one for one, model in zip(losses, models, strict=True) if one is not None and model == models[0]]
    for i, units in enumerate(methods):
        described = {name: next(iter(units.values()))[name] for name in ("layout", "model", "device")}
        columns = described | {"run": run, "seed": seed, "length": bounds[-1]}
        if i == 0 and trained is not None:
            yield Result(task="compare-trained", metric="tokens", value=trained, **columns)
        if (of_method := losses[i]) is not None:
            yield from _perplexities(of_method, own, spans, task, columns)
        yield from _retrieval({unit: one for unit, one in units.items() if unit in samples}, columns)
        yield from _costs(units, columns)


def failure_results(failures: Mapping[tuple[str, str], str], **columns: Any) -> list[Result]:
    """A result for each failure; `failures` maps a method and a kind of unit to the reason."""
    return [
        Result(task=f"compare-failed-{kind}", metric=reason, value=0, layout=method, **columns)
        for (method, kind), reason in failures.items()
    ]


def _common(methods: Sequence[MethodUnits], choose: Callable[[Unit], bool]) -> set[Unit]:
    """For each kind of unit, the units that are common to all methods with any unit of this kind."""
    kinds = {unit.kind for units in methods for unit in units if choose(unit)}
    common: set[Unit] = set()
    for kind in kinds:
        by_method = [{unit for unit in units if unit.kind == kind} for units in methods]
        common |= set.intersection(*filter(None, by_method))
    return common


WindowLosses = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Sums of losses and numbers of tokens by window and bucket, both (windows, buckets)."""


def _losses(units: MethodUnits, windows: set[Unit]) -> WindowLosses | None:
    """The losses of a method, with the whole window as the last bucket; None if it has no window."""
    measured = [units[unit] for unit in sorted(windows) if unit in units]
    if not measured:
        return None
    sums, counts = (np.array([one[name] for one in measured], dtype=np.float64) for name in ("sums", "counts"))
    if sums.shape[1] > 1:
        sums, counts = (np.c_[values, values.sum(axis=1)] for values in (sums, counts))
    return sums, counts


def _perplexities(
    losses: WindowLosses,
    references: Sequence[WindowLosses],
    spans: Sequence[tuple[int, int]],
    task: str,
    columns: dict[str, Any],
) -> Iterator[Result]:
    """Perplexity by position, and by how much the loss exceeds that of the best reference on the same tokens."""
    sums, counts = losses
    for i, (start, end) in enumerate(spans):
        best = min((of_method[:, i] for of_method, _ in references), key=lambda of_windows: of_windows.sum())
        above = bootstrap_mean(sums[:, i] - best, counts[:, i], columns["seed"])
        loss = bootstrap_mean(sums[:, i], counts[:, i], columns["seed"], bounds=(0, math.inf))
        value, low, high = (None if nats is None else float(np.exp(nats)) for nats in loss)
        where = columns | {"position_from": start, "position_to": end, "n": int(counts[:, i].sum())}
        yield Result(task=task, metric="perplexity", value=value or 0.0, low=low, high=high, **where)
        yield Result(task="compare-paired", metric="loss_above_best", **above._asdict(), **where)


def _retrieval(units: MethodUnits, columns: dict[str, Any]) -> Iterator[Result]:
    for task, depth in dict.fromkeys((unit.kind, unit.depth) for unit in units):
        scores = [units[unit]["score"] for unit in units if (unit.kind, unit.depth) == (task, depth)]
        mean = sum(scores) / len(scores)
        low, high = wilson(mean, len(scores))
        name = f"retrieval-generate-{task}" + "-in-text" * hides_in_text(task)
        counted = {"value": mean, "low": low, "high": high, "n": len(scores), "depth": depth}
        yield Result(task=name, metric="accuracy", **counted, **columns)


def _costs(units: MethodUnits, columns: dict[str, Any]) -> Iterator[Result]:
    if (cost := units.get(COST)) is None:
        return
    for metric in _COSTS:
        for name, value in ((metric, cost[metric]), (f"{metric}_planned", cost["planned"].get(metric))):
            if value is not None:
                yield Result(task="compare-cost", metric=name, value=value, **columns)
