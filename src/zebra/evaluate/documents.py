"""Questions about long documents, from a file: what a model answers, or how likely the reference answers are.

    generate     ROUGE-1, -2, -L (Lin, 2004) and SQuAD's token F1 of the greedy answer, against its best reference
    likelihood   nats per token of the references behind the prompt; and behind the question alone, without the document

Before any of it the data are looked at (`zebra.data.qa`), since a model cannot find what is not there. A document
that does not fit loses its middle.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zebra.data.haystack import PromptTokenizer
from zebra.data.qa import DOCUMENT_NOT_NEEDED, EVIDENCE_CUT, FAULTS, QAExample, evidence_cut, faults, read_examples
from zebra.errors import ZebraError
from zebra.evaluate.intervals import bootstrapped
from zebra.evaluate.likelihood import BATCH_TOKENS, likelihoods, padded
from zebra.evaluate.overlap import Overlap
from zebra.evaluate.perplexity import evaluating
from zebra.evaluate.prompts import TEMPLATE, WITHOUT_DOCUMENT, Prompt, Prompts
from zebra.evaluate.target import EvalTarget
from zebra.generation import generate_tokens
from zebra.model.load_options import LoadOptions
from zebra.progress import bar
from zebra.results import Result

SCORES = ("generate", "likelihood")
WITH, WITHOUT = "log_likelihood", "log_likelihood_without_document"


@dataclass
class Outcome:
    """What came of one item.

    Attributes:
        length: tokens of prompt and answer that there was room for; None for as many as there are.
        prompt_tokens: tokens of the prompt.
        document_tokens: tokens of the whole document.
        cut: the document's tokens that were cut, half-open.
        faults: the names of `zebra.data.qa.FAULTS`.
        scores: by metric; empty where nothing was measured.
        prediction: the text that the model made.
    """

    name: str
    group: int
    question: str
    length: int | None
    prompt_tokens: int
    document_tokens: int
    cut: tuple[int, int] | None
    faults: list[str]
    scores: dict[str, float] = field(default_factory=dict)
    prediction: str | None = None


def looked_at(items: Sequence[QAExample], prompts: Sequence[Prompt], length: int | None) -> list[Outcome]:
    """What is wrong with each item, as far as no model is needed."""
    found = []
    for item, prompt, wrong in zip(items, prompts, faults(items), strict=True):
        if prompt.cut and evidence_cut(item, prompt.kept):
            wrong.append(EVIDENCE_CUT)
        size = len(prompt.ids)
        found.append(Outcome(item.name, item.group, item.question, length, size, prompt.tokens, prompt.cut, wrong))
    return found


def answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    answer_tokens: int,
    stop: Sequence[str] = (),
    batch_tokens: int = BATCH_TOKENS,
    advance: Callable[[float], None] = lambda tokens: None,
) -> list[str]:
    """The greedy answers to prompts, read in batches of like length, a long one in chunks; without the stop strings."""
    found = [""] * len(prompts)
    for batch in _batches([len(prompt) for prompt in prompts], batch_tokens):
        ids, there = padded([prompts[i] for i in batch], model.device, side="left")
        chunk = {"prefill_chunk": batch_tokens} if ids.shape[1] > batch_tokens else {}
        with evaluating(model):
            new = generate_tokens(model, tokenizer, ids, there, max_new_tokens=answer_tokens, stop=tuple(stop), **chunk)
        texts = tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for i, text in zip(batch, texts, strict=True):
            found[i] = min((text.partition(string)[0] for string in stop), key=len, default=text).strip()
        advance(int(there.sum()))
    return found


def per_token(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    references: Sequence[Sequence[Sequence[int]]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    advance: Callable[[float], None] = lambda tokens: None,
) -> list[float]:
    """The log-likelihood per token of the references behind each prompt, in nats: the mean over its references."""
    found = [0.0] * len(prompts)
    for batch in _batches([len(prompt) for prompt in prompts], batch_tokens):
        with evaluating(model):
            sums = likelihoods(model, [prompts[i] for i in batch], [references[i] for i in batch], batch_tokens)
        for i, row in zip(batch, sums, strict=True):
            each = [total / len(ids) for total, ids in zip(row, references[i], strict=True)]
            found[i] = sum(each) / len(each)
        advance(sum(len(prompts[i]) for i in batch))
    return found


def _batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """The places of prompts, from the longest on, as many together as have room when padded."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


