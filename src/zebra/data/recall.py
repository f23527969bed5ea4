"""Documents that teach to recall: things are told once, and asked for later. By seed, exact to the token.

    [start] head | ..... told ..... told .. told ..... | asks answer. asks answer. asks answer.
                   '---- text, noise or entries -----'   '------------- the labels -----------'

The wording is that of `zebra.data.questions`, so that what is learned is what `zebra.data.needles` asks. Documents
stand side by side in rows and do not see each other. They grow over the training: of a few things told a few tokens
ago many are asked in a row, and copying is learned soon; then it is stretched to the row's length.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zebra.data.haystack import Hay, Pool, Tokenizer, Writer, listed, own_text, placed, repeated
from zebra.data.packing import IGNORE, Rows
from zebra.data.questions import NOISE, POOLS, TASKS, Kit, entry
from zebra.refusal import Refusal

KINDS = ("entries", "lookup", "needle", "passkey")
"""What is taught: the tasks of these names, and entries said again, the most answers in the fewest tokens."""
_WEIGHTS = (3, 1, 1, 1)
_MOST = {"passkey": 1, "needle": 60}  # of 150 words


@dataclass(frozen=True)
class Growth:
    """The longest document after a part p of the training, 0 to 1.

    longest(p) = first (last / first) ^ min(1, p / until)
    """

    first: int
    last: int
    until: float

    def longest(self, part: float) -> int:
        """Tokens."""
        return round(self.first * (self.last / self.first) ** min(1.0, part / self.until))


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


class Recall:
    """The generator under one tokenizer.

    Args:
        haystack: documents to hide things in, as tokens, beside noise; noise alone where None.

    Raises:
        Refusal: the tokenizer cannot write numbers or words.
    """

    def __init__(self, tokenizer: Tokenizer, haystack: Iterable[NDArray[np.integer[Any]]] | None = None):
        self._writer = Writer(tokenizer)
        self._own = None if haystack is None else own_text(haystack, self._writer)
        self._noise = [*map(self._writer.ids, NOISE)]
        self._pool = functools.cache(lambda kind: Pool(self._writer, kind, POOLS[kind]))

    def row(self, length: int, longest: int, rng: Random) -> dict[str, Tensor]:
        """`length` tokens of documents of up to `longest`: `input_ids`, `position_ids` and `labels`, each (length,)."""
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        while room := length - len(ids):
            size = min(room, longest if rng.random() < 0.5 else rng.randint(self.least, max(self.least, longest)))
            size = room if room - size < self.least else size
            found, asked = self.document(size, rng)
            ids, labels, positions = ids + found, labels + asked, [*positions, *range(size)]
        return {"input_ids": torch.tensor(ids), "position_ids": torch.tensor(positions), "labels": torch.tensor(labels)}

    @functools.cached_property
    def least(self) -> int:
        """Tokens that hold one fact of any kind and its question."""
        rng = Random(0)
        return 8 + max(
            len(self._head(head)) + len(fact.told) + fact.question
            for kind in KINDS
            for _ in range(16)
            for head, fact in [self._fact(kind, Kit(self._pool, rng))]
        )

    def document(self, size: int, rng: Random) -> tuple[list[int], list[int]]:
        """One document of exactly `size` tokens, and its labels: `IGNORE` before the first question, then the tokens.

        A third to two thirds of it are questions, as far as there are things to ask.

        Raises:
            Refusal: a size that holds no fact and its question.
        """
        if size < self.least:
            raise Refusal(f"a document that tells and asks has at least {self.least} tokens here; got {size:,}.")
        kind, kit = rng.choices(KINDS, _WEIGHTS)[0], Kit(self._pool, rng)
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
            labels += [*fact.asks, *fact.answer]
        return ids, labels

    def _fact(self, kind: str, kit: Kit) -> tuple[str, Fact]:
        """The head that its document has, and the fact."""
        if kind == "entries":
            key, number = kit.draw("numbers", 2)
            head, told, asks = "", entry(key, number), f"{key.text}:"
        else:
            draw = TASKS[kind](kit)
            (number,), head, told, asks = draw.answers, draw.head, draw.evidence[0], draw.tail
        stop = self._writer.ids(f"{number.text}.")[len(number.ids) :]
        return head, Fact(self._writer.ids(told), self._writer.ids(asks), number.ids + stop)

    def _head(self, text: str) -> tuple[int, ...]:
        return self._writer.start + self._writer.first(text)

    def _hay(self, kind: str, kit: Kit, size: int) -> Hay:
        if kind in ("entries", "lookup"):
            return listed([self._writer.ids(entry(*kit.draw("numbers", 2))) for _ in range(size // 4)])
        if self._own is not None and kit.rng.random() < 0.5:
            return self._own
        return repeated(self._noise, size)


@dataclass(frozen=True)
class Taught:
    """A dataset of training rows in the order of training: of recall with the probability `share`, of text otherwise.

    Row `i` follows from the seed and `i` alone, so a resumed training sees the same rows.
    """

    recall: Recall
    text: Rows
    share: float
    growth: Growth
    count: int
    seed: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        rng = Random(f"{self.seed} {i}")
        if rng.random() < self.share:
            return self.recall.row(self.text.length, self.growth.longest(i / self.count), rng)
        return self.text[int(self._order[i % len(self._order)])]

    @functools.cached_property
    def _order(self) -> NDArray[np.int64]:
        return np.random.default_rng(self.seed).permutation(len(self.text))
