"""Long documents to long instructions of three kinds, without a network and without a model:

    qa        the questions of an annotated set, with their answers
    summary   a document's own summary, or the answer to a question that asks for one
    writing   a passage of the document is the answer: continue the text before it, write out notes, expand an outline

Where several documents share a prompt they are numbered, and the question names the one that it is about:

    Document 1   Document 2   [Document 3]   Document 4          About document 3: who ran?
    others that fill the prompt to the wanted words, the one asked about at the border nearest to the wanted depth

Depth is where it begins, as a share of what the others leave: 0 at the front, 1 at the end.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, NamedTuple

from zebra.data.conversations import pairs_of
from zebra.data.documents import find_files, read_documents, read_records
from zebra.errors import ZebraError
from zebra.results import to_json

KINDS = ("qa", "summary", "writing")
_PASSAGE = (60, 160)
"""Words of a passage that is to be written."""


@dataclass(frozen=True)
class AnnotatedDocument:
    """A document, questions with their answers, and its summary, as far as there are any."""

    text: str
    where: str
    questions: tuple[tuple[str, str], ...] = ()
    summary: str | None = None


@dataclass(frozen=True)
class InstructionOptions:
    """What to make of each document.

    Attributes:
        kinds: which of `KINDS`.
        words: words of the documents in a prompt: others are added until there are so many, one alone is not cut.
        depths: where the document that is asked about begins, one after another.
        writing: writing tasks of each document.
    """

    kinds: tuple[str, ...] = KINDS
    words: int | None = None
    depths: tuple[float, ...] = (0.0, 0.5, 1.0)
    writing: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise ZebraError(f"the kinds are {', '.join(KINDS)}; got {', '.join(unknown)}. Choose of them.")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ZebraError(
                f"a depth lies from 0 to 1; got {', '.join(map(str, self.depths))}. Write for example 0,0.5,1."
            )
        if self.words is not None and self.words < 1:
            raise ZebraError(
                f"a prompt has at least one word of documents; got {self.words}. Raise it or leave it out."
            )


def read_annotated(patterns: Sequence[str], *, separator: str | None = None) -> list[AnnotatedDocument]:
    """Documents of text files and of JSON Lines: `document` or `text`, with `qa`, `question` and `answer`, `summary`.

    `qa` is a list of `{"question": "...", "answers": ["...", ...]}`; the first answer is taken.

    Raises:
        ZebraError: what reading refuses; a record without a document, or whose questions are of another shape.
    """
    found: list[AnnotatedDocument] = []
    for file in find_files(patterns):
        if ".jsonl" in file.suffixes:
            found += [_annotated(record, where) for where, record in read_records(file)]
        else:
            found += [AnnotatedDocument(one.text, str(file)) for one in read_documents([file], separator)]
    if not found:
        raise ZebraError(f"there is no document in {', '.join(patterns)}. Give files with at least one.")
    return found


def make_instructions(documents: Sequence[AnnotatedDocument], order: InstructionOptions) -> Iterator[dict[str, Any]]:
    """The instructions, document by document, as records that `zebra.data.conversations` reads."""
    rng, count = Random(order.seed), 0
    for at, one in enumerate(documents):
        for kind, text, question, answer in _tasks(one, order, rng):
            depth = order.depths[count % len(order.depths)]
            others = [i for i in range(len(documents)) if i != at]
            body, number, begins = _placed(
                text, [documents[i].text for i in rng.sample(others, len(others))], depth, order
            )
            count += 1
            asked = question if number is None else f"About document {number}: {question}"
            yield {
                **{"document": body, "question": asked, "answer": answer},
                **{"kind": kind, "source": one.where, "depth": begins},
            }


Task = tuple[str, str, str, str]
"""Kind, document, question, answer."""


def _tasks(one: AnnotatedDocument, order: InstructionOptions, rng: Random) -> Iterator[Task]:
    for question, answer in one.questions:
        kind = "summary" if re.search(r"\b(summary|summari[sz]e|plot of the)", question, re.IGNORECASE) else "qa"
        if kind in order.kinds:
            yield kind, one.text, question, answer
    if one.summary is not None and "summary" in order.kinds:
        yield "summary", one.text, "Summarise the text.", one.summary
    if "writing" in order.kinds:
        yield from _writing(one.text, order.writing, rng)


def _writing(text: str, wanted: int, rng: Random) -> Iterator[Task]:
    passages = _passages(text)
    # A passage has text before it, and each is asked for once.
    chosen = sorted(rng.sample(range(1, len(passages)), min(wanted, len(passages) - 1))) if len(passages) > 1 else []
    ways = [_continue, _restyle, _outline]
    for turn, i in enumerate(chosen):
        if turn % len(ways) == 0:
            rng.shuffle(ways)
        start, end = passages[i]
        yield ways[turn % len(ways)](text[:start].strip(), text[start:end].strip(), text[end:].strip())


def _continue(before: str, passage: str, behind: str) -> Task:
    asked = f"Continue the text in its own style, by about {len(passage.split())} words."
    return "writing-continue", before, asked, passage


def _restyle(before: str, passage: str, behind: str) -> Task:
    asked = f"Write these notes in full, in the style of the text:\n{_notes(passage)}"
    return "writing-restyle", f"{before}\n\n{behind}".strip(), asked, passage


def _outline(before: str, passage: str, behind: str) -> Task:
    points = "\n".join(f"- {_notes(passage[start:end], 5)}" for start, end in _sentences(passage))
    return (
        "writing-outline",
        before,
        f"Expand this outline to the next passage, in the style of the text:\n{points}",
        passage,
    )


_SMALL = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be been but by did do for from had has have he her his i in is it its of on or she so "
        "that the their them then there they this to was we were which who will with would you",
    )
)


def _notes(passage: str, most: int = 10_000) -> str:
    """The words that carry a passage, in their order and without marks: what is left out must be written again."""
    words = re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", passage)
    return " ".join([word for word in words if word.lower() not in _SMALL][:most] or words[:most])


def _sentences(text: str) -> list[tuple[int, int]]:
    """Where each sentence begins and ends, its closing quotes included."""
    ends = [found.end() for found in re.finditer(r"[.!?][\"')\]”’]*(?=\s)", text)]
    return [(a, b) for a, b in itertools.pairwise([0, *ends, len(text)]) if text[a:b].strip()]


def _passages(text: str) -> list[tuple[int, int]]:
    """Where the passages are, whole sentences of `_PASSAGE` words; what has too long a sentence is left out."""
    least, most = _PASSAGE
    found: list[tuple[int, int]] = []
    begin: int | None = None
    for start, end in _sentences(text):
        begin = start if begin is None else begin
        size = len(text[begin:end].split())
        if size >= least:
            found += [(begin, end)] if size <= most else []
            begin = None
    return found


# Placing


def _placed(text: str, others: Sequence[str], depth: float, order: InstructionOptions) -> tuple[str, int | None, float]:
    """A prompt's documents, the number of the one that is asked about, and where it begins."""
    room = 0 if order.words is None else order.words - len(text.split())
    filling: list[str] = []
    for other in others:
        size = len(other.split())
        if size <= room:
            filling.append(other)
            room -= size
    if not filling:
        return text, None, 0.0
    borders = [0]
    for other in filling:
        borders.append(borders[-1] + len(other))
    spot = min(range(len(borders)), key=lambda i: abs(borders[i] - depth * borders[-1]))
    filling.insert(spot, text)
    body = "\n\n".join(f"Document {i}:\n{one}" for i, one in enumerate(filling, start=1))
    return body, spot + 1, round(borders[spot] / borders[-1], 4)


