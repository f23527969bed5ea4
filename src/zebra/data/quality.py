"""A gate on conversations: what should not be trained on, by reading alone.

| fault | what it is |
|---|---|
| empty answer | no letter and no digit |
| encoding | replacement or control characters, UTF-8 that was read as Latin-1 |
| language | the answer is written in another script than nearly all other answers |
| copied answer | it repeats the question, or 50 words and more of the prompt as they stand |
| duplicate | the same words as a conversation before it |
| leak | a tenth of its runs of 13 words stand in a text that is measured on (arXiv 2005.14165, appendix C, has 13) |

A conversation has the first fault of this order.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from zebra.data.conversations import Conversation

FAULTS = ("empty answer", "encoding", "language", "copied answer", "duplicate", "leak")
NGRAM = 13
LEAK = 0.1
COPIED = 50
_BROKEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]|Ã[\x80-\xbf©¨ª¡±³¶¼]|â€[\x80-\xbf™œ˜“”]")
_NEARLY_ALL = 0.9
_LETTERS = 20


class Fault(NamedTuple):
    """What is wrong with which conversation."""

    at: int
    name: str


def faults(conversations: Sequence[Conversation], measured: frozenset[int] = frozenset()) -> list[Fault]:
    """The faulty ones among the conversations of one set, in their order.

    Args:
        measured: the runs of the texts that are measured on; see `ngrams`.
    """
    script = _usual([one.answer for one in conversations])
    seen: set[str] = set()
    found = []
    for i, one in enumerate(conversations):
        said = " ".join(_words(one.text))
        if (name := _fault(one, script, said in seen, measured)) is not None:
            found.append(Fault(i, name))
        seen.add(said)
    return found


def ngrams(texts: Iterable[str]) -> frozenset[int]:
    """The hashes of all runs of `NGRAM` words of texts; of a shorter text the one that it is."""
    return frozenset(run for text in texts for run in _runs(_words(text)))


def evaluation_text(one: Conversation) -> str:
    """What must not be in the training when a conversation is measured on: its document, or all of it."""
    return one.document if one.document is not None else " ".join(message.content for message in one.messages)


def _fault(one: Conversation, usual: str | None, again: bool, measured: frozenset[int]) -> str | None:
    answer = _words(one.answer)
    if not answer:
        return "empty answer"
    if any(_BROKEN.search(message.content) for message in one.messages):
        return "encoding"
    if usual is not None and (mine := _script(one.answer)) is not None and mine != usual:
        return "language"
    if answer == _words(one.question) or (len(answer) >= COPIED and _within(answer, one)):
        return "copied answer"
    if again:
        return "duplicate"
    return "leak" if measured and _leaks(one, measured) else None


def _within(answer: list[str], one: Conversation) -> bool:
    prompt = " ".join(word for message in one.messages if message.role == "user" for word in _words(message.content))
    return f" {' '.join(answer)} " in f" {prompt} "


def _leaks(one: Conversation, measured: frozenset[int]) -> bool:
    mine = list(_runs(_words(" ".join(message.content for message in one.messages))))
    return bool(mine) and sum(run in measured for run in mine) >= LEAK * len(mine)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _runs(words: list[str]) -> Iterator[int]:
    if words:
        for start in range(max(1, len(words) - NGRAM + 1)):
            yield hash(tuple(words[start : start + NGRAM]))


def _script(text: str) -> str | None:
    """The script of most letters, None where there are few."""
    letters = [letter for letter in text[:2000] if letter.isalpha()]
    if len(letters) < _LETTERS:
        return None
    return Counter(unicodedata.name(letter, "?").split()[0] for letter in letters).most_common(1)[0][0]


def _usual(answers: Sequence[str]) -> str | None:
    """The script of nearly all answers, None where there are several."""
    found = Counter(script for script in map(_script, answers) if script is not None)
    most = found.most_common(1)
    return most[0][0] if most and most[0][1] >= _NEARLY_ALL * found.total() else None
