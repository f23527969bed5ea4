"""Text as tokens piece by piece: what is written, what lies around it, and where each piece stands, to the token.

Joining strings changes how they become tokens, so nothing is joined as a string. Each piece becomes tokens once, as it
would behind a full stop, and all that follows is arithmetic on lists of tokens:

    haystack  ....|......|.....|....           | where a sentence begins
    body      ..|......[evidence].....|[other]....    cut to size at both ends, pieces put in between sentences

Exact are the tokens and their places. Not exact: the tokens that the same text would get if it were encoded anew,
which may be merged across the joints.
"""

from __future__ import annotations

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

from zebra.errors import ZebraError


class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of transformers have it."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Text to tokens."""
        ...

    def decode(self, token_ids: list[int], **options: Any) -> Any:
        """Tokens to text."""
        ...


class TokenizedText(NamedTuple):
    """A word or number as the tokenizer reads it back, and its tokens behind other text."""

    text: str
    ids: tuple[int, ...]


_ANCHOR = "."


class PromptTokenizer:
    """Text to tokens as they are behind a full stop and a space.

    Attributes:
        start: what the tokenizer puts before every text, such as its token of the beginning.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._known: dict[str, tuple[int, ...]] = {}
        self._anchor = self.first(_ANCHOR)
        bare, full = self.first("x"), tokenizer.encode("x", add_special_tokens=True)
        fits = (i for i in range(len(full)) if tuple(full[i : i + len(bare)]) == bare)
        self.start = tuple(full[: next(fits, 0)])

    def first(self, text: str) -> tuple[int, ...]:
        """The tokens of a text that stands first, without special ones."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def ids(self, text: str) -> tuple[int, ...]:
        """The tokens of a text that stands behind another, the space between them included."""
        if text not in self._known:
            self._known[text] = self._behind(text)
        return self._known[text]

    def text(self, ids: Sequence[int]) -> str:
        """Tokens to text; special ones are left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _behind(self, text: str) -> tuple[int, ...]:
        joined, n = self.first(f"{_ANCHOR} {text}"), len(self._anchor)
        if joined[:n] == self._anchor:
            return joined[n:]
        # The stop and the space are one token here (spaces behind words): a text alone then brings its own space.
        alone = self.first(text)
        spaced = plain(self.text(self._anchor + alone)) == plain(f"{_ANCHOR} {text}")
        return alone if spaced else self.first(f" {text}")


def plain(text: str) -> str:
    """Text as answers are compared: in small letters, with single spaces."""
    return " ".join(text.casefold().split())


def contains_answer(text: str, answer: str) -> bool:
    """Whether a text has an answer as whole words."""
    return re.search(rf"(?<!\w){re.escape(plain(answer))}(?!\w)", plain(text)) is not None


class Pool:
    """Words or numbers of one kind that the tokenizer reads back, all of the same number of tokens.

    So no candidate is longer than another, and a list of them fills a length evenly.

    Raises:
        ZebraError: the tokenizer reads none of them back.
    """

    _TRIES = 10_000

    def __init__(self, writer: PromptTokenizer, kind: str, make: Callable[[Random], str]):
        self._writer, self._kind, self._make = writer, kind, make
        rng = Random(0)
        found = [self._written(make(rng)) for _ in range(512)]
        sizes = Counter(len(one.ids) for one in found if one is not None)
        if not sizes:
            raise ZebraError(
                f"this tokenizer cannot write {kind} such as {make(rng)!r}. Leave the tasks that need them out."
            )
        self.tokens = sizes.most_common(1)[0][0]

    def draw(self, rng: Random, count: int, taken: set[str]) -> list[TokenizedText]:
        """`count` that are not among `taken`, which they join.

        Raises:
            ZebraError: there are not as many.
        """
        drawn: list[TokenizedText] = []
        misses = 0
        while len(drawn) < count:
            one = self._written(self._make(rng))
            if one is None or len(one.ids) != self.tokens or one.text in taken:
                misses += 1
                if misses > self._TRIES:
                    raise ZebraError(
                        f"{count:,} different {self._kind} of {self.tokens} tokens are needed, but this tokenizer "
                        f"writes {len(drawn):,}. Take a shorter length or another task."
                    )
                continue
            misses = 0
            taken.add(one.text)
            drawn.append(one)
        return drawn

    def _written(self, text: str) -> TokenizedText | None:
        ids = self._writer.ids(text)
        back = self._writer.text(ids).strip()
        return TokenizedText(back, ids) if back.replace(" ", "").casefold() == text.casefold() else None


@dataclass(frozen=True)
class Haystack:
    """Tokens to hide something in, and the places where a sentence begins, in order."""

    tokens: NDArray[np.integer[Any]]
    starts: Sequence[int]

    def window(self, rng: Random, before: int, behind: int) -> tuple[list[int], list[int]]:
        """`before + behind` tokens with a sentence's beginning after the first `before`, and all beginnings in them.

        Raises:
            ZebraError: the haystack has fewer.
        """
        last = len(self.tokens) - behind
        if last < before:
            raise ZebraError(
                f"the haystack has {len(self.tokens):,} tokens, and {before + behind:,} are needed. "
                "Give more text, or take a shorter length."
            )
        low, high = bisect_left(self.starts, before), bisect_right(self.starts, last)
        at = self.starts[rng.randrange(low, high)] if low < high else rng.randint(before, last)
        first = at - before
        inside = self.starts[bisect_left(self.starts, first) : bisect_right(self.starts, at + behind)]
        return self.tokens[first : at + behind].tolist(), [start - first for start in inside] or [before]


def listed(pieces: Sequence[Sequence[int]]) -> Haystack:
    """Pieces one behind another; each begins a sentence."""
    tokens = np.array([token for piece in pieces for token in piece], np.int64)
    return Haystack(tokens, np.cumsum([0, *map(len, pieces)]).tolist())


def repeated(pieces: Sequence[Sequence[int]], size: int) -> Haystack:
    """The pieces over and over: a window of `size` tokens fits wherever a piece begins."""
    return listed(list(pieces) * (size // sum(map(len, pieces)) + 2))


def own_text(documents: Iterable[NDArray[np.integer[Any]]], writer: PromptTokenizer) -> Haystack:
    """Documents one after another, without what the tokenizer puts before each."""
    n, kept = len(writer.start), []
    for document in documents:
        kept.append(document[n:] if n and tuple(document[:n].tolist()) == writer.start else document)
    tokens = np.concatenate([np.zeros(0, np.int64), *kept])
    ends = [
        token for token in np.unique(tokens).tolist() if re.search(r"[.!?][\"')\]”’]*\s*$|\n$", writer.text([token]))
    ]
    beginnings = np.cumsum([0, *map(len, kept)])
    return Haystack(tokens, np.union1d(np.flatnonzero(np.isin(tokens, ends)) + 1, beginnings).tolist())


Piece = Sequence[int]


def placed(
    rng: Random, hay: Haystack, size: int, depth: float, evidence: Sequence[Piece], others: Sequence[Piece]
) -> tuple[list[int], list[int]]:
    """A body of exactly `size` tokens, and where in it each piece of evidence begins.

        first = floor(depth (size - tokens of evidence) + 1/2)

    is where the first piece begins: at depth 0 the body begins with it, at depth 1 it ends with the evidence. Further
    pieces follow in their order, at beginnings of sentences drawn behind the first. `others` stand on both sides.
    At least `size_for(evidence, others)` tokens hold all of it at any depth.
    """
    rest = size - sum(map(len, evidence))
    rooms = [math.floor(depth * rest + 0.5)]
    rooms.append(rest - rooms[0])
    ahead: list[Piece] = []
    behind: list[Piece] = []
    for piece in others:
        side = int(rng.random() * rest >= rooms[0])
        side = side if len(piece) <= rooms[side] else 1 - side
        rooms[side] -= len(piece)
        (ahead, behind)[side].append(piece)
    tokens, starts = hay.window(rng, *rooms)
    near, far = starts[: bisect_right(starts, rooms[0])], starts[bisect_left(starts, rooms[0]) :]
    later = sorted(rng.choice(far) for _ in evidence[1:])
    pieces = [(rng.choice(near), 0, piece, False) for piece in ahead]
    pieces.append((rooms[0], 1, evidence[0], True))
    pieces += [(spot, 2, piece, True) for spot, piece in zip(later, evidence[1:], strict=True)]
    pieces += [(rng.choice(far), 2, piece, False) for piece in behind]
    body: list[int] = []
    places, cursor = [], 0
    for spot, _, piece, told in sorted(pieces, key=lambda one: one[:2]):
        body += tokens[cursor:spot]
        places += [len(body)] if told else []
        body += piece
        cursor = spot
    return body + tokens[cursor:], places


def size_for(evidence: Sequence[Piece], others: Sequence[Piece]) -> int:
    """The least body: all of `others` fit on the larger side of the evidence, wherever that stands."""
    return sum(map(len, evidence)) + 2 * sum(map(len, others))