@dataclass(frozen=True)
class Options:
    """How documents are read and answers scored.

    Args:
        score: generate or likelihood.
        answer_tokens: tokens of an answer: made at most, or scored of each reference.
        template: see `Prompts`.
        chat: in the tokenizer's chat template.
        stop: strings that end a generated answer.

    Raises:
        ZebraError: no such score, no token of an answer.
    """

    score: str = "generate"
    answer_tokens: int = 128
    template: str = TEMPLATE
    chat: bool = False
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ZebraError(f"the scores are {' and '.join(SCORES)}; got {self.score!r}. Choose one.")
        if self.answer_tokens < 1:
            raise ZebraError(f"an answer has at least 1 token; got --answer-tokens {self.answer_tokens}. Raise it.")


def evaluate_documents(
    checkpoint: str | os.PathLike[str],
    file: str | os.PathLike[str],
    *,
    lengths: Sequence[int] = (),
    limit: int | None = None,
    beyond: bool = False,
    check_only: bool = False,
    seed: int = 0,
    run: str = "evaluate",
    options: Options | None = None,
    **loading: Any,
) -> tuple[list[Result], list[Outcome]]:
    """Look at the data, load the checkpoint and measure: the rows and items of `zebra evaluate documents`.

    Args:
        lengths: tokens of prompt and answer, one after another; the model's reach where there are none.
        limit: how many items of the file are taken, the first ones.
        beyond: measure at lengths beyond the model, with a warning; without lengths, cut nothing.
        check_only: look at the data; do not load the model.
        loading: the fields of `zebra.model.load_options.LoadOptions`.

    Raises:
        ZebraError: what `EvalTarget`, `read_examples` and `Prompts` refuse, a length beyond the model without `beyond`,
            a file in which no item can be scored.
    """
    how = options or Options()
    overlap = Overlap() if how.score == "generate" and not check_only else None
    subject = EvalTarget(checkpoint, LoadOptions(**loading))
    if limit is not None and limit < 1:
        raise ZebraError(f"at least 1 item is measured; got --limit {limit}. Raise it or leave it out.")
    items = read_examples(Path(file))[:limit]
    prompts = Prompts(subject.tokenizer, how.template, chat=how.chat)
    spans = _lengths(subject, lengths, beyond)
    with bar("data", len(spans) * len(items), "items") as advance:
        rounds = [_Round(items, prompts, how, length, advance) for length in spans]
    for one in rounds:
        one.warn(subject, beyond)
    model = None if check_only else subject.load()
    if model is not None:
        for one in rounds:
            one.measure(model, subject.tokenizer, overlap)
    common = {"run": run, "seed": seed} | subject.columns(model)
    stem = Path(file).name.partition(".")[0]
    rows = [row for one in rounds for row in one.rows(stem, common)]
    return rows, [outcome for one in rounds for outcome in one.outcomes]


def _lengths(subject: EvalTarget, lengths: Sequence[int], beyond: bool) -> list[int | None]:
    if not lengths:
        return [None if beyond else subject.reach]
    subject.check_length(max(lengths), beyond)
    return [*sorted(set(lengths))]


