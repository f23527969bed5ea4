"""SmolLM2-135M beside its goals and beside other programs, from the results of benchmarks/speed_smollm2.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from speed_waterfalls import NAMES
from zebra.plan.cost import Run
from zebra.plan.decoder import decoder_from_config
from zebra.plan.memory import memory
from zebra.plan.shapes import shape
from zebra.report.page import Cell, Section, Table
from zebra.report.pivot import Results, split
from zebra.report.series import interval, number, percent
from zebra.results import Result
from zebra.stripes import Stripes
from zebra_bench.waterfall import PARTS

SELF_EXTEND = "full, self-extend"
SDPA = "transformers, sdpa"
LLAMA = "llama.cpp, f16"
_MOST = 3
"""Parts that are named where a goal is missed."""


@dataclass(frozen=True)
class Goal:
    """A line of the table.

    Attributes:
        what: is measured. bound: of the value.
        more: whether more is better.
        run: of the results. value: from those of the run.
        explained: (model, layout) whose waterfall explains a miss; the layout by its beginning.
        tried: what was tried where it is missed.
    """

    what: str
    bound: float
    more: bool
    run: str
    value: Callable[[Results], float]
    explained: tuple[str, str] = ("zebra", "full")
    tried: str = ""

    def met(self, value: float) -> bool:
        """Whether the bound holds."""
        return value >= self.bound if self.more else value <= self.bound


def one(results: Results, metric: str, model: str, layout: str) -> Result:
    """The result of a metric; Self-Extend's layout by its beginning.

    Raises:
        LookupError: there is none.
    """
    same = [r for r in results if r.metric == metric and r.model == model and _is(r.layout, layout)]
    if not same:
        raise LookupError(f"{metric} of {model}, {layout}")
    return same[-1]


def _is(layout: str, named: str) -> bool:
    return layout.startswith(named) if named == SELF_EXTEND else layout == named


def ratio(above: tuple[str, str], below: tuple[str, str], metric: str = "milliseconds") -> Callable[[Results], float]:
    """One (model, layout) over another."""
    return lambda results: one(results, metric, *above).value / one(results, metric, *below).value


def share(layout: str) -> Callable[[Results], float]:
    """Of the peak of products."""
    return lambda results: one(results, "share_of_peak", "zebra", layout).value


def attention_share(layout: str) -> Callable[[Results], float]:
    """The floor of attention in all layers over its time."""

    def value(results: Results) -> float:
        same = [r for r in results if r.model == "zebra" and _is(r.layout, layout)]
        sums = [
            sum(r.value for r in same if r.metric in (f"{kind}, global", f"{kind}, local"))
            for kind in ("floor_milliseconds", "milliseconds")
        ]
        if not sums[1]:
            raise LookupError(layout)
        return sums[0] / sums[1]

    return value


def memory_share(layout: str, length: int) -> Callable[[Results], float]:
    """Weights and the peak beyond them, over weights, cache and one layer's work by the plan."""
    stripes = Stripes.parse(layout) if ":" in layout else None
    run = Run(decoder=decoder_from_config(shape("smollm2-135m"), name="smollm2"), stripes=stripes, length=length)
    planned = memory(run)

    def value(results: Results) -> float:
        extra = one(results, "extra_bytes", "zebra", layout).value
        return (planned["weights"] + extra) / sum(planned.values())

    return value


_ROWS = (
    "A token's products have one row. torch's kernels read weights of 576 columns at a third of a copy's rate; "
    "products with the weight on the left, with a transposed copy of it, and of eight rows were no faster. Python "
    "and dispatch, 6,500 calls of operators, are a fifth of the token. A loop of our own over whole layers would "
    "copy the model's forward, which zebra does not do."
)
_STRIPES = (
    "Stripes shorten only the attention of a token. The rest, matrix products with one row and dispatch, takes more "
    "time than the goal leaves for it. The kernel for few queries, which since a first measurement serves local layers "
    "of 512 keys and more, takes 0.10 ms instead of torch's 0.18 in a layer of 1,024 (docs/log.md)."
)
_HEAD = (
    "Head and loss run over a vocabulary of 49,152 in float32, by torch's linear_cross_entropy, at the rate of MKL. A "
    "loop of our own, which computes the gradients with the loss by oneDNN, took half the time. It was not kept, "
    "because the kernel is torch's to improve (docs/log.md). Since these rows, mixed precision rounds the operands of "
    "the head as well, which took half the time on a CPU with AMX. Norms and rope pass over fresh float32 memory, "
    "which autocast allocates. Keeping freed memory took a third more of it and saved no time."
)
_ACTIVATIONS = (
    "The memory of a step is that of its activations. train.activation_checkpointing, which was off here, avoids it "
    "for the time of one more forward pass."
)
_MKL = (
    "In float32, shares exceed 100 %, because the peak is that of torch's matrix products, which MKL computes. On this "
    "AMD CPU oneDNN is more than twice as fast in full float32 (docs/log.md), and so is zebra's attention kernel. A "
    "whole prefill reaches about half of oneDNN's rate."
)
_FLOAT32 = (
    "Elementwise passes of transformers' layers. Compiled layers take 3 to 5 % off, for a minute of compiling "
    "(docs/tools.md). Products by oneDNN would be twice as fast on this processor, in full float32; that is torch's "
    "switch for a whole process, and stays the user's (docs/log.md)."
)


