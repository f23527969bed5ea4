"""Results of the from-scratch study, by cell (layout, position embedding, training length) and seed."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import PurePath
from typing import NamedTuple

from zebra.report.pivot import split
from zebra.report.series import FULL, Span, step
from zebra.results import Result
from zebra.study.spread import Scores

ATTENTIONS = ("global", "grouped", "summary", "local", "mixed")
POSITIONS = ("rotary", "alibi", "absolute", "none")
TEXT, RECALL = "text", "recall"
"""What cells are measured on: unseen text, and recall of what a document stated some distance before."""
_TASKS = {TEXT: "perplexity-", RECALL: "recall-"}
_LAYOUT = re.compile(
    rf"({FULL}|[GLS]+:\d+(?:/\d+)?|\d+(?:,\d+)*:\d+) ({'|'.join(POSITIONS)})(?:, self-extend (\d+:\d+))?"
)
"""How results name a cell's attention and position embedding, and Self-Extend: `GLLL:32 rotary, self-extend 8:64`."""


class StudyCell(NamedTuple):
    """What was trained, apart from the seed; `self_extend` is the group and window of Self-Extend, if it was used."""

    layout: str
    position: str
    length: int
    self_extend: str = ""

    @property
    def attention(self) -> str:
        """The kind of attention, one of ATTENTIONS."""
        letters = set("G" if self.layout == FULL else self.layout.partition(":")[0])
        if letters <= set("0123456789,"):
            return "grouped"
        of_letters = {"G": "global", "L": "local", "S": "summary", "GL": "grouped"}
        return of_letters.get("".join(sorted(letters)), "mixed")

    @property
    def name(self) -> str:
        """The cell's name as readers see it."""
        read = f", self-extend {self.self_extend}" if self.self_extend else ""
        return f"{short_layout(self.layout)} {self.position}{read}"


def short_layout(layout: str) -> str:
    """A layout as readers see it: if all layers are summary layers, one S stands for them."""
    return re.sub("^S+:", "S:", layout)


