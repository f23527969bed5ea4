"""Documents with questions and reference answers, from JSON Lines, and what is wrong with them.

    {"document": "...", "question": "...", "answers": ["...", "..."]}
    {"document": "...", "qa": [{"question": "...", "answers": ["..."]}, ...]}

Words are SQuAD's: small letters, without punctuation and without a, an, the (Rajpurkar et al., arXiv 1606.05250).
"""

from __future__ import annotations

import functools
import json
import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zebra.data.documents import json_lines
from zebra.errors import ZebraError

EMPTY_ANSWER = "empty answer"
DUPLICATE_ANSWER = "duplicate answer"
DUPLICATE_QUESTION = "duplicate question"
ANSWER_IN_QUESTION = "answer in the question"
EVIDENCE_CUT = "evidence cut"
DOCUMENT_NOT_NEEDED = "document not needed"
FAULTS = {
    EMPTY_ANSWER: "a reference answer without a word, or none at all",
    DUPLICATE_ANSWER: "a reference answer that stands there twice",
    DUPLICATE_QUESTION: "a question that was asked about the same document before",
    ANSWER_IN_QUESTION: "every word of a reference answer is in the question",
    EVIDENCE_CUT: "of each reference answer, words that the document has stand only in the part that was cut",
    DOCUMENT_NOT_NEEDED: "the reference answers are as likely without the document",
}
"""What may be wrong with an item. The last two depend on the length and on the model."""


@dataclass(frozen=True)
class QAExample:
    """A question about a document, and its reference answers.

    Attributes:
        name: the record's `id`, or `line <number>`; `#<place>` behind it where the record has several questions.
        group: the line that it stands in: items of one line share a document.
    """

    name: str
    group: int
    document: str
    question: str
    answers: tuple[str, ...]

    @property
    def references(self) -> tuple[str, ...]:
        """The answers that have a word, each once."""
        return tuple({tuple(words(answer)): answer for answer in reversed(self.answers) if words(answer)}.values())[
            ::-1
        ]


def words(text: str) -> list[str]:
    """The words of a text as SQuAD compares them."""
    plain = text.lower().translate(_NO_PUNCTUATION)
    return [word for word in plain.split() if word not in _ARTICLES]


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = ("a", "an", "the")


def faults(items: Sequence[QAExample]) -> list[list[str]]:
    """For each item what is wrong with it, as far as neither a length nor a model is needed."""
    asked: set[tuple[str, tuple[str, ...]]] = set()
    found = []
    for item in items:
        answers = [tuple(words(answer)) for answer in item.answers]
        question = words(item.question)
        place = item.document, tuple(question)
        given = any(answer and set(answer) <= set(question) for answer in answers)
        wrong = {
            EMPTY_ANSWER: not answers or () in answers,
            DUPLICATE_ANSWER: len(set(answers)) < len(answers),
            DUPLICATE_QUESTION: place in asked,
            ANSWER_IN_QUESTION: given,
        }
        asked.add(place)
        found.append([fault for fault, has in wrong.items() if has])
    return found


def evidence_lost(item: QAExample, kept: str) -> bool:
    """Whether each reference answer has words that the document has and the part that was kept has not."""
    lost = _vocabulary(item.document) - set(words(kept))
    return bool(item.references) and all(set(words(answer)) & lost for answer in item.references)


@functools.lru_cache(maxsize=1)  # items of one document come one after another
def _vocabulary(document: str) -> frozenset[str]:
    return frozenset(words(document))


def read_items(file: Path) -> list[QAExample]:
    """The items of a file of JSON Lines, which may be packed (.jsonl.gz, .jsonl.zst).

    Raises:
        ZebraError: no such file, lines that are no items, with their numbers; no items at all.
    """
    items: list[QAExample] = []
    bad: list[str] = []
    for number, line in json_lines(file):
        if line.strip():
            try:
                items += _items(number, json.loads(line))
            except (ValueError, RecursionError) as error:
                bad.append(f"line {number} {error if isinstance(error, _Bad) else f'is not JSON: {error}'}")
    if bad:
        more = f"; and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise ZebraError(
            f"{file} has {len(bad)} bad {'line' if len(bad) == 1 else 'lines'}: {'; '.join(bad[:_SHOWN])}{more}. "
            'A line is {"document": TEXT, "question": TEXT, "answers": [TEXT, ...]}, or has a list of such questions '
            "in qa."
        )
    if not items:
        raise ZebraError(f"{file} has no questions. Give a file of JSON Lines with document, question and answers.")
    return items


_SHOWN = 5


class _Bad(ValueError):
    """A line that is JSON but no item."""


def _items(number: int, record: Any) -> Iterator[QAExample]:
    if not isinstance(record, dict):
        raise _Bad(f"is no record but a {type(record).__name__}")
    name, document = str(record.get("id", f"line {number}")), _text(record, "document")
    if not document.strip():
        raise _Bad("has an empty document")
    several = "qa" in record
    asked = record["qa"] if several else [record]
    if not isinstance(asked, list) or not asked or not all(isinstance(one, dict) for one in asked):
        raise _Bad("has a qa that is no list of questions")
    for i, one in enumerate(asked):
        yield QAExample(f"{name}#{i}" if several else name, number, document, _text(one, "question"), _answers(one))


def _text(record: dict[str, Any], field: str) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        has = f"a {type(value).__name__}" if field in record else f"nothing (its fields are {', '.join(record)})"
        raise _Bad(f"has {has} for {field!r}")
    if re.search("[\ud800-\udfff]", value):  # JSON can spell half a character
        raise _Bad(f"has half a surrogate pair in {field!r}")
    return value


def _answers(record: dict[str, Any]) -> tuple[str, ...]:
    value = record.get("answers")
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        return (_text(record, "answers"),)  # says what is there instead
    return tuple(_text({"answers": answer}, "answers") for answer in value)
