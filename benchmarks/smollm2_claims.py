"""The checklist of the page of SmolLM2: what the papers and this project claim, what was measured, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from zebra.report.compared import answered
from zebra.report.page import Cell, Section, Table
from zebra.report.series import Span, buckets, percent, short_count, span_of
from zebra.results import Result
from zebra_bench.configs import SMOLLM2_STRIPES as CHOSEN
from zebra_bench.configs import SMOLLM2_STRIPES_WITH_SINKS as CHOSEN_WITH_SINKS

MODEL = "runs/demo-llm/smollm2"
TO_16K = "runs/lcat-smollm2-16k/model"
LIMIT, WINDOW = 8192, 1024
AUTO, AUTO_32K = "8:2048", "16:2048"
"""What `auto:16384` and `auto:32768` take."""
GROUPS = ("4:1024", "4:2048", "8:1024", "8:4096", "16:2048")


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


class Compared:
    """One comparison's values, by layout, for the checklist."""

    def __init__(self, results: Sequence[Result]):
        self.results = results

    def perplexity(self, layout: str, span: Span) -> float:
        """The perplexity of a layout at some positions; NaN without a result."""
        here = [one for one in self.results if one.metric == "perplexity" and span_of(one) == span]
        return next((one.value for one in here if one.layout == layout), math.nan)

    def enough(self, span: Span) -> bool:
        """Whether enough windows were scored."""
        scored = [one.n or 0 for one in self.results if one.metric == "perplexity" and span_of(one) == span]
        return max(scored, default=0) >= _WINDOWS * (span[1] - span[0])

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
        "Claims of Self-Extend (arXiv 2401.01325, sections 4, 5), of Zebra's adaptation (arXiv 2312.08618, section 4), "
        "and of this project about stripes, in our words, tested on this one model and these texts. Two perplexities "
        f"are equally good within {_BEYOND - 1:.0%} beyond the trained length, {_WITHIN - 1:.0%} within it. Passkeys "
        f"are found at a depth if {_ANSWERED:.0%} of them are. With fewer than {_SAMPLES} passkeys at a depth, or "
        f"fewer than {_WINDOWS} windows, a claim is undecided. Reproduce: make demo-llm, then python "
        "benchmarks/smollm2.py."
    )
    return Section(
        "Checklist", [prose, Table("", [Cell("claim"), Cell("measured here"), Cell("verdict")], body, False)]
    )


_BEYOND, _WITHIN = 1.03, 1.01
_ANSWERED = 0.9
_SAMPLES, _WINDOWS = 10, 6
"""See the prose of `checklist`."""


def _verdict(holds: bool, *, enough: bool = True) -> str:
    """In words; of too few windows or samples none."""
    return ("holds" if holds else "does not hold") if enough else "undecided"


def _verdict_of_answers(answers: Sequence[Result]) -> str:
    """Whether nearly all samples are answered at each depth."""
    enough = min((one.n or 0 for one in answers), default=0) >= _SAMPLES
    return _verdict(min(one.value for one in answers) >= _ANSWERED, enough=enough)


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
            "With Self-Extend, without training, perplexity does not rise beyond the trained length.",
            f"{far:.2f} at 8K to 16K, {grouped:.2f} at 4K to 8K; {lost:.1f} unchanged",
            _verdict(far < _BEYOND * grouped, enough=compared.enough(beyond)),
        )
        short = compared.perplexity("full", near), compared.perplexity(extended, near)
        yield (
            "Within the trained length, Self-Extend does not raise perplexity.",
            f"{grouped:.2f}, unchanged {plain:.2f} at 4K to 8K; {short[1]:.2f}, unchanged {short[0]:.2f} at 2K to 4K",
            _verdict(grouped < _WITHIN * plain and short[1] < _WITHIN * short[0], enough=compared.enough(beyond)),
        )
    for task in ("passkey", "needle-in-text"):
        if answered := compared.answers(extended, task):
            before = compared.answers("full", task)
            yield (
                f"With Self-Extend, at twice the trained length, a {task.replace('-', ' ')} is found at any depth.",
                f"{_shares(answered)}; {_shares(before)} unchanged",
                _verdict_of_answers(answered),
            )
    yield from _claims_of_few_layers(compared, AUTO, beyond, "twice")
    by_setting = Compared(parts.get("groups", ()))
    every = {one: by_setting.perplexity(f"full, self-extend {one}", beyond) for one in (AUTO, *GROUPS)}
    values = {one: value for one, value in every.items() if not math.isnan(value)}
    if len(values) > 1:
        best = min(values, key=lambda one: values[one])
        text = ", ".join(f"{one} ({_largest(one) / LIMIT:.0%}) {value:.2f}" for one, value in values.items())
        enough = by_setting.enough(beyond)
        yield (
            "The choice of G:W is not a fine one: the worst of these is as good as the best. In parentheses is the "
            "largest distance as a share of the trained length.",
            text,
            _verdict(max(values.values()) < _BEYOND * values[best], enough=enough),
        )
        yield (
            "The largest distance is best at a half to two thirds of the trained length.",
            f"best: {best}, {_largest(best) / LIMIT:.0%}; zebra's auto takes {AUTO}, {_largest(AUTO) / LIMIT:.0%}",
            _verdict(0.5 <= _largest(best) / LIMIT <= 2 / 3, enough=enough),
        )


