"""Retrieval by length and depth: does a model find what stands at a known place of a long text?

Two scores, each a share from 0 to 1 for every sample:

    generate     the answers that the greedy continuation of the prompt has, as RULER counts (arXiv 2404.06654)
    likelihood   the answers whose tokens are likelier behind the prompt than those of every distractor,
                 for models that cannot follow a question; a guesser has 1 / (distractors + 1)

A cell is the mean over its samples with Wilson's 95 % interval, which is exact for one answer and wide for several.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zebra.data.corpus import read_corpus
from zebra.data.haystack import contains_answer
from zebra.data.needles import Sample, SampleGenerator, check_task
from zebra.data.questions import IN_HAYSTACK, WITHOUT_DEPTH
from zebra.errors import ZebraError
from zebra.evaluate.intervals import wilson
from zebra.evaluate.likelihood import BATCH_TOKENS, likelihoods
from zebra.evaluate.perplexity import evaluating
from zebra.evaluate.target import EvalTarget
from zebra.generation import generate_tokens
from zebra.model.load_options import LoadOptions
from zebra.progress import bar
from zebra.results import Result

SCORES = ("generate", "likelihood")


def retrieval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    score: str = "generate",
    batch_tokens: int = BATCH_TOKENS,
) -> list[float]:
    """The score of each sample: the share of its answers that the model finds.

    Args:
        samples: of one length, so that they run in batches without padding.
        batch_tokens: how many tokens are run at once.

    Raises:
        ZebraError: no such score, samples of several lengths or none.
    """
    _check_score(score)
    lengths = sorted({len(sample.ids) for sample in samples})
    if len(lengths) != 1:
        raise ZebraError(
            f"samples of one length are measured together; got the lengths {lengths}. Take length by length."
        )
    size = max(1, batch_tokens // lengths[0])
    found: list[float] = []
    with evaluating(model):
        for start in range(0, len(samples), size):
            batch = samples[start : start + size]
            if score == "generate":
                found += _generated(model, tokenizer, batch, batch_tokens)
            else:
                found += _preferred(model, batch, batch_tokens)
    return found


def _generated(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Sequence[Sample], chunk: int
) -> list[float]:
    ids = torch.tensor([sample.ids for sample in batch], device=model.device)
    room = max(sample.max_answer_tokens for sample in batch)
    in_chunks: dict[str, Any] = {"prefill_chunk": chunk} if ids.shape[1] > chunk else {}
    new = generate_tokens(model, tokenizer, ids, max_new_tokens=room, **in_chunks)
    texts = tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [
        sum(contains_answer(text, answer.text) for answer in sample.answers) / len(sample.answers)
        for sample, text in zip(batch, texts, strict=True)
    ]


def _preferred(model: PreTrainedModel, batch: Sequence[Sample], chunk: int) -> list[float]:
    candidates = [[one.ids for one in (*sample.answers, *sample.distractors)] for sample in batch]
    table = torch.tensor(likelihoods(model, [sample.ids for sample in batch], candidates, chunk))
    answers = len(batch[0].answers)
    best_wrong = table[:, answers:].amax(dim=1, keepdim=True)
    return (table[:, :answers] > best_wrong).double().mean(dim=1).tolist()


def evaluate_retrieval(
    checkpoint: str | os.PathLike[str],
    *,
    tasks: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    samples: int = 20,
    score: str = "generate",
    haystack: Sequence[str] = (),
    beyond: bool = False,
    check_only: bool = False,
    seed: int = 0,
    run: str = "evaluate",
    **loading: Any,
) -> list[Result]:
    """Load a checkpoint, write the samples, and measure: the rows of `zebra evaluate retrieval`, one for each cell.

    Args:
        depths: not read by the tasks whose evidence is the whole text; they have one cell for each length.
        haystack: files of text to hide the evidence in; noise where there are none.
        beyond: measure lengths beyond the positions that the model was trained for, with a warning.
        check_only: load no model; the rows are the tokens that it would read.
        loading: the fields of `zebra.model.load_options.LoadOptions`.

    Raises:
        ZebraError: what `SampleGenerator.samples` and `load` refuse, a length beyond the model without `beyond`, a
            rope that changes with length.
    """
    _check_score(score)
    cells = _cells(tasks, lengths, depths, samples)
    subject = EvalTarget(checkpoint, LoadOptions(**loading))
    subject.check_length(max(lengths), beyond)
    tokenizer = subject.tokenizer
    needles = SampleGenerator(tokenizer, _documents(haystack, tokenizer))
    for task, length, depth in cells:  # refuse before the model is loaded
        needles.check(task, length=length, depth=depth, count=samples, seed=seed)
        if length == max(lengths):
            needles.samples(task, length=length, depth=depth, seed=seed)
    model = None if check_only else subject.load()
    common: dict[str, Any] = {"run": run, "seed": seed} | subject.columns(model)
    if model is None:
        at = [(f"retrieval-{score}-{task}", length, depth) for task, length, depth in cells]
        return [Result(task=t, metric="tokens", value=samples * n, length=n, depth=d, **common) for t, n, d in at]
    rows: list[Result] = []
    with bar("retrieval", samples * sum(length for _, length, _ in cells), "tokens") as advance:
        for task, length, depth in cells:
            advance(note=task)
            drawn = needles.samples(task, length=length, depth=depth, count=samples, seed=seed)
            scores: list[float] = []
            size = max(1, BATCH_TOKENS // length)
            for start in range(0, samples, size):
                batch = drawn[start : start + size]
                scores += retrieval(model, tokenizer, batch, score=score)
                advance(length * len(batch))
            named = f"retrieval-{score}-{task}" + ("-in-text" if haystack and task in IN_HAYSTACK else "")
            rows.append(_row(named, scores, length, depth, **common))
    return rows


def _row(task: str, scores: Sequence[float], length: int, depth: float | None, **common: Any) -> Result:
    mean, n = sum(scores) / len(scores), len(scores)
    low, high = wilson(mean, n)
    return Result(
        task=task, metric="accuracy", value=mean, length=length, depth=depth, n=n, low=low, high=high, **common
    )


def _cells(
    tasks: Sequence[str], lengths: Sequence[int], depths: Sequence[float], samples: int
) -> list[tuple[str, int, float | None]]:
    """Task by task, and each task from the shortest length on."""
    cells: list[tuple[str, int, float | None]] = []
    for task in dict.fromkeys(tasks):
        for depth in depths:
            check_task(task, depth, samples)
        its: Sequence[float | None] = [None] if task in WITHOUT_DEPTH else sorted(set(depths))
        cells += [(task, length, depth) for length in sorted(set(lengths)) for depth in its]
    if not cells:
        raise ZebraError("a grid has at least one task, one length and one depth; got none. Give one of each.")
    return cells


def _check_score(score: str) -> None:
    if score not in SCORES:
        raise ZebraError(f"the scores are {' and '.join(SCORES)}; got {score!r}. Choose one.")


def _documents(files: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Any:
    if not files:
        return None
    corpus = read_corpus(files, tokenizer)
    return [corpus[i] for i in range(len(corpus))]
