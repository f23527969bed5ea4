"""Read a recipe's conversations, filter and tokenise them, mix them by share, and pack them into sequences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from transformers import PreTrainedModel

from zebra.data.composition import kind_table, mixture_tables
from zebra.data.conversations import Conversation, TokenizedConversation, read_conversations
from zebra.data.corpus import Corpus
from zebra.data.mixture import Source, SourceStats, mix, select, split_sources
from zebra.data.packing import pack_whole
from zebra.errors import ZebraError
from zebra.progress import bar, console
from zebra.train.chat import Chat
from zebra.train.gate import Gate, conversation_hash, is_held_out
from zebra.train.processes import check_step, is_first_process, sequences_of_training
from zebra.train.sft import AnswerSequences, ConversationTraining, TokenizedSource
from zebra.train.tune_recipe import TuneRecipe


def read_instructions(recipe: TuneRecipe, chat: Chat, load: Callable[[], PreTrainedModel]) -> ConversationTraining:
    """Read, check, select and pack the conversations of a recipe, and print what they consist of.

    Args:
        load: loads the model with which `data.quality.independent` measures whether answers depend on their documents.

    Raises:
        ZebraError: a file that cannot be read; a conversation that is too long; a source or a suite with nothing left.
    """
    data, length = recipe.data, recipe.train.length
    named = data.by_source
    by_suite = {suite.name: read_conversations(suite.files) for suite in recipe.suites}
    gate = Gate(recipe, chat, load, [one for conversations in by_suite.values() for one in conversations])
    by_source = [read_conversations(source.files) for source in named]
    if data.held_out:
        gate.measure([one for source in by_source for one in source if is_held_out(one, data.held_out)])
    tokenized = [
        _tokenize(gate(conversations), source.name, recipe, chat, gate.counts)
        for source, conversations in zip(named, by_source, strict=True)
    ]
    splits = split_sources(
        [
            Source(source.name, tokens.corpus, source.share, source.min_tokens, source.max_tokens)
            for source, tokens in zip(named, tokenized, strict=True)
        ],
        deduplicate=True,
        held_out=data.held_out or 0.0,
    )
    stats: list[SourceStats] = []
    if data.sources is None:
        packed = pack_whole(select(splits), length)
        check_step(recipe, len(packed))
    else:
        mixture = mix(splits, sequences_of_training(recipe), length, join=False, seed=recipe.train.seed, whole=True)
        packed, stats = mixture.sequences, mixture.stats
        if is_first_process():
            console.print(mixture_tables(mixture))
    sequences = AnswerSequences(packed, tokenized)
    if is_first_process():
        console.print(kind_table(sequences.kind_stats()))
        if faults := _listed(gate.counts):
            console.print(f"{faults}.")
    if data.held_out is None:
        fitting = {name: [*_fitting(conversations, recipe, chat)] for name, conversations in by_suite.items()}
        if empty := [name for name, conversations in fitting.items() if not conversations]:
            raise ZebraError(
                f"all conversations of the suite {empty[0]} are too long. Raise train.length, or use others."
            )
        measured = {name: [tokens for tokens, _, _ in some] for name, some in fitting.items()}
        hashes = {name: [conversation_hash(one) for _, _, one in some] for name, some in fitting.items()}
    else:
        held_out = {
            split.source.name: (source, split.held_out)
            for split, source in zip(splits, tokenized, strict=True)
            if len(split.held_out)
        }
        measured = {name: [source[i] for i in which] for name, (source, which) in held_out.items()}
        hashes = {name: source.corpus.hashes[which].tolist() for name, (source, which) in held_out.items()}
    documents = {name: [one >> 32 for one in some] for name, some in hashes.items()}
    return ConversationTraining(recipe, chat.tokenizer, sequences, measured, documents, stats, dict(gate.counts))


def _tokenize(
    conversations: Sequence[Conversation], name: str, recipe: TuneRecipe, chat: Chat, counts: Counter[str]
) -> TokenizedSource:
    ids, answers = [], []  # lists of arrays: lists of ints take nine times the memory
    hashes, kinds = [], []
    with bar(f"tokenising {name}", len(conversations), "conversations") as advance:
        for tokens, cut, one in _fitting(conversations, recipe, chat, advance):
            counts["documents cut"] += cut > 0
            counts["tokens cut"] += cut
            ids.append(np.array(tokens.input_ids, np.uint32))
            answers.append(np.array(tokens.assistant_mask, np.bool_))
            hashes.append(conversation_hash(one))
            kinds.append(one.kind or name)
    counts["too long"] += len(conversations) - len(ids)
    if not ids:
        raise ZebraError(
            f"the source {name} has no conversation left to train on: all {len(conversations):,} that pass the quality "
            f"checks are too long. Use others, or raise train.length; faults: "
            f"{_listed(counts) or 'none'}."
        )
    offsets = np.concatenate([[0], np.cumsum([*map(len, ids)])]).astype(np.int64)
    corpus = Corpus(np.concatenate(ids), offsets, np.array(hashes, np.uint64))
    return TokenizedSource(corpus, np.concatenate(answers), kinds)


def _fitting(
    conversations: Sequence[Conversation],
    recipe: TuneRecipe,
    chat: Chat,
    advance: Callable[[float], None] = lambda units: None,
) -> Iterator[tuple[TokenizedConversation, int, Conversation]]:
    """Each conversation's tokens, how many were cut, and the conversation; one too long raises or is left out."""
    fit = chat.shortened if recipe.data.too_long == "drop" else chat.fitted
    for one in conversations:
        advance(1)
        if (tokens := fit(one, recipe.train.length)) is not None:
            yield (*tokens, one)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
