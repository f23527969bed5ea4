"""The page of benchmarks/smollm2.py: comparisons, the selection, what adaptation did, and a checklist of claims."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path

from matplotlib.axes import Axes

from zebra.errors import ZebraError
from zebra.files import atomic_write
from zebra.report import methods, page, perplexity, retrieval, selection, tasks
from zebra.report.answers import answers
from zebra.report.compared import answered
from zebra.report.figures import Figure, plot_positions
from zebra.report.method import method
from zebra.report.page import Cell, Section, Table
from zebra.report.pivot import interval_cell, split, table, where
from zebra.report.series import Span, buckets, by_kind, percent, short_layouts, span_name, span_of
from zebra.results import Result, read_results
from zebra_bench.configs import SMOLLM2_STRIPES as CHOSEN
from zebra_bench.configs import SMOLLM2_STRIPES_WITH_SINKS as CHOSEN_WITH_SINKS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results" / "smollm2.md"
PICTURES = ROOT / "docs" / "images" / "smollm2"
TO_16K = "runs/lcat-smollm2-16k/model"
ANSWERS = RESULTS.parent / "smollm2-answers.json"

MODEL = "runs/demo-llm/smollm2"
TUNED = {"source": MODEL, "adapted to stripes": "runs/lcat-smollm2/model", "then tuned": "runs/lit-smollm2/model"}
LIMIT, WINDOW = 8192, 1024
AUTO, AUTO_32K = "8:2048", "16:2048"
"""What `auto:16384` and `auto:32768` take."""
GROUPS = ("4:1024", "4:2048", "8:1024", "8:4096", "16:2048")
ADAPTED = {"chosen": "chosen", "sinks": "chosen, 4 sinks", "offset": "GL:1024"}
"""The adapted layouts, by part."""


def adaptation(parts: Mapping[str, Sequence[Result]]) -> Section:
    """Perplexity by position before and after, and the share of the gap to the full model that training closed."""
    here = [one for part in (*ADAPTED, "full") for one in parts.get(part, ()) if "perplexity" in one.task]
    here = [one for one in here if one.metric == "perplexity" and "@" not in one.model]
    if not here:
        return Section("Adaptation to stripes", [])
    source = [one for one in here if one.layout == "full" and one.model == MODEL]
    spans = [*buckets(source), (0, source[0].length or 0)]
    layouts = short_layouts(one.layout for one in here)
    names = {
        (MODEL, "full"): "the source",
        **{
            (model, layout): f"{layouts[layout]}, {'untrained' if model == MODEL else 'adapted'}"
            for model, layout in split(here, lambda one: (one.model, one.layout))
            if (model, layout) != (MODEL, "full")
        },
    }
    lines = [([Cell(name)], [one for one in here if (one.model, one.layout) == key]) for key, name in names.items()]
    shown = [(Cell(span_name(span)), _at(span, interval_cell)) for span in spans]
    gaps = [
        [Cell(ADAPTED[part]), Cell(name), *(show(Gap.of(parts, part, span)) for span in spans)]
        for part in ADAPTED
        if part in parts
        for name, show in _GAP_ROWS.items()
    ]
    prose = (
        "LoRA for 40 steps of 8,192 tokens, the same for each layout, on six books and two files of code. Measured on "
        "two other novels; with only two documents, an interval shows how far apart they are. An adapted model is "
        "compared with the full model that was trained in the same way: so what both learn from novels does not count."
    )
    head = [Cell("layout"), Cell("perplexity"), *(Cell(span_name(span)) for span in spans)]
    blocks: list[str | Table | Figure] = [prose, table("Perplexity by position", [Cell("model")], lines, shown)]
    return Section("Adaptation to stripes", [*blocks, Table("The gap to full attention", head, gaps)])


def _at(span: Span, show: Callable[..., Cell]) -> Callable[[Sequence[Result]], Cell]:
    return lambda results: show([one for one in results if span_of(one) == span])


@dataclass(frozen=True)
class Gap:
    """How far a layout is from full attention at some positions, ln(striped / full), untrained and adapted.

    Attributes:
        untrained, source: the layout, and the full model, before training. adapted, full: both after it.
    """

    untrained: Result
    source: Result
    adapted: Result
    full: Result

    @classmethod
    def of(cls, parts: Mapping[str, Sequence[Result]], part: str, span: Span, opened_by: str = "") -> Gap | None:
        """That of a part; `opened_by` names the part whose untrained layout is taken. None without all results."""
        one, other, full = (
            [one for one in parts.get(name, ()) if one.metric == "perplexity" and span_of(one) == span]
            for name in (part, opened_by or part, "full")
        )
        source = [one for one in other if one.layout == "full"]
        untrained = [one for one in other if one.layout != "full" and one.model == MODEL]
        adapted, trained = ([one for one in ones if one.model.endswith("/model")] for ones in (one, full))
        four = [ones[-1] for ones in (untrained, source, adapted, trained) if ones]
        return cls(*four) if len(four) == 4 and span[1] > WINDOW else None

    @property
    def before(self) -> float:
        """Of the untrained layout over the source."""
        return math.log(self.untrained.value / self.source.value)

    @property
    def after(self) -> float:
        """Of the adapted layout over the full model that was trained in the same way."""
        return math.log(self.adapted.value / self.full.value)

    @property
    def share(self) -> float:
        """The share that training closed."""
        return 1 - self.after / self.before


_GAP_ROWS: dict[str, Callable[[Gap | None], Cell]] = {
    "untrained, above the source": lambda gap: (
        Cell(percent(math.expm1(gap.before), sign="+"), results=[gap.untrained, gap.source]) if gap else Cell("–")
    ),
    "adapted, above full adapted": lambda gap: (
        Cell(percent(math.expm1(gap.after), sign="+"), results=[gap.adapted, gap.full]) if gap else Cell("–")
    ),
    "share of the gap that was closed": lambda gap: (
        Cell(percent(gap.share, 0), results=[gap.untrained, gap.source, gap.adapted, gap.full]) if gap else Cell("–")
    ),
}


class Compared:
    """One comparison's values, by layout, for the checklist."""

    def __init__(self, results: Sequence[Result]):
        self.results = results

    def perplexity(self, layout: str, span: Span) -> float:
        """The perplexity of a layout at some positions; NaN without a result."""
        here = [one for one in self.results if one.metric == "perplexity" and span_of(one) == span]
        return next((one.value for one in here if one.layout == layout), math.nan)

    def enough(self, span: Span) -> bool:
        """Whether half of the planned 16 windows were scored."""
        scored = [one.n or 0 for one in self.results if one.metric == "perplexity" and span_of(one) == span]
        return max(scored, default=0) >= 8 * (span[1] - span[0])

    def answers(self, layout: str, task: str) -> list[Result]:
        """The shares of answers by depth."""
        name = f"retrieval-generate-{task}"
        here = [one for one in self.results if one.task == name and one.layout == layout]
        return sorted(here, key=lambda one: one.depth or 0)


