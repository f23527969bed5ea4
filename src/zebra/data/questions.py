"""The questions of `zebra.data.needles`: what each task draws, and how it says it.

The families are those of RULER (arXiv 2404.06654, section 3) and the passkey of arXiv 2305.16300; wording and sizes are
ours.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from zebra.data.haystack import Pool, TokenizedText

DISTRACTORS = 9
"""Wrong answers of each sample: with the right one, a guesser is right one time in ten."""


@dataclass
class Draw:
    """What one sample is made of, before its length is known."""

    head: str
    tail: str
    answers: list[TokenizedText]
    distractors: list[TokenizedText]
    evidence: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    entries: bool = False
    """Whether the haystack is entries like the evidence."""
    counts: Callable[[int], list[int]] | None = None
    """How often each word comes among so many, where the text is a list of words: the answers first."""


class SampleContext:
    """Draws for one sample; nothing is drawn twice."""

    def __init__(self, pool: Callable[[str], Pool], rng: Random):
        self._pool, self.rng = pool, rng
        self._taken: set[str] = set()

    def draw(self, kind: str, count: int) -> list[TokenizedText]:
        """Different words, numbers or made-up words."""
        return self._pool(kind).draw(self.rng, count, self._taken)


def _passkey(kit: SampleContext) -> Draw:
    key, *wrong = kit.draw("numbers", 1 + DISTRACTORS)
    return Draw(
        "Somewhere in this text a pass key is hidden. Find it and remember it.",
        "What is the pass key? The pass key is",
        [key],
        wrong,
        [f"The pass key is {key.text}. Keep it in mind: {key.text} is the pass key."],
    )


_NOTED = "Numbers are noted for words in this text. Remember them."


def _noted(word: TokenizedText, number: TokenizedText) -> str:
    return f"The number noted for {word.text} is {number.text}."


def _needle(kit: SampleContext, others: int = 0) -> Draw:
    word, *more = kit.draw("words", 1 + others)
    number, *wrong = kit.draw("numbers", 1 + DISTRACTORS)
    return Draw(
        _NOTED,
        f"Which number is noted for {word.text}? The number noted for {word.text} is",
        [number],
        wrong,
        [_noted(word, number)],
        [_noted(*pair) for pair in zip(more, wrong, strict=False)],
    )


def _multivalue(kit: SampleContext, values: int = 4) -> Draw:
    (word,) = kit.draw("words", 1)
    numbers = kit.draw("numbers", values + DISTRACTORS)
    return Draw(
        _NOTED,
        f"Which {values} numbers are noted for {word.text}? The {values} numbers noted for {word.text} are",
        numbers[:values],
        numbers[values:],
        [_noted(word, number) for number in numbers[:values]],
    )


def _multiquery(kit: SampleContext, asked: int = 4, others: int = 2) -> Draw:
    words = kit.draw("words", asked + others)
    numbers = kit.draw("numbers", asked + DISTRACTORS)
    told = [_noted(*pair) for pair in zip(words, numbers, strict=False)]
    names = ", ".join(word.text for word in words[: asked - 1]) + f" and {words[asked - 1].text}"
    return Draw(
        _NOTED,
        f"Which numbers are noted for {names}? The numbers noted for {names} are",
        numbers[:asked],
        numbers[asked:],
        kit.rng.sample(told[:asked], asked),
        told[asked:],
    )


def entry(key: TokenizedText, value: TokenizedText) -> str:
    """A line of a lookup."""
    return f"{key.text}: {value.text}."


def _lookup(kit: SampleContext, others: int = 4) -> Draw:
    keys = kit.draw("numbers", 1 + others)
    value, *wrong = kit.draw("numbers", 1 + DISTRACTORS)
    told = [entry(*pair) for pair in zip(keys, [value, *wrong], strict=False)]
    return Draw(
        "Below are entries: a key, a colon, its value.",
        f"Look up the key {keys[0].text} again. {keys[0].text}:",
        [value],
        wrong,
        told[:1],
        told[1:],
        entries=True,
    )


def _variables(kit: SampleContext, hops: int = 3, others: int = 2) -> Draw:
    names = kit.draw("words", 1 + hops + DISTRACTORS)
    held, *wrong = kit.draw("numbers", 1 + others)
    chain, rest = names[: 1 + hops], names[1 + hops :]
    return Draw(
        "Here names are set to numbers, or to names that were set before and hold the same number then.",
        f"Which {1 + hops} names hold {held.text} now? The {1 + hops} names that hold {held.text} are",
        chain,
        rest,
        [f"Set {name.text} to {of.text}." for name, of in zip(chain, [held, *chain], strict=False)],
        [f"Set {name.text} to {number.text}." for name, number in zip(rest, wrong, strict=False)],
    )


_COMMON, _FREQUENT = 5, 3
LEAST_WORDS = 40
"""Fewer have no order of frequency that a reader could be sure of."""


def _common(kit: SampleContext) -> Draw:
    words = kit.draw("made-up words", _COMMON + DISTRACTORS)
    return Draw(
        "Below is a list of words. Some of them come far more often than the others.",
        f"Which {_COMMON} words come most often? The {_COMMON} words that come most often are",
        words[:_COMMON],
        words[_COMMON:],
        counts=_common_counts,
    )


def _common_counts(words: int) -> list[int]:
    """Five words up to 30 times and all others a tenth as often; more often only beyond 20,000 words."""
    often = min(30 * (1 + words // 20_000), words // (2 * _COMMON))
    seldom = max(1, often // 10)
    rest = words - _COMMON * often
    return [often] * _COMMON + [seldom] * (rest // seldom) + [rest % seldom] * (rest % seldom > 0)


def _frequent(kit: SampleContext) -> Draw:
    words = kit.draw("made-up words", _FREQUENT + DISTRACTORS)
    return Draw(
        "Below is a text in words that nobody knows. Some of them come more often than the others.",
        f"Which {_FREQUENT} words come most often? The {_FREQUENT} words that come most often are",
        words[:_FREQUENT],
        words[_FREQUENT:],
        counts=_frequent_counts,
    )


def _frequent_counts(words: int) -> list[int]:
    """The r-th word 6 / (pi r)^2 of the time, a zeta distribution of exponent 2; what is left over comes once."""
    counts: list[int] = []
    while (count := int(6 * words / (math.pi * (len(counts) + 1)) ** 2)) > 0:
        counts.append(count)
    return counts + [1] * (words - sum(counts))


_Task = Callable[[SampleContext], Draw]
TASKS: dict[str, _Task] = {
    "passkey": _passkey,
    "needle": _needle,
    "multikey": functools.partial(_needle, others=3),
    "multivalue": _multivalue,
    "multiquery": _multiquery,
    "lookup": _lookup,
    "variables": _variables,
    "common-words": _common,
    "frequent-words": _frequent,
}
"""The generators by name."""
IN_HAYSTACK = ("passkey", "needle", "multikey", "multivalue", "multiquery", "variables")
"""Tasks that hide their evidence in a haystack; a lookup has entries around it."""
WITHOUT_DEPTH = ("common-words", "frequent-words")
"""Tasks whose evidence is the whole text."""

NOISE = (
    "The river goes round the mill and on to the sea.",
    "A cart comes up the lane, and a dog runs after it.",
    "It rains a little, and then it is dry again.",
    "Somebody shuts a window.",
    "The clock in the hall is slow, as it was before.",
)
_NOUNS = """
    anchor apple apron arrow autumn badge bakery barrel basket beacon bell bench blanket bottle bridge broom bucket
    button cabin camel candle canoe carpet castle cellar chair cherry chimney circle clover coat copper corner cotton
    cradle curtain desert dinner donkey dragon drawer drum eagle engine feather fence ferry fiddle finger flag forest
    fountain garden garlic ginger glove goose hammer harbour hat hedge hill honey island jacket jewel kettle kitchen
    ladder lake lantern leaf lemon letter lily magnet maple marble market meadow melon mirror monkey mountain needle
    nest oak olive onion orchard oven paddle palace paper parrot pebble pencil pepper piano pillow planet plum pocket
    pony potato pumpkin rabbit ribbon river robin rocket rope saddle sailor salad school shadow sheep shell silver
    sister sparrow spoon spring stable station stone summer table temple ticket tiger tower tractor train tulip tunnel
    turkey valley velvet village violin wagon wallet walnut water whistle willow window winter wolf yard zebra
"""
_WORDS = _NOUNS.split()


def _number(rng: Random) -> str:
    return str(rng.randint(10_000, 99_999))


def _made_up(rng: Random) -> str:
    syllables = (rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2))
    return "".join(syllables) + rng.choice("lmnrst")


POOLS: dict[str, Callable[[Random], str]] = {
    "numbers": _number,
    "words": lambda rng: rng.choice(_WORDS),
    "made-up words": _made_up,
}