# Reading


def _annotated(record: dict[str, Any], where: str) -> AnnotatedDocument:
    name = next((name for name in ("document", "text") if name in record), None)
    if name is None:
        raise ZebraError(
            f"{where} has no document: its fields are {', '.join(record)}. Name the field document or text."
        )
    pairs = pairs_of(record.get("qa", []), where)
    if "question" in record and "answer" in record:
        pairs = [record]
    questions = tuple(
        (_string(pair["question"], "question", where), _string(pair["answer"], "answer", where)) for pair in pairs
    )
    summary = record.get("summary")
    return AnnotatedDocument(
        _string(record[name], name, where).strip(),
        where,
        questions,
        None if summary is None else _string(summary, "summary", where),
    )


def _string(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        said = "an empty one" if isinstance(value, str) else type(value).__name__
        raise ZebraError(f"{where}: {name} is a string with words; got {said}. Mend or drop it.")
    return value.strip()


class InstructionStats(NamedTuple):
    """Instructions of one kind: how many, and the median words of their documents and answers."""

    kind: str
    instructions: int
    document_words: int
    answer_words: int


def instruction_stats(records: Sequence[dict[str, Any]]) -> list[InstructionStats]:
    """What was made, kind by kind."""
    found = []
    for kind in sorted({record["kind"] for record in records}):
        mine = [record for record in records if record["kind"] == kind]
        words = [int(median(len(one[name].split()) for one in mine)) for name in ("document", "answer")]
        found.append(InstructionStats(kind, len(mine), *words))
    return found


def write(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Write JSON Lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text("".join(to_json(record) + "\n" for record in records), encoding="utf-8")
    os.replace(aside, path)
