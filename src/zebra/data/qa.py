"""Questions about documents with reference answers, read from records, and their faults.

    {"document": "...", "question": "...", "answers": ["...", "..."]}
    {"document": "...", "qa": [{"question": "...", "answers": ["..."]}, ...]}

`answers` may be one string, and may be called `answer`. Words are compared as in SQuAD: in lower case, without
punctuation and without a, an, the (Rajpurkar et al., arXiv 1606.05250).
"""

from __future__ import annotations

import functools
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zebra.data.records import Record, RecordError, parse_records, string_field
from zebra.errors import ZebraError

EMPTY_ANSWER = "empty answer"
DUPLICATE_ANSWER = "duplicate answer"
DUPLICATE_QUESTION = "duplicate question"
ANSWER_IN_QUESTION = "answer in the question"
EVIDENCE_CUT = "evidence cut"
DOCUMENT_NOT_NEEDED = "document not needed"
FAULTS = {
    EMPTY_ANSWER: "a reference answer without words, or no reference answer",
    DUPLICATE_ANSWER: "a reference answer that occurs twice",
    DUPLICATE_QUESTION: "an earlier question about the same document has the same words",
    ANSWER_IN_QUESTION: "every word of a reference answer is in the question",
    EVIDENCE_CUT: "each reference answer has words that the document lost when it was shortened",
    DOCUMENT_NOT_NEEDED: "the reference answers are as likely without the document",
}
"""What may be wrong with an example. The last two depend on the length and on the model."""


def questions_of(fields: dict[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
    """The questions of a record with their reference answers: those in its list `qa`, or else its own question.

    Raises:
        RecordError: `qa` is not a list of objects, or a field is missing or of another type.
    """
    entries = fields.get("qa", [fields])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise RecordError('has a qa that is not a list of {"question": "...", "answers": ["...", ...]}')
    return [(string_field(entry, "question"), _answers(entry)) for entry in entries]


def _answers(entry: dict[str, Any]) -> tuple[str, ...]:
    name = "answer" if "answer" in entry and "answers" not in entry else "answers"
    if isinstance(entry.get(name), list):
        return tuple(string_field({name: answer}, name) for answer in entry[name])
    return (string_field(entry, name),)


@dataclass(frozen=True)
class QAExample:
    """A question about a document, and its reference answers.

    Attributes:
        name: the record's `id`, or its place such as `line 3`; followed by `#<index>` if the record has a list `qa`.
        group: the number of the first record with the same document, so that examples of one document share it.
    """

    name: str
    group: int
    document: str
    question: str
    answers: tuple[str, ...]

    @property
    def references(self) -> tuple[str, ...]:
        """The answers with at least one word; of answers with the same words, only the first."""
        first: dict[tuple[str, ...], str] = {}
        for answer in self.answers:
            if normalized := tuple(words(answer)):
                first.setdefault(normalized, answer)
        return tuple(first.values())


def read_examples(file: Path) -> list[QAExample]:
    """Read the examples of a file of records.

    Raises:
        ZebraError: as `parse_records`; no examples at all.
    """
    examples = parse_records(
        file,
        _examples,
        'A record must be {"document": TEXT, "question": TEXT, "answers": [TEXT, ...]}, or have a list of such '
        "questions in qa.",
    )
    if not examples:
        raise ZebraError(f"{file} has no questions. Give a file with document, question and answers.")
    first: dict[str, int] = {}
    return [replace(example, group=first.setdefault(example.document, example.group)) for example in examples]


def _examples(record: Record) -> Iterator[QAExample]:
    document = string_field(record.fields, "document")
    if not document.strip():
        raise RecordError("has an empty document")
    questions = questions_of(record.fields)
    if not questions:
        raise RecordError("has an empty list 'qa'")
    name = str(record.fields.get("id", record.place))
    for i, (question, answers) in enumerate(questions):
        yield QAExample(f"{name}#{i}" if "qa" in record.fields else name, record.number, document, question, answers)


def words(text: str) -> list[str]:
    """The words of a text as SQuAD compares them."""
    return [word for word in text.lower().translate(_NO_PUNCTUATION).split() if word not in ("a", "an", "the")]


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def faults(examples: Sequence[QAExample]) -> list[list[str]]:
    """For each example, the faults that show without a length or a model, as names in `FAULTS`."""
    seen: set[tuple[str, tuple[str, ...]]] = set()
    faults_by_example = []
    for example in examples:
        answers = [tuple(words(answer)) for answer in example.answers]
        question = tuple(words(example.question))
        key = example.document, question
        applies = {
            EMPTY_ANSWER: not answers or () in answers,
            DUPLICATE_ANSWER: len(set(answers)) < len(answers),
            DUPLICATE_QUESTION: key in seen,
            ANSWER_IN_QUESTION: any(answer and set(answer) <= set(question) for answer in answers),
        }
        seen.add(key)
        faults_by_example.append([fault for fault, applied in applies.items() if applied])
    return faults_by_example


def evidence_cut(example: QAExample, shortened: str) -> bool:
    """Whether each reference answer has words that occur in the document, but not in the shortened document."""
    lost = _vocabulary(example.document) - set(words(shortened))
    return bool(example.references) and all(set(words(answer)) & lost for answer in example.references)


@functools.lru_cache(maxsize=1)  # examples of one document come one after another
def _vocabulary(document: str) -> frozenset[str]:
    return frozenset(words(document))
