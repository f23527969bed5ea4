"""Which layers of a checkpoint stay global, by measurement: what `zebra select` does.

Each layer is made local in turn, teacher-forced, and the loss of the tokens that need more than the window says what it
is needed for (`zebra.evaluate.calibration` has the tokens, `zebra.evaluate.search` the orders). What was chosen is then
measured on rows that took no part in the choice, beside the source, all layers local, and the paper's stride at every
offset.

A round is one whole pass over the rows, and each candidate from its layer on: half a pass in the mean.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from zebra.data.corpus import read_corpus
from zebra.data.needles import SampleGenerator, check_task
from zebra.errors import ZebraError
from zebra.evaluate import loss_cache
from zebra.evaluate.calibration import LEAST, Part, long_range, parts_of, task_rows, text_rows
from zebra.evaluate.intervals import bootstrapped
from zebra.evaluate.loss_cache import LossCache
from zebra.evaluate.perplexity import evaluating
from zebra.evaluate.search import Losses, greedy, once, strides
from zebra.model.checkpoint import checkpoint_digest, load_tokenizer, read_config
from zebra.model.families import FULL, stripes_of, with_stripes
from zebra.model.load import device_name, load, read_device, read_dtype
from zebra.model.rope import as_rope, refuse_changing_rope
from zebra.plan.budget import Budget
from zebra.plan.cost import BYTES, Run
from zebra.plan.decoder import decoder_from_config
from zebra.progress import bar, console
from zebra.provenance import versions
from zebra.results import Result, write_results
from zebra.stripes import GLOBAL, LOCAL, Stripes

ORDERS = ("greedy", "once")


@dataclass(frozen=True)
class Selection:
    """The layout that was chosen, and a row for each loss that was measured on the way."""

    stripes: Stripes
    rows: list[Result]


def select(
    checkpoint: str | os.PathLike[str],
    budget: str | int | float,
    *,
    window: int | str,
    length: int,
    text: Sequence[str] = (),
    tasks: Sequence[str] = (),
    samples: int = 16,
    order: str = "greedy",
    separator: str | None = None,
    rope: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    seed: int = 0,
    work: str | os.PathLike[str] | None = None,
    check_only: bool = False,
    run: str = "select",
) -> Selection:
    """Choose the layers of a checkpoint that stay global.

    Args:
        budget: how many: 8, a share such as 0.25, or a cost such as "cache:4GiB@131072"; see `zebra.plan.budget`.
        window: of the layers that become local, "512+4" with 4 sinks; those that the source has local get it too.
        length: tokens of each row of text, or of each task's prompt.
        text: files of text to read, or, where there are tasks, to hide their evidence in.
        tasks: retrieval tasks, see `zebra.data.questions`; the loss is that of their answers.
        samples: rows; one in four is held out.
        order: greedy, or once.
        work: a folder that keeps what is measured: the same call goes on after a kill, another budget takes it up.
        check_only: load no model; the row is the tokens that it would read, the layout one of as many global layers.

    Raises:
        ZebraError: a budget that leaves nothing to choose, a host whose layers keep their kind, too little text, a
            length within the window or beyond the model, a folder of something else; what `load` and
            `SampleGenerator` refuse.
    """
    local = Stripes.parse(f"L:{window}")
    _check(order, local.window, length, text, tasks, samples)
    place = read_device(device)
    placed: dict[str, Any] = {} if dtype is None else {"dtype": read_dtype(dtype)}
    config = as_rope(rope).apply(read_config(checkpoint))
    source = _kinds(config)
    _check_host(config, source, local, length, rope)
    count = _count(config, source, str(budget), local, length, placed.get("dtype") or config.dtype)
    parts = _parts(load_tokenizer(checkpoint, config), text, separator, tasks, length, local.window, samples, seed)
    cost = Cost.of(source, count, order, parts)
    if check_only:
        layout = _first(source, count, local)
        tokens = Result(
            task="selection-cost",
            metric="tokens",
            value=cost.passes * cost.rows * length,
            length=length,
            run=run,
            model=str(checkpoint),
            layout=str(layout),
        )
        return Selection(layout, [tokens])
    with ExitStack() as held:
        folder = None
        if work is not None:
            inputs = {"source": _identity(checkpoint), "rope": str(as_rope(rope)), "window": str(window), "seed": seed}
            inputs |= {"dtype": str(dtype), "device": place, "rows": _hash(parts), "versions": versions()}
            folder = held.enter_context(loss_cache.opened(Path(work), inputs))
        console.print(f"{count} of {source.count('G')} layers stay global, {order}: {cost}", soft_wrap=True)
        model = load(checkpoint, rope=rope, **placed).to(place)
        held.enter_context(evaluating(model))
        parts = _scored(model, parts, local.window, folder)
        losses = Losses(model, parts, local.window, LossCache(folder), local.sinks)
        found = _searched(losses, source, count, order, cost)
        common = {"run": run, "model": str(checkpoint), "length": length, "seed": seed}
        common |= {"device": device_name(model.device)}
        named = "+".join(dict.fromkeys(tasks)) or "text"
        rows = [*_rows(losses, found, source, local, named, common)]
        if folder is not None:
            write_results(folder / "results.jsonl", rows)
    return Selection(_stripes(found[order][0], local), rows)


def _check(order: str, window: int, length: int, text: Sequence[str], tasks: Sequence[str], samples: int) -> None:
    if order not in ORDERS:
        raise ZebraError(f"the orders are {' and '.join(ORDERS)}; got {order!r}. Choose one.")
    if not text and not tasks:
        raise ZebraError("layers are chosen by a text or by retrieval tasks; got neither. Give --text or --task.")
    for task in tasks:
        check_task(task, 0.0, 1)
    if samples < LEAST:
        raise ZebraError(
            f"a selection takes at least {LEAST} rows, as one in four is held out; got {samples}. Ask for more."
        )
    if length <= window:
        raise ZebraError(
            f"in a length of {length:,} tokens nothing lies beyond a window of {window:,}, so that no layer is needed. "
            "Take a longer length, several times the window."
        )


def _kinds(config: PreTrainedConfig) -> str:
    own = stripes_of(config)
    kinds = own.layer_types(config.num_hidden_layers) if own else [GLOBAL] * config.num_hidden_layers
    return "".join("G" if kind == GLOBAL else "L" for kind in kinds)


def _stripes(kinds: str, local: Stripes) -> Stripes:
    return Stripes.of([GLOBAL if kind == "G" else LOCAL for kind in kinds], local.window, local.sinks)


def _first(source: str, count: int, local: Stripes) -> Stripes:
    """The first so many of the source's global layers: each costs the same."""
    which = [i for i, kind in enumerate(source) if kind == "G"]
    return replace(local, pattern=None, global_layers=tuple(which[:count]))


