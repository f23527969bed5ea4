"""Exports in their engines: docs/results/engines.md.

make test-engines                           every family, by its tests; and the page
python benchmarks/engines.py SMOLLM2.gguf   SmolLM2-135M's GGUF file in llama.cpp; and the page
python benchmarks/engines.py --page         measure nothing; write the page again

Results go to benchmarks/results/engines.jsonl and engines-smollm2.jsonl. The second takes ten minutes of one core that
is free, and the environment with llama.cpp of `make test-engines`. It exports the file to runs/engines/striped.gguf,
verifies that, and lets both read a book and write on, in turns.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import zebra
from zebra.errors import ZebraError
from zebra.exports.verify import verify_export
from zebra.files import atomic_write
from zebra.provenance import versions
from zebra.report import page
from zebra.report.method import method
from zebra.report.page import Cell, Section, Table
from zebra.results import Result, read_results, write_results
from zebra_bench.configs import SMOLLM2_STRIPES as STRIPES
from zebra_bench.published import stored_results

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FAMILIES, SMOLLM2 = RESULTS / "engines.jsonl", RESULTS / "engines-smollm2.jsonl"
PAGE = ROOT / "docs" / "results" / "engines.md"
PYTHON = ROOT / ".venv-gguf" / "bin" / "python"
STRIPED = ROOT / "runs" / "engines" / "striped.gguf"
BOOK = ROOT / "examples" / "books" / "validation" / "the_secret_garden.txt"
TOKENS, NEW_TOKENS, TURNS = 4000, 64, 3
_COMMON: Any = {
    "run": "engines-smollm2",
    "model": "SmolLM2-135M-Instruct Q4_1",
    "task": "llama.cpp, SmolLM2-135M-Instruct Q4_1",
    "seed": 0,
}
"""Columns of all results of SmolLM2."""


# SmolLM2 in llama.cpp


def measure(source: Path) -> None:
    """Export, verify and time; results are written after each turn."""
    if not STRIPED.exists():
        STRIPED.parent.mkdir(parents=True, exist_ok=True)
        zebra.export(source, STRIPED, to="gguf", stripes=STRIPES)
    checks = verify_export(STRIPED, source, "gguf", python=str(PYTHON))
    verified = [
        Result(
            layout=STRIPES,
            metric=check.name,
            value=check.difference,
            high=check.tolerance,
            length=check.tokens,
            versions=_versions(check.compared),
            **_COMMON,
        )
        for check in checks
    ]
    turns: dict[str, list[dict[str, Any]]] = {"full": [], STRIPES: []}
    for _ in range(TURNS):
        for layout, file in (("full", source), (STRIPES, STRIPED)):
            turns[layout].append(_read_and_write(file))
        write_results(SMOLLM2, verified + [row for layout in turns for row in _medians(layout, turns)])


def _read_and_write(file: Path) -> dict[str, Any]:
    script = Path(__file__).parent / "zebra_bench" / "llama_cpp.py"
    command = [str(PYTHON), str(script), str(file), str(BOOK), str(TOKENS), str(NEW_TOKENS)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    print(f"{file.name}: {done.stdout.strip()}", flush=True)
    return dict(json.loads(done.stdout))


def _medians(layout: str, turns: dict[str, list[dict[str, Any]]]) -> list[Result]:
    """Of each column the median, with the least and the most; of times also the ratio to the full model's turn."""
    own, full = turns[layout], turns["full"]
    columns = {name: [turn[name] for turn in own] for name in ("read", "write", "kv_bytes")}
    if layout != "full":
        for name in ("read", "write"):
            columns[f"{name}_ratio"] = [one[name] / other[name] for one, other in zip(own, full, strict=True)]
    return [
        Result(
            layout=layout,
            metric=name,
            value=statistics.median(values),
            low=min(values),
            high=max(values),
            n=len(values),
            length=TOKENS,
            versions=_versions(own[0]["engine"]),
            **_COMMON,
        )
        for name, values in columns.items()
    ]


def _versions(engine: str) -> dict[str, str]:
    return versions() | {"llama.cpp": engine}


# The page, from the results

_TITLES = {
    "llama": "Llama",
    "llama-biased": "Llama with biases",
    "llama-llama3": "Llama, rope of Llama 3.1",
    "llama-yarn": "Llama, YaRN",
    "ministral": "Ministral",
    "smollm3": "SmolLM 3, a layer without rope",
    "qwen2": "Qwen 2",
    "qwen3": "Qwen 3, tied",
    "qwen2_moe": "Qwen 2 MoE",
    "qwen3_moe": "Qwen 3 MoE",
    "mellum": "Mellum",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3",
    "cohere2": "Cohere 2",
    "olmo2": "OLMo 2",
    "granite_swa": "Granite SWA",
    "gpt_oss": "gpt-oss",
}
_COLUMNS = ("llama.cpp", "MLX", "vLLM")


