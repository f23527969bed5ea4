"""Documents that teach to recall: things are told once, and asked for later. By seed, exact to the token.

    [start] head | ..... told ..... told .. told ..... | asks answer. asks answer. asks answer.
                   '---- text, noise or entries -----'   '------------- the labels -----------'

The wording is that of `zebra.data.questions`, so that what is learned is what `zebra.data.needles` asks. Documents
stand side by side in rows and do not see each other. At first they are short, and made of a few symbols again and
again: there the heads form that find where a token stood and copy what followed. Then the symbols grow in number, and
then the documents in length, with things told and asked for in words.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zebra.data.haystack import Haystack, Piece, Pool, PromptTokenizer, Tokenizer, listed, own_text, placed, repeated
from zebra.data.packing import IGNORE, PackedSequences
from zebra.data.questions import NOISE, POOLS, TASKS, SampleContext, entry

_TASKS = ("lookup", "needle", "passkey")
KINDS = ("repeats", "pairs", "entries", *_TASKS)
"""What is taught: symbols over and over, pairs of them and entries said again, and the tasks of these names."""
_AT_FIRST, _SHORT, _LATER = (3, 5, 1), (2, 3, 7), (1, 1, 6, 3, 3, 1)
_MOST = {"passkey": 1, "needle": 60}  # of 150 words
_WORDY = 256  # tokens: a document of so many may have more entries than there are words
_FEWEST = 10  # symbols


@dataclass(frozen=True)
class Difficulty:
    """Where a training stands: tokens of the longest document, and how much of the symbols is there, 0 to 1."""

    longest: int
    symbols: float = 1.0

    @property
    def easy(self) -> bool:
        """Whether keys are one symbol and stand beside their value."""
        return self.symbols < 0.4


@dataclass(frozen=True)
class Curriculum:
    """What is taught after a part p of the training, 0 to 1.

    symbols(p) = ten (all / ten) ^ min(1, p / hold)^2
    longest(p) = first (last / first) ^ clip((p - hold) / (until - hold))
    """

    first: int
    last: int
    hold: float
    until: float

    def held(self, part: float) -> bool:
        """Whether the documents are as short as at first."""
        return part < self.hold

    def at(self, part: float) -> Difficulty:
        """The stage."""
        grown = min(1.0, max(0.0, (part - self.hold) / (self.until - self.hold)))
        symbols = min(1.0, part / self.hold) ** 2 if self.hold else 1.0
        return Difficulty(round(self.first * (self.last / self.first) ** grown), symbols)


@dataclass(frozen=True)
class Fact:
    """What tells it, what asks for it, and the answer with its full stop, as tokens."""

    told: tuple[int, ...]
    asks: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def question(self) -> int:
        """Tokens of the question with its answer."""
        return len(self.asks) + len(self.answer)


class RecallGenerator:
    """The generator under one tokenizer.

    Args:
        haystack: documents to hide things in, as tokens, beside noise; noise alone where None.

    Raises:
        ZebraError: the tokenizer cannot write numbers or words.
    """

    def __init__(self, tokenizer: Tokenizer, haystack: Iterable[NDArray[np.integer[Any]]] | None = None):
        self._writer = PromptTokenizer(tokenizer)
        self._own = None if haystack is None else own_text(haystack, self._writer)
        self._noise = [*map(self._writer.ids, NOISE)]
        self._pool = functools.cache(lambda kind: Pool(self._writer, kind, POOLS[kind]))
        numbers = SampleContext(self._pool, Random(0)).draw("numbers", 512)
        self._symbols = list(dict.fromkeys(token for number in numbers for token in number.ids))

    def row(self, length: int, stage: Difficulty, rng: Random) -> dict[str, Tensor]:
        """`length` tokens of documents: `input_ids`, `position_ids` and `labels`, each (length,)."""
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        while room := length - len(ids):
            size = min(room, stage.longest if rng.random() < 0.5 else rng.randint(self.shortest, stage.longest))
            size = room if room - size < self.shortest else size
            found, asked = self.document(size, stage, rng)
            ids, labels, positions = ids + found, labels + asked, [*positions, *range(size)]
        return {"input_ids": torch.tensor(ids), "position_ids": torch.tensor(positions), "labels": torch.tensor(labels)}

    @functools.cached_property
    def shortest(self) -> int:
        """Tokens of the shortest document: two entries, and one of them again."""
        lines = (
            next(self._entries(size, SampleContext(self._pool, Random(seed))))
            for size in (1, _WORDY)
            for seed in range(16)
        )
        return len(self._writer.start) + 3 * max(map(len, lines))

    @functools.cached_property
    def least(self) -> int:
        """Tokens that hold one fact of any task and its question."""
        rng = Random(0)
        return 8 + max(
            len(self._head(head)) + len(fact.told) + fact.question
            for kind in _TASKS
            for _ in range(16)
            for head, fact in [self._fact(kind, SampleContext(self._pool, rng))]
        )

    def document(self, size: int, stage: Difficulty, rng: Random) -> tuple[list[int], list[int]]:
        """One document of exactly `size` tokens, and its labels: `IGNORE` where nothing told before says the token.

        The tasks need `least` tokens; below that, it is repeats, pairs and entries.
        """
        weights = _AT_FIRST if stage.easy else _LATER if size >= self.least else _SHORT
        kind = rng.choices(KINDS[: len(weights)], weights)[0]
        symbols = self._symbols[: round(_FEWEST * (len(self._symbols) / _FEWEST) ** stage.symbols)]
        if kind == "repeats":
            return self._repeats(size, symbols, rng)
        if kind == "pairs":
            return self._asked_again(size, _pairs(symbols, stage.easy, rng), rng)
        kit = SampleContext(self._pool, rng)
        return (
            self._asked_again(size, self._entries(size, kit), rng)
            if kind == "entries"
            else self._hidden(kind, size, kit)
        )

    def _repeats(self, size: int, symbols: list[int], rng: Random) -> tuple[list[int], list[int]]:
        """Symbols over and over; once round is not trained on."""
        start = self._writer.start
        period = [rng.choice(symbols) for _ in range(rng.randint(2, (size - len(start)) // 2))]
        ids = [*start, *itertools.islice(itertools.cycle(period), size - len(start))]
        known = len(start) + len(period) + 1
        return ids, [IGNORE] * known + ids[known:]

    def _asked_again(self, size: int, lines: Iterator[Piece], rng: Random) -> tuple[list[int], list[int]]:
        """Lines of equal size, and then a fifth of them to all again in another order; what begins one is free."""
        start, first = self._writer.start, next(lines)
        room, spare = divmod(size - len(start), len(first))
        told = [first, *itertools.islice(lines, min(room - 2, round(room / (1 + rng.uniform(0.2, 1))) - 1))]
        again: list[Piece] = []
        while (left := room - len(told) - len(again)) > 0:
            again += rng.sample(told, min(left, len(told)))
        ids = [*start, *first[len(first) - spare :], *itertools.chain(*told)]
        labels = [IGNORE] * len(ids)
        for line in again:
            ids += line
            labels += [IGNORE, *line[1:]]
        return ids, labels

    def _entries(self, size: int, kit: SampleContext) -> Iterator[Piece]:
        """Keys that are words or numbers, and their numbers."""
        keys = "words" if size < _WORDY and kit.rng.random() < 0.5 else "numbers"
        while True:
            (key,), (number,) = kit.draw(keys, 1), kit.draw("numbers", 1)
            yield self._writer.ids(entry(key, number))

    def _hidden(self, kind: str, size: int, kit: SampleContext) -> tuple[list[int], list[int]]:
        """Facts in a haystack; a third to two thirds are questions, as far as there are things to ask."""
        rng = kit.rng
        text, fact = self._fact(kind, kit)
        head = self._head(text)
        room, asked, facts = size - len(head), rng.uniform(0.3, 0.67) * size, [fact]
        taken = len(fact.told) + fact.question
        while len(facts) < _MOST.get(kind, size):
            _, fact = self._fact(kind, kit)
            taken += 2 * len(fact.told) + fact.question
            if taken > room or sum(one.question for one in facts) + fact.question > asked:
                break
            facts.append(fact)
        questions = sum(fact.question for fact in facts)
        told = [fact.told for fact in facts]
        body, _ = placed(rng, self._hay(kind, kit, room), room - questions, rng.random(), told[:1], told[1:])
        ids, labels = [*head, *body], [IGNORE] * (size - questions)
        for fact in rng.sample(facts, len(facts)):
            ids += [*fact.asks, *fact.answer]
            labels += [*[IGNORE] * len(fact.asks), *fact.answer]
        return ids, labels

    def _fact(self, kind: str, kit: SampleContext) -> tuple[str, Fact]:
        """The head that its document has, and the fact."""
        draw = TASKS[kind](kit)
        (number,) = draw.answers
        stop = self._writer.ids(f"{number.text}.")[len(number.ids) :]
        return draw.head, Fact(self._writer.ids(draw.evidence[0]), self._writer.ids(draw.tail), number.ids + stop)

    def _head(self, text: str) -> tuple[int, ...]:
        return self._writer.start + self._writer.first(text)

    def _hay(self, kind: str, kit: SampleContext, size: int) -> Haystack:
        if kind == "lookup":
            return listed([self._writer.ids(entry(*kit.draw("numbers", 2))) for _ in range(size // 4)])
        if self._own is not None and kit.rng.random() < 0.5:
            return self._own
        return repeated(self._noise, size)


def _pairs(symbols: list[int], easy: bool, rng: Random) -> Iterator[Piece]:
    """Keys and values of one to three symbols, in half of the documents with the same symbol between each two."""
    more, between, values = (
        (0, 0, rng.choice((1, 1, 1, 2))) if easy else (rng.randint(0, 2), rng.randint(0, 1), rng.randint(1, 3))
    )
    joint = rng.choices(symbols, k=between)
    for key in rng.sample(symbols, len(symbols)):
        yield (key, *rng.choices(symbols, k=more), *joint, *rng.choices(symbols, k=values))


@dataclass(frozen=True)
class RecallDataset:
    """A dataset of training rows in the order of training: of recall alone while it is held
    at the beginning, then of recall with the probability `share` and of text otherwise.

    Row `i` follows from the seed and `i` alone, so a resumed training sees the same rows.
    """

    recall: RecallGenerator
    text: PackedSequences
    share: float
    curriculum: Curriculum
    count: int
    seed: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        rng, stage = Random(f"{self.seed} {i}"), self.curriculum.at(i / self.count)
        if self.curriculum.held(i / self.count) or rng.random() < self.share:
            return self.recall.row(self.text.length, stage, rng)
        return self.text[int(self._order[i % len(self._order)])]

    @functools.cached_property
    def _order(self) -> NDArray[np.int64]:
        return np.random.default_rng(self.seed).permutation(len(self.text))