def checklist(parts: Mapping[str, Sequence[Result]]) -> Section:
    """What the two papers claim, beside what was measured here."""
    body = [
        [Cell(claim), Cell(measured), Cell(verdict)]
        for claim, measured, verdict in (
            *_self_extend_claims(parts),
            *_claims_at_four_times(parts),
            *_sink_claims(parts),
            *_adaptation_claims(parts),
        )
    ]
    prose = (
        "Claims of Self-Extend (arXiv 2401.01325, sections 4, 5) and of Zebra's adaptation (arXiv 2312.08618, section "
        "4), in our words, tested on this one model and these texts. Reproduce: make demo-llm, then python "
        "benchmarks/smollm2.py."
    )
    return Section(
        "Checklist", [prose, Table("", [Cell("claim"), Cell("measured here"), Cell("verdict")], body, False)]
    )


def _verdict(holds: bool, *, enough: bool = True) -> str:
    """In words; of too few windows or samples none."""
    return ("holds" if holds else "does not hold") if enough else "undecided"


def _self_extend_claims(parts: Mapping[str, Sequence[Result]]) -> Iterator[tuple[str, str, str]]:
    near, inside, beyond = (2048, 4096), (4096, 8192), (8192, 16384)
    compared, extended = Compared(parts.get("16k", ())), f"full, self-extend {AUTO}"
    plain, grouped, far = (
        compared.perplexity("full", inside),
        compared.perplexity(extended, inside),
        compared.perplexity(extended, beyond),
    )
    if not math.isnan(far):
        lost = compared.perplexity("full", beyond)
        yield (
            "Without training, perplexity does not rise beyond the trained length.",
            f"{far:.2f} at 8K to 16K, {grouped:.2f} at 4K to 8K; {lost:.1f} unchanged",
            _verdict(far < 1.03 * grouped, enough=compared.enough(beyond)),
        )
        short = compared.perplexity("full", near), compared.perplexity(extended, near)
        yield (
            "Within the trained length, perplexity does not rise.",
            f"{grouped:.2f}, unchanged {plain:.2f} at 4K to 8K; {short[1]:.2f}, unchanged {short[0]:.2f} at 2K to 4K",
            _verdict(grouped < 1.01 * plain and short[1] < 1.01 * short[0], enough=compared.enough(beyond)),
        )
    for task in ("passkey", "needle-in-text"):
        if answered := compared.answers(extended, task):
            before = compared.answers("full", task)
            yield (
                f"At twice the trained length a {task.replace('-', ' ')} is answered at any depth.",
                f"{_shares(answered)}; {_shares(before)} unchanged",
                _verdict(min(one.value for one in answered) >= 0.9, enough=len(answered) > 2),
            )
    by_setting = Compared(parts.get("groups", ()))
    every = {one: by_setting.perplexity(f"full, self-extend {one}", beyond) for one in (AUTO, *GROUPS)}
    values = {one: value for one, value in every.items() if not math.isnan(value)}
    if len(values) > 1:
        within = [one for one in values if 0.5 <= _largest(one) / LIMIT <= 2 / 3]
        best = min(values.values())
        yield (
            "The choice is not a fine one; the largest distance is best at a half to two thirds of the trained length.",
            ", ".join(f"{one} ({_largest(one) / LIMIT:.0%}) {value:.2f}" for one, value in values.items()),
            _verdict(
                all(values[one] < 1.01 * best for one in within) and max(values.values()) < 1.05 * best,
                enough=by_setting.enough(beyond),
            ),
        )


