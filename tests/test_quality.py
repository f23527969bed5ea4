"""The gate on conversations: every planted fault is detected, and nothing else."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import STORIES, TEXT
from transformers import AutoTokenizer

import zebra
from zebra.data.conversations import Conversation, TokenizedConversation, conversations_of
from zebra.data.quality import NGRAM, evaluation_text, faults, ngrams
from zebra.results import Result
from zebra.train.chat import Chat
from zebra.train.instructions import _tokenize, read_instructions
from zebra.train.tune_recipe import TuneRecipe

STORY = (TEXT / "tinystories_test.txt").read_text().split("<|endoftext|>")
GOOD = [
    {"prompt": f"What is {i} and {i}?", "completion": f"It is {2 * i}, as everyone knows by now."} for i in range(30)
]


def read(records: list[dict[str, Any]]) -> list[Conversation]:
    return [next(conversations_of(record, f"line {i}")) for i, record in enumerate(records)]


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        ({"prompt": "Who?", "completion": " ... "}, "empty answer"),
        ({"prompt": "Who?", "completion": "The caf\ufffd was shut all day."}, "encoding"),
        ({"prompt": "Who?", "completion": "The cafÃ© was shut all day."}, "encoding"),
        ({"prompt": "Whoâ€™s there?", "completion": "Nobody at all."}, "encoding"),
        ({"prompt": "Who?", "completion": "Собака убежала в лес вчера вечером"}, "language"),
        ({"prompt": "Who ran away?", "completion": "who ran away"}, "copied answer"),
        ({"document": "One day " + STORY[0], "question": "Sum up.", "answer": STORY[0].strip()[:600]}, "copied answer"),
        ({"prompt": "what is 3 AND 3", "completion": "It is 6 as everyone knows by now!"}, "duplicate"),
        ({"document": STORY[3].strip(), "question": "Who?", "answer": "A girl."}, "leak"),
        ({"prompt": "Go on. " + STORY[3].strip()[:300], "completion": "The end."}, "leak"),
    ],
)
def test_a_planted_fault_is_found(record: dict[str, Any], fault: str) -> None:
    measured = ngrams([STORY[3]])
    assert faults(read(GOOD), measured) == {}
    assert faults(read([*GOOD, record]), measured) == {len(GOOD): fault}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Say it.", "completion": "The café's naïve façade — “quoted” … 日本"},
        {"prompt": "Quote one sentence. " + STORY[5], "completion": " ".join(STORY[5].split()[:20])},
        {"document": STORY[6].strip(), "question": "Who?", "answer": "A girl."},
        {"prompt": "Так?", "completion": "Да"},
    ],
)
def test_what_is_no_fault_passes(record: dict[str, Any]) -> None:
    assert faults(read([*GOOD, record]), ngrams([STORY[3]])) == {}


def test_a_set_in_two_scripts_has_no_wrong_one() -> None:
    other = [{"prompt": f"{i}", "completion": f"Собака убежала в лес вчера вечером {i}"} for i in range(20)]
    assert faults(read([*GOOD, *other])) == {}


def test_runs_are_of_thirteen_words() -> None:
    words = [f"w{i}" for i in range(20)]
    assert len(ngrams([" ".join(words)])) == 20 - NGRAM + 1
    assert ngrams(["a b"]) == ngrams(["A, b!"])
    assert ngrams(["", "..."]) == frozenset()
    assert evaluation_text(next(conversations_of({"document": "d", "question": "q", "answer": "a"}, "x"))) == "d"


def tuning(path: Path, tmp_path: Path, **quality: Any) -> TuneRecipe:
    return TuneRecipe.model_validate(
        {
            "run": str(tmp_path / "run"),
            "model": str(STORIES),
            "data": {"files": [str(path)], "quality": quality, "held_out": 0.2},
            "train": {"length": 512, "max_steps": 1, "learning_rate": 0.1},
            "evaluate": {},
        }
    )


def test_the_gate_of_a_recipe_drops_flags_or_lets_be(tmp_path: Path) -> None:
    records = [
        {"document": story.strip()[:700], "question": f"Who {i}?", "answer": f"A girl called {i}."}
        for i, story in enumerate(STORY[:12])
        for i in (i, i + 100)
    ]
    # Each story stands in another prompt too, behind a document of its own.
    records += [
        {"document": f"Note {i}.\n\n" + story.strip()[:700], "question": "What?", "answer": f"Nothing, {i}."}
        for i, story in enumerate(STORY[:12])
    ]
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [*records, records[0]]))
    chat = Chat(AutoTokenizer.from_pretrained(STORIES), "plain", "stories")
    by_action = {
        act: read_instructions(tuning(path, tmp_path, act=act), chat, lambda: pytest.fail("no model is asked"))
        for act in ("drop", "flag", "off")
    }
    held = {act: sum(map(len, of.suites.values())) for act, of in by_action.items()}
    assert held["off"] > 0
    assert by_action["off"].counts.get("leak", 0) == 0
    leaks = by_action["drop"].counts["leak"]
    assert leaks > 0
    assert by_action["flag"].counts["leak"] == leaks
    trained = {act: sum(one.samples for one in of.sequences.kind_stats()) for act, of in by_action.items()}
    assert trained["flag"] == trained["off"] == trained["drop"] + leaks
    # Held out together: the two questions on one document are on one side.
    texts = {chat.tokenizer.decode(one.input_ids) for one in by_action["drop"].suites["instructions"]}
    for i in range(12):
        assert sum(f"Who {n}?" in text for n in (i, i + 100) for text in texts) in (0, 2)


@pytest.mark.parametrize("check", [{"independent": 0.1}, {"leaks": ["a.jsonl"]}], ids=str)
def test_a_check_of_a_gate_that_is_off_is_refused(check: dict[str, Any], tmp_path: Path) -> None:
    """It was not made, and nothing said so."""
    with pytest.raises(ValueError, match=f"{next(iter(check))} is a check, but act off turns all checks off"):
        tuning(tmp_path / "set.jsonl", tmp_path, act="off", **check)


def test_conversations_do_not_fill_the_memory(tmp_path: Path) -> None:
    """A token of each was two entries of lists and a number, 44 bytes, and each was kept as text beside itself."""
    conversations = read([{"prompt": f"{i} " * 2000, "completion": "It is so."} for i in range(1000, 1300)])
    tokens = TokenizedConversation(list(range(1000, 3000)), [False] * 1000 + [True] * 1000)
    chat: Any = SimpleNamespace(fitted=lambda one, length: (TokenizedConversation(*map(list, tokens)), 0))
    recipe = tuning(tmp_path / "set.jsonl", tmp_path)

    def bytes_taken(work: Callable[[], object]) -> int:
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert bytes_taken(lambda: faults(conversations)) < 1000 * len(conversations) * 5
    assert bytes_taken(lambda: _tokenize(conversations, "a", recipe, chat, Counter())) < 2000 * len(conversations) * 12


def test_questions_on_one_document_are_one_sample(tmp_path: Path) -> None:
    """Their losses are alike, so that an interval over them as over others is too narrow."""
    stories = [story.strip()[:300] for story in STORY[:3]]

    def measured(name: str, documents: list[str]) -> Result:
        path = tmp_path / f"{name}.jsonl"
        path.write_text(
            "".join(
                json.dumps({"document": document, "question": f"Who is {i}?", "answer": f"A girl called {i}."}) + "\n"
                for i, document in enumerate(documents)
            )
        )
        recipe = tuning(path, tmp_path, act="off").model_dump()
        recipe["data"]["held_out"] = None
        recipe["evaluate"]["suites"] = [{"name": name, "files": [str(path)]}]
        data = read_instructions(TuneRecipe.model_validate(recipe), chat, lambda: pytest.fail("no model is asked"))
        (result,) = data.evaluate(zebra.load(STORIES), {"run": "r", "model": "m", "layout": "full"})
        return result

    chat = Chat(AutoTokenizer.from_pretrained(STORIES), "plain", "stories")
    assert measured("one", stories[:1] * 3).low is None
    assert measured("two", stories).low is not None


def test_answers_that_need_no_document_are_found_by_likelihood(tmp_path: Path) -> None:
    """A sentence that the document says is likelier with it; noise is not."""
    records = []
    for i, story in enumerate(STORY[:6]):
        start, end = story.strip()[:500], story.strip()[500:640]
        records.append({"document": start + end, "question": "Say the end again.", "answer": end, "kind": "told"})
        records.append({"document": start, "question": "?", "answer": f"xq{i}zv kj{i}", "kind": "noise"})
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    chat = Chat(AutoTokenizer.from_pretrained(STORIES), "plain", "stories")
    recipe = tuning(path, tmp_path, independent=-0.5).model_copy(update={"evaluate": None})
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"held_out": None})})
    instructions = read_instructions(recipe, chat, lambda: zebra.load(STORIES))
    assert instructions.counts["independent answer"] == 6
    assert {one.kind: one.samples for one in instructions.sequences.kind_stats()} == {"told": 6}
