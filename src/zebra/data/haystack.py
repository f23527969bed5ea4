"""Prompts as tokens, piece by piece: needles, the haystack around them, and their positions, exact to the token.

Joining strings changes their tokens, so each piece is tokenised once, as it would be after a full stop, and the rest is
arithmetic on lists of tokens:

    haystack  ....|......|.....|....           | where a sentence begins
    body      ..|......[needle].....|[distractor]....    cut to size at both ends, pieces put in between sentences

The tokens and their positions are exact; the same text encoded anew may have tokens that are merged across the joints.
"""

from __future__ import annotations

import functools
import math
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from zebra.data.encoding import Affixes, TextEncoding, decode
from zebra.errors import ZebraError

TokenIds = Sequence[int]


class Tokenizer(TextEncoding, Protocol):
    """What is needed of a tokenizer; those of transformers have it."""

    def decode(self, token_ids: list[int], **options: Any) -> Any:
        """Tokens to text."""
        ...


class TokenizedText(NamedTuple):
    """A key or value, as the tokenizer decodes it, and its tokens after other text."""

    text: str
    ids: tuple[int, ...]


_ANCHOR = "."
_SENTENCES = 4096
"""Whose tokens are remembered. A training draws others without end; keys and values are of finite kinds."""
NOISE = (
    "The river goes round the mill and on to the sea.",
    "A cart comes up the lane, and a dog runs after it.",
    "It rains a little, and then it is dry again.",
    "Somebody shuts a window.",
    "The clock in the hall is slow, as it was before.",
)


class PromptTokenizer:
    """Tokenises the pieces of a prompt as they are after a full stop and a space.

    Attributes:
        prefix, suffix: the tokens that the tokenizer puts before and after every text, such as BOS.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._encoded = functools.lru_cache(maxsize=_SENTENCES)(self._encode)
        self._round_trips: dict[str, TokenizedText | None] = {}
        self._usual_sizes: dict[str, int] = {}
        self._anchor = self.encode_first(_ANCHOR)
        self.prefix, self.suffix = Affixes.of(tokenizer)

    def encode_first(self, text: str) -> tuple[int, ...]:
        """The tokens of a text that comes first, without special ones."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def encode(self, text: str) -> tuple[int, ...]:
        """The tokens of a text that comes after another, the space between them included."""
        return self._encoded(text)

    def _encode(self, text: str) -> tuple[int, ...]:
        joined, n = self.encode_first(f"{_ANCHOR} {text}"), len(self._anchor)
        if joined[:n] == self._anchor:
            return joined[n:]
        # The stop and the space are one token (spaces after words): a text alone brings its own space.
        ids = self.encode_first(text)
        if normalize(self.decode(self._anchor + ids)) != normalize(f"{_ANCHOR} {text}"):
            ids = self.encode_first(f" {text}")
        return ids

    def decode(self, ids: TokenIds) -> str:
        """Tokens to text, without special ones."""
        return decode(self._tokenizer, ids)

    def round_trip(self, text: str) -> TokenizedText | None:
        """A key or value, or None if the tokenizer does not decode its tokens to it."""
        if text not in self._round_trips:
            ids = self._encode(text)
            decoded = self.decode(ids).strip()
            is_same = decoded.replace(" ", "").casefold() == text.casefold()
            self._round_trips[text] = TokenizedText(decoded, ids) if is_same else None
        return self._round_trips[text]

    def usual_size(self, kind: str, generate: Callable[[Random], str]) -> int:
        """How many tokens most keys or values of a kind have.

        Raises:
            ZebraError: the tokenizer decodes none of them to itself.
        """
        if kind not in self._usual_sizes:
            rng = Random(0)
            candidates = [self.round_trip(generate(rng)) for _ in range(512)]
            sizes = Counter(len(candidate.ids) for candidate in candidates if candidate is not None)
            if not sizes:
                raise ZebraError(
                    f"this tokenizer cannot write {kind} such as {generate(rng)!r}. Leave the tasks that need them out."
                )
            self._usual_sizes[kind] = sizes.most_common(1)[0][0]
        return self._usual_sizes[kind]


def normalize(text: str) -> str:
    """Text as answers are compared: in lower case, with single spaces."""
    return " ".join(text.casefold().split())


def contains_answer(text: str, answer: str) -> bool:
    """Whether a text contains an answer as whole words."""
    return re.search(rf"(?<!\w){re.escape(normalize(answer))}(?!\w)", normalize(text)) is not None


def share_contained(text: str, answers: Sequence[str]) -> float:
    """The share of the answers that a text contains."""
    return sum(contains_answer(text, answer) for answer in answers) / len(answers)


def share_preferred(values: Sequence[float], answers: int) -> float:
    """The share of the first `answers` values, of right answers, that are above all others."""
    return sum(value > max(values[answers:]) for value in values[:answers]) / answers


