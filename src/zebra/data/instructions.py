"""Make long instructions of three kinds from long documents, offline and without a model:

    qa        the questions of an annotated data set, with their answers
    summary   a document's own summary, or the answer to a question that asks for one
    writing   a passage of the document is the answer: continue the text before it, write out notes, expand an outline

If a prompt has several documents, they are numbered, and the question names the one that it is about:

    Document 1   Document 2   [Document 3]   Document 4          About document 3: who ran?
    distractors fill the prompt up to the given number of words; the target is at the boundary nearest to its depth

Depth is where the target begins, as a share of the distractors' characters: 0 at the front, 1 at the end.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, NamedTuple

from zebra.data.documents import Names, check_formats, find_files, names_of, read_documents
from zebra.data.qa import questions_of
from zebra.data.records import Record, RecordError, parse_records, record_suffix, string_field
from zebra.errors import ZebraError

KINDS = ("qa", "summary", "writing")
_MIN_PASSAGE_WORDS, _MAX_PASSAGE_WORDS = 60, 160


@dataclass(frozen=True)
class AnnotatedDocument:
    """A document, (question, answer) pairs about it, and its summary if it has one."""

    text: str
    where: str
    questions: tuple[tuple[str, str], ...] = ()
    summary: str | None = None


def read_annotated(patterns: Names, *, separator: str | None = None) -> list[AnnotatedDocument]:
    """Read documents from text files and records: `document` or `text`, with `summary` and questions as in `qa`.

    Raises:
        ZebraError: as `read_documents` and `parse_records`; no document at all.
    """
    expected = "A record must have document or text; qa, question with answer, and summary are optional."
    files = find_files(patterns)
    check_formats(files, separator, None)
    by_file: dict[Path, list[AnnotatedDocument]] = {
        file: parse_records(file, _annotated, expected) if record_suffix(file) else [] for file in files
    }
    if texts := [file for file in files if record_suffix(file) is None]:
        for one in read_documents(texts, separator):
            by_file[one.file].append(AnnotatedDocument(one.text, str(one.file)))
    documents = list(itertools.chain(*by_file.values()))
    if not documents:
        raise ZebraError(f"there is no document in {', '.join(names_of(patterns))}. Give files with at least one.")
    return documents


def _annotated(record: Record) -> Iterator[AnnotatedDocument]:
    fields = record.fields
    text = _stripped(fields, "document" if "document" in fields else "text")
    questions = questions_of(fields) if "qa" in fields or {"question", "answer"} <= fields.keys() else []
    pairs = tuple((question.strip(), "".join(answers[:1]).strip()) for question, answers in questions)
    if not all(question and answer for question, answer in pairs):
        raise RecordError("has an empty question or answer")
    summary = _stripped(fields, "summary") if fields.get("summary") is not None else None
    yield AnnotatedDocument(text, record.where, pairs, summary)


def _stripped(fields: dict[str, Any], name: str) -> str:
    text = string_field(fields, name).strip()
    if not text:
        raise RecordError(f"has an empty {name}")
    return text


def make_instructions(
    documents: Sequence[AnnotatedDocument],
    *,
    kinds: Names = KINDS,
    words: int | None = None,
    depths: Sequence[float] = (0.0, 0.5, 1.0),
    writing: int = 3,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Yield instructions, document by document, as records that `zebra.data.conversations` reads.

    Args:
        kinds: which of `KINDS`.
        words: words of all documents in a prompt; distractors are added up to it, no document is cut. None adds none.
        depths: where the target document begins, used in turn.
        writing: writing tasks for each document, at most.

    Raises:
        ZebraError: an unknown kind, no depth, a depth outside 0 to 1, or `words` below 1.
    """
    kinds = names_of(kinds)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ZebraError(f"the kinds must be among {', '.join(KINDS)}; got {', '.join(unknown)}. Choose from these.")
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        got = ", ".join(map(str, depths)) or "none"
        raise ZebraError(f"depths must be from 0 to 1; got {got}. Write for example 0,0.5,1.")
    if words is not None and words < 1:
        raise ZebraError(f"words must be at least 1; got {words}. Raise it or leave it out.")
    rng, turns, sizes = Random(seed), itertools.cycle(depths), [len(one.text.split()) for one in documents]
    order = sorted(range(len(documents)), key=sizes.__getitem__)
    ascending, ranks = [sizes[i] for i in order], {i: rank for rank, i in enumerate(order)}
    for i, target in enumerate(documents):
        for task in _tasks(target, kinds, writing, rng):
            room = 0 if words is None else words - len(task["document"].split())
            distractors = [documents[order[rank]].text for rank in _drawn(ascending, ranks[i], room, rng)]
            prompt, number, depth = _with_distractors(task["document"], distractors, next(turns))
            if number is not None:
                task["question"] = f"About document {number}: {task['question']}"
            yield task | {"document": prompt, "source": target.where, "depth": depth}


