"""A recipe's texts: tokenised, without duplicates, mixed or whole, packed into sequences; and what is held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from zebra.data.composition import mixture_tables
from zebra.data.corpus import Corpus, read_corpus
from zebra.data.encoding import Encoder
from zebra.data.mixture import Source, SourceSplit, SourceStats, mix, select, split_sources
from zebra.data.packing import PackedSequences, pack
from zebra.data.recall import Curriculum, RecallDataset, RecallGenerator
from zebra.errors import ZebraError
from zebra.progress import console
from zebra.train.directory import is_first_process
from zebra.train.recipe import RecallSource, TextMixtureSource, TextRecipe, TextSource
from zebra.train.trainer import tokens_per_step


class TrainingTexts(NamedTuple):
    """What is trained and measured on.

    Attributes:
        sequences: to train on.
        held_out: documents to measure on; None where nothing is measured.
        stats: what a mixture took of each source.
    """

    sequences: PackedSequences | RecallDataset
    held_out: Corpus | None
    stats: list[SourceStats]


def read_texts(recipe: TextRecipe, tokenizer: PreTrainedTokenizerBase) -> TrainingTexts:
    """Read, choose and pack the texts of a recipe, and print what a mixture consists of.

    Raises:
        ZebraError: a text that cannot be read, a source with nothing to train on, a text shorter than a sequence.
    """
    data, train, evaluation = recipe.data, recipe.train, recipe.evaluate
    if data.append_eos and tokenizer.eos_token_id is None:
        raise ZebraError("data.append_eos is set, but the tokenizer has no end-of-text token. Unset it.")
    sources = _sources(recipe, tokenizer)
    splits = split_sources(sources, deduplicate=data.deduplicate, held_out=data.held_out or 0.0)
    stats: list[SourceStats] = []
    if data.sources is None:
        sequences = pack(select(splits), train.length, join=data.join, seed=train.seed)
        _print_losses(splits[0])
    else:
        mixture = mix(splits, _sequences_of_training(recipe), train.length, join=data.join, seed=train.seed)
        sequences, stats = mixture.sequences, mixture.stats
        if is_first_process():
            console.print(mixture_tables(mixture))
    held_out = None
    if evaluation is not None:
        if evaluation.files is None:
            held_out = select(splits, held_out=True).gathered()
        else:
            held_out = _corpus(evaluation, evaluation.files, recipe, tokenizer, evaluation.append_eos)
        if evaluation.join:
            held_out = held_out.joined(evaluation.beyond or evaluation.length)
    with_recall = sequences if data.recall is None else _with_recall(recipe, data.recall, tokenizer, sequences)
    return TrainingTexts(with_recall, held_out, stats)


def _sequences_of_training(recipe: TextRecipe) -> int:
    return recipe.train.max_steps * tokens_per_step(recipe) // recipe.train.length


def _with_recall(
    recipe: TextRecipe, recall: RecallSource, tokenizer: PreTrainedTokenizerBase, text: PackedSequences
) -> RecallDataset:
    """Sequences of recall among those of text."""
    train, documents = recipe.train, text.documents
    generator = RecallGenerator(tokenizer, (documents[i] for i in range(len(documents.lengths))))
    if recall.first < generator.min_tokens:
        raise ZebraError(
            f"data.recall.first is {recall.first}, and a document that tells and asks has at least "
            f"{generator.min_tokens} tokens under this tokenizer. Raise it."
        )
    return RecallDataset(
        recall=generator,
        text=text,
        share=recall.share,
        curriculum=Curriculum(recall.first, train.length, recall.hold, recall.until),
        count=_sequences_of_training(recipe),
        seed=train.seed,
    )


def _sources(recipe: TextRecipe, tokenizer: PreTrainedTokenizerBase) -> list[Source]:
    data = recipe.data
    if data.files is not None:
        return [Source("data.files", _corpus(data, data.files, recipe, tokenizer, data.append_eos))]
    return [
        Source(
            source.name,
            _corpus(source, source.files, recipe, tokenizer, data.append_eos),
            source.share,
            source.min_tokens,
            source.max_tokens,
        )
        for source in data.sources or []
    ]


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


def _print_losses(split: SourceSplit) -> None:
    """Print what files that are no mixture lost, where they lost something."""
    counts = {"dropped as duplicates": split.duplicates, "held out": len(split.held_out)}
    lost = [f"{count:,} {what}" for what, count in counts.items() if count]
    if lost and is_first_process():
        console.print(f"{len(split.train):,} documents to train on; {', '.join(lost)}.", highlight=False)