def _claims_at_four_times(parts: Mapping[str, Sequence[Result]]) -> Iterator[tuple[str, str, str]]:
    inside, beyond, extended = (4096, 8192), (16384, 32768), f", self-extend {AUTO_32K}"
    compared = Compared(parts.get("32k", ()))
    near, far = (compared.perplexity("full" + extended, span) for span in (inside, beyond))
    if math.isnan(far):
        return
    lost, few = compared.perplexity("full", beyond), compared.perplexity(CHOSEN_WITH_SINKS + extended, beyond)
    yield (
        "The same at four times the trained length.",
        f"{far:.2f} at 16K to 32K, {near:.2f} at 4K to 8K; {lost:,.0f} unchanged",
        _verdict(far < 1.03 * near),
    )
    answers = compared.answers("full" + extended, "passkey")
    yield (
        "At four times the trained length a passkey is answered at any depth.",
        f"{_shares(answers)}; {_shares(compared.answers('full', 'passkey'))} unchanged",
        _verdict(min(one.value for one in answers) >= 0.9, enough=len(answers) > 2),
    )
    yield (
        "There, without training, 8 of 30 global layers with four sinks read as well as 30, within 3 %.",
        f"{few:.2f} and {far:.2f} at 16K to 32K; passkeys "
        f"{_shares(compared.answers(CHOSEN_WITH_SINKS + extended, 'passkey'))}",
        _verdict(few < 1.03 * far),
    )


def _sink_claims(parts: Mapping[str, Sequence[Result]]) -> Iterator[tuple[str, str, str]]:
    compared, extended = Compared(parts.get("16k-sinks", ())), f", self-extend {AUTO}"
    for layout, name in ((f"GL:{WINDOW}", f"GL:{WINDOW}"), (CHOSEN, "the chosen layout")):
        shares = []
        for span in ((4096, 8192), (8192, 16384)):
            full, bare, sinks = (compared.perplexity(one + extended, span) for one in ("full", layout, f"{layout}+4"))
            shares.append(1 - math.log(sinks / full) / math.log(bare / full))
        if not math.isnan(sum(shares)):
            yield (
                f"Without training, four attention sinks close 80 % of the gap that {name} opens, under Self-Extend.",
                f"at 4K to 8K {percent(shares[0], 0)}, at 8K to 16K {percent(shares[1], 0)}",
                _verdict(min(shares) >= 0.8, enough=compared.enough((8192, 16384))),
            )


