"""A recipe's conversations: read, through the gate, as tokens, mixed by share, packed into rows; and the suites."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from zebra.data.composition import KindStats, kind_stats, kind_table, mixture_tables
from zebra.data.conversations import Conversation, TokenizedConversation, read_conversations
from zebra.data.corpus import Corpus
from zebra.data.mixture import SelectedDocuments, Source, SourceStats, mix, select, split_sources
from zebra.data.packing import IGNORE, PackedSequences, pack_whole
from zebra.errors import ZebraError
from zebra.progress import bar, console
from zebra.train.chat import Chat
from zebra.train.directory import is_first_process
from zebra.train.gate import Gate, hash_of, held
from zebra.train.trainer import tokens_per_step
from zebra.train.tune_recipe import InstructionSource, TuneRecipe


@dataclass(frozen=True)
class Tokens:
    """The conversations of a source as tokens; `answers` says of each token whether the assistant says it."""

    corpus: Corpus
    answers: NDArray[np.bool_]
    kinds: list[str]

    def __getitem__(self, i: int) -> TokenizedConversation:
        start, end = self.corpus.offsets[i : i + 2]
        return TokenizedConversation(self.corpus.tokens[start:end].tolist(), self.answers[start:end].tolist())


@dataclass(frozen=True)
class AnswerRows:
    """Rows in the form that trl's collator reads: tokens, labels on answers alone, where each conversation ends."""

    rows: PackedSequences
    sources: Sequence[Tokens]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {"input_ids": [], "labels": [], "seq_lengths": []}
        for document, _, count in self.rows.pieces[self.rows.firsts[i] : self.rows.firsts[i + 1]]:
            one = self._conversation(document)
            found["input_ids"] += one.input_ids
            found["labels"] += [
                t if answer else IGNORE for t, answer in zip(one.input_ids, one.assistant_mask, strict=True)
            ]
            found["seq_lengths"].append(int(count))
        return found

    def portions(self) -> list[KindStats]:
        """What the rows are made of, by kind and length."""
        documents = self.rows.pieces[:, 0]
        drawn = self._drawn
        kinds = [self.sources[drawn.sources[d]].kinds[drawn.documents[d]] for d in documents]
        answers = np.array([sum(self._conversation(d).assistant_mask) for d in documents])
        return kind_stats(kinds, self.rows.pieces[:, 2], answers)

    @property
    def _drawn(self) -> SelectedDocuments:
        assert isinstance(self.rows.documents, SelectedDocuments)
        return self.rows.documents

    def _conversation(self, document: int) -> TokenizedConversation:
        return self.sources[self._drawn.sources[document]][self._drawn.documents[document]]


class Instructions(NamedTuple):
    """The rows to train on, the suites to measure on, what a mixture took of each source, counts, a digest of all."""

    rows: AnswerRows
    suites: dict[str, list[TokenizedConversation]]
    lines: list[SourceStats]
    counts: dict[str, int]
    digest: str


