"""Build prompts from tokenised pieces: needles in a haystack, with positions that are exact to the token.

Joining strings can change their tokens. So each piece is tokenised once, as it would be after a full stop, and the rest
is arithmetic on lists of tokens:

    haystack  ....|......|.....|....           | where a sentence begins
    body      ..|......[needle].....|[distractor]....    cut to size at both ends, pieces inserted between sentences

The tokens and their positions are exact. Encoding the decoded text again may merge tokens across the joints.
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
    """What building prompts needs from a tokenizer; those of transformers provide it."""

    def decode(self, token_ids: list[int], **options: Any) -> Any:
        """Decode tokens to text."""
        ...


class TokenizedText(NamedTuple):
    """A key or value: its text as the tokenizer decodes it, and its tokens after other text."""

    text: str
    ids: tuple[int, ...]


_ANCHOR = "."
_SENTENCES = 4096
"""Sentences whose tokens are cached. Limited, as training draws new ones without end; keys and values are finite."""
NOISE = (
    "The river goes round the mill and on to the sea.",
    "A cart comes up the lane, and a dog runs after it.",
    "It rains a little, and then it is dry again.",
    "Somebody shuts a window.",
    "The clock in the hall is slow, as it was before.",
)


class PromptTokenizer:
    """Tokenises each piece of a prompt as it would be after a full stop and a space.

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
        """The tokens of a text that comes first, without special tokens."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def encode(self, text: str) -> tuple[int, ...]:
        """The tokens of a text that comes after another, the space between them included."""
        return self._encoded(text)

    def _encode(self, text: str) -> tuple[int, ...]:
        joined, n = self.encode_first(f"{_ANCHOR} {text}"), len(self._anchor)
        if joined[:n] == self._anchor:
            return joined[n:]
        # The full stop and the space are one token (spaces follow words): the text alone may bring its own space.
        ids = self.encode_first(text)
        if normalize(self.decode(self._anchor + ids)) != normalize(f"{_ANCHOR} {text}"):
            ids = self.encode_first(f" {text}")
        return ids

    def decode(self, ids: TokenIds) -> str:
        """Decode tokens to text, without special tokens."""
        return decode(self._tokenizer, ids)

    def round_trip(self, text: str) -> TokenizedText | None:
        """A key or value with its tokens; None if they do not decode to the same text, up to case and spaces."""
        if text not in self._round_trips:
            ids = self._encode(text)
            decoded = self.decode(ids).strip()
            is_same = decoded.replace(" ", "").casefold() == text.casefold()
            self._round_trips[text] = TokenizedText(decoded, ids) if is_same else None
        return self._round_trips[text]

    def usual_size(self, kind: str, generate: Callable[[Random], str]) -> int:
        """The most common number of tokens of keys or values of a kind.

        Raises:
            ZebraError: the tokenizer can write none of them.
        """
        if kind not in self._usual_sizes:
            rng = Random(0)
            candidates = [self.round_trip(generate(rng)) for _ in range(512)]
            sizes = Counter(len(candidate.ids) for candidate in candidates if candidate is not None)
            if not sizes:
                raise ZebraError(
                    f"this tokenizer cannot encode {kind} such as {generate(rng)!r}. Leave out the tasks that use them."
                )
            self._usual_sizes[kind] = sizes.most_common(1)[0][0]
        return self._usual_sizes[kind]


def normalize(text: str) -> str:
    """Normalise text for comparing answers: lower case, single spaces."""
    return " ".join(text.casefold().split())


def contains_answer(text: str, answer: str) -> bool:
    """Whether a text contains an answer as whole words."""
    return re.search(rf"(?<!\w){re.escape(normalize(answer))}(?!\w)", normalize(text)) is not None


def share_contained(text: str, answers: Sequence[str]) -> float:
    """The share of the answers that a text contains."""
    return sum(contains_answer(text, answer) for answer in answers) / len(answers)


def share_preferred(values: Sequence[float], answers: int) -> float:
    """The share of the right answers, the first `answers` values, that are above every distractor, the other values."""
    return sum(value > max(values[answers:]) for value in values[:answers]) / answers


@dataclass(frozen=True)
class Haystack:
    """Text to hide needles in: `tokens` (n,), and `starts`, the sorted positions where a sentence begins."""

    tokens: NDArray[np.integer[Any]]
    starts: NDArray[np.int64]

    @classmethod
    def of_pieces(cls, pieces: Sequence[TokenIds]) -> Haystack:
        """Concatenate pieces; each begins a sentence."""
        tokens = np.array([token for piece in pieces for token in piece], np.int64)
        return cls(tokens, np.cumsum([0, *map(len, pieces)]))

    @classmethod
    def of_noise(cls, tokenizer: PromptTokenizer, size: int) -> Haystack:
        """Repeat a few sentences, often enough to cut a window of `size` tokens around the start of any of them."""
        pieces = [tokenizer.encode(sentence) for sentence in NOISE]
        return cls.of_pieces(pieces * (size // sum(map(len, pieces)) + 2))

    @classmethod
    def of_documents(cls, documents: Iterable[NDArray[np.integer[Any]]], tokenizer: PromptTokenizer) -> Haystack:
        """Concatenate tokenised documents, without the affixes of each."""
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
        """Cut out `before + after` tokens such that, if possible, a sentence begins after the first `before` of them.

        Returns:
            The tokens, and the positions in them where a sentence begins.

        Raises:
            ZebraError: the haystack has fewer tokens.
        """
        last = len(self.tokens) - after
        if last < before:
            raise ZebraError(
                f"the haystack must have at least {before + after:,} tokens; got {len(self.tokens):,}. "
                "Give more text, or use a shorter length."
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
    """Make a body of exactly `size` tokens; returns it and the position of each needle in it.

        first = floor(depth (size - tokens of the needles) + 1/2)

    is where the first needle begins: at depth 0 the body begins with it, at depth 1 it ends with the needles. Further
    needles follow in order, at random sentence starts after the first. Distractors are placed on both sides at random.
    A body of `min_body_tokens(needles, distractors)` tokens or more has room for all of them at any depth.
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
    # Position in the haystack, order among pieces at the same position, tokens, whether it is a needle.
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
    """Tokens of the shortest body in which all distractors fit on the longer side of the needles, at any depth."""
    return sum(map(len, needles)) + 2 * sum(map(len, distractors))
