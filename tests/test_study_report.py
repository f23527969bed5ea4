"""The page of the study: cells are told apart by rows, claims are judged by their rules, no number is lost."""

from __future__ import annotations

import itertools
import math
import random
import re
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
from conftest import FEW_STORIES, ROOT
from matplotlib.text import Text
from test_report import a_run, words

import study as script
from study_page import _verdict
from zebra.errors import ZebraError
from zebra.report import write_report
from zebra.results import Result, read_results, write_results
from zebra.stripes import visible_pairs
from zebra.study import claims, evidence
from zebra.study.cells import recipes_of
from zebra.study.page import chapters
from zebra.study.pictures import Point, frontier, plot_scatter
from zebra.study.recipe import StudyRecipe
from zebra.study.results import StudyCell, studies_in
from zebra.study.spread import Difference, Losses, Spread, half_width, level, loss_difference, spread
from zebra.train.pretrain import pretrain
from zebra.train.tokenizer import END

FULL, GROUPED, SUMMARY, LOCAL = "full", "GL:32", "SS:32/16", "L:32"
LAYOUTS = (FULL, GROUPED, SUMMARY, LOCAL)
NUMBERS = {FULL: 17.0, GROUPED: 17.1, SUMMARY: 17.6, LOCAL: 18.4}
Perplexities = Mapping[StudyCell, Mapping[int, float]]


def pairs(layout: str, length: int) -> int:
    window = None if layout == FULL else 32
    return visible_pairs(length, window) + visible_pairs(length, None if layout == GROUPED else window)


def run_of(cell: StudyCell, seed: int, value: float, gain: float = 0.05, beyond: float = 1.1) -> list[Result]:
    """Results of `zebra pretrain` for a cell: perplexity `value`, whose logarithm falls by `gain` from near to far."""
    place = f"runs/grid/cells/{cell.layout.replace(':', '-').replace('/', '-')}-{cell.position}-{cell.length}-s{seed}"
    common: dict[str, Any] = {"run": Path(place).name, "seed": seed, "layout": f"{cell.layout} {cell.position}"}
    common |= {"versions": {"torch": "2"}, "commit": "abc"}
    train: dict[str, Any] = {"task": "train", "metric": "loss", "length": cell.length, **common}
    rows = [Result(model=f"{place}@{n}", value=3 - n / 100, n=n * 512, **train) for n in (10, 20)]
    end, half = f"{place}/model", cell.length // 2
    spans = [(0, half, value * math.exp(gain / 2)), (half, cell.length, value * math.exp(-gain / 2))]
    spans = [(*span, cell.length) for span in (*spans, (0, cell.length, value))]
    if cell.position != "absolute":
        far = [(0, 512, value), (512, 1024, value * beyond), (1024, 2048, value * beyond), (0, 2048, value * beyond)]
        spans += [(*span, 2048) for span in far]
    for start, stop, perplexity, context in spans:
        at: dict[str, Any] = {"position_from": start, "position_to": stop, "length": context, "n": 999}
        rows.append(
            Result(model=end, task="perplexity-disjoint", metric="perplexity", value=perplexity, **at, **common)
        )
    for layout in dict.fromkeys((FULL, cell.layout)):
        named = common | {"layout": f"{layout} {cell.position}" if layout == cell.layout else layout}
        at = {"task": "cost", "length": cell.length, "model": end}
        rows.append(Result(metric="layers", value=2, **at, **named))
        rows.append(Result(metric="attention_pairs", value=pairs(layout, cell.length), **at, **named))
        rows.append(Result(metric="cached_tokens", value=2 * cell.length, **at, **named))
    return rows


def whole(**changes: Any) -> dict[StudyCell, dict[str, Any]]:
    """A grid in which every claim that can be tested holds."""
    cells: dict[StudyCell, dict[str, Any]] = {}
    for layout, position in itertools.product(LAYOUTS, ("rotary", "alibi", "absolute", "none")):
        worse = {"rotary": 1.0, "alibi": 1.01, "absolute": 1.04, "none": 1.06}[position]
        gain = 0.02 if position == "alibi" else 0.05
        cells[StudyCell(layout, position, 512)] = {"value": NUMBERS[layout] * worse, "gain": gain}
    for layout in (FULL, GROUPED):
        cells[StudyCell(layout, "rotary", 1024)] = {"value": NUMBERS[layout], "beyond": 1.0}
    return cells


