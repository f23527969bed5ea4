"""Single kernels and small models, from the results of benchmarks/speed.py: a part of docs/results/speed.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from zebra.report.benches import benches
from zebra.report.page import Cell, Section, Table
from zebra.report.series import interval, number, percent
from zebra.results import Result
from zebra_bench.configs import FAST

LENGTHS = {
    "attention": 16384, "switch": 4096, "train-step": 8192, "decode": 32768, "self-extend": 16384, "authors": 16384,
    "loss": 16384,
}  # fmt: skip
"""The length at which a part's goals hold."""

Value = Callable[[list[Result]], tuple[float, str]]


@dataclass(frozen=True)
class Goal:
    """A line of the table: what is measured, what it is compared with, and the value with its evidence.

    Attributes:
        why: why the stretch was not reached on the machine of the published results, two cores of Zen 4.
    """

    workload: str
    against: str
    line: float
    stretch: float
    value: Value
    unit: str = "×"
    why: str = ""

    def verdict(self, value: float) -> str:
        """In one word; more is better of a ratio, less of a share."""
        better = (lambda bound: value <= bound) if self.unit == "of" else (lambda bound: value >= bound)
        return "stretch" if better(self.stretch) else "passed" if better(self.line) else "missed"

    def shown(self, value: float) -> str:
        """With the unit."""
        return {"×": f"{value:.1f} ×", "%": percent(value), "of": f"{value:.3f}"}[self.unit]


def _best(results: Sequence[Result], metric: str, fast: bool = False) -> Result:
    """Our kernel with the least of a metric, or with the greatest share."""
    ours = [r for r in results if r.metric == metric and r.model.startswith("zebra") and r.model.endswith(FAST) == fast]
    if not ours:
        raise LookupError(metric)
    return (max if "share" in metric else min)(ours, key=lambda result: result.value)


def _last(results: Sequence[Result], metric: str, model: str) -> Result:
    matching = [result for result in results if result.metric == metric and result.model == model]
    if not matching:
        raise LookupError(model)
    return matching[-1]


def _of(results: Sequence[Result], run: str, dtype: str) -> list[Result]:
    """The results of a part in a dtype, at the part's length."""
    return [r for r in results if r.run == run and r.task.endswith(dtype) and r.length == LENGTHS[run]]


def faster(run: str, dtype: str, peer: str, metric: str = "milliseconds") -> Value:
    """The peer's median over ours."""

    def value(results: list[Result]) -> tuple[float, str]:
        here = _of(results, run, dtype)
        ours, other = _best(here, metric), _last(here, metric, peer)
        evidence = f"{_spread(other)} against {_spread(ours)} ms"
        slower = {r.model: r for r in here if r.metric == metric and r.model.startswith("zebra, ") and r is not ours}
        evidence += f" by {ours.model.removeprefix('zebra, ')}" if slower else ""
        evidence += "".join(
            f"; {other.value / result.value:.1f} × by {model.removeprefix('zebra, ')}, {_spread(result)} ms"
            for model, result in slower.items()
        )
        return other.value / ours.value, evidence

    return value


def share_of_peak(results: list[Result]) -> tuple[float, str]:
    """FLOPs of the local layer over what the device's products could have computed in that time.

    For a kernel made of torch's products, all that it computes, hidden pairs too; for another, those of visible pairs.
    """
    here = _of(results, "switch", "float32")
    best = _best(here, "useful_share_of_peak_forward_backward", fast=True)
    executed = [r for r in here if (r.model, r.metric) == (best.model, "share_of_peak_forward_backward")]
    peak = _last([r for r in results if r.run == "switch"], "flops_per_second", "float32 products" + FAST)
    name = best.model.removesuffix(FAST).removeprefix("zebra, ")
    evidence = f"{name}; of {number(peak.value / 1e9)} GFLOP/s, which torch's products reach"
    evidence += f"; {percent(best.value)} counting visible pairs only" if executed else ", counting visible pairs only"
    return (executed or [best])[-1].value, evidence


def memory(run: str, dtype: str, peer: str) -> Value:
    """Our extra bytes over the peer's."""

    def value(results: list[Result]) -> tuple[float, str]:
        here = _of(results, run, dtype)
        fastest = _best(here, "milliseconds_forward_backward").model
        ours = _last(here, "extra_bytes_forward_backward", fastest)
        other = _last(here, "extra_bytes_forward_backward", peer)
        return ours.value / other.value, f"{ours.value / 2**20:,.0f} of {other.value / 2**20:,.0f} MiB"

    return value


def share_of_plain(metric: str) -> Value:
    """Self-Extend's number over that of plain causal attention."""

    def value(results: list[Result]) -> tuple[float, str]:
        here = _of(results, "self-extend", "float32")
        ours, plain = _last(here, metric, "zebra, Self-Extend"), _last(here, metric, "zebra, plain")
        if metric.startswith("peak_bytes"):
            return ours.value / plain.value, f"{ours.value / 2**20:,.0f} of {plain.value / 2**20:,.0f} MiB"
        evidence = f"{_spread(ours)} against {_spread(plain)} ms"
        authors = [result for result in _of(results, "authors", "float32") if result.metric == metric]
        for result in authors:
            if result.model.startswith("two score matrices"):
                times = result.value / _last(authors, metric, "zebra, plain").value
                evidence += f"; {result.model}: {times:.1f} ×"
        return ours.value / plain.value, evidence

    return value


