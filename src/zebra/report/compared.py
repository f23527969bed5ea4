"""Ways to read long texts (`zebra compare`): the results of one comparison, by method."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from zebra.report.pivot import split
from zebra.report.series import Series, Span, buckets, labels, percent, series_of, span_of
from zebra.results import Result

_FEW_SAMPLES = 20
"""With fewer answers than this, a percentage would suggest too much precision."""


class Methods:
    """The methods of one comparison; the first is the unchanged checkpoint."""

    def __init__(self, results: Sequence[Result]):
        by_series = split((one for one in results if not one.task.startswith("compare-failed")), series_of)
        self.by_series = by_series
        self.baseline = next(iter(by_series))
        self.names = labels(by_series)
        self.length = results[0].length or 0
        trained = [one.value for one in results if one.task == "compare-trained"]
        self.trained = trained[0] if trained else math.inf
        spans = buckets(one for one in results if one.metric == "perplexity")
        inside = [span for span in spans if span[1] <= self.trained]
        self.near = inside[-1] if inside and inside[-1] != spans[-1] else spans[max(0, len(spans) - 2)]
        """The last bucket within the trained length; the last but one where all or none are within it."""
        self.spans = [span for span in spans if span[0] >= self.near[0]]
        self.far = spans[-1]
        self.device = results[0].device

    def results(self, series: Series, metric: str, span: Span | None = None) -> list[Result]:
        """The result of a metric, at a span of positions if one is given; empty where it was not measured."""
        same = [one for one in self.by_series[series] if one.metric == metric]
        return [one for one in same if span is None or span_of(one) == span][:1]

    def value(self, series: Series, metric: str, span: Span | None = None) -> float:
        """The value of a metric; NaN where it was not measured."""
        results = self.results(series, metric, span)
        return results[0].value if results else math.nan

    def answers(self, series: Series, task: str | None = None) -> list[Result]:
        """The retrieval results of a task, or of all tasks."""
        scored = [one for one in self.by_series[series] if one.task.startswith("retrieval-")]
        return [one for one in scored if task in (None, one.task)]

    @property
    def windows(self) -> int:
        """The number of windows that were scored."""
        scored = sum(one.n or 0 for one in self.results(self.baseline, "perplexity", self.far))
        return round(scored / (self.far[1] - self.far[0]))

    @property
    def samples(self) -> int:
        """The number of questions that the unchanged checkpoint was asked."""
        return sum(one.n or 0 for one in self.answers(self.baseline))

    @property
    def counts(self) -> str:
        """Both in words."""
        windows, samples = self.windows, self.samples
        return f"{windows} window{'s' * (windows != 1)}, {samples} question{'s' * (samples != 1)}"

    def share(self, series: Series) -> float:
        """The share of answers over all samples; NaN without any."""
        return answered_share(self.answers(series))


def answered_share(results: Sequence[Result]) -> float:
    """The share of all samples of some retrieval results that were answered; NaN without any."""
    return sum(one.value * (one.n or 1) for one in results) / (sum(one.n or 1 for one in results) or math.nan)


def answered(results: Sequence[Result]) -> str:
    """How many samples of some retrieval results were answered: of many in percent, of a few `1 of 1`."""
    total, share = sum(one.n or 0 for one in results), answered_share(results)
    return f"{share * total:.0f} of {total}" if 0 < total < _FEW_SAMPLES else percent(share, decimals=0)


def comparisons(results: Iterable[Result]) -> list[list[Result]]:
    """The results of each run that compares methods."""
    runs = split(results, lambda one: (one.run, one.length))
    return [here for here in runs.values() if any(one.task == "compare-paired" for one in here)]