def _goals() -> Iterator[Goal]:
    zebra: Callable[[str], tuple[str, str]] = lambda layout: ("zebra", layout)  # noqa: E731
    for dtype, bound in (("bfloat16", 0.7), ("float32", 0.8)):
        for length in (8192, 16384, 32768):
            for layout in ("full", "GL:1024"):
                name = f"prefill of {length:,} tokens, {dtype}, {layout}: share of the peak"
                yield Goal(name, bound, True, f"prefill-{length}-{dtype}", share(layout), zebra(layout), _FLOAT32)
    for length, bound in ((8192, 0.3), (16384, 0.2)):
        name = f"prefill of {length:,} tokens, GL:1024: time over transformers' sdpa, full"
        run = f"peers-prefill-{length}-bfloat16"
        yield Goal(name, bound, False, run, ratio(zebra("GL:1024"), (SDPA, "full")), zebra("GL:1024"))
    for length in (8192, 16384, 32768):
        name = f"prefill of {length:,} tokens, Self-Extend: time over full"
        value = ratio(zebra(SELF_EXTEND), zebra("full"))
        yield Goal(name, 1.1, False, f"prefill-{length}-bfloat16", value, zebra(SELF_EXTEND))
    for length in (8192, 16384):
        for layout in ("full", "GL:1024"):
            name = f"attention in a prefill of {length:,} tokens, {layout}: share of the peak"
            yield Goal(name, 0.75, True, f"prefill-{length}-bfloat16", attention_share(layout), zebra(layout))
    name = "attention in a LoRA step of 8,192 tokens, GL:1024: share of the peak"
    yield Goal(name, 0.75, True, "lora-step-8192-bfloat16", attention_share("GL:1024"), zebra("GL:1024"))
    yield Goal(
        "LoRA step of 8,192 tokens, GL:1024: share of the peak", 0.6, True, "lora-step-8192-bfloat16", share("GL:1024"),
        zebra("GL:1024"), _HEAD,
    )  # fmt: skip
    runs = "memory-lora-step-8192-bfloat16+memory-step-8192-bfloat16"  # one step each, in processes of their own
    value = ratio(zebra("GL:1024"), (SDPA, "full"))
    name = "the same step: time over a step of all weights by transformers' sdpa, full"
    yield Goal(name, 0.3, False, runs, value, zebra("GL:1024"), _HEAD)
    value = ratio(zebra("GL:1024"), (SDPA, "full"), "extra_bytes")
    yield Goal(
        "the same step: peak memory beyond the model, over the same", 0.6, False, runs, value, ("", ""), _ACTIVATIONS
    )
    for layout in ("full", "GL:1024"):
        name = f"prefill of 32,768 tokens, {layout}: peak memory over weights, cache and one layer's work as planned"
        yield Goal(name, 1.3, False, "memory-prefill-32768-bfloat16", memory_share(layout, 32768))
    name = "a token after 8,192 tokens, full: time over llama.cpp, f16"
    value = ratio(zebra("full"), (LLAMA, "full"))
    yield Goal(name, 1.0, False, "peers-decode-8192-bfloat16", value, zebra("full"), _ROWS)
    name = "a token after 32,768 tokens, GL:1024: time over full"
    value = ratio(zebra("GL:1024"), zebra("full"))
    yield Goal(name, 0.45, False, "decode-32768-bfloat16", value, zebra("GL:1024"), _STRIPES)


GOALS = tuple(_goals())