@dataclass(frozen=True)
class Study:
    """The cells of one grid.

    Attributes:
        runs: the results of each cell and seed.
        measured: the results of `benchmarks/study.py costs`: what a training step takes.
        subject: what the scores measure, TEXT or RECALL. The spans of recall are distances.
    """

    name: str
    runs: dict[StudyCell, dict[int | None, list[Result]]]
    measured: list[Result] = field(default_factory=list)
    subject: str = TEXT

    def on(self, subject: str) -> Study:
        """The same study with the scores of another subject."""
        return replace(self, subject=subject)

    @property
    def subjects(self) -> list[str]:
        """What the cells were measured on."""
        return [TEXT, *[RECALL] * bool(self.on(RECALL)._scores)]

    @cached_property
    def _scores(self) -> dict[tuple[StudyCell, int, Span], dict[int | None, Result]]:
        scores: dict[tuple[StudyCell, int, Span], dict[int | None, Result]] = defaultdict(dict)
        for cell, seeds in self.runs.items():
            for seed, results in seeds.items():
                for one in (one for one in results if _is_score(one, self.subject)):
                    match = _LAYOUT.fullmatch(one.layout)
                    read = cell._replace(self_extend=match[3] or "") if match else cell
                    scores[read, one.length or 0, (one.position_from or 0, one.position_to or 0)].setdefault(seed, one)
        return dict(scores)

    def scores(self, cell: StudyCell, context: int, span: Span | None = None) -> Scores:
        """A cell's perplexities by seed, at a span of positions or distances of a context; by default over all."""
        return self._scores.get((cell, context, span or (0, context)), {})

    def spans(self, context: int, cells: Sequence[StudyCell]) -> list[Span]:
        """The buckets of positions that any of the cells has in a context; the whole context is last."""
        spans = {span for cell, c, span in self._scores if c == context and cell in cells}
        return sorted(spans, key=lambda span: (span == (0, context), span))

    def contexts(self, cell: StudyCell) -> list[int]:
        """The context lengths that a cell was measured at."""
        return sorted({context for other, context, _ in self._scores if other == cell})

    def extended(self, cell: StudyCell) -> StudyCell | None:
        """The same cell evaluated with Self-Extend; None where it was not."""
        return next((one for one, *_ in self._scores if one.self_extend and one._replace(self_extend="") == cell), None)

    @cached_property
    def uses_self_extend(self) -> bool:
        """Whether any cell was read with Self-Extend."""
        return any(", self-extend" in one.layout for one in self.results)

    def last(self, cell: StudyCell, context: int) -> Span:
        """The last bucket of positions of a cell in a context; the whole context where it has no buckets."""
        spans = self.spans(context, [cell])
        return spans[-2] if len(spans) > 1 else (0, context)

    def far(self, cell: StudyCell) -> Span:
        """The last bucket of positions of a cell in contexts of its trained length."""
        return self.last(cell, cell.length)

    @property
    def results(self) -> list[Result]:
        """All results of the study."""
        return [*(one for seeds in self.runs.values() for run in seeds.values() for one in run), *self.measured]

    @property
    def length(self) -> int:
        """The training length of most runs."""
        counts = Counter(cell.length for cell, seeds in self.runs.items() for _ in seeds)
        return max(counts, key=lambda length: (counts[length], length))

    def cells(self, attention: str, position: str = "rotary") -> list[StudyCell]:
        """The cells of a kind of attention at the study's length, the layout with the most runs first."""
        kinds = [cell for cell in self.runs if (cell.attention, cell.length) == (attention, self.length)]
        counts = Counter(cell.layout for cell in kinds for _ in self.runs[cell])
        cells = (StudyCell(layout, position, self.length) for layout, _ in counts.most_common())
        return [cell for cell in cells if cell in self.runs]

    def cell(self, attention: str, position: str = "rotary") -> StudyCell | None:
        """The first of `cells`."""
        return next(iter(self.cells(attention, position)), None)

    def title(self, cell: StudyCell) -> str:
        """A cell's name, with its training length if that is not the study's."""
        return cell.name + ("" if cell.length == self.length else f" at {cell.length:,}")

    def cost(self, cell: StudyCell, metric: str) -> Result | None:
        """The cost of a text of the training length, or of a training step: the first result for the cell's layout."""
        layout = f"{cell.layout} {cell.position}"
        costs = (one for seed in self.runs[cell].values() for one in seed if one.task == "cost")
        expected = metric, cell.length, layout
        return next((one for one in (*self.measured, *costs) if (one.metric, one.length, one.layout) == expected), None)


def studies_in(results: Sequence[Result]) -> list[Study]:
    """The studies among results: each grid, and all other runs together if they have at least two cells.

    A second run of the same cell and seed is left out.
    """
    runs = split(results, lambda one: (one.run, _run_directory(one)))
    grids: dict[str, dict[StudyCell, dict[int | None, list[Result]]]] = defaultdict(lambda: defaultdict(dict))
    for (_, directory), of_run in runs.items():
        if directory is not None and (cell := _cell(of_run)) is not None:
            path = PurePath(directory)
            name = path.parent.parent.name if path.parent.name == "cells" else ""
            grids[name][cell].setdefault(of_run[0].seed, of_run)
    grids = {name: cells for name, cells in grids.items() if name or len(cells) > 1}
    measured = [one for one in results if one.task.startswith("bench ") and _LAYOUT.fullmatch(one.layout)]
    return [
        Study(name, dict(cells), [one for one in measured if one.run == name or len(grids) == 1])
        for name, cells in grids.items()
    ]


def _run_directory(one: Result) -> str | None:
    """The run directory of the training that a result belongs to; None for other results."""
    if step(one) is not None:
        return one.model.rpartition("@")[0]
    path = PurePath(one.model)
    return str(path.parent) if path.name == "model" else None


def _cell(results: list[Result]) -> StudyCell | None:
    scores = [one for one in results if _is_score(one, TEXT)]
    layout = next((match for one in scores if (match := _LAYOUT.fullmatch(one.layout))), None)
    if layout is None:
        return None
    trained = next((one.length for one in results if (one.task, one.metric) == ("train", "loss") and one.length), None)
    return StudyCell(layout[1], layout[2], trained or min(one.length or 0 for one in scores))


def _is_score(one: Result, subject: str) -> bool:
    placed = one.length and one.position_from is not None and one.position_to is not None
    return bool(placed and one.task.startswith(_TASKS[subject]) and one.metric == "perplexity" and step(one) is None)
