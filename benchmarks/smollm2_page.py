"""The page of benchmarks/smollm2.py: comparisons, the selection, what adaptation did, and a checklist of claims."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from textwrap import shorten

from matplotlib.axes import Axes

from smollm2_claims import AUTO_32K, LIMIT, MODEL, Gap, checklist
from zebra.errors import ZebraError
from zebra.files import atomic_write
from zebra.report import methods, page, perplexity, retrieval, selection, tasks
from zebra.report.answers import answers
from zebra.report.figures import HUES, Figure, plot_loss, plot_positions
from zebra.report.method import method
from zebra.report.page import Cell, Section, Table
from zebra.report.pivot import interval_cell, split, table, where
from zebra.report.series import Span, buckets, by_kind, percent, short_layouts, span_name, span_of, step
from zebra.results import Result, read_results
from zebra_bench.configs import SMOLLM2_STRIPES_WITH_SINKS as CHOSEN_WITH_SINKS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results" / "smollm2.md"
PICTURES = ROOT / "docs" / "images" / "smollm2"
ANSWERS = RESULTS.parent / "smollm2-answers.json"
STORIES = ROOT / "examples" / "instructions" / "squality_dev.jsonl"

TUNED = {"source": MODEL, "adapted to stripes": "runs/lcat-smollm2/model", "then tuned": "runs/lit-smollm2/model"}
ADAPTED = {"chosen": "chosen", "sinks": "chosen, 4 sinks", "offset": "GL:1024"}
"""The adapted layouts, by part."""


def adaptation(parts: Mapping[str, Sequence[Result]]) -> Section:
    """Perplexity by position before and after, and the share of the gap to the full model that training closed."""
    here = [one for part in (*ADAPTED, "full") for one in parts.get(part, ()) if "perplexity" in one.task]
    here = [replace(one, low=None, high=None) for one in here if one.metric == "perplexity" and "@" not in one.model]
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
        "25 windows of two other novels, so without intervals. An adapted model is compared with the full model that "
        "was trained in the same way: so what both learn from novels does not count. Of the ways to close the gap only "
        "attention sinks and the choice of layers were tried. More steps, other windows, shares of global layers, "
        f"learning rates and trained tensors were not. {_progress(parts.get('chosen', ()))}"
    )
    losses = [one for part in (*ADAPTED, "full") for one in parts.get(part, ()) if one.metric == "loss"]
    by_run = split(losses, attrgetter("run"))
    common = set.intersection(*({one.n for one in here} for here in by_run.values()))
    named = {run: (_arm(run), HUES[i]) for i, run in enumerate(by_run)}
    shown_losses = [one for one in losses if one.n in common]
    caption = "Training loss of the four arms, the mean of ten steps at a time"
    curves = Figure("training", [partial(plot_loss, losses=shown_losses, named=named)], caption)
    head = [Cell("layout"), Cell("perplexity"), *(Cell(span_name(span)) for span in spans)]
    blocks: list[str | Table | Figure] = [prose, table("Perplexity by position", [Cell("model")], lines, shown)]
    return Section("Adaptation to stripes", [*blocks, Table("The gap to full attention", head, gaps), curves])


def _progress(chosen: Sequence[Result]) -> str:
    """The perplexity of the chosen layout during its training."""
    scored = [one for one in chosen if one.metric == "perplexity" and step(one) is not None]
    whole = {step(one): one.value for one in scored if span_of(one) == (0, one.length)}
    values = ", ".join(f"{value:.2f} after step {at}" for at, value in whole.items())
    return f"The chosen layout's perplexity was {values}."


def _arm(run: str) -> str:
    """The name of a training run's layout."""
    part = run.removeprefix("lcat-smollm2").lstrip("-") or "chosen"
    return ADAPTED.get(part, part)


def _at(span: Span, show: Callable[..., Cell]) -> Callable[[Sequence[Result]], Cell]:
    return lambda results: show([one for one in results if span_of(one) == span])


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
        "the question, and after the question alone. What a story adds is the difference of the two. For 25 questions "
        "answers were also generated, greedily, up to 128 tokens. ROUGE and F1 compare them with the best of the four "
        f"references. {_gain(here)}"
    )
    samples = json.loads(ANSWERS.read_text()) if ANSWERS.is_file() else {}
    stories = enumerate(map(json.loads, STORIES.read_text(encoding="utf-8").splitlines()), start=1)
    references = {f"{i}: {one['question']}": one["answers"][0] for i, story in stories for one in story["qa"]}
    rows = [
        [
            Cell(question),
            *(Cell(answers.get(name, "–")) for name in TUNED),
            Cell(shorten(references[question], 250, placeholder=" …")),
        ]
        for question, answers in samples.items()
    ]
    head = [Cell("the first question of three stories"), *map(Cell, TUNED), Cell("a reference, its beginning")]
    scores = table("Scores", [Cell("model"), Cell("layout")], lines, metrics)
    return Section("Questions about long stories", [prose, scores, Table("Sample answers", head, rows, False)])


