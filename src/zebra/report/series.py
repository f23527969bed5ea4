"""How a page groups results (by kind, by series of run, model and layout, by span of positions) and formats numbers."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import PurePath
from typing import NamedTuple

from zebra.results import Result
from zebra.stripes import Stripes

FULL = "full"
_KINDS = {"bench ": "bench", "compare-": "comparison", "harness-": "task", "documents-": "task"}
"""The kind of all results whose task has this prefix, whatever their metric."""
_SEVERAL = re.compile(r"\b(\d+)(?:,\d+){3,},(\d+)(?=:)")
"""The list of layers of a layout that names at least five."""
_SHORT = r"\1, … \2"
Span = tuple[int, int]


class Series(NamedTuple):
    """A model with a layout in a run: what one line of a figure or one column of a table shows."""

    run: str
    model: str
    layout: str

    @property
    def trained(self) -> bool:
        """Whether the model is the output of a run: `<run>/model`."""
        path = PurePath(self.model)
        return path.name == "model" and bool(path.parent.name)

    @property
    def is_output(self) -> bool:
        """Whether the model is the output of this run; a run may also measure the output of an earlier one."""
        return self.trained and self.run.partition(" (")[0] == PurePath(self.model).parent.name

    @property
    def name(self) -> str:
        """The model's name as readers see it."""
        path = PurePath(self.model)
        return f"{path.parent.name} (trained)" if self.trained else path.name or self.model


def series_of(result: Result) -> Series:
    """The series of a result."""
    return Series(result.run, result.model, result.layout)


def trained_series(candidates: Iterable[Series]) -> Series | None:
    """The first series that its own run trained, else the first output of another run, else None."""
    trained = [series for series in candidates if series.trained]
    return next((series for series in trained if series.is_output), trained[0] if trained else None)


def source_of(series: Series, candidates: Iterable[Series]) -> Series | None:
    """What a trained checkpoint was trained from: the first other model that its run measured; None without one."""
    others = (other for other in candidates if other.run == series.run and not other.is_output)
    first = next((other for other in others if series.is_output or not other.trained), None)
    return first if series.trained and series != first else None


def stripes_of(layout: str) -> Stripes:
    """The stripes of a result's layout; for `full` only global layers.

    Raises:
        ZebraError: another notation, such as that of the study.
    """
    return Stripes(1, pattern="G") if layout == FULL else Stripes.parse(layout)


def short_layouts(layouts: Iterable[str]) -> dict[str, str]:
    """Short names of layouts, `7, … 26:1024` for `7,13,14,15,26:1024`; the full names where two would be equal."""
    short = {layout: _SEVERAL.sub(_SHORT, layout) for layout in layouts}
    return short if len(set(short.values())) == len(short) else {layout: layout for layout in short}


def layer_lists(layouts: Iterable[str]) -> list[str]:
    """The lists of layers that `short_layouts` shortens: `7, … 26: 7,13,14,15,26`."""
    lists = dict.fromkeys(layers[0] for layout in layouts for layers in _SEVERAL.finditer(layout))
    return [f"{_SEVERAL.sub(_SHORT, f'{layers}:')} {layers}" for layers in lists]


def labels(series: Iterable[Series]) -> dict[Series, str]:
    """Labels for the series of one figure or table, with those of run, model and layout that tell them apart."""
    series = list(series)
    layouts = short_layouts(one.layout for one in series)
    runs, names = ({getattr(one, column) for one in series} for column in ("run", "name"))
    texts = {}
    for one in series:
        run = f"{one.run}: " if len(runs) > 1 and one.name != f"{one.run} (trained)" else ""
        named = len(runs) > 1 or len(names) > 1 or len(series) == 1
        layout = layouts[one.layout]
        texts[one] = f"{run}{one.name} {layout}" if named else layout
    if len(set(texts.values())) < len(texts):  # two models of one name
        return {one: f"{one.run}: {one.model} {layouts[one.layout]}" for one in series}
    return texts


