"""QA examples: what is read, what is rejected with its line, which faults are detected."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest
from pyarrow import parquet

from zebra import ZebraError
from zebra.data.conversations import read_conversations
from zebra.data.qa import (
    ANSWER_IN_QUESTION,
    DUPLICATE_ANSWER,
    DUPLICATE_QUESTION,
    EMPTY_ANSWER,
    FAULTS,
    QAExample,
    evidence_cut,
    faults,
    read_examples,
    words,
)

STORY = "Tom had a red ball. He lost it by the river. Anna found the ball under a stone."


def item(question: str, *answers: str, document: str = STORY) -> QAExample:
    return QAExample("one", 1, document, question, answers)


def test_both_shapes_are_read(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"document": STORY, "question": "Who?", "answers": "Anna"},
        {"id": "x.7", "document": f"{STORY} End.", "qa": [{"question": "Who?", "answers": ["Anna", "Tom"]}]},
        {"id": 3, "document": STORY, "qa": [{"question": "a", "answers": []}, {"question": "b", "answers": "c"}]},
    ]
    text = "\n".join([json.dumps(lines[0]), "", *map(json.dumps, lines[1:])])
    (tmp_path / "items.jsonl").write_text(text)
    (tmp_path / "items.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    examples = read_examples(tmp_path / "items.jsonl")
    assert examples == read_examples(tmp_path / "items.jsonl.gz")
    assert [(one.name, one.group, one.question, one.answers) for one in examples] == [
        ("line 1", 1, "Who?", ("Anna",)),
        ("x.7#0", 3, "Who?", ("Anna", "Tom")),
        ("3#0", 1, "a", ()),  # on the document of the first record
        ("3#1", 1, "b", ("c",)),
    ]


BAD = {
    "not JSON": "{'document': 1}",
    "is a JSON list, not an object": "[1]",
    "has no field 'document': its fields are question, answers": '{"question": "q", "answers": ["a"]}',
    "has int instead of a string in the field 'document'": '{"document": 4, "question": "q", "answers": ["a"]}',
    "has an empty document": '{"document": " ", "question": "q", "answers": ["a"]}',
    "has no field 'question': its fields are document, answers": '{"document": "d", "answers": ["a"]}',
    "has no field 'answers': its fields are document, question": '{"document": "d", "question": "q"}',
    "has NoneType instead of a string in": '{"document": "d", "question": "q", "answers": ["a", null]}',
    "has a qa that is not a list of": '{"document": "d", "qa": ["q"]}',
    "has an empty list 'qa'": '{"document": "d", "qa": []}',
    "has half a surrogate pair at character 0 of": '{"document": "d", "question": "\\ud800", "answers": ["a"]}',
}


@pytest.mark.parametrize("why", BAD)
def test_a_bad_line_is_refused_with_its_number(why: str, tmp_path: Path) -> None:
    good = json.dumps({"document": "d", "question": "q", "answers": ["a"]})
    (tmp_path / "bad.jsonl").write_text(f"{good}\n\n{BAD[why]}\n{good}\n")
    with pytest.raises(ZebraError) as refused:
        read_examples(tmp_path / "bad.jsonl")
    assert f"has 1 bad record: line 3 {'is ' if why == 'not JSON' else ''}{why}" in str(refused.value)


def test_all_bad_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("[]\n" * 8)
    with pytest.raises(ZebraError, match=r"has 8 bad records: line 1 .*; line 5 [^;]*; and 3 more\."):
        read_examples(tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    ("name", "why"), [("no.jsonl", "no file at"), ("a.txt", "records must end in .jsonl"), ("e.jsonl", "no q")]
)
def test_a_file_that_is_none_is_refused(name: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("{}")
    (tmp_path / "e.jsonl").write_text("\n")
    with pytest.raises(ZebraError, match=why):
        read_examples(tmp_path / name)


def test_words_are_those_of_squad() -> None:
    assert words("  The cat's   hat, an A+ (theatre)!") == ["cats", "hat", "theatre"]


def test_faults_are_found() -> None:
    items = [
        item("Who found the ball?", "Anna"),
        item("Who found the ball?", "Anna did", document=STORY + " Then they ran."),
        item("who found ball", "Anna", "the ANNA!"),
        item("Where?", "By the river", "..."),
        item("Where was it?"),
        item("Was it Tom or Anna?", "Tom."),
    ]
    assert faults(items) == [
        [],
        [],
        [DUPLICATE_ANSWER, DUPLICATE_QUESTION],
        [EMPTY_ANSWER],
        [EMPTY_ANSWER],
        [ANSWER_IN_QUESTION],
    ]
    assert items[2].references == ("Anna",)
    assert items[3].references == ("By the river",)


def test_evidence_is_lost_where_every_answer_loses_words() -> None:
    shortened = "Tom had a red ball. ... under a stone."
    assert evidence_cut(item("Who?", "Anna"), shortened)
    assert not evidence_cut(item("Who?", "Anna", "Tom"), shortened)
    assert not evidence_cut(item("Who?", "Peter"), shortened)  # stands nowhere in the document
    assert evidence_cut(item("What?", "Tom lost a ball"), shortened)
    assert not evidence_cut(item("What?", "Anna"), STORY)
    assert not evidence_cut(item("What?"), shortened)


def test_every_fault_is_in_the_guide() -> None:
    guide = (Path(__file__).parent.parent / "docs" / "evaluating.md").read_text()
    for fault in FAULTS:
        assert f"| {fault} |" in guide


def test_a_parquet_file_has_examples_and_conversations(tmp_path: Path) -> None:
    rows = [{"document": STORY, "qa": [{"question": "Who?", "answers": ["Anna"]}]}, {"document": "d", "qa": [{}]}]
    parquet.write_table(arrow.Table.from_pylist(rows[:1]), tmp_path / "a.parquet")
    (example,) = read_examples(tmp_path / "a.parquet")
    assert (example.name, example.document, example.question, example.answers) == ("row 1#0", STORY, "Who?", ("Anna",))
    (conversation,) = read_conversations([str(tmp_path / "a.parquet")])
    assert (conversation.question, conversation.answer) == ("Who?", "Anna")
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    with pytest.raises(ZebraError, match="has 1 bad record: row 2 has NoneType instead of a string"):
        read_examples(tmp_path / "b.parquet")
