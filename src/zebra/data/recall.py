"""Training documents for associative recall, drawn with a seed: they state values for keys, and query them later.

    [prefix] instruction | .. needle ... needle .. needle .. | query answer. query answer. query answer.
                         '------ text, noise or entries -----'  '---- labels: the answers only -------'

The wording is that of `zebra.data.needles`. Documents are packed into sequences and do not attend to each other. At
first they are short and repeat a few symbols, so that induction heads form, which find an earlier token and copy what
followed it. Then the number of symbols grows, and then the length of the documents, with needles and queries in words.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zebra.data.haystack import Haystack, PromptTokenizer, TokenIds, Tokenizer, place_needles
from zebra.data.packing import IGNORE, PackedSequences
from zebra.data.questions import TASKS, SampleContext
from zebra.errors import ZebraError

_TASKS = ("lookup", "needle", "passkey")
KINDS = ("repeats", "pairs", "entries", *_TASKS)
"""Kinds of documents: a repeated run of symbols, recurring pairs of symbols, recurring entries, and three tasks."""
_EASY_WEIGHTS: tuple[int, ...] = (3, 5, 1)
_SHORT_WEIGHTS: tuple[int, ...] = (2, 3, 7)
_LONG_WEIGHTS: tuple[int, ...] = (1, 1, 6, 3, 3, 1)
"""Relative frequencies of `KINDS`: with few symbols, in documents too short for a task, and otherwise."""
_MAX_NEEDLES = {"passkey": 1, "needle": 60}  # of 150 words
_WORD_KEY_TOKENS = 256  # from this size on, a document may have more entries than there are words
_MIN_SYMBOLS = 10


@dataclass(frozen=True)
class Curriculum:
    """The difficulty of documents after a fraction p of the training, 0 to 1.

    symbols(p) = min(1, p / hold)^2                                          1 if hold is 0
    longest(p) = first (last / first) ^ clip((p - hold) / (until - hold))    clipped to 0 .. 1

    Attributes:
        first, last: tokens of the longest document at first and in the end.
        hold, until: fractions of the training between which documents become longer.
    """

    first: int
    last: int
    hold: float
    until: float

    def at(self, part: float) -> tuple[int, float]:
        """Tokens of the longest document, and the share of symbols that are used, 0 to 1 on a logarithmic scale."""
        growth = min(1.0, max(0.0, (part - self.hold) / (self.until - self.hold)))
        symbols = min(1.0, part / self.hold) ** 2 if self.hold else 1.0
        return round(self.first * (self.last / self.first) ** growth), symbols


class _Question(NamedTuple):
    """Tokens of a needle, of the query for its value, and of the value with a full stop; and how many the stop has."""

    needle: tuple[int, ...]
    query: tuple[int, ...]
    answer: tuple[int, ...]
    stop_tokens: int

    @property
    def tokens(self) -> int:
        return len(self.query) + len(self.answer)


class Answer(NamedTuple):
    """Where a document answers a query: in tokens [start, end), with a value first stated `distance` tokens before."""

    start: int
    end: int
    distance: int


IdsAndLabels = tuple[list[int], list[int]]
"""Tokens and labels of a document; a label is `IGNORE` where the earlier tokens do not determine the token."""


class RecallGenerator:
    """Draws documents with one tokenizer.

    Args:
        haystack: documents to hide needles in, as tokens (n,), used half of the time; otherwise, and if None, noise.

    Raises:
        ZebraError: the tokenizer cannot write numbers.
    """

    def __init__(self, tokenizer: Tokenizer, haystack: Iterable[NDArray[np.integer[Any]]] | None = None):
        self._tokenizer = PromptTokenizer(tokenizer)
        self._haystack = None if haystack is None else Haystack.of_documents(haystack, self._tokenizer)
        numbers = SampleContext(self._tokenizer, Random(0)).draw("numbers", 512)
        self._symbols = list(dict.fromkeys(token for number in numbers for token in number.ids))

    def sequence(self, length: int, rng: Random, *, longest: int, symbols: float = 1.0) -> dict[str, Tensor]:
        """Documents of up to about `longest` tokens: `input_ids`, `position_ids`, `labels`, each (length,), int64."""
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        while room := length - len(ids):
            size = min(room, longest if rng.random() < 0.5 else rng.randint(self.min_tokens, longest))
            size = room if room - size < self.min_tokens else size
            document_ids, document_labels = self.document(size, rng, symbols)
            ids += document_ids
            labels += document_labels
            positions += range(size)
        return {"input_ids": torch.tensor(ids), "position_ids": torch.tensor(positions), "labels": torch.tensor(labels)}

    @functools.cached_property
    def min_tokens(self) -> int:
        """Tokens of the shortest document: two entries, and one of them repeated."""
        entries = (
            next(_entries(size, SampleContext(self._tokenizer, Random(seed))))
            for size in (1, _WORD_KEY_TOKENS)
            for seed in range(16)
        )
        return len(self._tokenizer.prefix) + 3 * max(map(len, entries))

    @functools.cached_property
    def min_task_tokens(self) -> int:
        """Tokens that are enough for one needle of any task and its query."""
        rng = Random(0)
        draws = [self._question(task, SampleContext(self._tokenizer, rng)) for task in _TASKS for _ in range(16)]
        return 8 + max(len(instruction) + len(question.needle) + question.tokens for instruction, question in draws)

    def document(self, size: int, rng: Random, symbols: float = 1.0) -> IdsAndLabels:
        """Draw one document of exactly `size` tokens, and its labels.

        A document shorter than `min_task_tokens` has repeats, pairs or entries, but no task.

        Args:
            symbols: 0 to 1, how many symbols are used, on a logarithmic scale: 10 (all / 10) ^ symbols. Below 0.4 there
                are no tasks, and in pairs the key is one symbol, directly before its value.
        """
        easy = symbols < 0.4
        if easy:
            weights = _EASY_WEIGHTS
        elif size < self.min_task_tokens:
            weights = _SHORT_WEIGHTS
        else:
            weights = _LONG_WEIGHTS
        kind = rng.choices(KINDS[: len(weights)], weights)[0]
        context = SampleContext(self._tokenizer, rng)
        count = round(_MIN_SYMBOLS * (len(self._symbols) / _MIN_SYMBOLS) ** symbols)
        used = self._symbols[:count]
        if kind == "repeats":
            return self._repeats(size, used, rng)
        if kind == "pairs":
            return self._recurring(size, _pairs(used, easy, rng), rng)
        if kind == "entries":
            return self._recurring(size, _entries(size, context), rng)
        return self._task(kind, size, context)[:2]

    def lookups(self, size: int, rng: Random) -> tuple[list[int], list[Answer]]:
        """Draw a document of the task lookup of exactly `size` tokens, and where it answers.

        Raises:
            ZebraError: fewer tokens than one question needs, or more entries than there are numbers.
        """
        ids, _, questions = self._task("lookup", size, SampleContext(self._tokenizer, rng))
        if len(ids) > size:
            raise ZebraError(
                f"a recall document with one question requires a length of {len(ids):,} tokens with this tokenizer; "
                f"got {size:,}. Raise it."
            )
        answers, start = [], size - sum(question.tokens for question in questions)
        n = len(questions[0].answer) - questions[0].stop_tokens  # of each value
        first = {tuple(ids[i : i + n]): i for i in reversed(range(size - n + 1))}
        for question in questions:
            start += len(question.query)
            answers.append(Answer(start, start + n, start - first[tuple(ids[start : start + n])]))
            start += len(question.answer)
        return ids, answers

    def _repeats(self, size: int, symbols: list[int], rng: Random) -> IdsAndLabels:
        """A run of symbols over and over; labels begin after the first token of the second round."""
        prefix = self._tokenizer.prefix
        period = [rng.choice(symbols) for _ in range(rng.randint(2, (size - len(prefix)) // 2))]
        ids = [*prefix, *itertools.islice(itertools.cycle(period), size - len(prefix))]
        known = len(prefix) + len(period) + 1
        return ids, [IGNORE] * known + ids[known:]

    def _recurring(self, size: int, lines: Iterator[TokenIds], rng: Random) -> IdsAndLabels:
        """Lines of equal size, then 20 % to 100 % of them again in random order, labelled but for their first token."""
        prefix, first = self._tokenizer.prefix, next(lines)
        room, spare = divmod(size - len(prefix), len(first))
        stated = [first, *itertools.islice(lines, min(room - 2, round(room / (1 + rng.uniform(0.2, 1))) - 1))]
        again: list[TokenIds] = []
        while (left := room - len(stated) - len(again)) > 0:
            again += rng.sample(stated, min(left, len(stated)))
        ids = [*prefix, *first[len(first) - spare :], *itertools.chain(*stated)]
        labels = [IGNORE] * len(ids)
        for line in again:
            ids += line
            labels += [IGNORE, *line[1:]]
        return ids, labels

    def _task(self, task: str, size: int, context: SampleContext) -> tuple[list[int], list[int], list[_Question]]:
        """Needles in a haystack, then queries in at most 30 % to 67 % of the tokens; also returns the questions."""
        rng = context.rng
        instruction, question = self._question(task, context)
        room, max_query_tokens, questions = size - len(instruction), rng.uniform(0.3, 0.67) * size, [question]
        used, query_tokens = len(question.needle) + question.tokens, question.tokens
        while len(questions) < _MAX_NEEDLES.get(task, size):
            _, question = self._question(task, context)
            used += 2 * len(question.needle) + question.tokens
            query_tokens += question.tokens
            if used > room or query_tokens > max_query_tokens:
                break
            questions.append(question)
        query_tokens = sum(question.tokens for question in questions)
        if task == "lookup":
            haystack = Haystack.of_pieces([context.entry() for _ in range(room // 4)])
        elif self._haystack is not None and rng.random() < 0.5:
            haystack = self._haystack
        else:
            haystack = Haystack.of_noise(self._tokenizer, room)
        needles = [question.needle for question in questions]
        body, _ = place_needles(rng, haystack, room - query_tokens, rng.random(), needles[:1], needles[1:])
        ids, labels = [*instruction, *body], [IGNORE] * (size - query_tokens)
        questions = rng.sample(questions, len(questions))
        for question in questions:
            ids += [*question.query, *question.answer]
            labels += [*[IGNORE] * len(question.query), *question.answer]
        return ids, labels, questions

    def _question(self, task: str, context: SampleContext) -> tuple[tuple[int, ...], _Question]:
        """The instruction at the beginning of a document of the task, and a question."""
        parts, encode = TASKS[task](context), self._tokenizer.encode
        (value,) = parts.answers
        stop = encode(f"{value.text}.")[len(value.ids) :]
        instruction = self._tokenizer.prefix + self._tokenizer.encode_first(parts.instruction)
        return instruction, _Question(encode(parts.needles[0]), encode(parts.query), value.ids + stop, len(stop))


def _entries(size: int, context: SampleContext) -> Iterator[TokenIds]:
    """Entries whose keys are words or numbers, and whose values are numbers."""
    keys = "words" if size < _WORD_KEY_TOKENS and context.rng.random() < 0.5 else "numbers"
    while True:
        yield context.entry(keys)


def _pairs(symbols: list[int], easy: bool, rng: Random) -> Iterator[TokenIds]:
    """Keys and values of one to three symbols; half of the documents, unless easy, put one fixed symbol in between."""
    if easy:
        extra_key, between, value_size = 0, 0, rng.choice((1, 1, 1, 2))
    else:
        extra_key, between, value_size = rng.randint(0, 2), rng.randint(0, 1), rng.randint(1, 3)
    joint = rng.choices(symbols, k=between)
    for key in rng.sample(symbols, len(symbols)):
        yield (key, *rng.choices(symbols, k=extra_key), *joint, *rng.choices(symbols, k=value_size))


@dataclass(frozen=True)
class RecallDataset:
    """A dataset of training sequences in the order of training.

    In the first phase of the curriculum, up to `hold`, all sequences are recall. After it, each is recall with
    probability `share`, and text otherwise. A sequence depends only on the fields and its index `i`, so a resumed
    training sees the same sequences.
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
        rng = Random(f"{self.seed} {i}")
        if self._is_recall(i, rng):
            longest, symbols = self.curriculum.at(i / self.count)
            return self.recall.sequence(self.text.length, rng, longest=longest, symbols=symbols)
        return self.text[self._text_index(i)]

    @property
    def text_indices(self) -> NDArray[np.int64]:
        """Indices into `text` of the sequences that are used, in order of training, without the places of recall."""
        places = (i for i in range(self.count) if not self._is_recall(i, Random(f"{self.seed} {i}")))
        return np.array([self._text_index(i) for i in places], dtype=np.int64)

    def _is_recall(self, i: int, rng: Random) -> bool:
        return i / self.count < self.curriculum.hold or rng.random() < self.share

    def _text_index(self, i: int) -> int:
        return int(self._order[i % len(self._order)])

    @functools.cached_property
    def _order(self) -> NDArray[np.int64]:
        return np.random.default_rng(self.seed).permutation(len(self.text))
