"""Faults of conversations that should not be trained on, as far as the text alone shows them.

| fault | what it is |
|---|---|
| empty answer | no letter and no digit |
| encoding | replacement or control characters, or UTF-8 that was read as Latin-1 |
| language | the answer is in another script than at least 90 % of the answers |
| copied answer | the answer is the question, or has at least 50 words and occurs as a whole in the prompt |
| duplicate | the same words as an earlier conversation |
| leak | at least a tenth of its 13-grams of words occur in an evaluation text (13 as in arXiv 2005.14165, appendix C) |

Of several faults, the first in this order is reported.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from zebra.data.conversations import Conversation

NGRAM = 13
_LEAK_SHARE = 0.1
_COPIED_WORDS = 50
_BROKEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]|Ã[\x80-\xbf©¨ª¡±³¶¼]|â€[\x80-\xbf™œ˜“”]")
_NEARLY_ALL = 0.9
_MIN_LETTERS = 20


def faults(conversations: Sequence[Conversation], evaluated: frozenset[int] = frozenset()) -> dict[int, str]:
    """Find the faulty conversations of a data set: their indices, in order, each with its fault.

    Args:
        evaluated: the n-grams of the evaluation texts, see `ngrams`; empty finds no leaks.
    """
    scripts = Counter(_script(conversation.answer) for conversation in conversations)
    del scripts[None]
    script = next((name for name, count in scripts.items() if count >= _NEARLY_ALL * scripts.total()), None)
    seen: set[int] = set()
    results: dict[int, str] = {}
    for i, conversation in enumerate(conversations):
        text = hash(" ".join(_words(conversation.text)))
        if (name := _fault(conversation, script, text in seen, evaluated)) is not None:
            results[i] = name
        seen.add(text)
    return results


def ngrams(texts: Iterable[str]) -> frozenset[int]:
    """Hashes of all n-grams of `NGRAM` words in texts; a shorter text is one n-gram."""
    return frozenset(ngram for text in texts for ngram in _ngrams(_words(text)))


def evaluation_text(conversation: Conversation) -> str:
    """The text of an evaluation conversation that must not be trained on: its document, or all of it without one."""
    return conversation.document if conversation.document is not None else _contents(conversation)


def _fault(conversation: Conversation, script: str | None, duplicate: bool, evaluated: frozenset[int]) -> str | None:
    answer = _words(conversation.answer)
    if not answer:
        return "empty answer"
    if any(_BROKEN.search(message.text) for message in conversation.messages):
        return "encoding"
    if script is not None and _script(conversation.answer) not in (None, script):
        return "language"
    prompt = [word for one in conversation.messages if one.role == "user" for word in _words(one.content)]
    repeated = len(answer) >= _COPIED_WORDS and f" {' '.join(answer)} " in f" {' '.join(prompt)} "
    if repeated or answer == _words(conversation.question):
        return "copied answer"
    if duplicate:
        return "duplicate"
    hashes = list(_ngrams(_words(_contents(conversation)))) if evaluated else []
    leaked = sum(ngram in evaluated for ngram in hashes)
    return "leak" if hashes and leaked >= _LEAK_SHARE * len(hashes) else None


def _contents(conversation: Conversation) -> str:
    return " ".join(message.text for message in conversation.messages)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _ngrams(words: list[str]) -> Iterator[int]:
    if words:
        for start in range(max(1, len(words) - NGRAM + 1)):
            yield hash(tuple(words[start : start + NGRAM]))


def _script(text: str) -> str | None:
    """The script of most letters at the beginning of a text; None if there are too few letters."""
    letters = [letter for letter in text[:2000] if letter.isalpha()]
    if len(letters) < _MIN_LETTERS:
        return None
    return Counter(unicodedata.name(letter, "?").split()[0] for letter in letters).most_common(1)[0][0]
