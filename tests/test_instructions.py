"""Long instructions from long documents: the question is answered by the document, and stands where it should."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from zebra.data.conversations import read_conversations
from zebra.data.instructions import (
    AnnotatedDocument,
    instruction_stats,
    make_instructions,
    read_annotated,
)
from zebra.errors import ZebraError

NAMES = ("Ann", "Ben", "Cas", "Dan", "Eve", "Fay", "Gus", "Hal")


def story(name: str, sentences: int = 40) -> str:
    return "\n".join(f'On day {i} {name} met a fox. "Where is number {i}?" asked {name}.' for i in range(sentences))


DOCUMENTS = [
    AnnotatedDocument(
        story(name), f"line {i}", ((f"Who is it about {i}?", name), ("Summarize it.", f"{name} meets.")), f"All {name}."
    )
    for i, name in enumerate(NAMES)
]


def instructions(**options: Any) -> list[dict[str, Any]]:
    return list(make_instructions(DOCUMENTS, **options))


def test_the_kinds_of_an_annotated_set() -> None:
    records = instructions(kinds=("qa", "summary"))
    assert [record["kind"] for record in records[:3]] == ["qa", "summary", "summary"]
    assert [record["answer"] for record in records[:3]] == ["Ann", "Ann meets.", "All Ann."]
    assert {record["document"] for record in records[:3]} == {story("Ann")}
    assert [row.instructions for row in instruction_stats(records)] == [8, 16]
    assert {record["kind"] for record in instructions(kinds=("writing",))} == {
        *("writing-continue", "writing-restyle", "writing-outline")
    }


def test_words_of_a_document_are_counted_once() -> None:
    """They used to be counted again for each task of every other document, which is quadratic."""

    class Counted(str):
        calls = 0

        def split(self, *arguments: Any, **options: Any) -> list[str]:
            Counted.calls += 1
            return super().split(*arguments, **options)

    documents = [replace(document, text=Counted(document.text)) for document in DOCUMENTS]
    assert [*make_instructions(documents, kinds="qa", words=1000)] == instructions(kinds="qa", words=1000)
    assert Counted.calls == 2 * len(documents)  # and each once more, for its own question


def test_a_passage_to_write_is_the_documents_and_not_in_the_prompt() -> None:
    records = instructions(kinds=("writing",), writing=4)
    assert len(records) == 4 * len(DOCUMENTS)
    for record in records:
        name = next(name for name in NAMES if name in record["answer"])
        whole = story(name)
        assert record["answer"] in whole
        assert 60 <= len(record["answer"].split()) <= 160
        assert record["answer"] not in record["document"]
        before = whole[: whole.index(record["answer"])].strip()
        assert record["document"].startswith(before)
        assert before
        assert (record["document"] == before) == (record["kind"] != "writing-restyle")
        if record["kind"] != "writing-continue":
            assert f"{name} met fox" in record["question"]
            assert record["question"].count(" the ") < 4


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_documents_are_mixed_and_the_one_asked_about_stands_at_its_depth(depth: float) -> None:
    words = 5 * len(story("Ann").split())
    for record in instructions(kinds=("qa",), words=words, depths=(depth,)):
        parts = record["document"].split("\n\nDocument ")
        assert len(parts) == 5
        assert len(record["document"].split()) <= words + 2 * len(parts)
        number, question = record["question"].removeprefix("About document ").split(": ", 1)
        target = parts[int(number) - 1]
        assert target.split(":\n", 1)[1] == story(record["answer"])
        assert record["answer"] == NAMES[int(question[-2])]
        assert sum(story(name) in record["document"] for name in NAMES) == 5
        assert abs(record["depth"] - depth) <= 0.13
        assert abs((int(number) - 1) / 4 - record["depth"]) < 0.01


def test_one_seed_makes_one_set() -> None:
    assert instructions(words=900) == instructions(words=900)
    assert instructions(words=900) != instructions(words=900, seed=1)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text(
        json.dumps({"document": story("Ann"), "qa": [{"question": "Who?", "answers": ["Ann", "she"]}], "summary": "S."})
        + "\n"
        + json.dumps({"text": story("Ben")})
    )
    (tmp_path / "book.txt").write_text(story("Cas") + "\n--\n" + story("Dan"))
    read = read_annotated([str(tmp_path / "set.jsonl"), str(tmp_path / "book.txt")], separator="--")
    assert [len(one.questions) for one in read] == [1, 0, 0, 0]
    records = list(make_instructions(read))
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    back = read_conversations([str(tmp_path / "out.jsonl")])
    assert [one.answer for one in back] == [record["answer"] for record in records]
    assert back[0].kind == "qa"
    assert back[0].document == story("Ann")


def test_bad_input_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    for record, match in (
        ({"title": "x"}, "line 1 has no field 'text': its fields are title"),
        ({"document": " "}, "line 1 has an empty document"),
        ({"document": "x", "qa": [{"question": "y"}]}, "line 1 has no field 'answers'"),
        (
            {"document": "x", "qa": [{"question": "y", "answers": [3]}]},
            "has int instead of a string in the field",
        ),
    ):
        path.write_text(json.dumps(record))
        with pytest.raises(ZebraError, match=match):
            read_annotated([str(path)])
    with pytest.raises(ZebraError, match="the kinds must be among qa, summary, writing; got poem"):
        instructions(kinds=("poem",))
    with pytest.raises(ZebraError, match="depths must be from 0 to 1; got 2"):
        instructions(depths=(2.0,))
    with pytest.raises(ZebraError, match="words must be at least 1; got"):
        instructions(words=0)


def test_distractors_are_drawn_and_not_all_documents_for_each_task() -> None:
    """Each task used to shuffle all other documents, which is quadratic."""
    few, many = (
        [AnnotatedDocument(f"{i} is a text.", "", ((f"What is {i}?", "x"),)) for i in range(n)] for n in (50, 3000)
    )
    assert all(len(one["document"].split()) == 5 * 6 for one in make_instructions(few, kinds="qa", words=20))
    start = time.process_time()
    drawn = [
        one["document"].split("Document ")[1].split()[1]
        for one in make_instructions(many, kinds="qa", words=8, depths=(1,))
    ]
    assert time.process_time() - start < 1
    assert len(set(drawn)) > 1500  # of 3,000 drawn evenly two thirds come
