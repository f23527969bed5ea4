"""Three turns of a chat about a long document, of zebra and of other servers: docs/results/turns.md.

make demo-llm                                                 first: it makes the checkpoint in runs/demo-llm/smollm2
python benchmarks/turns.py                                    every subject that can run here; a rerun continues
python benchmarks/turns.py serve llama-server --length 4096   these subjects alone, at this length
python benchmarks/turns.py --page                             measure nothing; write the page again

Subjects are `conversation` (`zebra.Conversation`) and `serve` (`zebra serve`), each with full attention, with stripes
(`conversation-stripes`, `serve-stripes`) and with Self-Extend (`-self-extend`); `transformers` (`transformers serve`)
and `llama-server`, which need their packages, and the second a GGUF file of the model (--gguf). Beyond the trained
length a full model takes YaRN in zebra, and a striped one Self-Extend. The others answer beyond it as they are: of
them only the times count there.

`rounding` measures no time: how far cached answers in bfloat16 are from those that read everything anew.

Each other subject answers a short message first, then three about the document, greedily, with at most 64 tokens. Its
results are in --out as soon as it has ended. What is there already is not measured again: delete its lines to measure
anew.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import turns_page
from turns_rounding import rounding
from turns_subjects import ANSWER, Chat, in_process, llama_server, transformers_serve, zebra_serve
from zebra.errors import ZebraError
from zebra.model.checkpoint import load_tokenizer, read_config
from zebra.model.context import context_length
from zebra.model.load import device_name
from zebra.model.self_extend import resolve_self_extend
from zebra.plan.cost import Run
from zebra.plan.decoder import read_decoder
from zebra.plan.memory import kv_bytes, snapshot_bytes
from zebra.provenance import versions
from zebra.results import Result, read_results, write_results
from zebra.stripes import Stripes
from zebra_bench.configs import SMOLLM2_STRIPES
from zebra_bench.published import stored_results

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "turns.jsonl"
BOOKS = ROOT / "examples" / "books" / "validation"
QUESTIONS = (
    "Summarise this text in many words.",
    "Who is in it? Describe them, one after another.",
    "What happens at its end? Tell it in your own words.",
)
ROOM = 1024
"""Tokens beside the document: the template, questions and answers."""
WARM_UP = "Write a sentence about this.\n\n" + "The quick brown fox jumps over the lazy dog. " * 40
"""Loads what a first answer loads, kernels for long prompts too."""
SNAPSHOTS = 4
"""How many the cache of a conversation keeps at most."""


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        model: in the results.
        chat: begins a conversation.
        loading: how zebra loads the checkpoint; None for others.
        versions: of what it runs besides.
    """

    model: str
    chat: Callable[[], AbstractContextManager[Chat]]
    loading: Mapping[str, Any] | None = None
    versions: Mapping[str, str] | None = None


def subjects(checkpoint: Path, length: int, stripes: str, gguf: Path | None) -> dict[str, Subject]:
    """Those that can run here, by the names that choose them."""
    needed, trained = length + ROOM, context_length(read_config(str(checkpoint))) or sys.maxsize
    extended = {"self_extend": f"auto:{max(needed, trained + 1)}"}
    beyond = needed > trained
    ways = {
        "": {"rope": f"yarn:{-(-needed // trained)}"} if beyond else {},
        "-stripes": {"stripes": stripes, **(extended if beyond else {})},
        "-self-extend": extended,
    }
    table = {
        f"{name}{way}": Subject(checkpoint.name, partial(chat, checkpoint, loading), loading)
        for name, chat in (("conversation", in_process), ("serve", zebra_serve))
        for way, loading in ways.items()
    }
    if all(map(find_spec, ("fastapi", "uvicorn", "openai"))):
        table["transformers"] = Subject(checkpoint.name, partial(transformers_serve, checkpoint))
    if gguf and shutil.which("llama-server"):
        lines = subprocess.run(["llama-server", "--version"], capture_output=True, text=True, check=True)
        version = re.search(r"version: (.*)", lines.stdout + lines.stderr)
        of = {"llama.cpp": version[1] if version else "unknown"}
        table["llama-server"] = Subject(gguf.name, partial(llama_server, gguf, needed), versions=of)
    return table