def _check_host(config: PreTrainedConfig, source: str, local: Stripes, length: int, rope: str | None) -> None:
    """Refuse what could not be converted, before anything is measured."""
    refuse_changing_rope(config)
    which = [i for i, kind in enumerate(source) if kind == "G"]
    if len(which) < 2:
        raise ZebraError(
            f"this model has {len(which)} global layers, so there is nothing to choose. Take another source."
        )
    for kept in which[0], which[-1]:  # a host whose layers keep their kind refuses one of these
        with_stripes(config, replace(local, pattern=None, global_layers=(kept,)))
    trained = getattr(config, "max_position_embeddings", None)
    if trained is not None and length > trained and as_rope(rope).kind != "base":
        raise ZebraError(
            f"a length of {length:,} tokens passes the {trained:,} positions that this model was trained for. "
            "Take a shorter one, a rope such as yarn:8, or a checkpoint that was adapted."
        )


def _count(config: PreTrainedConfig, source: str, budget: str, local: Stripes, length: int, dtype: Any) -> int:
    def run(at: int | None) -> Run:
        kind = str(dtype).removeprefix("torch.")
        return Run(
            decoder=decoder_from_config(config.to_dict(), name="the model"),
            stripes=_stripes(source, local) if "L" in source else None,
            length=at or length,
            dtype=kind if kind in BYTES else "float32",
        )

    which = [i for i, kind in enumerate(source) if kind == "G"]
    return Budget.parse(budget).layers(which, local, run)


def _parts(
    tokenizer: PreTrainedTokenizerBase,
    text: Sequence[str],
    separator: str | None,
    tasks: Sequence[str],
    length: int,
    window: int,
    samples: int,
    seed: int,
) -> list[Part]:
    corpus = read_corpus(text, tokenizer, separator=separator) if text else None
    if not tasks:
        assert corpus is not None
        return parts_of(text_rows(corpus, length, samples), seed)
    needles = SampleGenerator(tokenizer, None if corpus is None else [corpus[i] for i in range(len(corpus))])
    return parts_of(task_rows(needles, tasks, length=length, window=window, samples=samples, seed=seed), seed)


def _identity(checkpoint: str | os.PathLike[str]) -> str:
    return checkpoint_digest(checkpoint) if Path(checkpoint).exists() else str(checkpoint)


