"""Tasks of lm-evaluation-harness and questions about documents on a page: rows are metrics, columns lengths."""

from __future__ import annotations

from zebra.report.page import Cell, Section, Table
from zebra.report.pivot import Results, finite, interval_cell, split, table, where
from zebra.report.series import number, percent, series_of, task_name
from zebra.results import Result

_CHECK = "documents-check-"
_PERCENT_METRICS = ("acc", "acc_norm", "accuracy", "exact_match", "em", "f1", "rouge1", "rouge2", "rougeL")
HOW = (
    "Tasks of the lm-evaluation-harness, and questions about documents, by the tokens that the model read. ROUGE and "
    "F1 are against the best reference answer; a log-likelihood is in nats per token of the reference answers. A check "
    "of the data gives the share of items with each fault. Each value has its 95 % interval."
)


def tasks(results: list[Result]) -> Section:
    """A table for each task of each run, model and layout."""
    groups = split(results, lambda one: (one.task, series_of(one))).values()
    return Section("Tasks", [HOW, *map(_table, groups)] if groups else [])


def _table(results: list[Result]) -> Table:
    task, series = results[0].task, series_of(results[0])
    counts = sorted({one.n for one in results if one.n is not None})
    items = f", {' or '.join(f'{n:,}' for n in counts)} items" if counts else ""
    metrics = split(results, lambda one: one.metric)
    lines = [([Cell(metric.replace("_", " "))], finite(here)) for metric, here in metrics.items()]
    columns = [
        (Cell("–") if length is None else Cell(f"{length:,}", "tokens"), where(mean_cell, length=length))
        for length in sorted({one.length for one in results}, key=lambda length: length or 0)
    ]
    corner = Cell("share of items" if task.startswith(_CHECK) else "metric")
    title = f"{series.run}: {task_name(task)}, {series.name} {series.layout}{items}"
    return table(title, [corner], lines, columns)


def is_share(result: Result) -> bool:
    """Whether a result's value is a share, to be shown in percent."""
    return result.task.startswith(_CHECK) or result.metric.partition(" ")[0] in _PERCENT_METRICS


def mean(results: Results) -> float:
    """The mean value of results."""
    return results[0].value if len(results) == 1 else sum(one.value for one in results) / len(results)


def mean_cell(results: Results) -> Cell:
    """The mean of results, in percent where they are shares; a single result with its interval."""
    if not results:
        return Cell("–")
    text = percent if is_share(results[0]) else number
    if len(results) > 1:
        return Cell(text(mean(results)), results=results)
    if text is percent:
        return interval_cell(results, percent, lambda bound: f"{100 * bound:.1f}")
    return interval_cell(results, between=" to ")
