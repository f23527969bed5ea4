"""Rows by what a page shows of them: series of a model and a layout, compared at one length under one task."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import PurePath
from typing import NamedTuple

from zebra.results import Result

FULL = "full"
Span = tuple[int, int]


class Series(NamedTuple):
    """What one line or column shows."""

    run: str
    model: str
    layout: str

    @property
    def trained(self) -> bool:
        """Whether the model is what a run made, of a source or from nothing: `<run>/model`."""
        path = PurePath(self.model)
        return path.name == "model" and bool(path.parent.name)

    @property
    def made(self) -> bool:
        """Whether the run that it stands in is the one that made it; a second training starts with a trained one."""
        return self.trained and self.run.partition(" (")[0] == PurePath(self.model).parent.name

    @property
    def name(self) -> str:
        """The model's name for people."""
        path = PurePath(self.model)
        return f"{path.parent.name} (trained)" if self.trained else path.name or self.model


class Group(NamedTuple):
    """What may be compared: one task at one context length, by series and span of positions."""

    task: str
    length: int
    scores: dict[Series, dict[Span, Result]]

    @property
    def spans(self) -> list[Span]:
        """The buckets of positions in order, and last the whole context."""
        found = {span for scores in self.scores.values() for span in scores}
        return sorted(found, key=lambda span: (span == (0, self.length), span))

    @property
    def buckets(self) -> list[Span]:
        """The spans without the whole context."""
        return [span for span in self.spans if span != (0, self.length)] or self.spans

    @property
    def rows(self) -> list[Result]:
        """All of them."""
        return [row for scores in self.scores.values() for row in scores.values()]

    def of_run(self, run: str) -> Group:
        """The series of one run."""
        return self._replace(scores={series: scores for series, scores in self.scores.items() if series.run == run})

    def source(self, series: Series) -> Series | None:
        """What a trained checkpoint came from: the first that its run measured; None where it had no source."""
        before = (other for other in self.scores if other.run == series.run and not other.made)
        first = next((other for other in before if series.made or not other.trained), None)
        return first if series.trained and series != first else None


def outcome(found: Iterable[Series]) -> Series | None:
    """What came of the training among the series of a run: what that run made, else the first that any run made."""
    trained = [series for series in found if series.trained]
    return next((series for series in trained if series.made), trained[0] if trained else None)


def _kind(row: Result) -> str:
    if row.task.startswith("perplexity-") and row.metric == "perplexity":
        known = None not in (row.length, row.position_from, row.position_to)
        return ("position" if step(row) is None else "on the way") if known else "other"
    if (row.task, row.metric) == ("train", "loss") and row.n is not None and step(row) is not None:
        return "loss"
    if row.task.startswith("answers-") and row.metric == "answer_loss" and math.isfinite(row.value):
        return "answers"
    if row.task.startswith("instructions-") and row.position_from is not None and math.isfinite(row.value):
        return "instructions"
    if row.task.startswith("bench "):
        return "bench"
    if row.task.startswith(("harness-", "documents-")):
        return "task"
    if row.task.count("-") > 1 and row.task.startswith("selection-"):
        return "selection"
    if row.task.startswith("retrieval-") and row.metric == "accuracy" and row.length is not None:
        return "retrieval"
    if row.task == "cost" and row.metric in ("layers", "attention_pairs", "cached_tokens") and row.length is not None:
        return "cost"
    return "speed" if (row.task, row.metric) == ("speed", "evaluation_tokens_per_second") else "other"


def by_kind(rows: Iterable[Result]) -> dict[str, list[Result]]:
    """Rows by the section that shows them; a second value for one place (another seed, say) is shown as it is, and one
    that says the same again is left out."""
    kinds: dict[str, list[Result]] = defaultdict(list)
    seen: dict[tuple[object, ...], Result] = {}
    for row in rows:
        place = (*series_of(row), row.task, row.metric, row.length, row.depth, row.position_from, row.position_to)
        first = seen.setdefault(place, row)
        if first is row:
            kinds[_kind(row)].append(row)
        elif (row.value, row.n, row.seed) != (first.value, first.n, first.seed):
            kinds["other"].append(row)
    return kinds


def series_of(row: Result) -> Series:
    """Which line or column a row belongs to."""
    return Series(row.run, row.model, row.layout)


def labels(series: Iterable[Series]) -> dict[Series, str]:
    """Names for what stands in one picture: of run, model and layout those that tell them apart."""
    series = list(series)
    runs, names = ({getattr(one, column) for one in series} for column in ("run", "name"))
    found = {}
    for one in series:
        run = f"{one.run}: " if len(runs) > 1 and one.name != f"{one.run} (trained)" else ""
        named = len(runs) > 1 or len(names) > 1 or len(series) == 1
        found[one] = f"{run}{one.name} {one.layout}" if named else one.layout
    if len(set(found.values())) < len(found):  # two models of one name
        return {one: f"{one.run}: {one.model} {one.layout}" for one in series}
    return found


def step(row: Result) -> int | None:
    """The training step of a row on the way, whose model is named `<run>@<step>`."""
    step = row.model.rpartition("@")[2]
    return int(step) if "@" in row.model and step.isdecimal() else None


def groups_of(rows: Iterable[Result]) -> list[Group]:
    """Rows by task and length."""
    groups: dict[tuple[str, int], Group] = {}
    for row in rows:
        assert row.length is not None
        assert row.position_from is not None
        assert row.position_to is not None
        group = groups.setdefault((row.task, row.length), Group(row.task, row.length, {}))
        group.scores.setdefault(series_of(row), {})[row.position_from, row.position_to] = row
    return list(groups.values())


def interval(row: Result) -> tuple[float, float] | None:
    """The row's bounds, where it has both."""
    return None if row.low is None or row.high is None else (row.low, row.high)


def number(value: float) -> str:
    """A value with about three digits; a count, which is an int, with all."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if isinstance(value, int):
        text = f"{size:,}"
    elif size >= 1e6 and value != int(value):
        text = f"{size:.2e}"
    else:
        text = f"{size:,.{2 if size < 100 else 1 if size < 1000 else 0}f}"
    return f"−{text}" if value < 0 else text


def count(value: float) -> str:
    """A whole number."""
    return f"{value:,.0f}" if math.isfinite(value) else str(value)


def percent(share: float, decimals: int = 1, sign: str = "") -> str:
    """A share in percent."""
    return f"{100 * share:{sign}.{decimals}f}\N{NO-BREAK SPACE}%".replace("-", "−")


def span_name(span: Span, to: str = "–") -> str:
    """A span of positions."""
    return f"{span[0]:,}{to}{span[1]:,}"