@dataclass(frozen=True)
class Haystack:
    """Text to hide needles in: `tokens` (n,), and the sorted positions where a sentence begins."""

    tokens: NDArray[np.integer[Any]]
    starts: NDArray[np.int64]

    @classmethod
    def of_pieces(cls, pieces: Sequence[TokenIds]) -> Haystack:
        """Pieces one after another; each begins a sentence."""
        tokens = np.array([token for piece in pieces for token in piece], np.int64)
        return cls(tokens, np.cumsum([0, *map(len, pieces)]))

    @classmethod
    def of_noise(cls, tokenizer: PromptTokenizer, size: int) -> Haystack:
        """A few sentences over and over: a window of `size` tokens fits wherever a sentence begins."""
        pieces = [tokenizer.encode(sentence) for sentence in NOISE]
        return cls.of_pieces(pieces * (size // sum(map(len, pieces)) + 2))

    @classmethod
    def of_documents(cls, documents: Iterable[NDArray[np.integer[Any]]], tokenizer: PromptTokenizer) -> Haystack:
        """Tokenised documents one after another, without the affixes of each."""
        n, m, texts = len(tokenizer.prefix), len(tokenizer.suffix), []
        for document in documents:
            text = document[n:] if n and tuple(document[:n].tolist()) == tokenizer.prefix else document
            texts.append(text[:-m] if m and tuple(text[-m:].tolist()) == tokenizer.suffix else text)
        tokens = np.concatenate(texts) if texts else np.zeros(0, np.int64)
        sentence_end = re.compile(r"[.!?][\"')\]”’]*\s*$|\n$")
        ends = [token for token in np.unique(tokens).tolist() if sentence_end.search(tokenizer.decode([token]))]
        document_starts = np.cumsum([0, *map(len, texts)])
        return cls(tokens, np.union1d(np.flatnonzero(np.isin(tokens, ends)) + 1, document_starts))

    def window(self, rng: Random, before: int, after: int) -> tuple[list[int], list[int]]:
        """`before + after` tokens, cut so that a sentence begins after the first `before` of them where one can.

        Returns:
            The tokens, and the positions in them where a sentence begins.

        Raises:
            ZebraError: the haystack has fewer tokens.
        """
        last = len(self.tokens) - after
        if last < before:
            raise ZebraError(
                f"the haystack has {len(self.tokens):,} tokens, and {before + after:,} are needed. "
                "Give more text, or take a shorter length."
            )
        low, high = bisect_left(self.starts, before), bisect_right(self.starts, last)
        middle = int(self.starts[rng.randrange(low, high)]) if low < high else rng.randint(before, last)
        first = middle - before
        inside = self.starts[bisect_left(self.starts, first) : bisect_right(self.starts, middle + after)]
        return self.tokens[first : middle + after].tolist(), (inside - first).tolist() or [before]


def place_needles(
    rng: Random,
    haystack: Haystack,
    size: int,
    depth: float,
    needles: Sequence[TokenIds],
    distractors: Sequence[TokenIds],
) -> tuple[list[int], list[int]]:
    """A body of exactly `size` tokens, and the position in it of each needle.

        first = floor(depth (size - tokens of the needles) + 1/2)

    is where the first needle begins: at depth 0 the body begins with it, at depth 1 it ends with the needles. Further
    needles follow in their order, at beginnings of sentences drawn after the first. Distractors are on both sides.
    At least `min_body_tokens(needles, distractors)` tokens hold all of it at any depth.
    """
    rest = size - sum(map(len, needles))
    rooms = [math.floor(depth * rest + 0.5)]
    rooms.append(rest - rooms[0])
    sides: tuple[list[TokenIds], list[TokenIds]] = ([], [])
    for piece in distractors:
        side = int(rng.random() * rest >= rooms[0])
        side = side if len(piece) <= rooms[side] else 1 - side
        rooms[side] -= len(piece)
        sides[side].append(piece)
    tokens, starts = haystack.window(rng, *rooms)
    before, after = starts[: bisect_right(starts, rooms[0])], starts[bisect_left(starts, rooms[0]) :]
    later = sorted(rng.choice(after) for _ in needles[1:])
    # Position in the haystack, order among those of one position, tokens, whether it is a needle.
    pieces = [(rng.choice(before), 0, piece, False) for piece in sides[0]]
    pieces.append((rooms[0], 1, needles[0], True))
    pieces += [(position, 2, piece, True) for position, piece in zip(later, needles[1:], strict=True)]
    pieces += [(rng.choice(after), 2, piece, False) for piece in sides[1]]
    body: list[int] = []
    needle_starts, end = [], 0
    for position, _, piece, is_needle in sorted(pieces, key=lambda piece: piece[:2]):
        body += tokens[end:position]
        needle_starts += [len(body)] if is_needle else []
        body += piece
        end = position
    return body + tokens[end:], needle_starts


def min_body_tokens(needles: Sequence[TokenIds], distractors: Sequence[TokenIds]) -> int:
    """The shortest body in which all distractors fit on the larger side of the needles, wherever these are."""
    return sum(map(len, needles)) + 2 * sum(map(len, distractors))
