"""Retrieval samples: questions whose answer is at a known depth of a long text, drawn with a seed, exact to the token.

    [prefix] instruction | haystack .. [needle] .. [distractor] .. | query: a question, the beginning of its answer
    '----------------------------------- `length` tokens ---------------------------------------------------------'

`zebra.data.questions` has the tasks, `zebra.data.haystack` says what is exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zebra.data.haystack import (
    Haystack,
    PromptTokenizer,
    TokenIds,
    TokenizedText,
    Tokenizer,
    min_body_tokens,
    place_needles,
)
from zebra.data.questions import MIN_WORDS, TASKS, WITHOUT_DEPTH, SampleContext, SampleParts
from zebra.errors import ZebraError


@dataclass(frozen=True)
class Sample:
    """A prompt and its answers.

    Attributes:
        ids: the prompt.
        answers: what a right continuation contains, in any order.
        distractors: wrong answers with the same number of tokens; the values of other keys in the text come first.
        needle_starts: where in `ids` each needle begins; empty where the answer depends on the whole text.
        depth: where the first needle begins in the body, 0 to 1; None where the answer depends on the whole text.
    """

    task: str
    ids: tuple[int, ...]
    answers: tuple[TokenizedText, ...]
    distractors: tuple[TokenizedText, ...]
    needle_starts: tuple[int, ...]
    depth: float | None

    @property
    def max_answer_tokens(self) -> int:
        """Tokens to generate, enough for answers within a sentence."""
        return 8 + 2 * sum(len(answer.ids) for answer in self.answers)


class SampleGenerator:
    """Draws samples of all tasks with one tokenizer and one haystack.

    Args:
        haystack: documents to hide needles in, as tokens (n,); None takes noise, a few sentences over and over.
    """

    def __init__(self, tokenizer: Tokenizer, haystack: Iterable[NDArray[np.integer[Any]]] | None = None):
        self._tokenizer = PromptTokenizer(tokenizer)
        self._haystack = None if haystack is None else Haystack.of_documents(haystack, self._tokenizer)

    def samples(
        self, task: str, *, length: int, depth: float | None = None, first: int = 0, count: int = 1, seed: int = 0
    ) -> list[Sample]:
        """Draw `count` samples of one task: prompts of `length` tokens. Each depends on the arguments and its number.

        Args:
            first: the number of the first sample.
            depth: 0 to 1, see `zebra.data.haystack.place_needles`; ignored by the tasks in `WITHOUT_DEPTH`.

        Raises:
            ZebraError: no such task, a depth outside 0 to 1, no samples or too many, a length too short for the task, a
                haystack too short, or a tokenizer that cannot write what the task needs.
        """
        depth = check_task(task, depth, count)
        draws = self._draw(task, length, depth, range(first, first + count), seed)
        return [self._sample(task, context, parts, length, depth) for context, parts in draws]

    def check(self, task: str, *, length: int, depth: float | None = None, count: int = 1, seed: int = 0) -> None:
        """Raise what `samples` would raise, except for a short haystack, without building the samples."""
        self._draw(task, length, check_task(task, depth, count), range(count), seed)

    def _draw(
        self, task: str, length: int, depth: float | None, numbers: range, seed: int
    ) -> list[tuple[SampleContext, SampleParts]]:
        contexts = [SampleContext(self._tokenizer, Random(f"{task} {length} {depth} {seed} {i}")) for i in numbers]
        draws = [(context, TASKS[task](context)) for context in contexts]
        min_tokens = max(self._min_tokens(parts) for _, parts in draws)
        if length < min_tokens:
            raise ZebraError(
                f"{task} requires a length of at least {min_tokens:,} tokens with this tokenizer; got {length:,}. "
                "Raise it."
            )
        return draws

    def _sample(
        self, task: str, context: SampleContext, parts: SampleParts, length: int, depth: float | None
    ) -> Sample:
        instruction, query, needles, distractors = self._encode(parts)
        size = length - len(instruction) - len(query)
        starts: list[int] = []
        if depth is None:
            body = _word_list(context, parts, size)
        else:
            own = _entries(context, size) if parts.entry_haystack else self._haystack
            haystack = own or Haystack.of_noise(self._tokenizer, size)
            body, starts = place_needles(context.rng, haystack, size, depth, needles, distractors)
        return Sample(
            task,
            (*instruction, *body, *query),
            tuple(parts.answers),
            tuple(parts.distractors),
            tuple(len(instruction) + start for start in starts),
            depth,
        )

    def _encode(self, parts: SampleParts) -> tuple[TokenIds, TokenIds, list[TokenIds], list[TokenIds]]:
        """The instruction, the query, the needles and the distractors."""
        encode = self._tokenizer.encode
        instruction = self._tokenizer.prefix + self._tokenizer.encode_first(parts.instruction)
        return instruction, encode(parts.query), [*map(encode, parts.needles)], [*map(encode, parts.distractor_needles)]

    def _min_tokens(self, parts: SampleParts) -> int:
        instruction, query, needles, distractors = self._encode(parts)
        word_list = MIN_WORDS * len(parts.answers[0].ids) if parts.word_counts else 0
        return len(instruction) + len(query) + (word_list or min_body_tokens(needles, distractors))


def _entries(context: SampleContext, size: int) -> Haystack:
    entries: list[TokenIds] = []
    total = longest = 0
    while total <= size + longest:
        entries.append(context.entry())
        total, longest = total + len(entries[-1]), max(longest, len(entries[-1]))
    return Haystack.of_pieces(entries)


def _word_list(context: SampleContext, parts: SampleParts, size: int) -> list[int]:
    """Shuffled words with the frequencies of the task; the beginning of one more word fills the rest."""
    assert parts.word_counts is not None
    width = len(parts.answers[0].ids)
    counts = parts.word_counts(size // width)
    words = [*parts.answers, *parts.distractors]
    words += context.draw("made-up words", max(0, len(counts) - len(words)) + 1)
    order = [word.ids for word, count in zip(words, counts, strict=False) for _ in range(count)]
    context.rng.shuffle(order)
    return [*(token for ids in order for token in ids), *words[-1].ids[: size % width]]


_MOST_SAMPLES = 100_000
"""All are drawn before they are measured, so their tokens must fit in memory."""


def check_task(task: str, depth: float | None, count: int) -> float | None:
    """Check the options of a task; returns its depth, None where the answer depends on the whole text.

    Raises:
        ZebraError: no such task, a depth outside 0 to 1, no samples or too many.
    """
    if task not in TASKS:
        raise ZebraError(f"the task must be one of {', '.join(TASKS)}; got {task!r}. Choose one of these.")
    if not 1 <= count <= _MOST_SAMPLES:
        raise ZebraError(f"the number of samples must be from 1 to {_MOST_SAMPLES:,}; got {count:,}. Change it.")
    if task in WITHOUT_DEPTH:
        return None
    if depth is None or not 0 <= depth <= 1:
        raise ZebraError(f"the depth must be from 0 to 1; got {depth}. Write for example 0.5.")
    return float(depth)
