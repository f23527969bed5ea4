"""The tasks of `zebra.data.needles`: what the samples of each ask, and their wording.

The kinds of tasks are those of RULER (arXiv 2404.06654, section 3) and the passkey of arXiv 2305.16300; wording and
sizes are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random

from zebra.data.haystack import PromptTokenizer, TokenIds, TokenizedText
from zebra.errors import ZebraError

_MAX_MISSES = 10_000
DISTRACTORS = 9
"""Wrong answers of each sample: with the right one, a guess is right one time in ten."""


@dataclass
class SampleParts:
    """The parts of a sample, before its length is known; `needles` are sentences that state the answers.

    Attributes:
        query: the question, and the beginning of its answer.
        distractors: wrong values; those of other keys in the text come first.
        entry_haystack: whether the haystack consists of entries like the needles.
        word_counts: maps a number of words to how often each distinct word occurs, the answers first; None if the text
            is not a list of words.
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
    """Draws keys and values for one sample, each at most once."""

    def __init__(self, tokenizer: PromptTokenizer, rng: Random):
        self.tokenizer, self.rng = tokenizer, rng
        self._taken: set[str] = set()

    def draw(self, kind: str, count: int) -> list[TokenizedText]:
        """Draw distinct keys or values of a kind in `GENERATORS`, all with the same number of tokens.

        So no length gives an answer away, and a list of them fills a length evenly.

        Raises:
            ZebraError: the tokenizer can write none of them, or fewer than `count`.
        """
        size = self.tokenizer.usual_size(kind, GENERATORS[kind])
        drawn: list[TokenizedText] = []
        misses = 0
        while len(drawn) < count:
            candidate = self.tokenizer.round_trip(GENERATORS[kind](self.rng))
            if candidate is not None and len(candidate.ids) == size and candidate.text not in self._taken:
                misses = 0
                self._taken.add(candidate.text)
                drawn.append(candidate)
            elif (misses := misses + 1) > _MAX_MISSES:
                raise ZebraError(
                    f"the task requires {count:,} different {kind} of {size} tokens, but this tokenizer "
                    f"has only {len(drawn):,}. Use a shorter length or another task."
                )
        return drawn

    def entry(self, keys: str = "numbers") -> TokenIds:
        """The tokens of an entry of the task lookup, with a number as its value."""
        (key,), (value,) = self.draw(keys, 1), self.draw("numbers", 1)
        return self.tokenizer.encode(_entry(key, value))


def _passkey(context: SampleContext) -> SampleParts:
    value, *wrong = context.draw("numbers", 1 + DISTRACTORS)
    return SampleParts(
        "Somewhere in this text a pass key is hidden. Find it and remember it.",
        "What is the pass key? The pass key is",
        [value],
        wrong,
        [f"The pass key is {value.text}. Keep it in mind: {value.text} is the pass key."],
    )


def _noted(context: SampleContext, queries: int = 1, values: int = 1, distractor_needles: int = 0) -> SampleParts:
    """Numbers are noted for words, `values` for each word; the question asks for those of `queries` words."""
    keys = context.draw("words", queries + distractor_needles)
    numbers = context.draw("numbers", queries * values + DISTRACTORS)
    answers, wrong = numbers[: queries * values], numbers[queries * values :]

    def notes(keys: list[TokenizedText], numbers: list[TokenizedText]) -> list[str]:
        pairs = zip(keys, numbers, strict=False)
        return [f"The number noted for {key.text} is {number.text}." for key, number in pairs]

    needles = notes(keys[:queries] * values, answers)
    if queries > 1:
        needles = context.rng.sample(needles, queries)
    names = ", ".join(key.text for key in keys[:queries])
    names = " and ".join(names.rsplit(", ", 1))
    noun, verb = ("number", "is") if len(answers) == 1 else ("numbers", "are")
    if values > 1:
        noun = f"{values} {noun}"
    return SampleParts(
        "Numbers are noted for words in this text. Remember them.",
        f"Which {noun} {verb} noted for {names}? The {noun} noted for {names} {verb}",
        answers,
        wrong,
        needles,
        notes(keys[queries:], wrong),
    )


def _entry(key: TokenizedText, value: TokenizedText) -> str:
    return f"{key.text}: {value.text}."


def _lookup(context: SampleContext, distractor_needles: int = 4) -> SampleParts:
    keys = context.draw("numbers", 1 + distractor_needles)
    value, *wrong = context.draw("numbers", 1 + DISTRACTORS)
    entries = [_entry(*pair) for pair in zip(keys, [value, *wrong], strict=False)]
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
"""The number of answers of the tasks common-words and frequent-words."""
MIN_WORDS = 40
"""In a list of fewer words, the most frequent ones are not certain."""


def common_counts(words: int) -> list[int]:
    """Counts with five words up to 30 times each (more from 20,000 words on), and all others a tenth as often."""
    often = min(30 * (1 + words // 20_000), words // (2 * COMMON_WORDS))
    seldom = max(1, often // 10)
    rest = words - COMMON_WORDS * often
    return [often] * COMMON_WORDS + [seldom] * (rest // seldom) + [rest % seldom] * (rest % seldom > 0)


def frequent_counts(words: int) -> list[int]:
    """Counts with a share 6 / (pi r)^2 for the r-th word, a zeta distribution with exponent 2; the rest occur once."""
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
    "needle": _noted,
    "multikey": partial(_noted, distractor_needles=3),
    "multivalue": partial(_noted, values=4),
    "multiquery": partial(_noted, queries=4, distractor_needles=2),
    "lookup": _lookup,
    "variables": _variables,
    "common-words": partial(
        _most_frequent,
        instruction="Below is a list of words. Some of them come far more often than the others.",
        answers=COMMON_WORDS,
        word_counts=common_counts,
    ),
    "frequent-words": partial(
        _most_frequent,
        instruction="Below is a text in words that nobody knows. Some of them come more often than the others.",
        answers=FREQUENT_WORDS,
        word_counts=frequent_counts,
    ),
}
"""Each task: its name, and the function that draws the parts of a sample."""
IN_HAYSTACK = ("passkey", "needle", "multikey", "multivalue", "multiquery", "variables")
"""Tasks that hide their needles in a haystack of text; the needle of a lookup is among other entries."""
WITHOUT_DEPTH = ("common-words", "frequent-words")
"""Tasks whose answer depends on the whole text."""

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


def _made_up_word(rng: Random) -> str:
    syllables = (rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2))
    return "".join(syllables) + rng.choice("lmnrst")


GENERATORS: dict[str, Callable[[Random], str]] = {
    "numbers": lambda rng: str(rng.randint(10_000, 99_999)),
    "words": lambda rng: rng.choice(_WORDS),
    "made-up words": _made_up_word,
}
"""Each kind of key or value, and the function that draws one."""
