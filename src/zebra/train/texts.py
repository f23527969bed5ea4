"""A recipe's texts: tokenised, without duplicates, mixed or whole, packed into training rows; and what is held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from zebra.data.composition import mixture_tables
from zebra.data.corpus import Corpus, read_corpus
from zebra.data.mixture import Source, SourceSplit, SourceStats, mix, select, split_sources
from zebra.data.packing import PackedSequences, pack
from zebra.data.recall import Curriculum, RecallDataset, RecallGenerator
from zebra.errors import ZebraError
from zebra.progress import console
from zebra.results import Result
from zebra.train.directory import is_first_process
from zebra.train.recipe import MixtureSource, Recipe, TextRecipe, TextSource
from zebra.train.trainer import tokens_per_step


class Texts(NamedTuple):
    """The rows to train on, the documents to measure on, what a mixture took of each source, a digest of all texts."""

    rows: PackedSequences | RecallDataset
    held_out: Corpus | None
    lines: list[SourceStats]
    digest: str


def read_texts(recipe: TextRecipe, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """Read, choose and pack the texts of a recipe; what a mixture is made of is printed.

    Raises:
        ZebraError: a text that cannot be read, a source with nothing to train on, a text shorter than a row.
    """
    data, train, measured = recipe.data, recipe.train, recipe.evaluate
    if data.append_eos and tokenizer.eos_token_id is None:
        raise ZebraError("data.append_eos is set, but the tokenizer has no end-of-text token. Unset it.")
    sources = _sources(recipe, tokenizer)
    kept = split_sources(sources, deduplicate=data.deduplicate, held_out=data.held_out or 0.0)
    lines: list[SourceStats] = []
    if data.sources is None:
        rows = pack(select(kept), train.length, join=data.join, seed=train.seed)
        _say(kept)
    else:
        wanted = train.max_steps * tokens_per_step(recipe) // train.length
        mixture = mix(kept, wanted, train.length, join=data.join, seed=train.seed)
        rows, lines = mixture.sequences, mixture.stats
        if is_first_process():
            console.print(mixture_tables(kept, mixture))
    held_out = None
    texts = [source.corpus for source in sources]
    if measured is not None:
        if measured.files is None:
            held_out = select(kept, held_out=True).gathered()
        else:
            held_out = _corpus(measured, measured.files, recipe, tokenizer, measured.append_eos)
            texts.append(held_out)
        if measured.join:
            held_out = held_out.joined(measured.beyond or measured.length)
    return Texts(rows if data.recall is None else _taught(recipe, tokenizer, rows), held_out, lines, _digest(texts))


def _taught(recipe: TextRecipe, tokenizer: PreTrainedTokenizerBase, rows: PackedSequences) -> RecallDataset:
    """Rows of recall among those of text."""
    train, recall, documents = recipe.train, recipe.data.recall, rows.documents
    assert recall is not None
    generator = RecallGenerator(tokenizer, (documents[i] for i in range(len(documents.lengths))))
    if recall.first < generator.min_tokens:
        raise ZebraError(
            f"data.recall.first is {recall.first}, and a document that tells and asks has at least "
            f"{generator.min_tokens} tokens under this tokenizer. Raise it."
        )
    return RecallDataset(
        recall=generator,
        text=rows,
        share=recall.share,
        curriculum=Curriculum(recall.first, train.length, recall.hold, recall.until),
        count=train.max_steps * tokens_per_step(recipe) // train.length,
        seed=train.seed,
    )


def data_rows(recipe: Recipe, lines: Sequence[SourceStats], **common: Any) -> list[Result]:
    """What a mixture took of each source, as rows of the task `data-<source>`."""
    rows = []
    for line in lines:
        values = {
            "share_asked": line.source.share,
            "share": line.share,
            "tokens": line.tokens,
            "tokens_drawn": line.drawn,
            "epochs": line.epochs,
            "duplicates": line.duplicates,
            "held_out": line.held_out,
        }
        rows += [
            Result(
                task=f"data-{line.source.name}",
                metric=metric,
                value=value,
                n=line.documents,
                length=recipe.train.length,
                **common,
            )
            for metric, value in values.items()
        ]
    return rows


def _sources(recipe: TextRecipe, tokenizer: PreTrainedTokenizerBase) -> list[Source]:
    data = recipe.data
    if data.files is not None:
        return [Source("data.files", _corpus(data, data.files, recipe, tokenizer, data.append_eos))]
    return [
        Source(
            asked.name,
            _corpus(asked, asked.files, recipe, tokenizer, data.append_eos),
            asked.share,
            asked.min_tokens,
            asked.max_tokens,
        )
        for asked in data.sources or []
    ]


def _corpus(
    source: TextSource | MixtureSource,
    files: Sequence[str],
    recipe: TextRecipe,
    tokenizer: PreTrainedTokenizerBase,
    append_eos: bool,
) -> Corpus:
    return read_corpus(
        files,
        tokenizer,
        separator=source.separator,
        field=source.field,
        append_eos=append_eos,
        workers=recipe.data.num_proc,
        cache=recipe.data.cache_dir,
    )


def _say(kept: Sequence[SourceSplit]) -> None:
    """Say what files that are no mixture lost; where nothing was, nothing is said."""
    (part,) = kept
    lost = {"dropped as duplicates": part.duplicates, "held out": len(part.held_out)}
    said = [f"{count:,} {what}" for what, count in lost.items() if count]
    if said and is_first_process():
        console.print(f"{len(part.train):,} documents to train on; {', '.join(said)}.", highlight=False)


def _digest(texts: Sequence[Corpus]) -> str:
    digest = hashlib.sha256()
    for corpus in texts:
        digest.update(len(corpus).to_bytes(8, "big") + corpus.hashes.tobytes())
    return digest.hexdigest()