def rows_of(cells: dict[StudyCell, dict[str, Any]], seeds: int = 3, noise: float = 0.001) -> list[Result]:
    """Results in which each seed shifts all cells by the same large amount, and each run by a small one."""
    drawn, rows = random.Random(5), []
    for cell, settings in cells.items():
        for seed in range(seeds):
            value = settings["value"] * math.exp(0.05 * seed + drawn.gauss(0, noise))
            rows += run_of(cell, seed, **settings | {"value": value})
    return rows


def few() -> list[Result]:
    """A cell of each kind, one seed: enough for a page."""
    return rows_of({cell: settings for cell, settings in whole().items() if cell[1:3] == ("rotary", 512)}, seeds=1)


def judged(rows: list[Result]) -> list[str]:
    (study,) = studies_in(rows)
    return [claim.verdict for claim in claims.claims(study)]


# Cells


def test_the_rows_of_a_grid_are_told_from_others() -> None:
    grid, other = rows_of(whole()), a_run()
    (study,) = studies_in([*other, *grid])
    assert len(study.results) == len(grid)
    assert (study.name, study.length, len(study.runs)) == ("grid", 512, 18)
    assert {cell.attention for cell in study.runs} == {"global", "grouped", "summary", "local"}
    assert StudyCell("0,3:32", "none", 8).attention == "grouped"
    assert StudyCell("GS:32/4", "none", 8).attention == "mixed"
    assert StudyCell(SUMMARY, "rotary", 8).name == "S:32/16 rotary"
    assert study.cell("grouped") == StudyCell(GROUPED, "rotary", 512)
    assert study.cell("mixed") is None
    assert study.title(StudyCell(GROUPED, "rotary", 1024)) == "GL:32 rotary at 1,024"
    one = [row for row in grid if row.run == grid[0].run]
    assert [len(study.runs) for study in studies_in(one)] == [1]
    alone = [replace(row, model=row.model.replace("/cells/", "/")) for row in one]
    assert studies_in(alone) == []
    two = [
        *alone,
        *(replace(row, model=row.model.replace("/cells/", "/")) for row in grid if "-none-512-s0" in row.run),
    ]
    assert [(study.name, len(study.runs)) for study in studies_in(two)] == [("", 5)]


def test_the_layout_with_the_most_runs_comes_first() -> None:
    cells = {StudyCell("GL:8", "rotary", 512): {"value": 9.0}} | whole()
    (study,) = studies_in(rows_of(cells))
    assert study.cell("grouped") == StudyCell(GROUPED, "rotary", 512)


def test_a_second_run_of_a_cell_and_seed_is_not_lost() -> None:
    cell = StudyCell(FULL, "rotary", 512)
    again = [
        replace(row, model=row.model.replace("/cells/", "/cells/again-"), run="again") for row in run_of(cell, 0, 7.77)
    ]
    (study,) = studies_in([*rows_of(whole()), *again])
    assert not {id(one) for one in again} & {id(one) for one in study.results}


# Seeds


def test_three_seeds_are_paired_by_students_t() -> None:
    change = loss_difference({0: 1.1, 1: 2.2, 2: 3.3, 9: 5.0}, {0: 1.0, 1: 2.0, 2: 3.0, 8: 7.0}, [])
    assert isinstance(change, Difference)
    assert change.mean == pytest.approx(0.2)
    assert change.half == pytest.approx(4.303 * 0.1 / math.sqrt(3))


def test_without_a_shared_seed_or_a_spread_there_is_no_difference() -> None:
    assert loss_difference({0: 1.0}, {1: 1.0}, [{0: 1.0, 1: 1.0}, {0: 2.0, 1: 3.0}]) == "no common seed"
    none = "no spread to compare it with"
    assert loss_difference({0: 1.0}, {0: 2.0}, [{0: 1.0}, {0: 2.0}]) == none
    assert loss_difference({0: 1.0}, {0: 2.0}, [{0: 1.0, 1: 2.0}]) == none
    assert loss_difference({0: 1.0}, {0: 2.0}, [{0: 1.0, 1: math.inf}, {0: 2.0, 1: 2.1}]) == none


