"""Retrieval by length and depth: whether a model uses evidence at a known position of a long text.

Two scores, each a share of a sample's answers from 0 to 1:

    generate     the answers that the greedy continuation of the prompt contains, as RULER counts (arXiv 2404.06654)
    likelihood   the answers that are likelier after the prompt than every distractor, for models that cannot follow
                 a question; chance is 1 / (distractors + 1)

Each task, length and depth has the mean over its samples, with Wilson's 95 % interval, which fits tasks with one answer
and is too wide for several.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zebra.data.corpus import read_corpus
from zebra.data.documents import Names, names_of
from zebra.data.encoding import Encoder
from zebra.data.haystack import share_contained, share_preferred
from zebra.data.needles import Sample, SampleGenerator, check_task
from zebra.data.questions import IN_HAYSTACK, WITHOUT_DEPTH
from zebra.errors import ZebraError
from zebra.evaluate.intervals import wilson
from zebra.evaluate.scoring import BATCH_TOKENS, check_score, greedy_answers, log_likelihoods, no_progress
from zebra.evaluate.target import EvalTarget
from zebra.progress import bar
from zebra.results import Result


def retrieval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    score: str = "generate",
    batch_tokens: int = BATCH_TOKENS,
    advance: Callable[[float], None] = no_progress,
) -> list[float]:
    """The score of each sample: the share of its answers that the model gives.

    Args:
        score: generate or likelihood.
        batch_tokens: tokens that are run at once.
        advance: called with the number of prompt tokens that are done.

    Raises:
        ZebraError: no such score.
    """
    check_score(score)
    prompts = [sample.ids for sample in samples]
    if score == "generate":
        room = [sample.max_answer_tokens for sample in samples]
        texts = greedy_answers(
            model, tokenizer, prompts, max_new_tokens=room, batch_tokens=batch_tokens, advance=advance
        )
        return [
            share_contained(text, [answer.text for answer in sample.answers])
            for sample, text in zip(samples, texts, strict=True)
        ]
    candidates = [[one.ids for one in (*sample.answers, *sample.distractors)] for sample in samples]
    sums = log_likelihoods(model, prompts, candidates, batch_tokens=batch_tokens, advance=advance)
    return [share_preferred(values, len(sample.answers)) for sample, values in zip(samples, sums, strict=True)]


def evaluate_retrieval(
    checkpoint: str | os.PathLike[str],
    *,
    tasks: Names,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    samples: int = 20,
    score: str = "generate",
    haystack: Names = (),
    beyond: bool = False,
    check_only: bool = False,
    seed: int = 0,
    run: str = "evaluate",
    **loading: Any,
) -> list[Result]:
    """Load a checkpoint, draw the samples, and measure: a result for each task, length and depth.

    Args:
        depths: ignored by the tasks whose answer depends on the whole text.
        haystack: files of text to hide the needles in; without them, a few sentences over and over.
        beyond: measure at lengths beyond the model's reach, with a warning.
        check_only: load no model; the results are the numbers of tokens that it would read.
        loading: the fields of `zebra.model.load_options.LoadOptions`.

    Raises:
        ZebraError: as `EvalTarget` and `SampleGenerator.samples`; a length beyond the model's reach without `beyond`.
    """
    check_score(score)
    cells = _cells(names_of(tasks), lengths, depths, samples)
    target = EvalTarget(checkpoint, **loading)
    target.check_length(max(lengths), beyond)
    documents = read_corpus(haystack, Encoder.of(target.tokenizer)) if haystack else None
    needles = SampleGenerator(target.tokenizer, documents)
    for task, length, depth in cells:
        needles.check(task, length=length, depth=depth, count=samples, seed=seed)
        if length == max(lengths):  # the haystack is long enough
            needles.samples(task, length=length, depth=depth, seed=seed)
    model = None if check_only else target.load()
    columns: dict[str, Any] = {"run": run, "seed": seed} | target.columns(model)
    results: list[Result] = []
    with bar("retrieval", samples * sum(length for _, length, _ in cells), "tokens") as advance:
        for task, length, depth in cells:
            at = columns | {"task": f"retrieval-{score}-{task}", "length": length, "depth": depth}
            if model is None:
                results.append(Result(metric="tokens", value=samples * length, **at))
                continue
            if haystack and task in IN_HAYSTACK:
                at["task"] += "-in-text"
            advance(note=task)
            drawn = needles.samples(task, length=length, depth=depth, count=samples, seed=seed)
            scores = retrieval(model, target.tokenizer, drawn, score=score, advance=advance)
            mean = sum(scores) / samples
            low, high = wilson(mean, samples)
            results.append(Result(metric="accuracy", value=mean, n=samples, low=low, high=high, **at))
    return results


def _cells(
    tasks: Sequence[str], lengths: Sequence[int], depths: Sequence[float], samples: int
) -> list[tuple[str, int, float | None]]:
    """The (task, length, depth) to measure, task by task, each from the shortest length on."""
    cells: list[tuple[str, int, float | None]] = []
    for task in dict.fromkeys(tasks):
        for depth in depths:
            check_task(task, depth, samples)
        depths_of_task: Sequence[float | None] = [None] if task in WITHOUT_DEPTH else sorted(set(depths))
        cells += [(task, length, depth) for length in sorted(set(lengths)) for depth in depths_of_task]
    if not cells:
        raise ZebraError(
            "a grid must have at least one task, one length and one depth; one is missing. Give one of each."
        )
    return cells