class _Round:
    """All items at one length."""

    def __init__(
        self,
        items: Sequence[QAExample],
        prompts: Prompts,
        options: Options,
        length: int | None,
        advance: Callable[..., None],
    ):
        self.items, self.options, self.written = items, options, prompts
        room = None if length is None else length - options.answer_tokens
        self.prompts: list[Prompt] = []
        for item in items:
            self.prompts.append(prompts.fitting(item, room))
            advance(1)
        self.outcomes = looked_at(items, self.prompts, length)
        self.length = length or max(len(prompt.ids) for prompt in self.prompts) + options.answer_tokens
        self.scored = [i for i, item in enumerate(items) if item.references]
        if not self.scored:
            raise ZebraError(
                f"none of the {len(items):,} items has a reference answer with a word. Give a file that has."
            )

    def warn(self, subject: EvalTarget, beyond: bool) -> None:
        """Say what does not fit."""
        if self.outcomes[0].length is None:
            subject.check_length(self.length, beyond)
        cut = [outcome for outcome in self.outcomes if outcome.cut]
        if cut:
            lost = sum(EVIDENCE_CUT in outcome.faults for outcome in cut)
            warnings.warn(
                f"at {self.length:,} tokens {len(cut):,} of {len(self.items):,} documents lose their middle, and "
                f"{lost:,} with it words of every reference answer. Take a longer length, or a model that reads more.",
                stacklevel=3,
            )

    def measure(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, overlap: Overlap | None) -> None:
        """Fill in the scores."""
        prompts = [self.prompts[i].ids for i in self.scored]
        with bar("documents", sum(map(len, prompts)), "tokens") as advance:
            advance(note=f"at {self.length:,} tokens")
            if overlap is None:
                self._likelihoods(model, tokenizer, prompts, advance)
                return
            room, stop = self.options.answer_tokens, self.options.stop
            texts = answered(model, tokenizer, prompts, answer_tokens=room, stop=stop, advance=advance)
        for i, text in zip(self.scored, texts, strict=True):
            self.outcomes[i].prediction = text
            self.outcomes[i].scores = overlap(text, self.items[i].references)

    def _likelihoods(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        advance: Callable[[float], None],
    ) -> None:
        behind = PromptTokenizer(tokenizer)
        ids = behind.encode_first if self.options.chat else behind.encode
        room = self.options.answer_tokens
        references = [[ids(answer)[:room] for answer in self.items[i].references] for i in self.scored]
        alone = [self.written.ids(self.items[i], WITHOUT_DOCUMENT) for i in self.scored]
        found = per_token(model, prompts, references, advance=advance)
        without = per_token(model, alone, references)
        for i, value, closed in zip(self.scored, found, without, strict=True):
            self.outcomes[i].scores = {WITH: value, WITHOUT: closed}
            if value <= closed:
                self.outcomes[i].faults.append(DOCUMENT_NOT_NEEDED)

    def rows(self, stem: str, common: dict[str, Any]) -> list[Result]:
        """Shares of faulty items, then scores."""
        count = len(self.items)
        known = [
            fault for fault in FAULTS if fault != DOCUMENT_NOT_NEEDED or WITH in self.outcomes[self.scored[0]].scores
        ]
        shares = {fault: sum(fault in outcome.faults for outcome in self.outcomes) for fault in known}
        shares["document cut"] = sum(outcome.cut is not None for outcome in self.outcomes)
        shares["any fault"] = sum(bool(outcome.faults) for outcome in self.outcomes)
        common = common | {"length": self.length}
        check = {"task": f"documents-check-{stem}", "n": count, **common}
        rows = [Result(metric=fault, value=bad / count, **check) for fault, bad in shares.items()]
        task = f"documents-{self.options.score}-{stem}"
        return rows + [self._row(metric, task, common) for metric in self.outcomes[self.scored[0]].scores]

    def _row(self, metric: str, task: str, common: dict[str, Any]) -> Result:
        scored = [self.outcomes[i] for i in self.scored]
        groups = sorted({outcome.group for outcome in scored})
        sums, counts = np.zeros(len(groups)), np.zeros(len(groups))
        for outcome in scored:
            at = groups.index(outcome.group)
            sums[at] += outcome.scores[metric]
            counts[at] += 1
        low = high = None
        if len(groups) > 1:
            low, high = bootstrapped(sums, counts, common["seed"]).tolist()
        value = float(sums.sum() / counts.sum())
        return Result(task=task, metric=metric, value=value, n=len(scored), low=low, high=high, **common)