def read_instructions(recipe: TuneRecipe, chat: Chat, load: Callable[[], PreTrainedModel]) -> Instructions:
    """Read, check, choose and pack the conversations of a recipe; what they are made of is printed.

    Args:
        load: the model whose likelihood says whether answers depend on their documents, where the recipe asks.

    Raises:
        ZebraError: what reading refuses; a conversation too long; a source with nothing left to train on.
    """
    data, length = recipe.data, recipe.train.length
    asked = data.sources or [InstructionSource(name="instructions", files=data.files or [], share=1.0)]
    measured = recipe.evaluate.suites if recipe.evaluate and recipe.evaluate.suites else []
    suites = {suite.name: read_conversations(suite.files) for suite in measured}
    gate = Gate(recipe, chat, load, [one for found in suites.values() for one in found])
    read = [read_conversations(one.files) for one in asked]
    if data.held_out:
        gate.measure([one for found in read for one in found if held(one, data.held_out)])
    tokens = [_tokens(gate(found), one.name, recipe, chat, gate.counts) for one, found in zip(asked, read, strict=True)]
    sources = [
        Source(one.name, found.corpus, one.share, one.min_tokens, one.max_tokens)
        for one, found in zip(asked, tokens, strict=True)
    ]
    kept = split_sources(sources, deduplicate=True, held_out=data.held_out or 0.0)
    lines: list[SourceStats] = []
    if data.sources is None:
        rows = AnswerRows(pack_whole(select(kept), length), tokens)
    else:
        wanted = recipe.train.max_steps * tokens_per_step(recipe) // length
        mixture = mix(kept, wanted, length, join=False, seed=recipe.train.seed, whole=True)
        rows, lines = AnswerRows(mixture.sequences, tokens), mixture.stats
        if is_first_process():
            console.print(mixture_tables(kept, mixture))
    if is_first_process():
        console.print(kind_table(rows.portions()))
        _say(gate.counts)
    if data.held_out is not None:
        labelled = {part.source.name: [own[i] for i in part.held_out] for part, own in zip(kept, tokens, strict=True)}
        labelled = {name: found for name, found in labelled.items() if found}
    else:
        labelled = {name: [made for made, _, _ in _fitted(found, recipe, chat)] for name, found in suites.items()}
        if empty := [name for name, found in labelled.items() if not found]:
            raise ZebraError(
                f"all conversations of the suite {empty[0]} are too long. Take longer rows, or give others."
            )
    return Instructions(rows, labelled, lines, dict(gate.counts), _digest(tokens, labelled))


def _tokens(
    conversations: Sequence[Conversation], name: str, recipe: TuneRecipe, chat: Chat, counts: Counter[str]
) -> Tokens:
    made: list[TokenizedConversation] = []
    hashes, kinds = [], []
    with bar(f"tokenising {name}", len(conversations), "conversations") as advance:
        for labelled, cut, one in _fitted(conversations, recipe, chat, advance):
            counts["documents cut"] += cut > 0
            counts["tokens cut"] += cut
            made.append(labelled)
            hashes.append(hash_of(one))
            kinds.append(one.kind or name)
    counts["too long"] += len(conversations) - len(made)
    if not made:
        raise ZebraError(
            f"the source {name} has no conversation left to train on: of those that pass the gate all "
            f"{len(conversations):,} are too long. Give others, or take longer rows; faults: {_said(counts) or 'none'}."
        )
    ids = np.concatenate([np.array(one.input_ids, np.uint32) for one in made])
    offsets = np.concatenate([[0], np.cumsum([len(one.input_ids) for one in made])]).astype(np.int64)
    answers = np.concatenate([np.array(one.assistant_mask, np.bool_) for one in made])
    return Tokens(Corpus(ids, offsets, np.array(hashes, np.uint64)), answers, kinds)


def _fitted(
    conversations: Sequence[Conversation],
    recipe: TuneRecipe,
    chat: Chat,
    advance: Callable[[float], None] = lambda units: None,
) -> Iterator[tuple[TokenizedConversation, int, Conversation]]:
    """The conversations as tokens, and how many were cut of each; what is too long is refused or left out."""
    length, drop = recipe.train.length, recipe.data.too_long == "drop"
    for one in conversations:
        advance(1)
        found = chat.shortened(one, length) if drop else chat.fitted(one, length)
        if found is not None:
            yield (*found, one)


def _said(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)


def _say(counts: Counter[str]) -> None:
    if said := _said(counts):
        console.print(f"{said}.", highlight=False)


def _digest(tokens: Sequence[Tokens], suites: dict[str, list[TokenizedConversation]]) -> str:
    digest = hashlib.sha256()
    parts: list[Any] = [found.corpus.tokens for found in tokens] + [found.answers for found in tokens]
    parts += [np.array(one.input_ids) for found in suites.values() for one in found]
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part.tobytes())
    return digest.hexdigest()