def _gain(results: Sequence[Result]) -> str:
    """How much the story adds to the likelihood of the answers, before and after."""
    values = {(one.model, one.metric): one.value for one in results}
    names = {model: name for name, model in TUNED.items()}
    gains = [
        f"{values[model, 'log_likelihood'] - values[model, 'log_likelihood_without_document']:.2f} nats ({name})"
        for model, name in names.items()
        if (model, "log_likelihood_without_document") in values
    ]
    return f"The story adds {', '.join(gains)}: so the answers become likelier by their style, not by more use of it."


def sections(parts: Mapping[str, list[Result]]) -> list[Section]:
    """What each part shows."""
    return [
        _comparison(parts, "16k", "16,384 tokens, twice the trained length"),
        _comparison(parts, "32k", "32,768 tokens, four times the trained length"),
        _comparison(parts, "without-sinks", "16,384 tokens, with and without attention sinks"),
        _question(parts.get("question", [])),
        _comparison(parts, "groups", "Self-Extend by group and window", _BUSY),
        selection.selection(parts.get("selection", [])),
        _selection_with_sinks(parts.get("selection-sinks", [])),
        adaptation(parts),
        _to_16k(parts.get("sinks-16k", [])),
        _comparison(parts, "8k", "8,192 tokens, before and after adaptation"),
        answers(by_kind(parts.get("lit", []))["answers"]),
        documents(parts.get("documents", [])),
    ]


_ABOUT: list[str | Table | Figure] = [
    "A language model of 135 million parameters with 30 layers, trained to read 8,192 tokens, reads two and four times "
    "as many. Perplexity is measured on two novels of the validation set that nothing was trained on. The methods: "
    "Self-Extend G:W lets far tokens share positions in groups of G, and keeps those of the last W tokens exact; "
    "linear, dynamic and yarn scale the RoPE. A layout such as GL:1024+4 says which layers are global (every second "
    "one), what local layers see (the last 1,024 tokens), and how many attention sinks, the first tokens of the text, "
    "they see besides (4).",
    "Layouts that zebra select chose begin with the numbers of their global layers: 7, … 26 are 15 layers, chosen "
    "without sinks, and 6, … 24 are 8 layers, chosen with four sinks. Only the checkpoints called trained were trained "
    "further: lcat-smollm2 was adapted to stripes by 40 steps of LoRA on other novels and code, and lit-smollm2 was "
    "then tuned on instructions. All else is the source, untrained.",
    "Two machines were used. Rows of the device cpu are from a machine without AMX instructions, the others from an "
    "Intel one with AMX. So compare times only within a table. On the first machine the time of a token is a mean of "
    "eight, not a median. The harder retrieval task, needle, was run at 8,192 tokens alone. Beyond, linear scaling was "
    "asked for no passkeys, for want of time.",
]
_BUSY = "Five of these methods were timed while the machine's other core worked, so their times are upper bounds."


def _comparison(parts: Mapping[str, list[Result]], part: str, title: str, note: str = "") -> Section:
    """What `zebra compare` measured, with figures named after the part."""
    results = parts.get(part, [])
    kinds = by_kind(results)
    blocks = [
        *("".join(cell.text for cell in line) for line in methods.method_summaries(results) if not note),
        *methods.methods(results).blocks,
        *perplexity.positions(kinds["position"]).blocks,
        *retrieval.retrieval(kinds["retrieval"]).blocks,
    ]
    named = [replace(block, name=f"{part}-{block.name}") if isinstance(block, Figure) else block for block in blocks]
    return Section(title, [note, *named] if note and named else named)


def _question(results: list[Result]) -> Section:
    """The question of make demo-llm: how many of its numbers each layout answered."""
    layouts = short_layouts(one.layout for one in results)
    rows = [
        [Cell(layouts[layout]), Cell(f"{sum(one.value for one in here):.0f} of {len(here)}", results=here)]
        for layout, here in split(results, attrgetter("layout")).items()
    ]
    prose = (
        "The question of make demo-llm, with three numbers: a number stands in the first line, 12,000 tokens of a book "
        "follow, and the last line asks for it. Greedy answers of at most 16 tokens by the untrained model."
    )
    head = [Cell("layout"), Cell("answered")]
    return Section("A number 12,000 tokens back", [prose, Table("", head, rows)] if rows else [])


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
    prose = (
        "Only four sequences were measured, so the intervals of some chosen layers include 0: other texts may choose "
        "other layers at the margin."
    )
    return Section("Which layers stay global, with attention sinks", [prose, *named] if named else [])


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
    shown = [
        section
        for section in [Section("What is measured", _ABOUT), checklist(parts), *sections(parts), method(results)]
        if section.blocks
    ]
    for figure in page.figures_of(shown):
        atomic_write(PICTURES.with_name(f"{PICTURES.name}-{figure.name}.svg"), figure.standalone)
    if longest := parts.get("32k"):
        atomic_write(PICTURES.with_suffix(".svg"), picture(longest).standalone)
    atomic_write(PAGE, page.markdown("../images/smollm2", "SmolLM2-135M-Instruct", [], shown))
