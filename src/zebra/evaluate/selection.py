"""Select by measurement which layers of a checkpoint stay global: what `zebra select` does.

Each layer becomes local in turn. The teacher-forced loss on tokens that need more than the window shows how much the
layer is needed (`zebra.evaluate.calibration` has the tokens, `zebra.evaluate.search` the orders). The selection is then
compared, on held-out sequences, with the source, with all layers local, and with the paper's stride at every offset.

A round is one full pass over the sequences, and for each candidate the layers from the changed one on: half a pass on
average.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from zebra.data.corpus import Corpus, read_corpus
from zebra.data.documents import Names, names_of
from zebra.data.encoding import Encoder, window_prefix
from zebra.data.needles import SampleGenerator, check_task
from zebra.errors import ZebraError
from zebra.evaluate.calibration import (
    MIN_SAMPLES,
    CalibrationBatch,
    batches_of,
    long_range,
    task_sequences,
    text_sequences,
)
from zebra.evaluate.intervals import bootstrap_mean
from zebra.evaluate.losses import Losses, selection_folder
from zebra.evaluate.perplexity import evaluating
from zebra.evaluate.search import SearchCost, global_layers, greedy, once, strides
from zebra.evaluate.target import EvalTarget
from zebra.files import atomic_write
from zebra.model.checkpoint import checkpoint_digests
from zebra.model.families import FULL, stripes_of, with_stripes
from zebra.model.load import read_device
from zebra.model.local import check_sinks
from zebra.model.rope import as_rope
from zebra.plan.budget import layers_within
from zebra.plan.cost import BYTES, Run
from zebra.plan.decoder import decoder_from_config
from zebra.progress import bar, console
from zebra.provenance import versions
from zebra.results import Result, write_results
from zebra.stripes import GLOBAL, LOCAL, Stripes, layer_letters

ORDERS = ("greedy", "once")


@dataclass(frozen=True)
class Selection:
    """The selected layout, and a result for each loss that was measured on the way."""

    stripes: Stripes
    results: list[Result]


def select(
    checkpoint: str | os.PathLike[str],
    budget: str | int | float,
    *,
    window: int | str,
    length: int,
    text: Names | Corpus = (),
    tasks: Names = (),
    samples: int = 16,
    order: str = "greedy",
    separator: str | None = None,
    field: str | None = None,
    bos: bool | None = None,
    rope: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    work: str | os.PathLike[str] | None = None,
    check_only: bool = False,
    run: str = "select",
) -> Selection:
    """Select the layers of a checkpoint that stay global.

    Args:
        budget: how many: 8, a share such as 0.25, or a cost such as "cache:4GiB@131072"; see `zebra.plan.budget`.
        window: of the layers that become local, "512+4" with 4 sinks; local layers of the source get it too.
        length: tokens of each sequence of text, or of each prompt of a task.
        text: files of text to score, or their tokens; with tasks, the haystack for their needles.
        tasks: retrieval tasks, see `zebra.data.questions`; the loss is that of their answers.
        samples: number of sequences; one in four is held out.
        order: greedy or once, see `zebra.evaluate.search`.
        separator, field: where files have their documents, see `zebra.data.documents.read_documents`.
        bos: for sequences of text, see `zebra.data.encoding.window_prefix`; with a prefix, tasks end in `-bos`.
        rope, dtype, device: see `zebra.model.load_options.LoadOptions`.
        trust_remote_code: run a tokenizer that is the checkpoint's own Python code.
        work: a folder for the losses: the same call continues after a kill, another budget reuses them.
        check_only: load no model; the result is the number of tokens that it would read, with a placeholder layout.

    Raises:
        ZebraError: a budget that leaves nothing to select, a model whose layers have fixed kinds, sinks under ALiBi,
            too little text, a length within the window or beyond the model's reach, or a folder of something else; see
            also `zebra.load` and `zebra.data.needles.SampleGenerator`.
    """
    local, tasks = Stripes.parse(f"L:{window}"), names_of(tasks)
    _check(order, local, length, text, tasks, samples)
    loading = {"rope": rope, "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    target = EvalTarget(checkpoint, purpose="converting", **loading)
    check_sinks(target.config, local)
    source = _source_layers(target.config, local)
    which = global_layers(source)
    target.check_length(length)
    count = _count(target.config, source, str(budget), local, length, dtype or target.config.dtype)
    if isinstance(text, Corpus):
        corpus: Corpus | None = text
    else:
        encoder = Encoder.of(target.tokenizer)
        corpus = read_corpus(text, encoder, separator=separator, field=field) if text else None
    prefix = window_prefix(target.tokenizer, bos)
    if tasks:
        needles = SampleGenerator(target.tokenizer, corpus)
        sequences = task_sequences(needles, tasks, length=length, window=local.window, samples=samples, seed=seed)
    else:
        assert corpus is not None
        sequences = text_sequences(corpus, length, samples, prefix)
    batches = batches_of(sequences, seed)
    cost = SearchCost.of(source, count, order, batches)
    if check_only:
        layout = replace(local, pattern=None, global_layers=tuple(which[:count]))
        columns = target.columns() | {"layout": str(layout), "task": "selection-cost", "metric": "tokens"}
        tokens = cost.passes * cost.sequences * length
        return Selection(layout, [Result(run=run, length=length, value=tokens, **columns)])
    with ExitStack() as stack:
        folder = None
        if work is not None:
            inputs = _inputs(checkpoint, rope, dtype, device) | {"window": str(window), "seed": seed}
            inputs |= {"sequences": _digest(batches), "versions": versions()}
            folder = stack.enter_context(selection_folder(Path(work), inputs))
        console.print(f"{count} of {len(which)} layers stay global, {order}: {cost}", soft_wrap=True)
        model = target.load()
        stack.enter_context(evaluating(model))
        if not tasks:
            _score_long_range(model, batches, local.window, prefix, folder)
        losses = Losses(model, batches, local.window, local.sinks, folder)
        layouts = _search(losses, source, count, order, cost)
        columns = {"run": run, "length": length, "seed": seed} | target.columns(model)
        data = "+".join(dict.fromkeys(tasks)) or "text" + "-bos" * bool(prefix)
        results = [*_results(losses, layouts, source, local, data, columns)]
        if folder is not None:
            write_results(folder / "results.jsonl", results)
    return Selection(_stripes(layouts[order][0], local), results)


def _check(order: str, local: Stripes, length: int, text: Names | Corpus, tasks: Sequence[str], samples: int) -> None:
    if order not in ORDERS:
        raise ZebraError(f"order must be {' or '.join(ORDERS)}; got {order!r}. Choose one.")
    if not text and not tasks:
        raise ZebraError("selecting layers requires a text or retrieval tasks; got neither. Give text= or tasks=.")
    for task in tasks:
        check_task(task, 0.0, 1)
    if samples < MIN_SAMPLES:
        raise ZebraError(
            f"a selection requires at least {MIN_SAMPLES} samples, as one in four is held out; got {samples}. Raise it."
        )
    if length <= local.window + local.sinks:
        raise ZebraError(
            f"the length must exceed what local layers see, or no global layer is needed; got a length of {length:,} "
            f"tokens and a window of {local.window:,}{f' with {local.sinks:,} sinks' * bool(local.sinks)}. Use a "
            "length of several windows."
        )


def _source_layers(config: PreTrainedConfig, local: Stripes) -> str:
    """The layout of the source, as letters G and L.

    Raises:
        ZebraError: fewer than two are global, or layers have fixed kinds.
    """
    stripes = stripes_of(config)
    types = stripes.layer_types(config.num_hidden_layers) if stripes else [GLOBAL] * config.num_hidden_layers
    source = layer_letters(types)
    which = global_layers(source)
    if len(which) < 2:
        raise ZebraError(
            f"a selection requires at least 2 global layers; this model has {len(which)}. Use another source."
        )
    for layer in which[0], which[-1]:  # a model whose layers have fixed kinds cannot have one of these
        with_stripes(config, replace(local, pattern=None, global_layers=(layer,)))
    return source


def _inputs(checkpoint: str | os.PathLike[str], rope: Any, dtype: Any, device: str | None) -> dict[str, Any]:
    """What the losses depend on as regards the model."""
    return {
        "source": checkpoint_digests(checkpoint),
        "rope": str(as_rope(rope)),
        "dtype": str(dtype),
        "device": read_device(device),
    }


def _count(config: PreTrainedConfig, source: str, budget: str, local: Stripes, length: int, dtype: Any) -> int:
    """The number of layers that the budget keeps global."""
    kind = str(dtype).removeprefix("torch.")

    def run(at: int | None) -> Run:
        return Run(
            decoder=decoder_from_config(config.to_dict(), name="the model"),
            stripes=_stripes(source, local) if "L" in source else None,
            length=at or length,
            dtype=kind if kind in BYTES else "float32",
        )

    return layers_within(budget, global_layers(source), local, run)


def _stripes(kinds: str, local: Stripes) -> Stripes:
    return Stripes.of([GLOBAL if kind == "G" else LOCAL for kind in kinds], local.window, local.sinks)


def _digest(batches: Sequence[CalibrationBatch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(f"{batch.ids.shape} {batch.held_out}".encode() + batch.ids.tobytes() + batch.scored.tobytes())
    return digest.hexdigest()


def _score_long_range(
    model: PreTrainedModel, batches: Sequence[CalibrationBatch], window: int, prefix: Sequence[int], folder: Path | None
) -> None:
    """Mark the long-range tokens of a text as scored; the folder, if any, stores them for the next start."""
    file = None if folder is None else folder / "scored_tokens.json"
    if file is not None and file.exists():
        indices = json.loads(file.read_text(encoding="utf-8"))
    else:
        indices = []
        with bar("long-range tokens", sum(batch.ids.size for batch in batches), "tokens") as advance:
            for batch in batches:
                ids, _ = batch.tensors(model.device)
                indices.append(long_range(model, ids, window, prefix).flatten().nonzero().flatten().tolist())
                advance(batch.ids.size)
        if file is not None:
            atomic_write(file, json.dumps(indices) + "\n")
    for batch, of_batch in zip(batches, indices, strict=True):
        batch.scored.flat[of_batch] = True


def _search(losses: Losses, source: str, count: int, order: str, cost: SearchCost) -> dict[str, list[str]]:
    """The layouts by kind: the selection of each order, and what it is compared with on the held-out sequences."""
    start = time.perf_counter()
    if losses.measure(source, [source]):
        seconds = time.perf_counter() - start
        total = seconds * cost.passes
        estimate = f"{total:,.0f} seconds" if total < 120 else f"{total / 60:,.0f} minutes"
        console.print(f"one pass takes {seconds:,.2f} seconds, all passes about {estimate}", soft_wrap=True)
    layouts = {"source": [source], "local": ["L" * len(source)], "stride": strides(source, count)}
    with bar("selection", cost.candidates * cost.batches, "batches") as advance:
        layouts[order] = [(greedy if order == "greedy" else once)(losses, source, count, advance)]
    layouts.setdefault("once", [once(losses, source, count)])  # the first round of greedy, which is measured
    every = list(dict.fromkeys(kinds for group in layouts.values() for kinds in group))
    losses.measure(source, every, held_out=True)
    return layouts


def _results(
    losses: Losses, layouts: dict[str, list[str]], source: str, local: Stripes, data: str, columns: dict[str, Any]
) -> Iterator[Result]:
    """The loss of the source and the rise of each candidate, then the same for all layouts on the held-out sequences.

    The interval of a rise comes from the differences of each sequence, which vary less than the losses.
    """

    def result(kind: str, kinds: str, metric: str, sums: Any, **more: Any) -> Result:
        mean = bootstrap_mean(sums, counts, columns["seed"])
        layout = FULL if "L" not in kinds else str(_stripes(kinds, local))
        values = columns | mean._asdict() | {"layout": layout, "n": int(counts.sum())} | more
        return Result(task=f"selection-{kind}-{data}", metric=metric, **values)

    base, counts = losses.sums(source)
    yield result("source", source, "layers", base, value=len(source), n=None, low=None, high=None)
    yield result("source", source, "loss", base)
    for kinds in losses.candidates:
        if kinds != source:
            yield result("candidate", kinds, "rise", losses.sums(kinds)[0] - base)
    base, counts = losses.sums(source, held_out=True)
    yield result("source", source, "held_out_loss", base)
    for kind, group in layouts.items():
        for kinds in group:
            if kind != "source":
                yield result(kind, kinds, "held_out_rise", losses.sums(kinds, held_out=True)[0] - base)
