"""Training on texts: the Trainer with the language modelling loss, evaluated by perplexity by position.

The texts are tokenised, deduplicated, mixed or used as they are, and packed into sequences; some may be held out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from zebra.data.composition import mixture_tables
from zebra.data.corpus import Corpus, read_corpus
from zebra.data.encoding import Encoder, window_prefix
from zebra.data.mixture import Mixture, Source, SourceSplit, SourceStats, mix, select, split_sources
from zebra.data.packing import PackedSequences, pack
from zebra.data.recall import Curriculum, RecallDataset, RecallGenerator
from zebra.errors import ZebraError
from zebra.evaluate.perplexity import perplexity, results_of, task_name, unfilled
from zebra.evaluate.recall import recall_by_distance
from zebra.model.loss import head_of, summed_loss, without_logits
from zebra.progress import console
from zebra.results import Result
from zebra.train.parallel import ParallelTrainer, shard
from zebra.train.processes import check_step, is_first_process, sequences_of_training
from zebra.train.recipe import PerplexityEvaluation, RecallSource, TextMixtureSource, TextRecipe, TextSource
from zebra.train.run import TrainingData
from zebra.train.run_results import source_results
from zebra.train.trainer import check_loss, optimizer_of, training_arguments


@dataclass
class TextTraining(TrainingData):
    """A recipe's texts, to train and evaluate on.

    Attributes:
        sequences: the sequences to train on.
        held_out: documents to evaluate on; None without an evaluation.
        prefix: tokens that begin each window of these documents.
        stats: what a mixture took from each source.
    """

    recipe: TextRecipe
    sequences: PackedSequences | RecallDataset
    held_out: Corpus | None
    prefix: tuple[int, ...]
    stats: list[SourceStats]

    def trainer(self, model: PreTrainedModel, checkpoints: Path) -> Trainer:
        """The Trainer. Sequences are shuffled, except with recall: its documents grow, so they keep their order."""
        arguments = training_arguments(self.recipe, checkpoints)
        if isinstance(self.sequences, RecallDataset):
            arguments["train_sampling_strategy"] = "sequential"

        def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
            total = summed_loss(
                outputs.hidden_states[-1], head_of(model), labels, mixed_precision=self.recipe.train.bf16
            )
            check_loss(total, trainer)
            return total / (num_items_in_batch if num_items_in_batch is not None else (labels[:, 1:] >= 0).sum())

        trainer = ParallelTrainer(
            parallel=self.recipe.parallel,
            model=model,
            args=TrainingArguments(**arguments),
            train_dataset=self.sequences,
            data_collator=lambda sequences: shard(default_data_collator(sequences), self.recipe) | without_logits(),
            compute_loss_func=loss,
            optimizer_cls_and_kwargs=optimizer_of(self.recipe.train),
        )
        return trainer

    def evaluate(self, model: PreTrainedModel, columns: dict[str, Any], length: int | None = None) -> list[Result]:
        """Perplexity of the held-out text by position, in contexts of `length` tokens (`evaluate.length` if None)."""
        evaluation = self.recipe.evaluate
        assert evaluation is not None
        assert self.held_out is not None
        length = length or evaluation.length
        scores = perplexity(
            model,
            self.held_out,
            length=length,
            convention=evaluation.convention,
            first_bucket=evaluation.first_bucket,
            prefix=self.prefix,
            seed=self.recipe.train.seed,
        )
        return results_of(scores, length, task_name(evaluation.convention, self.prefix), **columns)

    def measure(self, model: PreTrainedModel, columns: dict[str, Any]) -> list[Result]:
        """Perplexity by position at `evaluate.length` and `beyond`, that of recall, and the speed of the evaluation."""
        evaluation = self.recipe.evaluate
        assert evaluation is not None
        start = time.perf_counter()
        results = self.evaluate(model, columns)
        seconds, tokens = time.perf_counter() - start, results[-1].n
        if evaluation.beyond:
            results += self.evaluate(model, columns, evaluation.beyond)
        if evaluation.recall:
            for length in filter(None, (evaluation.length, evaluation.beyond)):
                results += self.recall(model, columns, length)
        speed = tokens / seconds if tokens else 0.0
        columns = columns | {"length": evaluation.length, "n": tokens}
        return [*results, Result(task="speed", metric="evaluation_tokens_per_second", value=speed, **columns)]

    def recall(self, model: PreTrainedModel, columns: dict[str, Any], length: int) -> list[Result]:
        """Perplexity of the values that documents of recall look up; the positions of these results are distances."""
        evaluation = self.recipe.evaluate
        assert evaluation is not None
        assert evaluation.recall is not None
        assert isinstance(self.sequences, RecallDataset)
        scores = recall_by_distance(
            model,
            self.sequences.recall,
            length=length,
            documents=max(1, evaluation.recall * evaluation.length // length),
            first_bucket=evaluation.first_bucket,
        )
        return results_of(scores, length, "recall-lookup", **columns)

    def composition(self, columns: dict[str, Any]) -> list[Result]:
        """What a mixture took from each source."""
        return source_results(self.stats, length=self.recipe.train.length, **columns)


def read_texts(recipe: TextRecipe, tokenizer: PreTrainedTokenizerBase) -> TextTraining:
    """Read, select and pack the texts of a recipe, and print what they consist of.

    Raises:
        ZebraError: a text that cannot be read, a source with nothing to train on, less text than one step needs,
            `append_eos` without an end-of-text token, a `recall.first` too short for a document.
    """
    data, train, evaluation = recipe.data, recipe.train, recipe.evaluate
    if data.append_eos and tokenizer.eos_token_id is None:
        raise ZebraError("data.append_eos requires an end-of-text token, and the tokenizer has none. Remove it.")
    sources = [
        Source(
            source.name,
            _corpus(source, source.files, recipe, tokenizer, data.append_eos),
            source.share,
            source.min_tokens,
            source.max_tokens,
        )
        for source in data.by_source
    ]
    splits = split_sources(sources, deduplicate=data.deduplicate, held_out=data.held_out or 0.0)
    packing: dict[str, Any] = {"join": data.join, "seed": train.seed}
    mixture = mix(splits, sequences_of_training(recipe), train.length, **packing) if data.sources else None
    text = mixture.sequences if mixture else pack(select(splits), train.length, **packing)
    # A mixture repeats its sources to fill its sequences, so its text is counted.
    check_step(recipe, sum(split.tokens for split in splits) // train.length if mixture else len(text))
    sequences = text if data.recall is None else _with_recall(recipe, data.recall, tokenizer, text)
    if mixture and isinstance(sequences, RecallDataset):
        mixture = mixture.take(sequences.text_indices)
    if is_first_process():
        _print_composition(mixture, splits[0])
    stats = mixture.stats if mixture else []
    if evaluation is None:
        return TextTraining(recipe, sequences, None, (), stats)
    held_out, prefix = _held_out(recipe, evaluation, tokenizer, splits), window_prefix(tokenizer, evaluation.bos)
    longest = int(held_out.lengths.max(initial=0)) + len(prefix)
    if (warning := unfilled(longest, evaluation.beyond or evaluation.length)) and is_first_process():
        console.print(warning, soft_wrap=True)
    return TextTraining(recipe, sequences, held_out, prefix, stats)


def _print_composition(mixture: Mixture | None, files: SourceSplit) -> None:
    """Print what is trained on: a mixture, or files without what was dropped from them."""
    if mixture is not None:
        console.print(mixture_tables(mixture))
        return
    counts = {"dropped as duplicates": files.duplicates, "held out": len(files.held_out)}
    if lost := [f"{count:,} {what}" for what, count in counts.items() if count]:
        console.print(f"{len(files.train):,} documents to train on; {', '.join(lost)}.")


def _held_out(
    recipe: TextRecipe,
    evaluation: PerplexityEvaluation,
    tokenizer: PreTrainedTokenizerBase,
    splits: Sequence[SourceSplit],
) -> Corpus:
    """The documents of the evaluation's files, or those held out from training."""
    if evaluation.files is None:
        held_out = select(splits, held_out=True).gathered()
    else:
        held_out = _corpus(evaluation, evaluation.files, recipe, tokenizer, evaluation.append_eos)
        trained = np.concatenate([split.source.corpus.hashes[split.train] for split in splits])
        if (known := int(np.isin(held_out.hashes, trained).sum())) and is_first_process():
            text = f"{known:,} of the {len(held_out):,} evaluation documents are also in the training text."
            console.print(text, soft_wrap=True)
    return held_out.joined(evaluation.beyond or evaluation.length) if evaluation.join else held_out