@pytest.mark.parametrize("diverged", [math.inf, math.nan])
def test_a_seed_that_diverged_is_not_left_out(diverged: float) -> None:
    one, two = {0: 1.0, 1: 1.1, 2: 1.05, 3: diverged}, {0: 2.0, 1: 2.1, 2: 2.2, 3: 2.1}
    assert loss_difference(one, two, []) == "a loss is not finite"
    row = run_of(StudyCell(FULL, "rotary", 512), 0, 2.0)[2]
    assert math.isnan(level({seed: replace(row, value=math.exp(loss)) for seed, loss in one.items()}))


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_intervals_hold_the_truth_in_95_of_100(seeds: int) -> None:
    drawn, held, trials = random.Random(seeds), 0, 2000
    for _ in range(trials):
        shift = [drawn.gauss(0, 5) for _ in range(3)]
        cells: list[Losses] = [{s: mean + shift[s] + drawn.gauss(0, 0.3) for s in range(3)} for mean in range(6)]
        one, two = ({s: cell[s] for s in range(seeds)} for cell in cells[:2])
        change = loss_difference(one, two, [one, two, *cells[2:]] if seeds < 3 else cells)
        assert isinstance(change, Difference)
        held += change.low <= -1 <= change.high
    assert 0.93 < held / trials < 0.97


def test_spreads() -> None:
    row = run_of(StudyCell(FULL, "rotary", 512), 0, 2.0)[2]
    assert spread({0: row}) == (row.value, None)
    losses = (0.1, 0.2, 2.3)
    mean, deviation = spread({i: replace(row, value=math.exp(loss)) for i, loss in enumerate(losses)})
    assert mean == pytest.approx(math.exp(statistics.mean(losses)))
    assert deviation == pytest.approx(mean * statistics.stdev(losses))
    assert spread({0: row, 1: replace(row, value=math.nan)}).deviation is None


# Claims


def test_all_claims_that_can_be_tested_hold() -> None:
    (study,) = studies_in(rows_of(whole()))
    verdicts = [claim.verdict for claim in claims.claims(study)]
    assert verdicts == ["holds"] * 5 + ["does not hold"] + ["holds"] * 2
    for claim in claims.claims(study):
        assert claim.results
        assert all(row.run for row in claim.results)


def moved(cell: StudyCell, **settings: Any) -> dict[StudyCell, dict[str, Any]]:
    cells = whole()
    return cells | {cell: cells.get(cell, {}) | settings}