def goals(results: Sequence[Result]) -> Section:
    """Each goal with its verdict; a miss is explained by the parts that are farthest above their floors."""
    body, tried, absent = [], [], []
    for goal in GOALS:
        runs = goal.run.split("+")
        here = [r for r in results if r.run in runs]
        if len(runs) > 1:  # the first run has ours, the second the other's
            here = [r for r in here if (r.run == runs[0]) == (r.model == "zebra")]
        try:
            value = goal.value(here)
        except LookupError:
            absent.append(goal.what)
            continue
        verdict = "met" if goal.met(value) else "missed"
        profiled = [r for r in results if r.run == _without_prefix(goal.run.split("+")[0])]
        cells = _shown(goal, value), verdict, excess(profiled, *goal.explained) if verdict == "missed" else ""
        note = goal.tried if verdict == "missed" else _MKL if "share" in goal.what and value > 1 else ""
        if note and note not in tried:
            tried.append(note)
        bound = f"{'≥' if goal.more else '≤'} {_shown(goal, goal.bound)}"
        body.append([Cell(goal.what), Cell(bound), *map(Cell, cells)])
    head = [*map(Cell, ("", "goal", "measured", "verdict", "most time above the floor"))]
    left = [f"Not measured: {'; '.join(absent)}."] if absent else []
    return Section("Goals", [Table("", head, body, numeric=False), *tried, *left] if body else [])


def _without_prefix(run: str) -> str:
    """The run whose waterfalls explain those of peers and of memory."""
    return run.removeprefix("peers-").removeprefix("memory-")


def _shown(goal: Goal, value: float) -> str:
    return percent(value, 0) if "share" in goal.what else f"{value:.3f}"


def excess(results: Results, model: str, layout: str) -> str:
    """The parts that take the most time above their floors."""
    own = [r for r in results if r.model == model and _is(r.layout, layout)]
    same = {r.metric: r.value for r in own}
    above = {p: same.get(f"milliseconds, {p}", 0.0) - same.get(f"floor_milliseconds, {p}", 0.0) for p in PARTS}
    largest = sorted(above, key=lambda part: -above[part])[:_MOST] if same else []
    return "; ".join(f"{NAMES[part].partition(':')[0]} {_time(own[0], above[part])}" for part in largest)


def _time(of: Result, milliseconds: float) -> str:
    """In milliseconds where it is of a token, else in seconds."""
    token = ": decode" in of.task
    return f"{number(milliseconds if token else milliseconds / 1e3)} {'ms' if token else 's'}"


def totals(results: Sequence[Result]) -> Section:
    """Median times of everything that was measured."""
    here = [r for r in results if r.metric == ("extra_bytes" if r.run.startswith("memory") else "milliseconds")]
    if not here:
        return Section("Compared with transformers and llama.cpp", [])
    kinds: dict[str, list[Result]] = split(here, lambda r: r.run)
    blocks: list[Any] = []
    for kind, how in (("peers", PEERS), ("memory", MEMORY)):
        chosen = {run: ones for run, ones in kinds.items() if run.startswith(kind)}
        every = [r for ones in chosen.values() for r in ones]
        columns = [(name, of) for name, of in _COLUMNS if any(r.model == name and _is(r.layout, of) for r in every)]
        head = [Cell(f"{model}, {layout}" if model == "zebra" else model) for model, layout in columns]
        if columns:
            lines = [_line(ones, columns) for ones in chosen.values()]
            blocks += [how, Table("", [Cell(""), *head], lines, numeric=False)]
    return Section("Compared with transformers and llama.cpp", blocks)


PEERS = (
    "Measured in turns, in one process (llama.cpp in its server, by its own clock); minimum and maximum in brackets. "
    "Logits after 1,281 tokens were compared first."
)
MEMORY = "Peak memory of one call beyond the model. Each call has its own process."
_COLUMNS = (
    ("zebra", "full"), ("zebra", "GL:1024"), ("zebra", "GLLL:1024"), ("zebra", SELF_EXTEND), (SDPA, "full"),
    ("transformers, eager", "full"), (LLAMA, "full"),
)  # fmt: skip


def _line(results: Results, columns: Sequence[tuple[str, str]]) -> list[Cell]:
    first = results[0]
    cells = [Cell(f"{first.task.rpartition(': ')[2]}, {first.length:,} tokens")]
    for model, layout in columns:
        same = [r for r in results if r.model == model and _is(r.layout, layout)]
        if not same:
            cells.append(Cell("–"))
        elif same[-1].metric == "extra_bytes":
            cells.append(Cell(f"{same[-1].value / 2**20:,.0f} MiB", results=[same[-1]]))
        else:
            bounds = interval(same[-1])
            least, most = (_time(first, bound).partition(" ")[0] for bound in bounds or (0.0, 0.0))
            spread = f" ({least} to {most})" if bounds else ""
            cells.append(Cell(_time(first, same[-1].value) + spread, results=[same[-1]]))
    return cells