def _claims_at_four_times(parts: Mapping[str, Sequence[Result]]) -> Iterator[tuple[str, str, str]]:
    inside, beyond, extended = (4096, 8192), (16384, 32768), f", self-extend {AUTO_32K}"
    compared = Compared(parts.get("32k", ()))
    near, far = (compared.perplexity("full" + extended, span) for span in (inside, beyond))
    if math.isnan(far):
        return
    lost = compared.perplexity("full", beyond)
    yield (
        "With Self-Extend, without training, perplexity does not rise up to four times the trained length.",
        f"{far:.2f} at 16K to 32K, {near:.2f} at 4K to 8K; {lost:,.0f} unchanged",
        _verdict(far < _BEYOND * near, enough=compared.enough(beyond)),
    )
    answers = compared.answers("full" + extended, "passkey")
    yield (
        "With Self-Extend, at four times the trained length, a passkey is found at any depth.",
        f"{_shares(answers)}; {_shares(compared.answers('full', 'passkey'))} unchanged",
        _verdict_of_answers(answers),
    )
    yield from _claims_of_few_layers(compared, AUTO_32K, beyond, "four times")


def _claims_of_few_layers(compared: Compared, setting: str, far: Span, length: str) -> Iterator[tuple[str, str, str]]:
    layouts = [f"{layout}, self-extend {setting}" for layout in ("full", CHOSEN_WITH_SINKS)]
    full, few = (compared.perplexity(layout, far) for layout in layouts)
    if math.isnan(few):
        return
    yield (
        f"At {length} the trained length, without training, the perplexity of 8 of 30 global layers with four sinks is "
        "as good as that of 30.",
        f"{few:.2f} and {full:.2f} at {'–'.join(map(short_count, far))}",
        _verdict(few < _BEYOND * full, enough=compared.enough(far)),
    )
    answers = compared.answers(layouts[1], "passkey")
    claim = f"These 8 layers find a passkey at {length} the trained length at any depth."
    yield claim, _shares(answers), _verdict_of_answers(answers)


def _sink_claims(parts: Mapping[str, Sequence[Result]]) -> Iterator[tuple[str, str, str]]:
    compared, extended = Compared(parts.get("without-sinks", ())), f", self-extend {AUTO}"
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
    closes = "A short adaptation closes 80 % of the"
    for part, opened_by, claim in (
        ("chosen", "chosen", f"{closes} gap between the chosen layout and {full}."),
        ("offset", "offset", f"{closes} gap between the paper's order, GL:1024, and {full}."),
        ("sinks", "sinks", f"{closes} smaller gap that the chosen layout with four sinks leaves."),
        ("sinks", "chosen", "Sinks and adaptation together close 80 % of the gap of the chosen layout without sinks."),
    ):
        here = [one for one in parts.get(part, ()) if one.metric == "perplexity" and "@" not in one.model]
        spans = [span for span in buckets(here) if span[0] >= WINDOW]
        gaps = [gap for gap in (Gap.of(parts, part, span, opened_by) for span in spans) if gap]
        own = [gap for gap in (Gap.of(parts, part, span) for span in spans) if gap]
        if gaps:
            text = f"at 1K–2K, 2K–4K and 4K–8K: {_percents(gap.share for gap in gaps)}"
            if part != opened_by:
                alone = (1 - small.before / whole.before for small, whole in zip(own, gaps, strict=True))
                text += f"; sinks alone, untrained: {_percents(alone)}"
            yield claim, text, _verdict(min(gap.share for gap in gaps) >= 0.8)
    here = [one for one in parts.get("sinks-16k", ()) if one.metric == "perplexity" and one.model.endswith("/model")]
    at = {(one.model == TO_16K, span_of(one)): one.value for one in here if (one.layout or "").endswith("yarn:2")}
    near, far = (4096, 8192), (8192, 16384)
    if at.keys() >= {(trained, span) for trained in (False, True) for span in (near, far)}:
        values = {trained: (at[trained, near], at[trained, far]) for trained in (False, True)}
        yield (
            "With YaRN, the adapted model's perplexity at 8K to 16K is within 10 % of 4K to 8K.",
            f"{values[False][1]:.2f} and {values[False][0]:.2f} without a step at this length; after 12 steps "
            f"{values[True][1]:.2f} and {values[True][0]:.2f}",
            _verdict(values[True][1] < 1.1 * values[True][0]),
        )


def _shares(results: Sequence[Result]) -> str:
    return ", ".join(answered([one]) for one in results)


def _percents(shares: Iterable[float]) -> str:
    return ", ".join(percent(share, 0) for share in shares)


def _largest(setting: str) -> float:
    """The largest distance of Self-Extend G:W at 16,384 tokens: W + (N - W) / G."""
    group, window = map(int, setting.split(":"))
    return window + (16384 - window) / group
