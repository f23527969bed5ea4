"""One decoder layer of SmolLM2's shape, eager and compiled by torch: docs/tools.md shows the ratios.

python benchmarks/compiled.py      a few minutes of one core

8,192 tokens in bfloat16 through a local and a global layer, one thread. The two take turns, and each time is the
process's CPU time, so that a busy machine counts for little; a ratio is the median of those of the turns. Results go to
benchmarks/results/compiled.jsonl.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zebra.errors import ZebraError
from zebra.measure import TOLERANCE, relative_error
from zebra.model.compiled import compile_layers
from zebra.results import Result, write_results
from zebra.stripes import Stripes
from zebra_bench.configs import ModelConfig
from zebra_bench.models import llama_config, random_model

RESULTS = Path(__file__).parent / "results" / "compiled.jsonl"
SMOLLM2 = ModelConfig(layers=1, heads=9, key_value_heads=3, intermediate_size=1536, vocab_size=97, dtype="bfloat16")
LAYERS = ("L:512", "G:512")
TURNS = 5


def passes(layout: str, compiled: bool) -> dict[str, Callable[[], Tensor]]:
    """The forward pass of a model of one layer, and its forward and backward pass."""
    stripes = Stripes.parse(layout)
    model: Any = random_model(SMOLLM2, llama_config(SMOLLM2, stripes), "zebra").model
    states = torch.randn(1, SMOLLM2.length, 576, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    if compiled:
        compile_layers(model)

    def forward() -> Tensor:
        with torch.no_grad():
            out: Tensor = model(inputs_embeds=states, use_cache=False).last_hidden_state
            return out

    def both() -> Tensor:
        inputs = states.clone().requires_grad_()
        model(inputs_embeds=inputs, use_cache=False).last_hidden_state.sum().backward()
        model.zero_grad()
        assert inputs.grad is not None
        return inputs.grad

    return {"forward": forward, "forward + backward": both}


def cpu_seconds(call: Callable[[], Tensor]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def measured(layout: str) -> list[Result]:
    """The rows of one kind of layer.

    Raises:
        ZebraError: the compiled layer computes something else.
    """
    eager, compiled = passes(layout, compiled=False), passes(layout, compiled=True)
    rows = []
    for name in eager:
        error = relative_error([compiled[name]()], [eager[name]()])  # compiles, and warms both up
        if not error < TOLERANCE["bfloat16"]:
            raise ZebraError(f"the compiled layer's {name} differs from the eager one's by {error:.2g}.")
        turns = [(cpu_seconds(eager[name]), cpu_seconds(compiled[name])) for _ in range(TURNS)]
        values = {
            "eager_milliseconds": [1e3 * one for one, _ in turns],
            "compiled_milliseconds": [1e3 * other for _, other in turns],
            "ratio": [other / one for one, other in turns],
        }
        rows += [
            Result(
                run="compiled",
                model="a layer of SmolLM2-135M's shape, bfloat16",
                layout=layout,
                task=f"compiled {name}",
                metric=metric,
                value=statistics.median(each),
                low=min(each),
                high=max(each),
                n=TURNS,
                length=SMOLLM2.length,
                seed=0,
            )
            for metric, each in values.items()
        ]
    return rows


def table(rows: list[Result]) -> str:
    """The table of docs/tools.md."""
    by_key = {(row.layout, row.task.removeprefix("compiled "), row.metric): row for row in rows}
    lines = ["| layer | | eager | compiled | ratio | least and most |", "|---|---|---:|---:|---:|---:|"]
    for layout in LAYERS:
        names = ("local, window 512" if layout.startswith("L") else "global", "")
        for name, of in zip(names, ("forward", "forward + backward"), strict=True):
            eager, compiled, ratio = (
                by_key[layout, of, metric] for metric in ("eager_milliseconds", "compiled_milliseconds", "ratio")
            )
            lines.append(
                f"| {name} | {of} | {eager.value:,.0f} ms | {compiled.value:,.0f} ms | **{ratio.value:.2f}** "
                f"| {ratio.low:.2f}–{ratio.high:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    rows: list[Result] = []
    for layout in LAYERS:
        rows += measured(layout)
    write_results(RESULTS, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
