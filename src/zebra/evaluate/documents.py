"""Questions about long documents, from a file: what a model answers, or how likely the reference answers are.

    generate     ROUGE-1, -2, -L (Lin, 2004) and SQuAD's token F1 of the greedy answer, against its best reference
    likelihood   log-likelihood per token of the references, in nats: after the prompt, and without the document

The data are checked first (`zebra.data.qa`), since a model cannot find what is not there. A document that does not fit
is cut in the middle.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from zebra.data.documents import Names, names_of
from zebra.data.qa import DOCUMENT_NOT_NEEDED, EVIDENCE_CUT, FAULTS, QAExample, evidence_cut, faults, read_examples
from zebra.errors import ZebraError
from zebra.evaluate.intervals import bootstrap_mean
from zebra.evaluate.overlap import Overlap
from zebra.evaluate.prompts import TEMPLATE, WITHOUT_DOCUMENT, Prompt, Prompts
from zebra.evaluate.scoring import Ids, check_score, greedy_answers, log_likelihoods
from zebra.evaluate.target import EvalTarget
from zebra.progress import bar
from zebra.results import Result


@dataclass
class Outcome:
    """An example at one length: its prompt, its faults and its scores.

    Attributes:
        length: room for prompt and answer, in tokens; None if there is no limit.
        faults: names in `zebra.data.qa.FAULTS`.
        scores: values by metric; empty if nothing was measured.
        prediction: the generated answer, if one was generated.
    """

    example: QAExample
    prompt: Prompt
    length: int | None
    faults: list[str]
    scores: dict[str, float] = field(default_factory=dict)
    prediction: str | None = None

    def record(self) -> dict[str, Any]:
        """The outcome for JSON, without the document; `cut` is the half-open range of its tokens that were left out."""
        return {
            "name": self.example.name,
            "group": self.example.group,
            "question": self.example.question,
            "length": self.length,
            "prompt_tokens": len(self.prompt.ids),
            "document_tokens": self.prompt.document_tokens,
            "cut": self.prompt.cut,
            "faults": self.faults,
            "scores": self.scores,
            "prediction": self.prediction,
        }


def evaluate_documents(
    checkpoint: str | os.PathLike[str],
    file: str | os.PathLike[str],
    *,
    lengths: Sequence[int] = (),
    limit: int | None = None,
    score: str = "generate",
    answer_tokens: int = 128,
    template: str = TEMPLATE,
    chat: bool = False,
    stop: Names = (),
    beyond: bool = False,
    check_only: bool = False,
    seed: int = 0,
    run: str = "evaluate",
    **loading: Any,
) -> tuple[list[Result], list[Outcome]]:
    """Check the data, load the checkpoint and measure; outcomes come length by length, in the order of the file.

    Args:
        lengths: room for prompt and answer, in tokens; if empty, all that the model can read.
        limit: use only the first examples of the file.
        score: generate or likelihood.
        answer_tokens: the most tokens to generate, or to score of each reference.
        template, chat: see `Prompts`.
        stop: strings that end a generated answer.
        beyond: measure at lengths beyond the model's reach, with a warning; without lengths, cut nothing.
        check_only: check the data only; load no model.
        loading: the fields of `zebra.model.load_options.LoadOptions`.

    Raises:
        ZebraError: as `EvalTarget`, `read_examples` and `Prompts`; an unknown score, too small an option, a length
            beyond the model's reach without `beyond`, or no example that can be scored.
    """
    check_score(score)
    if answer_tokens < 1:
        raise ZebraError(f"answer_tokens must be at least 1; got {answer_tokens}. Raise it.")
    if limit is not None and limit < 1:
        raise ZebraError(f"limit must be at least 1; got {limit}. Raise it or leave it out.")
    overlap = Overlap() if score == "generate" and not check_only else None
    target = EvalTarget(checkpoint, **loading)
    examples = read_examples(Path(file))[:limit]
    if not any(example.references for example in examples):
        raise ZebraError(
            f"none of the {len(examples):,} items has a reference answer with a word. Use a file with references."
        )
    prompts = Prompts(target.tokenizer, template, chat=chat)
    if lengths:
        target.check_length(max(lengths), beyond)
    spans: list[int | None] = [*sorted(set(lengths))] or [None if beyond else target.context_length]
    by_length: dict[int, list[Outcome]] = {}
    with bar("data", len(spans) * len(examples), "items") as advance:
        for span in spans:
            outcomes = _inspect(examples, prompts, span, answer_tokens, advance)
            by_length[span or max(len(one.prompt.ids) for one in outcomes) + answer_tokens] = outcomes
    if spans == [None]:
        target.check_length(max(by_length), beyond)
    for length, outcomes in by_length.items():
        _warn_of_cuts(outcomes, length)
    model = None if check_only else target.load()
    columns = {"run": run, "seed": seed} | target.columns(model)
    stem, results = Path(file).name.partition(".")[0], []
    for length, outcomes in by_length.items():
        scored = [one for one in outcomes if one.example.references]
        if model is not None:
            _measure(model, prompts, scored, overlap, answer_tokens, names_of(stop), length)
        columns |= {"length": length}
        results += _shares_of_faults(outcomes, columns | {"task": f"documents-check-{stem}"})
        results += _means(scored, columns | {"task": f"documents-{score}-{stem}"})
    return results, [one for outcomes in by_length.values() for one in outcomes]


def _inspect(
    examples: Sequence[QAExample], prompts: Prompts, span: int | None, answer_tokens: int, advance: Callable[..., None]
) -> list[Outcome]:
    """Fit the prompts into a length, and find the faults that need no model."""
    outcomes = []
    for example, its_faults in zip(examples, faults(examples), strict=True):
        prompt = prompts.fitting(example, None if span is None else span - answer_tokens)
        if prompt.cut and evidence_cut(example, prompt.document):
            its_faults.append(EVIDENCE_CUT)
        outcomes.append(Outcome(example, prompt, span, its_faults))
        advance(1)
    return outcomes


def _warn_of_cuts(outcomes: Sequence[Outcome], length: int) -> None:
    cut = [one for one in outcomes if one.prompt.cut]
    if cut:
        lost = sum(EVIDENCE_CUT in one.faults for one in cut)
        warnings.warn(
            f"at {length:,} tokens the middle of {len(cut):,} of {len(outcomes):,} documents is cut, and in {lost:,} "
            "this removes words of every reference answer. Use a longer length, or a model with a longer context.",
            stacklevel=3,
        )


def _measure(
    model: PreTrainedModel,
    prompts: Prompts,
    outcomes: Sequence[Outcome],
    overlap: Overlap | None,
    answer_tokens: int,
    stop: Sequence[str],
    length: int,
) -> None:
    """Set the scores of outcomes: by generation if there is an `overlap`, otherwise by likelihood."""
    whole = [one.prompt.ids for one in outcomes]
    with bar("documents", sum(map(len, whole)), "tokens") as advance:
        advance(note=f"at {length:,} tokens")
        if overlap is not None:
            room = [answer_tokens] * len(outcomes)
            texts = greedy_answers(model, prompts.tokenizer, whole, max_new_tokens=room, stop=stop, advance=advance)
            for outcome, text in zip(outcomes, texts, strict=True):
                outcome.prediction, outcome.scores = text, overlap(text, outcome.example.references)
            return
        references = [[prompts.answer_ids(text)[:answer_tokens] for text in one.example.references] for one in outcomes]
        with_document = per_token(model, whole, references, advance=advance)
    questions = [prompts.ids(one.example, WITHOUT_DOCUMENT) for one in outcomes]
    without = per_token(model, questions, references)
    for outcome, value, alone in zip(outcomes, with_document, without, strict=True):
        outcome.scores = {"log_likelihood": value, "log_likelihood_without_document": alone}
        if value <= alone:
            outcome.faults.append(DOCUMENT_NOT_NEEDED)


def per_token(
    model: PreTrainedModel, prompts: Sequence[Ids], references: Sequence[Sequence[Ids]], **options: Any
) -> list[float]:
    """For each prompt, the mean over its references of their log-likelihood per token, in nats.

    Args:
        options: as for `log_likelihoods`.
    """
    means = []
    for sums, some in zip(log_likelihoods(model, prompts, references, **options), references, strict=True):
        means.append(sum(total / len(ids) for total, ids in zip(sums, some, strict=True)) / len(some))
    return means


def _shares_of_faults(outcomes: Sequence[Outcome], columns: dict[str, Any]) -> list[Result]:
    measured = any("log_likelihood" in one.scores for one in outcomes)
    counts = {
        fault: sum(fault in one.faults for one in outcomes)
        for fault in FAULTS
        if fault != DOCUMENT_NOT_NEEDED or measured
    }
    counts["document cut"] = sum(one.prompt.cut is not None for one in outcomes)
    counts["any fault"] = sum(bool(one.faults) for one in outcomes)
    n = len(outcomes)
    return [Result(metric=fault, value=count / n, n=n, **columns) for fault, count in counts.items()]


def _means(outcomes: Sequence[Outcome], columns: dict[str, Any]) -> list[Result]:
    """The mean of each metric, with an interval from resampling documents, each with all of its examples."""
    _, group = np.unique([one.example.group for one in outcomes], return_inverse=True)
    counts = np.bincount(group)
    results = []
    for metric in outcomes[0].scores:
        sums = np.bincount(group, [one.scores[metric] for one in outcomes])
        bounds = (-math.inf, 0) if metric.startswith("log_likelihood") else (0, 1)
        mean = bootstrap_mean(sums, counts, columns["seed"], bounds=bounds)
        results.append(Result(metric=metric, n=len(outcomes), **mean._asdict(), **columns))
    return results