def families(results: Sequence[Result]) -> Section:
    """The largest difference of each tiny model, in each engine."""
    shown = [one for one in results if one.metric in ("logprob_difference", "refused") and ", " not in one.model]
    lines = []
    for model, layout in dict.fromkeys((one.model, one.layout) for one in shown):
        here = {one.task: one for one in shown if (one.model, one.layout) == (model, layout)}
        cells = [_difference(here.get(engine)) for engine in _COLUMNS]
        lines.append([Cell(_TITLES.get(model, f"{model}")), Cell(layout), *cells])
    full = [one.value for one in results if one.metric == "full_logprob_difference"]
    behind = [one for one in results if one.metric == "greedy_behind" and one.value > 0]
    prose = [
        "Each export was run in its engine and compared with the striped model in transformers, in float32 on a CPU. "
        "The models are tiny and random (5 layers, 4 query heads of size 32, 2 key-value heads, a vocabulary of 320), "
        "except for examples/retrieval-2.2M. One prompt is shorter than the window, the other three times as long. "
        "After each, the engine decodes 8 tokens greedily with its KV cache.",
        "A cell is the largest difference of a log-probability, in nats, over the 10 likeliest tokens of each step. A "
        "dash means not run. vLLM ran with the arguments that zebra export prints. Reproduce: make test-engines.",
        "For scale: after the longer prompt, the same models with full attention in every layer differ by "
        f"{min(full):.1g} to {max(full):.2g} nats. All engines split the test texts into the same tokens. llama.cpp "
        "has no name for the pre-tokenizer of retrieval-2.2M, so its export ran with GPT-2's instead.",
        "Every greedily decoded token was the likeliest in transformers too"
        + (
            "."
            if not behind
            else ", except for " + "; ".join(f"{_of(one)} ({one.value:.2g} nats below)" for one in behind) + "."
        ),
    ]
    head = [Cell("model"), Cell("layout"), *map(Cell, _COLUMNS)]
    return Section("Tiny models of every family", [*prose, Table("", head, lines)])


def _of(one: Result) -> str:
    return f"{_TITLES.get(one.model, one.model)} in {one.task}"


def _difference(one: Result | None) -> Cell:
    if one is None:
        return Cell("–")
    if one.metric == "refused":
        return Cell("refused")
    return Cell(f"{one.value:.1e}".replace("e-0", "e-"), results=[one])


def otherwise(results: Sequence[Result]) -> Section:
    """What vLLM computes with the flag where it should not have it, and without where it should."""
    here = [one for one in results if one.metric == "logprob_difference" and ", " in one.model]
    if not here:
        return Section("", [])
    lines = []
    for one in here:
        model, _, how = one.model.partition(", ")
        lines.append([Cell(f"{_TITLES[model]}, {how}"), Cell(one.layout), Cell(f"{one.value:.2g}", results=[one])])
    prose = (
        "vLLM gives wrong results without an error if --model-impl transformers is missing for the first three "
        "models, or given for Granite SWA. For Qwen 2 and 3 it stops with an error without the flag, because zebra "
        "convert writes max_window_layers: 0."
    )
    head = [Cell("model"), Cell("layout"), Cell("difference, nats")]
    return Section("vLLM with the wrong flag", [prose, Table("", head, lines)])


def smollm2(results: Sequence[Result]) -> Section:
    """A real language model in llama.cpp: time and memory beside its own full attention, and the verification."""
    if not results:
        return Section("", [])
    at = {(one.layout, one.metric): one for one in results}

    def line(title: str, metric: str, show: Callable[[float], str], ratio: str | None = None) -> list[Cell]:
        both = [at["full", metric], at[STRIPES, metric]]
        cells = [Cell(show(one.value), results=[one]) for one in both]
        if ratio is None:
            share = Cell(f"{both[1].value / both[0].value:.2f}", results=both)
        else:
            one = at[STRIPES, ratio]
            share = Cell(f"{one.value:.2f}", f"{one.low:.2f}–{one.high:.2f}", results=[one])
        return [Cell(title), *cells, share]

    def mib(value: float) -> str:
        return f"{value / 2**20:,.0f} MiB"

    def seconds(value: float) -> str:
        return f"{value:.1f} s"

    body = [
        line("KV cache of 8,192 tokens", "kv_bytes", mib),
        line(f"CPU time to prefill {TOKENS:,} tokens of a book", "read", seconds, "read_ratio"),
        line(f"CPU time to decode {NEW_TOKENS} tokens after them", "write", seconds, "write_ratio"),
    ]
    turns = at["full", "read"].n
    prose = (
        f"SmolLM2-135M-Instruct in Q4_1, from its GGUF file. The striped export has the layout {STRIPES}, chosen by "
        "zebra select, and is not adapted. llama.cpp ran with its defaults on one thread; other work used the machine "
        f"too. The two models took turns, {turns} runs each. The values are medians; the ratio of times is the median "
        "over the turns, with minimum and maximum. Reproduce: python benchmarks/engines.py FILE.gguf."
    )
    head = [Cell(""), Cell("unchanged"), Cell("striped"), Cell("ratio")]
    checks = [one for one in results if one.high is not None and one.n is None]
    verified = [
        [Cell(one.metric), Cell(f"{one.length:,}"), Cell(f"{one.value:.2g}", results=[one]), Cell(f"{one.high:.2g}")]
        for one in checks
    ]
    columns = [Cell("check"), Cell("tokens"), Cell("difference"), Cell("allowed")]
    title = "zebra verify --engine gguf of the striped file; differences of log-probabilities in nats"
    return Section("SmolLM2-135M in llama.cpp", [prose, Table("", head, body), Table(title, columns, verified)])


def write_page() -> None:
    """The page, from the results that there are.

    Raises:
        ZebraError: none of the families.
    """
    tiny = read_results(FAMILIES)
    real = stored_results(SMOLLM2)
    sections = [families(tiny), otherwise(tiny), smollm2(real), method([*tiny, *real])]
    written = page.markdown("", "Exports in llama.cpp, MLX and vLLM", [], [one for one in sections if one.blocks])
    atomic_write(PAGE, written)


def main(arguments: list[str]) -> None:
    if arguments != ["--page"]:
        if len(arguments) != 1:
            raise ZebraError("name SmolLM2's GGUF file, or --page.")
        measure(Path(arguments[0]))
    write_page()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ZebraError as error:
        sys.exit(str(error))
