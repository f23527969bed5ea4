"""Questions whose answer stands at a known place of a long text: generators by seed, exact to the token, offline.

    [start] introduction | haystack .. [evidence] .. [others] .. | question, and the beginning of its answer
            '--------------------------- `length` tokens ------------------------------------------------'

`zebra.data.questions` has the tasks, `zebra.data.haystack` says what is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zebra.data.haystack import (
    Haystack,
    Pool,
    PromptTokenizer,
    TokenizedText,
    Tokenizer,
    listed,
    own_text,
    placed,
    repeated,
    size_for,
)
from zebra.data.questions import LEAST_WORDS, NOISE, POOLS, TASKS, WITHOUT_DEPTH, Draw, SampleContext, entry
from zebra.errors import ZebraError


@dataclass(frozen=True)
class Sample:
    """A prompt, its answers and where they come from.

    Attributes:
        task: its name in `TASKS`.
        ids: the prompt, exactly as long as was asked.
        answers: what a right continuation has, in any order.
        distractors: wrong answers, of the same number of tokens; those of other keys in the text come first.
        evidence: where in `ids` each piece of evidence begins; empty where the whole text is the evidence.
        depth: 0 to 1, where the first piece of evidence stands in the body; None where the whole text is the evidence.
    """

    task: str
    ids: tuple[int, ...]
    answers: tuple[TokenizedText, ...]
    distractors: tuple[TokenizedText, ...]
    evidence: tuple[int, ...]
    depth: float | None

    @property
    def max_answer_tokens(self) -> int:
        """Tokens that an answer in words may take."""
        return 8 + 2 * sum(len(answer.ids) for answer in self.answers)


class SampleGenerator:
    """The generators under one tokenizer, with one haystack.

    Args:
        haystack: documents to hide things in, as tokens; noise, a few sentences over and over, where None.

    Example:
        >>> SampleGenerator(tokenizer).samples("passkey", length=1024, depth=0.5, count=20, seed=0)
    """

    def __init__(self, tokenizer: Tokenizer, haystack: Iterable[NDArray[np.integer[Any]]] | None = None):
        self._writer = PromptTokenizer(tokenizer)
        self._own = None if haystack is None else own_text(haystack, self._writer)
        self._pools: dict[str, Pool] = {}
        self._needed: dict[str, int] = {}

    def pool(self, kind: str) -> Pool:
        """The words or numbers that the tokenizer writes."""
        if kind not in self._pools:
            self._pools[kind] = Pool(self._writer, kind, POOLS[kind])
        return self._pools[kind]

    def samples(
        self, task: str, *, length: int, depth: float | None = None, count: int = 1, seed: int = 0
    ) -> list[Sample]:
        """Samples of one task, length and depth.

        Args:
            length: tokens of each prompt.
            depth: 0 to 1, see `zebra.data.haystack.placed`; not read by the tasks in `WITHOUT_DEPTH`.

        Raises:
            ZebraError: no such task, a depth outside 0 to 1, a length too short for the task, a haystack too short, a
                tokenizer that cannot write what the task needs.
        """
        at = self._depth(task, depth)
        return [self._sample(task, kit, draw, length, at) for kit, draw in self._draws(task, length, at, count, seed)]

    def check(self, task: str, *, length: int, depth: float | None = None, count: int = 1, seed: int = 0) -> None:
        """Refuse what `samples` would, but for the haystack, without writing the samples."""
        self._draws(task, length, self._depth(task, depth), count, seed)

    @staticmethod
    def _depth(task: str, depth: float | None) -> float | None:
        return None if depth is None or task in WITHOUT_DEPTH else float(depth)

    def _draws(
        self, task: str, length: int, depth: float | None, count: int, seed: int
    ) -> list[tuple[SampleContext, Draw]]:
        check(task, depth, count)
        kits = [SampleContext(self.pool, Random(f"{task} {length} {depth} {seed} {i}")) for i in range(count)]
        draws = [(kit, TASKS[task](kit)) for kit in kits]
        least = max(self._usual(task), *(self._least(draw) for _, draw in draws))
        if length < least:
            raise ZebraError(
                f"{task} needs a length of at least {least:,} tokens under this tokenizer; got {length:,}. "
                "Take a longer one."
            )
        return draws

    def _sample(self, task: str, kit: SampleContext, draw: Draw, length: int, depth: float | None) -> Sample:
        head, tail = self._ends(draw)
        size = length - len(head) - len(tail)
        places: list[int] = []
        if depth is None:
            body = self._words(kit, draw, size)
        else:
            evidence, others = self._pieces(draw)
            hay = self._entries(kit, size) if draw.entries else self._own or self._noise(size)
            body, places = placed(kit.rng, hay, size, depth, evidence, others)
        return Sample(
            task,
            (*head, *body, *tail),
            tuple(draw.answers),
            tuple(draw.distractors),
            tuple(len(head) + place for place in places),
            depth,
        )

    def _ends(self, draw: Draw) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self._writer.start + self._writer.first(draw.head), self._writer.ids(draw.tail)

    def _pieces(self, draw: Draw) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
        return [*map(self._writer.ids, draw.evidence)], [*map(self._writer.ids, draw.others)]

    def _usual(self, task: str) -> int:
        """What any samples of a task need, as far as a few tell: pieces differ by a token or two."""
        if task not in self._needed:
            kits = (SampleContext(self.pool, Random(f"{task} {i}")) for i in range(32))
            self._needed[task] = max(self._least(TASKS[task](kit)) for kit in kits)
        return self._needed[task]

    def _least(self, draw: Draw) -> int:
        ends = sum(map(len, self._ends(draw)))
        return ends + (LEAST_WORDS * len(draw.answers[0].ids) if draw.counts else size_for(*self._pieces(draw)))

    def _noise(self, size: int) -> Haystack:
        return repeated([*map(self._writer.ids, NOISE)], size)

    def _entries(self, kit: SampleContext, size: int) -> Haystack:
        found: list[Sequence[int]] = []
        total = longest = 0
        while total <= size + longest:
            found.append(self._writer.ids(entry(*kit.draw("numbers", 2))))
            total, longest = total + len(found[-1]), max(longest, len(found[-1]))
        return listed(found)

    def _words(self, kit: SampleContext, draw: Draw, size: int) -> list[int]:
        """Words in the frequencies of the task; the last one is cut where the length cuts it."""
        assert draw.counts is not None
        width = len(draw.answers[0].ids)
        counts = draw.counts(size // width)
        words = [*draw.answers, *draw.distractors]
        words += kit.draw("made-up words", max(0, len(counts) - len(words)) + 1)
        order = [word.ids for word, count in zip(words, counts, strict=False) for _ in range(count)]
        kit.rng.shuffle(order)
        return [*(token for ids in order for token in ids), *words[-1].ids[: size % width]]


def check(task: str, depth: float | None, count: int) -> None:
    """Refuse what no tokenizer could serve.

    Raises:
        ZebraError: no such task, a depth outside 0 to 1, no samples.
    """
    if task not in TASKS:
        raise ZebraError(f"the tasks are {', '.join(TASKS)}; got {task!r}. Choose among them.")
    if task not in WITHOUT_DEPTH and (depth is None or not 0 <= depth <= 1):
        raise ZebraError(f"a depth is a share of the text from 0 to 1; got {depth}. Write for example 0.5.")
    if count < 1:
        raise ZebraError(f"at least 1 sample is measured; got {count}. Ask for more.")