def by_kind(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Results by kind: the section that shows them.

    Of two results that differ only in value, count or seed, the second is of the kind "other"; an exact repetition is
    left out.
    """
    kinds: dict[str, list[Result]] = defaultdict(list)
    seen: dict[tuple[object, ...], Result] = {}
    for one in results:
        key = (*series_of(one), one.task, one.metric, one.length, one.depth, one.position_from, one.position_to)
        first = seen.setdefault(key, one)
        if first is one:
            kinds[_kind(one)].append(one)
        elif (one.value, one.n, one.seed) != (first.value, first.n, first.seed):
            kinds["other"].append(one)
    return kinds


def _kind(one: Result) -> str:
    if one.task.startswith("perplexity-") and one.metric == "perplexity":
        complete = None not in (one.length, one.position_from, one.position_to)
        return ("position" if step(one) is None else "position during training") if complete else "other"
    if (one.task, one.metric) == ("train", "loss") and one.n is not None and step(one) is not None:
        return "loss"
    if one.task.startswith("answers-") and one.metric == "answer_loss" and math.isfinite(one.value):
        return "answers"
    if one.task.startswith("instructions-") and one.position_from is not None and math.isfinite(one.value):
        return "instructions"
    for prefix, kind in _KINDS.items():
        if one.task.startswith(prefix):
            return kind
    if one.task.count("-") > 1 and one.task.startswith("selection-"):
        return "selection"
    if one.task.startswith("retrieval-") and one.metric == "accuracy" and one.length is not None:
        return "retrieval"
    if one.task == "cost" and one.metric in ("layers", "attention_pairs", "cached_tokens") and one.length is not None:
        return "cost"
    return "speed" if (one.task, one.metric) == ("speed", "evaluation_tokens_per_second") else "other"


def task_name(task: str) -> str:
    """A task's name as readers see it: `needle in own text, by generation` for `retrieval-generate-needle-in-text`."""
    if task.startswith("documents-check-"):
        return f"the data of {task.removeprefix('documents-check-')}"
    kind, _, rest = task.partition("-")
    if kind == "harness":
        return rest
    if kind not in ("retrieval", "documents"):
        return task.replace("-", ": ", 1)
    scoring, _, name = rest.partition("-")
    if kind == "retrieval":
        name = name.replace("-in-text", " in own text")
    return f"{name}, by {'generation' if scoring == 'generate' else scoring}"


def step(result: Result) -> int | None:
    """The step of a result that was measured during training (its model is `<run>@<step>`); None for any other."""
    step = result.model.rpartition("@")[2]
    return int(step) if "@" in result.model and step.isdecimal() else None


def span_of(result: Result) -> Span:
    """The span of positions that a result covers."""
    return result.position_from or 0, result.position_to or 0


def spans(results: Iterable[Result]) -> list[Span]:
    """The spans of results of one context length, in order; the whole context is last."""
    return [span for _, span in sorted({(span_of(one) == (0, one.length), span_of(one)) for one in results})]


def buckets(results: Iterable[Result]) -> list[Span]:
    """The spans without the whole context, unless it is the only one."""
    results = list(results)
    return spans(one for one in results if span_of(one) != (0, one.length)) or spans(results)


def interval(result: Result) -> tuple[float, float] | None:
    """The bounds of a result's interval; None without both."""
    return None if result.low is None or result.high is None else (result.low, result.high)


def overlap(one: Result, other: Result) -> bool:
    """Whether two results both have intervals that overlap."""
    a, b = interval(one), interval(other)
    return a is not None and b is not None and a[0] <= b[1] and b[0] <= a[1]


def number(value: float) -> str:
    """Format a number: an int in full, a float with two decimals below 100, one below 1,000 and none from there on."""
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
    """Format a value as an integer with thousands separators."""
    return f"{value:,.0f}" if math.isfinite(value) else str(value)


def short_count(n: int) -> str:
    """Format a count of tokens; a multiple of 1,024 as `8K`."""
    return f"{n // 1024}K" if n and n % 1024 == 0 else f"{n:,}"


def percent(share: float, decimals: int = 1, sign: str = "") -> str:
    """Format a share in percent."""
    return f"{100 * share:{sign}.{decimals}f}\N{NO-BREAK SPACE}%".replace("-", "−")


def span_name(span: Span, to: str = "–") -> str:
    """Format a span of positions."""
    return f"{span[0]:,}{to}{span[1]:,}"