def _adaptation_claims(parts: Mapping[str, Sequence[Result]]) -> Iterator[tuple[str, str, str]]:
    full = "the full model trained in the same way, at every position"
    for part, opened_by, name in (
        ("chosen", "chosen", f"closes 80 % of the gap between the chosen layout and {full}"),
        ("offset", "offset", f"closes 80 % of the gap between the paper's order, GL:1024, and {full}"),
        ("sinks", "chosen", f"with four sinks closes 80 % of the gap between the chosen layout without and {full}"),
    ):
        here = [one for one in parts.get(part, ()) if one.metric == "perplexity" and "@" not in one.model]
        gaps = [Gap.of(parts, part, span, opened_by) for span in buckets(here) if span[0] >= WINDOW]
        if shares := [gap.share for gap in gaps if gap]:
            yield (
                f"A short adaptation {name}.",
                f"from 1K to 8K: {', '.join(percent(share, 0) for share in shares)}",
                _verdict(min(shares) >= 0.8),
            )
    here = [one for one in parts.get("sinks-16k", ()) if one.metric == "perplexity" and one.model.endswith("/model")]
    at = {(one.model == TO_16K, span_of(one)): one.value for one in here if (one.layout or "").endswith("yarn:2")}
    near, far = (4096, 8192), (8192, 16384)
    if at.keys() >= {(trained, span) for trained in (False, True) for span in (near, far)}:
        values = {trained: (at[trained, near], at[trained, far]) for trained in (False, True)}
        yield (
            "With YaRN and a few steps at twice the length, perplexity at 8K to 16K is within 10 % of 4K to 8K.",
            f"{values[True][1]:.2f} and {values[True][0]:.2f}; before these steps "
            f"{values[False][1]:.2f} and {values[False][0]:.2f}",
            _verdict(values[True][1] < 1.1 * values[True][0]),
        )


def documents(results: Sequence[Result]) -> Section:
    """Questions about unseen stories before and after, and samples of the answers."""
    here = [one for one in results if not one.task.startswith("documents-check")]
    if not here:
        return Section("Questions about long stories", [])
    named = {model: name for name, model in TUNED.items()}
    layouts = short_layouts(one.layout for one in here)
    lines = [
        ([Cell(named[model]), Cell(layouts[layout])], ones)
        for (model, layout), ones in split(here, attrgetter("model", "layout")).items()
    ]
    metrics = [
        (Cell(metric.replace("_", " ")), where(tasks.mean_cell, metric=metric))
        for metric in split(here, attrgetter("metric"))
    ]
    prose = (
        "Ten stories of SQuALITY's development set, each of at most 7,300 tokens, with 50 questions and four reference "
        "answers to each. Log-likelihoods are those of the reference answers, in nats per token: after the story and "
        "the question, and after the question alone. For 25 questions answers were also generated, greedily, up to 128 "
        "tokens. ROUGE and F1 compare them with the best of the four references."
    )
    samples = json.loads(ANSWERS.read_text()) if ANSWERS.is_file() else {}
    rows = [
        [Cell(question), *(Cell(answers.get(name, "–")) for name in TUNED)] for question, answers in samples.items()
    ]
    head = [Cell("the first question of three stories"), *map(Cell, TUNED)]
    scores = table("Scores", [Cell("model"), Cell("layout")], lines, metrics)
    return Section("Questions about long stories", [prose, scores, Table("Sample answers", head, rows, False)])


def _shares(results: Sequence[Result]) -> str:
    return ", ".join(answered([one]) for one in results)


def _largest(setting: str) -> float:
    """The largest distance of Self-Extend G:W at 16,384 tokens: W + (N - W) / G."""
    group, window = map(int, setting.split(":"))
    return window + (16384 - window) / group


def sections(parts: Mapping[str, list[Result]]) -> list[Section]:
    """What each part shows."""
    return [
        _comparison(parts, "16k", "16,384 tokens, twice the trained length"),
        _comparison(parts, "16k-sinks", "16,384 tokens, with attention sinks"),
        _comparison(parts, "32k", "32,768 tokens, four times the trained length"),
        _comparison(parts, "groups", "Self-Extend by group and window", _BUSY),
        selection.selection(parts.get("selection", [])),
        _selection_with_sinks(parts.get("selection-sinks", [])),
        adaptation(parts),
        _to_16k(parts.get("sinks-16k", [])),
        _comparison(parts, "8k", "8,192 tokens, before and after adaptation"),
        answers(by_kind(parts.get("lit", []))["answers"]),
        documents(parts.get("documents", [])),
    ]