BROKEN: dict[str, tuple[dict[StudyCell, dict[str, Any]], int]] = {
    "long context does not help": (moved(StudyCell(LOCAL, "rotary", 512), value=16.7), 0),
    "long context helps one kind alone": (moved(StudyCell(FULL, "rotary", 512), value=19.0), 0),
    "grouped is worse": (moved(StudyCell(GROUPED, "rotary", 512), value=17.6), 1),
    "local is better than grouped": (moved(StudyCell(LOCAL, "rotary", 512), value=16.9), 2),
    "summary is worse than local": (moved(StudyCell(SUMMARY, "rotary", 512), value=18.6), 3),
    "summary is better than global": (moved(StudyCell(SUMMARY, "rotary", 512), value=16.0), 3),
    "absolute is better in one kind": (moved(StudyCell(SUMMARY, "absolute", 512), value=16.0), 4),
    "alibi is bad within": (moved(StudyCell(FULL, "alibi", 512), value=18.0), 6),
    "alibi uses far context": (moved(StudyCell(FULL, "alibi", 512), gain=0.05), 6),
    "length matters less": (moved(StudyCell(GROUPED, "rotary", 1024), value=19.5), 7),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_claim_that_the_rows_contradict_does_not_hold(name: str) -> None:
    cells, claim = BROKEN[name]
    assert judged(rows_of(cells))[claim] == "does not hold"


@pytest.mark.parametrize(
    ("missing", "claim"),
    [(LOCAL, 0), (LOCAL, 1), (GROUPED, 1), (GROUPED, 2), (SUMMARY, 3), ("absolute", 4), ("alibi", 6), (1024, 7)],
)
def test_a_claim_without_its_cells_is_not_tested(missing: object, claim: int) -> None:
    cells = {cell: settings for cell, settings in whole().items() if missing not in cell}
    assert judged(rows_of(cells))[claim] == "not tested here"


def test_positions_are_compared_in_one_layout() -> None:
    rows = rows_of({StudyCell("GLLL:32", "rotary", 512): {"value": 16.0}}, seeds=5)
    rows += rows_of({StudyCell(GROUPED, position, 512): {"value": 17.0} for position in ("rotary", "alibi")}, seeds=2)
    (study,) = studies_in(rows)
    (part,) = claims.claims(study)[4].evidence
    assert [name for name, _ in part.compared] == ["GL:32 rotary", "GL:32 alibi"]


def test_a_spread_that_leaves_it_open_is_no_verdict() -> None:
    verdicts = judged(rows_of(whole(), noise=0.2))
    assert verdicts[:5] == ["not tested here"] * 5


def test_noise_opens_a_verdict_and_never_turns_it() -> None:
    for half in (0.001, 0.007, 0.009, 0.013, 0.03, 0.1):
        assert evidence.within(Difference(-0.008, half, "", half), evidence.BEATS) in (True, None)
        assert evidence.within(Difference(0.008, half, "", half), evidence.BEATS) in (False, None)
        assert evidence.within(Difference(0.018, half, "", half), evidence.AS_GOOD) in (True, None)
        assert evidence.within(Difference(0.022, half, "", half), evidence.AS_GOOD) in (False, None)


def test_means_beside_a_change_are_of_the_seeds_that_it_is_of() -> None:
    rows = [row for row in rows_of(whole(), seeds=5) if row.seed < 3 or not row.layout.startswith(LOCAL)]
    (study,) = studies_in(rows)
    (part,) = [part for part in claims.claims(study)[2].evidence if part.compared[0][0].startswith(FULL)]
    one, two = (float(text.split()[0]) for text in (number for _, number in part.compared))
    assert float(part.change.rstrip(" %").replace("−", "-")) == pytest.approx(100 * (one / two - 1), abs=0.06)


def test_grouped_as_good_as_a_global_that_is_no_better_than_local_tells_nothing() -> None:
    assert judged(rows_of(moved(StudyCell(LOCAL, "rotary", 512), value=16.9)))[1] == "not tested here"


def test_length_that_matters_to_one_variant_alone_does_not_hold() -> None:
    (study,) = studies_in(rows_of(whole()))
    short, long = (StudyCell(GROUPED, "rotary", length) for length in (512, 1024))
    for seed, rows in study.runs[short].items():
        same = {(row.length, row.position_from, row.position_to): row.value for row in study.runs[long][seed]}
        study.runs[short][seed] = [
            replace(row, value=same.get((row.length, row.position_from, row.position_to), row.value))
            if row.metric == "perplexity" and row.length == 2048
            else row
            for row in rows
        ]
    assert claims.claims(study)[7].verdict == "does not hold"


def test_one_seed_is_held_against_the_noise_of_the_others() -> None:
    rows = [row for row in rows_of(whole()) if row.seed == 0 or "alibi" in row.layout or "none" in row.layout]
    assert judged(rows)[0] == "holds"
    assert judged([row for row in rows if row.seed == 0])[0] == "not tested here"


def test_rotary_beyond_its_length_is_held_against_absolute_positions_begun_anew() -> None:
    assert judged(rows_of(moved(StudyCell(FULL, "rotary", 512), beyond=1.0)))[5] == "holds"
    (study,) = studies_in(with_recall(rows_of(whole())))
    assert claims.claims(study.on("recall"))[5].verdict == "not tested here"  # nothing is begun anew there


def with_self_extend(rows: list[Result], **values: float) -> list[Result]:
    """The rows and those of rotary cells read with Self-Extend: a tenth less, but for the layouts that are named."""
    names = {FULL: "full", GROUPED: "grouped"}
    cells = [row for row in rows if row.metric == "perplexity" and row.layout.endswith("rotary")]
    extended = [
        replace(row, value=row.value * values.get(names.get(row.layout.split()[0], ""), 0.9),
                layout=f"{row.layout}, self-extend 8:64")
        for row in cells if row.length == 2048 and not row.layout.startswith(LOCAL)
    ]  # fmt: skip
    return [*rows, *extended]


def test_self_extend_is_judged_beside_the_same_cell_without_it_and_grouped_beside_global() -> None:
    (study,) = studies_in(with_self_extend(rows_of(whole())))
    assert len(study.runs) == 18  # the cells are those that were trained
    cell = study.extended(StudyCell(GROUPED, "rotary", 512))
    assert cell is not None
    assert cell.name == "GL:32 rotary, self-extend 8:64"
    assert study.extended(StudyCell(LOCAL, "rotary", 512)) is None
    assert judged(study.results)[8] == "holds"
    assert judged(with_self_extend(rows_of(whole()), grouped=1.1))[8] == "does not hold"
    assert judged(with_self_extend(rows_of(whole()), full=0.5))[8] == "does not hold"
    alone = [row for row in study.results if not row.layout.startswith(GROUPED) or "self-extend" not in row.layout]
    assert judged(alone)[8] == "not tested here"


def test_a_verdict_names_the_comparison_that_decides_it() -> None:
    parts = [
        evidence.Evidence([], name, "", "", evidence.within(difference, 0), gates=name == "gate", difference=difference)
        for name, difference in {
            "gate": Difference(0.9, 0.01, "", 0.01), "sure": Difference(-0.5, 0.01, "", 0.01),
            "less sure": Difference(-0.1, 0.05, "", 0.01), "open": Difference(-0.04, 0.05, "", 0.01),
            "more open": Difference(0.0, 0.05, "", 0.01), "fails": Difference(0.1, 0.01, "", 0.01),
            "fails for sure": Difference(0.2, 0.01, "", 0.01),
        }.items()
    ]  # fmt: skip
    for verdict, name in {
        "holds": "less sure",
        "does not hold": "fails for sure",
        "not tested here": "more open",
    }.items():
        decided = evidence.Claim("", "", verdict=verdict, evidence=parts).deciding
        assert decided is not None
        assert decided.where == name


def test_an_open_claim_names_the_comparison_that_more_seeds_decide_it_by() -> None:
    def decided_by(*means: float) -> float:
        differences = [Difference(mean, half_width(0.1, 3), "", 0.1) for mean in means]
        parts = [evidence.Evidence([], "", "", "", None, difference=one) for one in differences]
        deciding = evidence.Claim("", "", evidence=parts).deciding
        assert deciding is not None
        assert deciding.difference is not None
        return deciding.difference.mean

    assert decided_by(-0.1, -0.05, -0.08) == -0.05  # all hold when the last does
    assert decided_by(-0.1, 0.05, 0.08, -0.001) == 0.08  # it does not hold when one does not
    assert decided_by(-0.1, 0.0) == 0.0  # no number of seeds


def test_a_claim_that_lacks_a_cell_wants_no_seeds() -> None:
    surely = evidence.Evidence([], "", "", "", True, difference=Difference(-0.5, 0.01, "", 0.01))
    assert _verdict(evidence.Claim("", "", evidence=[surely])).text == "not tested"


def test_how_many_seeds_would_decide() -> None:
    open_at = [Difference(mean, half_width(0.008, 3), "3 seeds, paired", 0.008) for mean in (0.01, 0.0001, 0.03)]
    assert half_width(0.008, 4) > 0.01 > half_width(0.008, 5)
    assert [evidence.seeds_to_decide(one, evidence.BEATS) for one in open_at] == [5, None, None]


def test_the_shorter_training_may_be_the_rarer_one() -> None:
    cells = {
        cell._replace(length=1536 - cell.length): {"value": 17.0, **settings} for cell, settings in whole().items()
    }
    shorter = {
        cell: settings | {"value": 20.0, "beyond": 1.1} for cell, settings in cells.items() if cell.length == 512
    }
    assert judged(rows_of(cells | shorter))[7] == "holds"


def test_a_further_seed_that_diverged_in_every_longer_cell_leaves_it_open() -> None:
    rows = rows_of(whole())
    diverged = [row for row in rows_of(whole(), seeds=4) if row.seed == 3 and "-1024-" in row.run]
    assert diverged
    assert judged([*rows, *(replace(row, value=math.inf) for row in diverged)])[7] == "not tested here"


def with_recall(rows: list[Result], **values: float) -> list[Result]:
    """The rows and the recall of each model: 1.1 near and far, but for the kinds of attention that are named."""
    recall = []
    for row in rows:
        cell = row.layout.partition(" ")[0]
        if row.metric == "perplexity":
            value = values.get({FULL: "full", LOCAL: "local"}.get(cell, ""), 1.1) * (row.value / 18) ** 0.01
            recall.append(replace(row, task="recall-lookup", value=value))
    return [*rows, *recall]


def test_claims_are_judged_on_text_and_on_recall_apart() -> None:
    (study,) = studies_in(rows_of(whole()))
    assert study.subjects == ["text"]
    (study,) = studies_in(with_recall(rows_of(whole()), local=9.0))
    assert study.subjects == ["text", "recall"]
    assert judged(study.results)[3] == "holds"
    recall = [claim.verdict for claim in claims.claims(study.on("recall"))]
    assert recall[:3] == ["holds"] * 3
    (study,) = studies_in(with_recall(rows_of(whole()), full=9.0))
    assert [claim.verdict for claim in claims.claims(study.on("recall"))][2] == "does not hold"
    assert [claim.verdict for claim in claims.claims(study)][2] == "holds"


def test_the_page_has_a_verdict_for_text_and_one_for_recall(tmp_path: Path) -> None:
    page(with_recall(rows_of(whole()), local=9.0, full=9.5), tmp_path)
    markdown = (tmp_path / "page.md").read_text()
    assert "|  | on text | on recall | claim |" in markdown
    assert "| 3 | holds | does not hold | Local attention alone" in markdown
    assert "recall by distance" in markdown
    assert "Of the paper's 7 claims 6 hold, 1 does not hold, 0 are not tested here on text." in markdown
    assert (tmp_path / "page-study-recall-beyond.svg").stat().st_size > 2000


# The page


def page(results: list[Result], directory: Path) -> None:
    write_report(results, directory / "page.html", chapters=chapters(results))


def test_the_page_says_what_the_rows_say(tmp_path: Path) -> None:
    rows = rows_of(whole())
    page(rows, tmp_path)
    markdown, html = (tmp_path / "page.md").read_text(), words((tmp_path / "page.html").read_text())
    (study,) = studies_in(rows)
    for text in (markdown, html):
        assert "18 cells, 54 runs. Of the paper's 7 claims 6 hold, 1 does not hold, 0 are not tested here." in text
        for title in ("claims", "perplexity by position", "quality against cost", "beyond the trained length"):
            assert title in text
        for cell in study.runs:
            of = spread(study.scores(cell, cell.length))
            assert f"{of.mean:.2f}" in text
            assert f"± {of.deviation:.2f}" in text
        assert f"{pairs(GROUPED, 512):,}" in text
        assert "Other results" not in text
        assert "Side by side" not in text
    for name in ("scatter", "beyond", "loss"):
        assert f"page-study-{name}.svg" in markdown
        assert (tmp_path / f"page-study-{name}.svg").stat().st_size > 2000
    beyond = (tmp_path / "page-study-beyond.svg").read_text()
    assert "rotary" in beyond
    assert "absolute" in beyond  # to its own length


def test_rows_that_are_odd_make_a_page(tmp_path: Path) -> None:
    for value in (math.nan, math.inf, 0.0, 1e300):
        odd = [replace(row, value=value) for row in few()]
        page(odd, tmp_path)
        assert "not tested here" in (tmp_path / "page.md").read_text()


def test_two_studies_and_a_run_share_a_page(tmp_path: Path) -> None:
    one = few()
    two = [replace(row, model=row.model.replace("runs/grid/", "runs/other/")) for row in one]
    page([*one, *two, *a_run()], tmp_path)
    markdown = (tmp_path / "page.md").read_text()
    assert markdown.startswith("# grid, other, demo\n")
    assert (tmp_path / "page-study-2-scatter.svg").exists()
    assert "214.2" in markdown


# The pictures


def points(n: int) -> list[Point]:
    drawn = random.Random(n)
    cells = [
        StudyCell(layout, position, 512) for layout in LAYOUTS for position in ("rotary", "alibi", "absolute", "none")
    ]
    cells += [StudyCell(f"GL:{window}", "rotary", 512) for window in (8, 16, 64, 128)]
    means = [17 + drawn.random() for _ in range(n)]
    return [
        Point(cell, pairs(cell.layout, 512) / 512, Spread(mean, 0.02 if i % 2 else None), mean)
        for i, (cell, mean) in enumerate(zip(cells, means, strict=False))
    ]


def test_the_frontier_is_what_nothing_beats() -> None:
    for n in (2, 7, 20):
        some = points(n)
        best = {
            point.cell
            for point in some
            if not any(
                (other.cost, other.quality.mean) != (point.cost, point.quality.mean)
                and other.cost <= point.cost
                and other.quality.mean <= point.quality.mean
                for other in some
            )
        }
        assert {point.cell for point in frontier(some)} == best


def test_no_label_lies_on_another() -> None:
    canvas = matplotlib.figure.Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = canvas.subplots()
    some = points(20)
    plot_scatter(axes, some)
    canvas.draw_without_rendering()
    boxes = {text.get_text(): Text.get_window_extent(text) for text in axes.texts}  # without the line to the point
    assert set(boxes) == {point.cell.name for point in some}
    for one, two in itertools.combinations(boxes.values(), 2):
        assert not one.padded(-0.5).overlaps(two.padded(-0.5))


# The published page


def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The script's page and results go into a directory of the test."""
    monkeypatch.setattr(script, "RESULTS", tmp_path / "study.jsonl")
    monkeypatch.setattr(script, "PAGE", tmp_path / "study.md")
    monkeypatch.setattr(script, "IMAGES", tmp_path / "images")
    (tmp_path / "images").mkdir()
    return tmp_path / "study.md"


def a_study() -> list[Result]:
    return with_recall(with_self_extend(rows_of(whole())), local=9.0)


def test_the_script_publishes_a_run_and_writes_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rows, run = published(tmp_path, monkeypatch), a_study(), tmp_path / "grid"
    run.mkdir()
    extended = [row for row in rows if "self-extend" in row.layout]
    write_results(run / "results.jsonl", [row for row in rows if row not in extended])
    write_results(run / "self-extend.jsonl", extended)
    script.main([str(run)])
    text = path.read_text()
    assert text.startswith("# The from-scratch study\n\n**18 models, 54 trainings, means over seeds. Perplexity of")
    lines = text.splitlines()
    assert len(lines) <= 120
    (grouped,) = [line for line in lines if line.startswith("| 2. ")]
    assert re.search(r"\| holds \| GL:32 against full, 0–512: \+0\.\d\s% \(.*\) \| holds \| GL:32 ", grouped), grouped
    (full,) = [line for line in lines if line.startswith("| full rotary |")]
    cells = [cell.strip() for cell in full.strip("|").split("|")]
    assert cells[1] == "3"
    assert float(cells[4].split()[0]) == pytest.approx(0.9 * float(cells[3].split()[0]), rel=0.01)  # with Self-Extend
    for name in ("text", "recall", "positions"):
        assert f"../images/study-{name}.svg" in text
        assert (tmp_path / "images" / f"study-{name}.svg").stat().st_size > 2000
    script.main([])
    assert path.read_text() == text


def test_cells_that_diverged_have_a_line_and_no_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published(tmp_path, monkeypatch)
    of = (f"{LOCAL} rotary", "full absolute")
    rows = [replace(row, value=math.inf) if row.layout in of and row.n == 999 else row for row in a_study()]
    script.write_page(rows, script.PAGE, script.IMAGES, [], [])
    assert "| L:32 rotary | 3 | inf | inf |" in script.PAGE.read_text()
    assert ">L:32<" not in (script.IMAGES / "study-text.svg").read_text()


def test_costs_are_published_beside_the_runs_and_stay_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, run, rows = published(tmp_path, monkeypatch), tmp_path / "grid", a_study()
    run.mkdir()
    write_results(run / "results.jsonl", rows)
    timed = [
        Result(run="study", model="zebra", layout=f"{layout} rotary", task="bench study step", metric=metric,
               value=value * part, length=length)
        for layout, part in ((FULL, 1.0), (GROUPED, 0.5)) for length in (1024, 16384)
        for metric, value in (("tokens_per_second", 2000.0), ("planned_milliseconds", 60.0))
    ]  # fmt: skip
    recipes: list[Any] = []
    monkeypatch.setattr(script, "recipes_of", lambda grid: recipes.append(grid) or [])
    monkeypatch.setattr(script.bench, "costs", lambda recipes, run: (timed, ("a line",)))
    script.main([str(run)])
    for arguments in (["costs", str(ROOT / "recipes" / "study-cpu.yaml")], [str(run)]):
        script.main(arguments)
        assert len(read_results(tmp_path / "study.jsonl")) == len(rows) + len(timed)
        assert "| GL:32 | 1,000 | 2.00 | 0.50 | 1,000 | 2.00 | 0.50 |" in path.read_text()
    assert recipes[0].recipe["train"]["length"] == 16384
    for mistaken in (["extend"], ["costs"], ["extend"] * 3, [str(tmp_path)]):
        with pytest.raises(ZebraError, match="is no command, and no run"):
            script.main(mistaken)
    with pytest.raises(ZebraError, match="of one study of two cells or more; got 0"):
        script.write_page(a_run(), tmp_path / "none.md", tmp_path, [], [])


def test_rotary_models_are_read_farther_with_self_extend_and_once(tmp_path: Path) -> None:
    run = tmp_path / "grid"
    recall = {"share": 0.5, "first": 192}
    tree: dict[str, Any] = {
        "run": str(run),
        "recipe": {
            "model": {"model_type": "zebra_study", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                      "num_attention_heads": 2, "sliding_window": 16},
            "tokenizer": {"vocab_size": 400, "digits": 2},
            "data": {"files": [str(FEW_STORIES)], "separator": END, "join": True, "held_out": 0.2, "recall": recall},
            "train": {"length": 256, "max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 2},
            "evaluate": {"length": 256, "join": True, "beyond": 512, "recall": 1, "first_bucket": 64},
        },
        "cells": [{"attention": ["grouped", "local"], "group": 2, "position": "rotary"},
                  {"attention": "global", "position": "none"}],
    }  # fmt: skip
    for recipe in recipes_of(StudyRecipe.model_validate(tree)):
        pretrain(recipe)
    script.extend(run)
    results = read_results(run / "self-extend.jsonl")
    assert {one.layout.partition(",")[0] for one in results} == {"GL:16 rotary"}
    assert all("self-extend" in one.layout and one.length == 512 for one in results)
    assert {one.task for one in results} == {"perplexity-disjoint", "recall-lookup"}
    script.extend(run)
    assert read_results(run / "self-extend.jsonl") == results
    cells = [one for cell in run.glob("cells/*/results.jsonl") for one in read_results(cell)]
    (study,) = studies_in([*cells, *results])
    assert study.extended(StudyCell("GL:16", "rotary", 256)) is not None


def test_the_published_page_is_what_its_rows_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, page = script.RESULTS, script.PAGE
    path = published(tmp_path, monkeypatch)
    monkeypatch.setattr(script, "RESULTS", results)
    script.main([])
    assert path.read_text() == page.read_text()
    for picture in (tmp_path / "images").glob("*.svg"):
        assert (ROOT / "docs" / "images" / picture.name).is_file()