def _tasks(document: AnnotatedDocument, kinds: Sequence[str], writing: int, rng: Random) -> Iterator[dict[str, str]]:
    for question, answer in document.questions:
        kind = "summary" if re.search(r"\b(summary|summari[sz]e|plot of the)", question, re.IGNORECASE) else "qa"
        if kind in kinds:
            yield {"document": document.text, "question": question, "answer": answer, "kind": kind}
    if document.summary is not None and "summary" in kinds:
        question = "Summarise the text."
        yield {"document": document.text, "question": question, "answer": document.summary, "kind": "summary"}
    if "writing" in kinds:
        yield from _writing_tasks(document.text, writing, rng)


def _drawn(sizes: Sequence[int], target: int, room: int, rng: Random) -> Iterator[int]:
    """Draw distinct indices other than `target` whose sizes fit into the room that is left; `sizes` are ascending."""
    taken = [target]  # ascending
    while (fitting := bisect_right(sizes, room)) > bisect_left(taken, fitting):
        i = rng.randrange(fitting)
        place = bisect_left(taken, i)
        if taken[place : place + 1] != [i]:
            taken.insert(place, i)
            room -= sizes[i]
            yield i


def _with_distractors(target: str, distractors: Sequence[str], depth: float) -> tuple[str, int | None, float]:
    """The documents of a prompt, the number of the target among them (None if alone), and its actual depth."""
    if not distractors:
        return target, None, 0.0
    boundaries = [0, *itertools.accumulate(map(len, distractors))]
    index = min(range(len(boundaries)), key=lambda i: abs(boundaries[i] - depth * boundaries[-1]))
    texts = [*distractors[:index], target, *distractors[index:]]
    prompt = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(texts, start=1))
    return prompt, index + 1, round(boundaries[index] / boundaries[-1], 4)


def _writing_tasks(text: str, count: int, rng: Random) -> Iterator[dict[str, str]]:
    passages = _passages(text)
    if len(passages) < 2:  # the first has no text before it
        return
    kinds = ["continue", "restyle", "outline"]
    for n, i in enumerate(sorted(rng.sample(range(1, len(passages)), min(count, len(passages) - 1)))):
        if n % len(kinds) == 0:
            rng.shuffle(kinds)
        start, end = passages[i]
        document, passage, rest = text[:start].strip(), text[start:end].strip(), text[end:].strip()
        kind = kinds[n % len(kinds)]
        if kind == "continue":
            question = f"Continue the text in its own style, by about {len(passage.split())} words."
        elif kind == "restyle":
            document = f"{document}\n\n{rest}".strip()
            question = f"Write these notes in full, in the style of the text:\n{_notes(passage)}"
        else:
            points = "\n".join(f"- {_notes(passage[a:b], 5)}" for a, b in _sentences(passage))
            question = f"Expand this outline to the next passage, in the style of the text:\n{points}"
        yield {"document": document, "question": question, "answer": passage, "kind": f"writing-{kind}"}


_STOP_WORDS = """
    a an and are as at be been but by did do for from had has have he her his i in is it its of on or she so that the
    their them then there they this to was we were which who will with would you
"""


def _notes(passage: str, limit: int | None = None) -> str:
    """The content words of a passage in their order, without punctuation."""
    words, stop_words = re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", passage), _STOP_WORDS.split()
    content_words = [word for word in words if word.lower() not in stop_words]
    return " ".join(content_words[:limit] or words[:limit])


def _sentences(text: str) -> list[tuple[int, int]]:
    """Where each sentence begins and ends, with its closing quotes."""
    ends = [match.end() for match in re.finditer(r"[.!?][\"')\]”’]*(?=\s)", text)]
    return [(a, b) for a, b in itertools.pairwise([0, *ends, len(text)]) if text[a:b].strip()]


def _passages(text: str) -> list[tuple[int, int]]:
    """Where passages of whole sentences begin and end; one that a long sentence makes too long is left out."""
    passages: list[tuple[int, int]] = []
    begin: int | None = None
    for start, end in _sentences(text):
        begin = start if begin is None else begin
        size = len(text[begin:end].split())
        if size >= _MIN_PASSAGE_WORDS:
            passages += [(begin, end)] if size <= _MAX_PASSAGE_WORDS else []
            begin = None
    return passages


class InstructionStats(NamedTuple):
    """Instructions of one kind: their number, and the median number of words of their documents and answers."""

    kind: str
    instructions: int
    document_words: int
    answer_words: int


def instruction_stats(records: Iterable[dict[str, Any]]) -> list[InstructionStats]:
    """Statistics of instructions by kind."""
    by_kind: dict[str, list[tuple[int, int]]] = {}
    for record in records:
        document, answer = (len(record[name].split()) for name in ("document", "answer"))
        by_kind.setdefault(record["kind"], []).append((document, answer))
    return [
        InstructionStats(kind, len(words), *(int(median(each)) for each in zip(*words, strict=True)))
        for kind, words in sorted(by_kind.items())
    ]