_BUSY = "Five of these methods were timed while the machine's other core worked, so their times are upper bounds."


def _comparison(parts: Mapping[str, list[Result]], part: str, title: str, note: str = "") -> Section:
    """What `zebra compare` measured, with figures named after the part."""
    results = parts.get(part, [])
    kinds = by_kind(results)
    blocks = [
        *methods.methods(results).blocks,
        *perplexity.positions(kinds["position"]).blocks,
        *retrieval.retrieval(kinds["retrieval"]).blocks,
    ]
    named = [replace(block, name=f"{part}-{block.name}") if isinstance(block, Figure) else block for block in blocks]
    return Section(title, [note, *named] if note and named else named)


def _to_16k(results: list[Result]) -> Section:
    here = [replace(one, low=None, high=None) for one in by_kind(results)["position"]]
    figures = [block for block in perplexity.positions(here).blocks if not isinstance(block, str)]
    named = [replace(block, name=f"to-16k-{block.name}") if isinstance(block, Figure) else block for block in figures]
    prose = (
        "The model that was adapted at 8,192 tokens with four sinks: as it is, by YaRN without a step, and after 12 "
        "steps on rows of 16,384 tokens. Measured on two novels, so without intervals."
    )
    return Section("The adapted model to 16,384 tokens, by YaRN", [prose, *named] if named else [])


def _selection_with_sinks(results: list[Result]) -> Section:
    blocks = selection.selection(results).blocks
    named = [replace(block, name=f"sinks-{block.name}") if isinstance(block, Figure) else block for block in blocks]
    return Section("Which layers stay global, with attention sinks", named)


def picture(results: Sequence[Result]) -> Figure:
    """Perplexity by position of the ways to read four times the trained length, beside the unchanged checkpoint."""
    names = {
        "full": "unchanged",
        f"full, self-extend {AUTO_32K}": "Self-Extend",
        f"{CHOSEN_WITH_SINKS}, self-extend {AUTO_32K}": "Self-Extend, 8 of 30 layers global",
    }
    here = [one for one in results if one.metric == "perplexity" and one.model == MODEL and one.layout in names]
    buckets_of = [one for one in here if (one.position_from, one.position_to) != (0, one.length)]
    shown = [replace(one, low=None, high=None) for one in buckets_of]  # the page has the intervals
    last = {one.layout: one.value for one in shown if one.position_to == one.length}
    legend = {name: f"{names[name]}: {value:,.{0 if value >= 100 else 2}f}" for name, value in last.items()}
    return Figure("smollm2", [partial(_plot_with_limit, results=shown, named=legend)], height=2.9)


def _plot_with_limit(axes: Axes, results: Sequence[Result], named: Mapping[str, str]) -> None:
    plot_positions(axes, results, named)
    axes.axvline(LIMIT, color="0.6", linestyle=":")
    place = axes.get_xaxis_transform()
    axes.text(LIMIT / 1.05, 0.98, "trained length", transform=place, ha="right", va="top", color="0.4")


def write_page(names: Sequence[str]) -> None:
    """The page and its pictures, from the results of the parts of these names.

    Raises:
        ZebraError: no results.
    """
    files = {part: RESULTS / f"smollm2-{part}.jsonl" for part in names}
    parts = {part: read_results(file) for part, file in files.items() if file.is_file()}
    results = [one for part in parts.values() for one in part]
    if not results:
        raise ZebraError("there are no results of SmolLM2. Measure first: python benchmarks/smollm2.py")
    shown = [section for section in [checklist(parts), *sections(parts), method(results)] if section.blocks]
    for figure in page.figures_of(shown):
        atomic_write(PICTURES.with_name(f"{PICTURES.name}-{figure.name}.svg"), figure.standalone)
    if longest := parts.get("32k"):
        atomic_write(PICTURES.with_suffix(".svg"), picture(longest).standalone)
    advice = [line for part in ("16k-sinks", "32k") for line in methods.method_summaries(parts.get(part, []))]
    atomic_write(PAGE, page.markdown("../images/smollm2", "SmolLM2-135M-Instruct", advice, shown))
