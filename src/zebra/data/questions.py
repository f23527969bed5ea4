"""The tasks of `zebra.data.needles`: what the samples of each ask, and in which words.

The families are those of RULER (arXiv 2404.06654, section 3) and the passkey of arXiv 2305.16300; wording and sizes are
ours.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from zebra.data.haystack import Haystack, PromptTokenizer, TokenizedText

DISTRACTORS = 9
"""Wrong answers of each sample: with the right one, a guesser is right one time in ten."""


@dataclass
class SampleParts:
    """The parts of a sample, before its length is known.

    Attributes:
        instruction: what the prompt begins with.
        query: what it ends with: the question, and the beginning of its answer.
        answers: the right values.
        distractors: wrong values; those of other keys in the text come first.
        needles: sentences that state the answers.
        distractor_needles: sentences about other keys.
        entry_haystack: whether the haystack is entries like the needles.
        word_counts: of n words, how often each word occurs, the answers first; None where the text is no list of words.
    """

    instruction: str
    query: str
    answers: list[TokenizedText]
    distractors: list[TokenizedText]
    needles: list[str] = field(default_factory=list)
    distractor_needles: list[str] = field(default_factory=list)
    entry_haystack: bool = False
    word_counts: Callable[[int], list[int]] | None = None


class SampleContext:
    """Draws keys and values for one sample; none is drawn twice."""

    def __init__(self, tokenizer: PromptTokenizer, rng: Random):
        self._tokenizer, self.rng = tokenizer, rng
        self._taken: set[str] = set()

    def draw(self, kind: str, count: int) -> list[TokenizedText]:
        """Different keys or values of a kind in `GENERATORS`."""
        return self._tokenizer.pool(kind, GENERATORS[kind]).draw(self.rng, count, self._taken)


def _passkey(context: SampleContext) -> SampleParts:
    value, *wrong = context.draw("numbers", 1 + DISTRACTORS)
    return SampleParts(
        "Somewhere in this text a pass key is hidden. Find it and remember it.",
        "What is the pass key? The pass key is",
        [value],
        wrong,
        [f"The pass key is {value.text}. Keep it in mind: {value.text} is the pass key."],
    )


_NOTED = "Numbers are noted for words in this text. Remember them."


def _noted(key: TokenizedText, value: TokenizedText) -> str:
    return f"The number noted for {key.text} is {value.text}."


def _needle(context: SampleContext, distractor_needles: int = 0) -> SampleParts:
    key, *other_keys = context.draw("words", 1 + distractor_needles)
    value, *wrong = context.draw("numbers", 1 + DISTRACTORS)
    return SampleParts(
        _NOTED,
        f"Which number is noted for {key.text}? The number noted for {key.text} is",
        [value],
        wrong,
        [_noted(key, value)],
        [_noted(*pair) for pair in zip(other_keys, wrong, strict=False)],
    )


def _multivalue(context: SampleContext, count: int = 4) -> SampleParts:
    (key,) = context.draw("words", 1)
    values = context.draw("numbers", count + DISTRACTORS)
    return SampleParts(
        _NOTED,
        f"Which {count} numbers are noted for {key.text}? The {count} numbers noted for {key.text} are",
        values[:count],
        values[count:],
        [_noted(key, value) for value in values[:count]],
    )


def _multiquery(context: SampleContext, queries: int = 4, distractor_needles: int = 2) -> SampleParts:
    keys = context.draw("words", queries + distractor_needles)
    values = context.draw("numbers", queries + DISTRACTORS)
    statements = [_noted(*pair) for pair in zip(keys, values, strict=False)]
    names = ", ".join(key.text for key in keys[: queries - 1]) + f" and {keys[queries - 1].text}"
    return SampleParts(
        _NOTED,
        f"Which numbers are noted for {names}? The numbers noted for {names} are",
        values[:queries],
        values[queries:],
        context.rng.sample(statements[:queries], queries),
        statements[queries:],
    )


def entry(key: TokenizedText, value: TokenizedText) -> str:
    """An entry of a lookup."""
    return f"{key.text}: {value.text}."


def _lookup(context: SampleContext, distractor_needles: int = 4) -> SampleParts:
    keys = context.draw("numbers", 1 + distractor_needles)
    value, *wrong = context.draw("numbers", 1 + DISTRACTORS)
    entries = [entry(*pair) for pair in zip(keys, [value, *wrong], strict=False)]
    return SampleParts(
        "Below are entries: a key, a colon, its value.",
        f"Look up the key {keys[0].text} again. {keys[0].text}:",
        [value],
        wrong,
        entries[:1],
        entries[1:],
        entry_haystack=True,
    )


def _variables(context: SampleContext, hops: int = 3, other_chains: int = 2) -> SampleParts:
    names = context.draw("words", 1 + hops + DISTRACTORS)
    value, *other_values = context.draw("numbers", 1 + other_chains)
    chain, rest = names[: 1 + hops], names[1 + hops :]
    return SampleParts(
        "Here names are set to numbers, or to names that were set before and hold the same number then.",
        f"Which {1 + hops} names hold {value.text} now? The {1 + hops} names that hold {value.text} are",
        chain,
        rest,
        [f"Set {name.text} to {of.text}." for name, of in zip(chain, [value, *chain], strict=False)],
        [f"Set {name.text} to {of.text}." for name, of in zip(rest, other_values, strict=False)],
    )


COMMON_WORDS, FREQUENT_WORDS = 5, 3
"""Answers of the tasks of these names."""
MIN_WORDS = 40
"""Fewer have no order of frequency that a reader could be sure of."""


def _common(context: SampleContext) -> SampleParts:
    instruction = "Below is a list of words. Some of them come far more often than the others."
    return _most_frequent(context, instruction, COMMON_WORDS, common_counts)


def common_counts(words: int) -> list[int]:
    """Five words up to 30 times and all others a tenth as often; more often only beyond 20,000 words."""
    often = min(30 * (1 + words // 20_000), words // (2 * COMMON_WORDS))
    seldom = max(1, often // 10)
    rest = words - COMMON_WORDS * often
    return [often] * COMMON_WORDS + [seldom] * (rest // seldom) + [rest % seldom] * (rest % seldom > 0)


def _frequent(context: SampleContext) -> SampleParts:
    instruction = "Below is a text in words that nobody knows. Some of them come more often than the others."
    return _most_frequent(context, instruction, FREQUENT_WORDS, frequent_counts)


def frequent_counts(words: int) -> list[int]:
    """The r-th word 6 / (pi r)^2 of the time, a zeta distribution of exponent 2; what is left over comes once."""
    counts: list[int] = []
    while (count := int(6 * words / (math.pi * (len(counts) + 1)) ** 2)) > 0:
        counts.append(count)
    return counts + [1] * (words - sum(counts))


def _most_frequent(
    context: SampleContext, instruction: str, answers: int, word_counts: Callable[[int], list[int]]
) -> SampleParts:
    words = context.draw("made-up words", answers + DISTRACTORS)
    query = f"Which {answers} words come most often? The {answers} words that come most often are"
    return SampleParts(instruction, query, words[:answers], words[answers:], word_counts=word_counts)


TASKS: dict[str, Callable[[SampleContext], SampleParts]] = {
    "passkey": _passkey,
    "needle": _needle,
    "multikey": functools.partial(_needle, distractor_needles=3),
    "multivalue": _multivalue,
    "multiquery": _multiquery,
    "lookup": _lookup,
    "variables": _variables,
    "common-words": _common,
    "frequent-words": _frequent,
}
"""The generators by name."""
IN_HAYSTACK = ("passkey", "needle", "multikey", "multivalue", "multiquery", "variables")
"""Tasks that hide their needles in a haystack of text; a lookup has entries around it."""
WITHOUT_DEPTH = ("common-words", "frequent-words")
"""Tasks whose answer depends on the whole text."""

NOISE = (
    "The river goes round the mill and on to the sea.",
    "A cart comes up the lane, and a dog runs after it.",
    "It rains a little, and then it is dry again.",
    "Somebody shuts a window.",
    "The clock in the hall is slow, as it was before.",
)


def noise(tokenizer: PromptTokenizer, size: int) -> Haystack:
    """A haystack of a few sentences over and over, for windows of `size` tokens."""
    return Haystack.repeating([*map(tokenizer.encode, NOISE)], size)


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


def _random_number(rng: Random) -> str:
    return str(rng.randint(10_000, 99_999))


def _made_up_word(rng: Random) -> str:
    syllables = (rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2))
    return "".join(syllables) + rng.choice("lmnrst")


GENERATORS: dict[str, Callable[[Random], str]] = {
    "numbers": _random_number,
    "words": lambda rng: rng.choice(_WORDS),
    "made-up words": _made_up_word,
}
"""What draws a key or value of each kind."""