def _hash(parts: Sequence[Part]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(f"{part.ids.shape} {part.held_out}".encode() + part.ids.tobytes() + part.at.tobytes())
    return found.hexdigest()


def _scored(model: PreTrainedModel, parts: list[Part], window: int, folder: Path | None) -> list[Part]:
    """The parts with the tokens that are scored: a task's answers, or the long-range tokens of a text."""
    if all(part.at.any() for part in parts):
        return parts
    at = None if folder is None else loss_cache.scored(folder)
    if at is None:
        at = []
        with bar("long-range tokens", sum(part.ids.size for part in parts), "tokens") as advance:
            for part in parts:
                ids, _ = part.tensors(model.device)
                at.append(long_range(model, ids, window).cpu().numpy())
                advance(part.ids.size)
        if folder is not None:
            loss_cache.keep_scored(folder, at)
    return [replace(part, at=each) for part, each in zip(parts, at, strict=True)]


@dataclass(frozen=True)
class Cost:
    """What a search will run: a round is a whole pass over the rows that choose, and a candidate the layers from its
    first on, half a pass in the mean over the source's global layers.
    """

    rounds: int
    candidates: int
    passes: float
    rows: int

    @classmethod
    def of(cls, source: str, count: int, order: str, parts: Sequence[Part]) -> Cost:
        """Before anything is run; which layers greedy selection will try in its later rounds is not known yet."""
        which = [i for i, kind in enumerate(source) if kind == "G"]
        left = range(len(which), count if order == "greedy" else len(which) - 1, -1)
        tail = sum(len(source) - i for i in which) / len(which) / len(source)
        rows = sum(len(part.ids) for part in parts if not part.held_out)
        return cls(len(left), sum(left), len(left) + sum(left) * tail, rows)

    def __str__(self) -> str:
        rounds = "1 round" if self.rounds == 1 else f"{self.rounds:,} rounds"
        return f"{self.candidates:,} candidates in {rounds}, about {self.passes:,.0f} passes over {self.rows:,} rows"


def _searched(losses: Losses, source: str, count: int, order: str, cost: Cost) -> dict[str, list[str]]:
    """The layouts by what they are: what is chosen by each order, and what it is compared with on the held-out rows."""
    start = time.perf_counter()
    if losses.measure(source, [source], held_out=False):
        took = time.perf_counter() - start
        about = took * cost.passes
        said = f"{about:,.0f} seconds" if about < 120 else f"{about / 60:,.0f} minutes"
        console.print(f"a pass takes {took:,.2f} seconds, all of them about {said}", soft_wrap=True)
    found = {"source": [source], "local": ["L" * len(source)], "stride": strides(source, count)}
    with bar("selection", cost.candidates * losses.parts(False), "parts") as advance:
        if order == "greedy":
            found["greedy"] = [greedy(losses, source, count, advance)]
            found["once"] = [once(losses, source, count)]  # greedy's first round
        else:
            found["once"] = [once(losses, source, count, advance)]
    every = list(dict.fromkeys(kinds for layouts in found.values() for kinds in layouts))
    losses.measure(source, every, held_out=True)
    return found


def _rows(
    losses: Losses, found: dict[str, list[str]], source: str, local: Stripes, named: str, common: dict[str, Any]
) -> Iterator[Result]:
    """The source's loss and what each candidate adds to it, then the same of all comparisons on the held-out rows.

    Intervals of what is added are of the rows' differences, which vary less than their losses.
    """

    def row(what: str, kinds: str, metric: str, sums: Any, counts: Any) -> Result:
        low, high = bootstrapped(sums, counts, common["seed"]).tolist() if len(sums) > 1 else (None, None)
        return Result(
            layout=FULL if "L" not in kinds else str(_stripes(kinds, local)),
            task=f"selection-{what}-{named}",
            metric=metric,
            value=float(sums.sum() / counts.sum()),
            n=int(counts.sum()),
            low=low,
            high=high,
            **common,
        )

    own, counts = losses.sums(source, held_out=False)
    yield replace(row("source", source, "layers", own, counts), value=len(source), n=None, low=None, high=None)
    yield row("source", source, "loss", own, counts)
    for kinds in losses.candidates:
        if kinds != source:
            yield row("candidate", kinds, "rise", losses.sums(kinds, held_out=False)[0] - own, counts)
    own, counts = losses.sums(source, held_out=True)
    yield row("source", source, "held_out_loss", own, counts)
    for what, layouts in found.items():
        for kinds in layouts:
            if what != "source":
                yield row(what, kinds, "held_out_rise", losses.sums(kinds, held_out=True)[0] - own, counts)