def _with_recall(
    recipe: TextRecipe, recall: RecallSource, tokenizer: PreTrainedTokenizerBase, text: PackedSequences
) -> RecallDataset:
    """Mix sequences of recall with those of text."""
    train, documents = recipe.train, text.documents
    generator = RecallGenerator(tokenizer, (documents[i] for i in range(len(documents.lengths))))
    if recall.first < generator.min_tokens:
        raise ZebraError(
            f"data.recall.first must be at least {generator.min_tokens}, the tokens of the shortest recall document "
            f"with this tokenizer; got {recall.first}. Raise it."
        )
    if recipe.evaluate and recipe.evaluate.recall:
        for length in filter(None, (recipe.evaluate.length, recipe.evaluate.beyond)):
            generator.lookups(length, Random(0))  # fails here rather than after the training
    return RecallDataset(
        recall=generator,
        text=text,
        share=recall.share,
        curriculum=Curriculum(recall.first, train.length, recall.hold, recall.until),
        count=sequences_of_training(recipe),
        seed=train.seed,
    )


def _corpus(
    source: TextSource | TextMixtureSource,
    files: Sequence[str],
    recipe: TextRecipe,
    tokenizer: PreTrainedTokenizerBase,
    append_eos: bool,
) -> Corpus:
    return read_corpus(
        files,
        Encoder.of(tokenizer, append_eos=append_eos),
        separator=source.separator,
        field=source.field,
        num_proc=recipe.data.num_proc,
        cache=recipe.data.cache_dir,
    )
