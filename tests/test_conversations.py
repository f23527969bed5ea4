"""Conversations: every shape is read, every bad line is one clear line, and only a document's middle is cut."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from zebra.data.conversations import GAP, Message, conversations_of, read_conversations, without_middle
from zebra.data.quality import faults
from zebra.errors import ZebraError

ASKED, SAID = Message("user", "Who ran?"), Message("assistant", "The dog.")


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "Who ran?"}, {"role": "assistant", "content": "The dog."}]},
        {"prompt": "Who ran?", "completion": "The dog."},
        {
            "prompt": [{"role": "user", "content": "Who ran?"}],
            "completion": [{"role": "assistant", "content": "The dog."}],
        },
        {"instruction": "Who ran?", "input": "", "output": "The dog."},
        {"instruction": "Who ran?", "output": "The dog.", "id": 7},
        {"conversations": [{"from": "human", "value": "Who ran?"}, {"from": "gpt", "value": "The dog."}]},
        {"conversations": [{"role": "user", "content": "Who ran?"}, {"role": "assistant", "content": "The dog."}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Who ran?"}]},
                {"role": "assistant", "content": "The dog.", "tool_calls": None, "name": None},
            ]
        },
    ],
)
def test_every_shape_says_the_same(record: dict[str, Any]) -> None:
    conversation = next(conversations_of(record, "here"))
    assert conversation.messages == (ASKED, SAID)
    assert (conversation.document, conversation.kind, conversation.question, conversation.answer) == (
        None,
        None,
        "Who ran?",
        "The dog.",
    )


def test_parts_are_lines_as_the_server_reads_them() -> None:
    parts = [{"type": "text", "text": text} for text in ("A dog ran.", "Who ran?")]
    record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "The dog."}]}
    (conversation,) = conversations_of(record, "here")
    assert conversation.question == "A dog ran.\nWho ran?"


ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    ("call", "result"),
    [
        (
            {"role": "assistant", "content": None, "tool_calls": [{**ADD, "id": "7"}]},
            {"role": "tool", "content": "2", "name": "add", "tool_call_id": "7"},
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}, "id": "7"}]},
            {"role": "tool", "content": [{"type": "text", "text": "2"}], "name": "add", "tool_call_id": "7"},
        ),
        (
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
        ),
        (
            {"from": "gpt", "value": "", "tool_calls": [{"name": "add", "arguments": '{"a": 1}'}]},
            {"from": "tool", "value": "2"},
        ),
    ],
)
def test_tool_turns_are_read_as_templates_take_them(call: dict[str, Any], result: dict[str, Any]) -> None:
    record = {
        "conversations": [{"from": "human", "value": "1 + 1?"}, call, result, {"from": "gpt", "value": "2."}],
        "system": "Add.",
        "tools": '[{"type": "function", "function": {"name": "add"}}]',
    }
    (conversation,) = conversations_of(record, "here")
    with_id = {"id": "7"} if "id" in str(call) else {}
    names = {"name": "add", "tool_call_id": "7"} if with_id else {}
    assert [message.for_template() for message in conversation.messages] == [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": (ADD | with_id,)},
        {"role": "tool", "content": "2"} | names,
        {"role": "assistant", "content": "2."},
    ]
    assert conversation.tools == ({"type": "function", "function": {"name": "add"}},)
    assert conversation.tool_names == {"add"}
    other = next(conversations_of(json.loads(json.dumps(record).replace("add", "sum")), "here"))
    assert other.text != conversation.text  # no duplicates of each other


def test_an_answer_may_be_a_call_and_nothing_else() -> None:
    messages = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "tool_calls": [ADD]}]
    (conversation,) = conversations_of({"messages": messages}, "here")
    assert "add" in conversation.answer
    assert faults([conversation]) == {}


def test_an_input_and_a_document_stand_before_what_is_asked() -> None:
    conversation = next(conversations_of({"instruction": "Translate.", "input": "chien", "output": "dog"}, "here"))
    assert conversation.messages[0].content == "Translate.\n\nchien"
    record = {"document": " A dog ran. ", "question": "Who ran?", "answer": "The dog.", "kind": "qa"}
    conversation = next(conversations_of(record, "here"))
    assert conversation.messages == (Message("user", "A dog ran.\n\nWho ran?"), SAID)
    assert (conversation.document, conversation.question, conversation.kind) == ("A dog ran.", "Who ran?", "qa")
    other = conversation.with_document("A cat")
    assert other.messages == (Message("user", "A cat\n\nWho ran?"), SAID)
    assert (other.document, other.question) == ("A cat", "Who ran?")


def test_a_document_with_several_questions_is_a_conversation_for_each(tmp_path: Path) -> None:
    qa = [{"question": f"Q{i}?", "answers": [f"A{i}", "else"]} for i in range(3)]
    (tmp_path / "set.jsonl").write_text(json.dumps({"document": "A text.", "qa": qa}))
    conversations = read_conversations([str(tmp_path / "set.jsonl")])
    assert [(one.question, one.answer, one.document) for one in conversations] == [
        (f"Q{i}?", f"A{i}", "A text.") for i in range(3)
    ]
    (tmp_path / "set.jsonl").write_text(json.dumps({"document": "A text.", "qa": [{"question": "Q?"}]}))
    with pytest.raises(ZebraError, match="line 1 has no field 'answers'"):
        read_conversations([str(tmp_path / "set.jsonl")])


def test_files_plain_and_packed_are_read_in_order(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": str(i), "completion": "x"}) + "\n" for i in range(4)]
    (tmp_path / "a.jsonl").write_text(lines[0] + "\n" + lines[1])
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as packed:
        packed.write("".join(lines[2:]))
    conversations = read_conversations([str(tmp_path)])
    assert [one.messages[0].content for one in conversations] == ["0", "1", "2", "3"]
    assert conversations[1].where.endswith("a.jsonl, line 3")


BAD = {
    "{": "line 2 is not JSON",
    "[1]": "line 2 is a JSON list, not an object",
    '{"text": "x"}': "line 2 has text, but none of the supported sets of fields: messages; conversations; ",
    "{}": "has no fields, but none",
    '{"prompt": "x", "completion": 3}': "has int instead of a string in the field 'completion'",
    '{"messages": []}': "has a field 'messages' that is not a non-empty list",
    '{"messages": ["x"]}': "has a field 'messages' that is not a non-empty list",
    '{"messages": [{"role": "bot", "content": "x"}]}': "has the role 'bot', which is not one of system, user",
    '{"messages": [{"role": "user", "content": "x"}]}': "end with the assistant; its roles are user",
    '{"messages": [{"role": "assistant", "content": "x"}]}': "must have a user message and end with the assista",
    '{"messages": [{"role": "user"}]}': "has no field 'content': its fields are role",
    '{"instruction": "x", "input": 1, "output": "y"}': "has int instead of a string in the field 'input'",
    r'{"prompt": "\ud800", "completion": "x"}': "half a surrogate pair at character 0 of the field 'prompt'",
    '{"conversations": [{"from": "bard", "value": "x"}]}': "has the role 'bard', which is not one of system, user",
    '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}': "has a content part of type image_url; ",
    '{"messages": [{"role": "user", "content": ["x"]}]}': "has a content part of type str",
    '{"messages": [{"role": "assistant", "tool_calls": ["add"]}]}': "has a field 'tool_calls' that is not a list",
    '{"messages": [{"role": "assistant", "tool_calls": [{"function": "add"}]}]}': "whose function is not an object",
    '{"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}': "has no field 'name'",
    '{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]}': "that is not JSON: ",
    '{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "3"}]}]}': "are not an object: 3",
    '{"conversations": [{"from": "function_call", "value": "add"}]}': "has a field 'value' that is not JSON",
    '{"prompt": "x", "completion": "y", "tools": "add"}': "has a field 'tools' that is not JSON",
    '{"prompt": "x", "completion": "y", "kind": 3}': "has the kind 3, which is not a non-empty string",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_refused_with_its_number(line: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "x", "completion": "y"}\n' + line + "\n")
    with pytest.raises(ZebraError) as refused:
        read_conversations([str(path)])
    assert BAD[line] in str(refused.value)
    assert "line 2" in str(refused.value)


def test_a_list_of_sharegpt_is_read_from_its_file(tmp_path: Path) -> None:
    """As such sets are published."""
    records = [
        {"id": str(i), "conversations": [{"from": "human", "value": f"Q{i}"}, {"from": "gpt", "value": f"A{i}"}]}
        for i in range(3)
    ]
    (tmp_path / "set.json").write_text(json.dumps(records, indent=2))
    conversations = read_conversations([str(tmp_path / "set.json")])
    assert [one.text for one in conversations] == [f"user: Q{i}\nassistant: A{i}" for i in range(3)]
    assert conversations[2].where.endswith("set.json, row 3")


def test_an_empty_set_and_another_kind_of_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ZebraError, match=r"no conversation in .*empty\.jsonl"):
        read_conversations([str(tmp_path / "empty.jsonl")])
    (tmp_path / "text.txt").write_text("Who ran?")
    with pytest.raises(ZebraError, match=r"a file of records must end in \.jsonl, "):
        read_conversations([str(tmp_path / "text.txt")])


def test_the_middle_is_cut_at_blanks() -> None:
    text = "once upon a time there was a cat who slept"
    spans = [(i, i + 1) for i in range(len(text))]  # every character a token
    for keep in range(2, len(text)):
        cut = without_middle(text, spans, keep)
        first, last = cut.split(GAP)
        assert text.startswith(first)
        assert text.endswith(last)
        assert len(first) + len(last) <= keep
        assert " " not in text[: keep - keep // 2] or text[len(first)] == " "
        assert " " not in text[len(text) - keep // 2 :] or text[-len(last) - 1] == " "
    assert without_middle(text, spans, 26) == "once upon a" + GAP + "who slept"
    unbroken = "x" * 900 + " " + "y" * 900
    cut = without_middle(unbroken, [(i, i + 1) for i in range(len(unbroken))], 1600)
    assert cut == "x" * 800 + GAP + "y" * 800