def measure(run: str, subject: Subject, checkpoint: Path, length: int) -> list[Result]:
    """The results of one subject."""
    text = document(checkpoint, length)
    rows: list[Result] = []
    with subject.chat() as chat:
        "".join(chat.ask(WARM_UP))
        chat.clear()
        for number, question in enumerate(QUESTIONS, 1):
            pieces, first, rate = timed(chat.ask(question if number > 1 else f"{text}\n\n{question}"))
            counts = chat.counts()
            values = {"seconds_to_first_token": first, "tokens_per_second": rate, **counts}
            if number == len(QUESTIONS):
                values["cache_bytes"] = chat.cache_bytes()
                if subject.loading is not None:
                    whole = int(counts["prompt_tokens"]) + pieces
                    values["planned_cache_bytes"] = planned_bytes(checkpoint, whole, subject.loading)
            rows += [
                Result(
                    run=run,
                    model=subject.model,
                    layout=chat.layout,
                    task=f"turn {number}",
                    metric=metric,
                    value=value,
                    length=length,
                    n=pieces if metric == "tokens_per_second" else None,
                    device=device_name("cpu"),
                    versions=versions() | dict(subject.versions or {}),
                )
                for metric, value in values.items()
                if value is not None
            ]
    return rows


def measure_rounding(checkpoint: Path, length: int) -> list[Result]:
    """The results of `rounding`, of a model with full attention."""
    values = rounding(checkpoint, document(checkpoint, length), QUESTIONS, ANSWER)
    row = partial(Result, run="rounding", model=checkpoint.name, layout="full", task="turns 1 to 3", length=length)
    return [row(metric=name, value=value, n=n, device=device_name("cpu")) for name, (value, n) in values.items()]


def timed(pieces: Iterator[str]) -> tuple[int, float, float | None]:
    """How many pieces an answer has, the seconds to the first, and pieces per second after that."""
    start = time.perf_counter()
    times = [time.perf_counter() for _ in pieces]
    if not times:
        raise ZebraError("the subject answered nothing. Ask another question.")
    return len(times), times[0] - start, (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None


def planned_bytes(checkpoint: Path, tokens: int, loading: Mapping[str, Any]) -> int:
    """Bytes of the keys and values of so many tokens, and of all snapshots, as the plan has them."""
    config, decoder = read_config(str(checkpoint)), read_decoder(str(checkpoint))
    run = Run(
        decoder=decoder,
        stripes=Stripes.parse(loading["stripes"]) if "stripes" in loading else decoder.stripes,
        length=tokens,
        dtype=str(config.dtype or torch.float32).removeprefix("torch."),
        self_extend=resolve_self_extend(loading["self_extend"], config) if "self_extend" in loading else None,
    )
    return kv_bytes(run) + SNAPSHOTS * snapshot_bytes(run)


def document(checkpoint: Path, tokens: int) -> str:
    """The beginning of the books, of so many tokens."""
    tokenizer = load_tokenizer(str(checkpoint), read_config(str(checkpoint)))
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(BOOKS.glob("*.txt")))
    ids = tokenizer(text[: tokens * 12], add_special_tokens=False)["input_ids"]
    if len(ids) < tokens:
        raise ZebraError(f"the books in {BOOKS} have {len(ids):,} tokens; got {tokens:,}. Take a shorter length.")
    return str(tokenizer.decode(ids[:tokens]))


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", help="Default: all.")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "runs" / "demo-llm" / "smollm2")
    parser.add_argument("--length", type=int, action="append", help="Tokens of the document. Default: 4096, 16384.")
    parser.add_argument("--stripes", default=SMOLLM2_STRIPES)
    parser.add_argument("--gguf", type=Path, help="The model for llama-server.")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args(arguments)
    for length in [] if options.page else options.length or [4096, 16384]:
        table = subjects(options.checkpoint, length, options.stripes, options.gguf)
        if absent := [one for one in options.subjects if one not in (*table, "rounding")]:
            raise ZebraError(f"subjects are {', '.join(table)} and rounding here; got {', '.join(absent)}.")
        for name in options.subjects or table:
            results = stored_results(options.out)
            if any((one.run, one.length) == (name, length) for one in results):
                continue
            print(f"{name}, {length:,} tokens", flush=True)
            if name == "rounding":
                rows = measure_rounding(options.checkpoint, length)
            else:
                rows = measure(name, table[name], options.checkpoint, length)
            write_results(options.out, [*results, *rows])
            for one in rows:
                print(f"    {one.task:8} {one.metric:24} {one.value:16,.2f}", flush=True)
    if options.out == RESULTS:
        turns_page.write_page(read_results(RESULTS))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        main(sys.argv[1:])
    except ZebraError as error:
        sys.exit(str(error))