_LAYER = "local layer forward + backward, N = 16,384, w = 512"
_MASK = "sdpa, dense mask"
_STEP = "train step, 20M parameters, N = 8,192"
_TRANSFORMERS = "transformers, sdpa"
_TWO = "_forward_backward"
GOALS = (
    Goal(
        f"{_LAYER}, float32", "transformers sdpa, dense mask, float32", 25, 28,
        faster("attention", "float32", _MASK, f"milliseconds{_TWO}"),
    ),
    Goal(
        f"{_LAYER}, bf16", "the same, bf16", 30, 36, faster("attention", "bfloat16", _MASK, f"milliseconds{_TWO}"),
    ),
    Goal(
        "local layer, N = 4,096, executed FLOPs, float32 matmul precision medium", "the machine's measured matrix peak",
        0.47, 0.60, share_of_peak, "%",
    ),
    Goal(
        "local layer, N = 16,384, peak memory minus inputs and outputs, 12 heads of 64", "the dense mask", 0.16, 0.08,
        memory("attention", "float32", _MASK), "of",
    ),
    Goal(
        f"{_STEP}, float32", "transformers default, float32", 2.6, 3.5, faster("train-step", "float32", _TRANSFORMERS),
        why="of 10.1 s, the matrix products of linear layers and head, the same on both sides, take 5.8 at torch's "
        "rate, and attention 2.7; the stretch goal is 9.1 s.",
    ),
    Goal(
        f"{_STEP}, bf16 autocast", "transformers default, bf16 autocast", 3.2, 4,
        faster("train-step", "bfloat16", _TRANSFORMERS),
        why="head and loss stay in float32 for a correct loss: 1.8 of 6.9 s; the stretch goal is 6.4 s.",
    ),
    Goal(
        "decode at 32,768 cached, 44M parameters, float32", "transformers default cache, full attention", 15, 18,
        faster("decode", "float32", f"{_TRANSFORMERS}, full attention"),
        why="of 37 to 50 ms per token, about 18 are the linear layers: matrix products with one row, which MKL runs on "
        "one thread at 10 GB/s. About 15 are the attention of two global layers at 19 GB/s; a sum over memory reads "
        "32. A C++ loop of our own saved 3.6 ms, too little. The ratio depends on the allocator: transformers' cache "
        "is slow because its copies need fresh memory (docs/log.md).",
    ),
    Goal(
        "Self-Extend 8:1024, attention of a prefill, N = 16,384", "plain causal, the same kernels", 1.25, 1.15,
        share_of_plain("milliseconds_prefill_attention"), "of",
    ),
    Goal(
        "Self-Extend 8:1024, attention of a token, 16,384 cached", "plain causal, the same kernels", 1.2, 1.05,
        share_of_plain("milliseconds_decode_attention"), "of",
    ),
    Goal(
        "Self-Extend 8:1024, decode, 16,384 cached, 44M parameters", "the same model without", 1.05, 1.02,
        share_of_plain("milliseconds_decode"), "of",
    ),
    Goal(
        "Self-Extend 8:1024, peak memory of a process, 16,384 tokens in chunks of 2,048, 110M parameters",
        "the same model without", 1.15, 1.05, share_of_plain("peak_bytes_chunks"), "of",
    ),
    Goal(
        "loss, vocabulary 32,000, N = 16,384, extra memory", "full logits", 0.045, 0.03,
        memory("loss", "float32", "full logits"), "of",
    ),
)  # fmt: skip


def _spread(result: Result) -> str:
    bounds = interval(result)
    return number(result.value) + (f" ({number(bounds[0])} to {number(bounds[1])})" if bounds else "")


def goals(results: list[Result]) -> Section:
    """The table of goals."""
    body, reasons = [], []
    for goal in GOALS:
        try:
            value, evidence = goal.value(results)
            measured, verdict = goal.shown(value), goal.verdict(value)
        except LookupError:
            measured, verdict, evidence = "–", "not measured", "–"
        bounds = goal.shown(goal.line), goal.shown(goal.stretch)
        body.append([*map(Cell, (goal.workload, goal.against, measured, *bounds, verdict, evidence))])
        if verdict in ("passed", "missed") and goal.why:
            reasons.append(f"{goal.workload}, {verdict}: {goal.why}")
    head = [*map(Cell, ("workload", "against", "measured", "pass line", "stretch goal", "verdict", "evidence"))]
    prose = (
        "Medians on two threads, with minimum and maximum in brackets. Both sides take turns in one process, in the "
        "same dtype. For Self-Extend and for memory, less is better."
    )
    return Section("Goals of kernels and small models", [prose, Table("", head, body, numeric=False), *reasons])


def plan(results: list[Result]) -> Section:
    """The step time that the plan predicts and the measured one, for three sizes."""
    here = [result for result in results if result.run == "plan"]
    body = []
    for task, length in dict.fromkeys((r.task, r.length) for r in here if r.metric == "milliseconds"):
        same = [result for result in here if (result.task, result.length) == (task, length)]
        step = _best(same, "milliseconds")
        planned = _last(same, "planned_milliseconds", step.model)
        sizes = task.removeprefix("bench train step: ")
        cells = f"{sizes}, {length:,} tokens", number(planned.value), _spread(step), f"{planned.value / step.value:.2f}"
        body.append([*map(Cell, cells)])
    head = [Cell("train step of zebra"), Cell("planned", "ms"), Cell("measured", "ms"), Cell("planned / measured")]
    prose = "The machine's ceilings are measured before and after each step. The goal is a ratio of 0.75 to 1.25."
    return Section(
        "Training steps, planned and measured", [prose, Table("", head, body, numeric=False)] if body else []
    )


def kernel_tables(results: list[Result]) -> Section:
    """Attention of one layer by every kernel and alternative; what else was measured is in the results."""
    tables = benches([one for one in results if one.run == "attention" and one.task != "bench ceilings"])
    return tables._replace(title="Attention of one layer")
