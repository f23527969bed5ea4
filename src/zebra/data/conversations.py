"""Conversations from records, in the common formats of instruction data:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}     ShareGPT
    {"document": "...", "qa": [{"question": "...", "answers": ["...", ...]}]}      a conversation for each question
    {"prompt": "..." or messages, "completion": "..." or messages}
    {"instruction": "...", "input": "...", "output": "..."}            the input may be empty or absent
    {"document": "...", "question": "...", "answer": "..."}            only the document may be cut

A content may be a list of text parts. The assistant may call `tools`; a message with the role tool has the result:

    {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}     or {...} as a string
    {"role": "tool", "name": "add", "content": "2"}

The first of several answers is used. A record may name its `kind`, which tables show; other fields are ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from zebra.data.documents import Names, find_files
from zebra.data.qa import questions_of
from zebra.data.records import RecordError, parse_records, string_field
from zebra.errors import ZebraError

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
GAP = "\n\n[...]\n\n"
"""Replaces the part of a document that was cut."""
_MAX_WORD = 40


class Message(NamedTuple):
    """One message of a conversation.

    Attributes:
        tool_calls: calls by the assistant, as chat templates take them: the function's name and arguments by name.
        name, tool_call_id: for a message of a tool, the function and the call that it answers.
    """

    role: str
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """The content, followed by one line of JSON for each tool call."""
        calls = [json.dumps(call["function"], sort_keys=True, ensure_ascii=False) for call in self.tool_calls]
        return "\n".join([self.content, *calls])

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates of transformers take it, without empty fields."""
        return {name: value for name, value in self._asdict().items() if value or name == "content"}


@dataclass(frozen=True)
class Conversation:
    """Messages, the last of which is the assistant's.

    Attributes:
        where: the file and line that it was read from.
        document: the beginning of the first user message, which may be cut; None if nothing may be cut.
        tools: those that the assistant may call, as JSON schemas.
    """

    messages: tuple[Message, ...]
    where: str
    kind: str | None = None
    document: str | None = None
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def answer(self) -> str:
        """The text of the last message, which is the assistant's."""
        return self.messages[-1].text

    @property
    def text(self) -> str:
        """The tools and all messages with their roles; two conversations are the same if these are."""
        tools = [json.dumps(tool, sort_keys=True, ensure_ascii=False) for tool in self.tools]
        return "\n".join([*tools, *(f"{message.role}: {message.text.strip()}" for message in self.messages)])

    @property
    def tool_names(self) -> set[str]:
        """The names of the tools that are called or may be called."""
        called = [call for message in self.messages for call in message.tool_calls]
        return {str(tool.get("function", tool).get("name")) for tool in (*self.tools, *called)}

    @property
    def question(self) -> str:
        """All that the user writes, except for the document."""
        prompt = " ".join(message.content for message in self.messages if message.role == "user")
        return prompt.removeprefix(self.document or "").strip()

    def with_document(self, document: str) -> Conversation:
        """A copy with another text in place of the document."""
        i = next(i for i, message in enumerate(self.messages) if message.role == "user")
        content = document + self.messages[i].content[len(self.document or "") :]
        messages = (*self.messages[:i], self.messages[i]._replace(content=content), *self.messages[i + 1 :])
        return replace(self, messages=messages, document=document)


class TokenizedConversation(NamedTuple):
    """The tokens of a conversation, and which of them are the assistant's; both lists have one entry per token."""

    input_ids: list[int]
    assistant_mask: list[bool]


def without_middle(document: str, spans: Sequence[tuple[int, int]], tokens: int) -> str:
    """Cut the middle out of a document, at whitespace, to leave about `tokens` tokens, half of them at each end.

        once upon a time there was a cat who slept    ->    once upon a [...] who slept

    Args:
        spans: where each token of the document begins and ends, in characters.
    """
    head, tail = tokens - tokens // 2, tokens // 2
    first = document[: spans[head - 1][1]] if head else ""
    last = document[spans[len(spans) - tail][0] :] if tail else ""
    # Text without spaces is cut between any two characters.
    if match := re.search(rf"\s\S{{0,{_MAX_WORD}}}$", first):
        first = first[: match.start()]
    if match := re.match(rf"\S{{0,{_MAX_WORD}}}\s", last):
        last = last[match.end() :]
    return first + GAP + last


def read_conversations(patterns: Names) -> list[Conversation]:
    """Read the conversations of files, folders and globs, in order.

    Raises:
        ZebraError: no such file, records that are not conversations, or no conversation in any file.
    """
    files = find_files(patterns)
    conversations: list[Conversation] = []
    for file in files:
        conversations += parse_records(
            file,
            lambda record: conversations_of(record.fields, record.where),
            "Name the fields as in docs/tuning.md, and fix or remove these records.",
        )
    if not conversations:
        raise ZebraError(f"there is no conversation in {', '.join(map(str, files))}. Give files with at least one.")
    return conversations


def conversations_of(fields: dict[str, Any], where: str) -> Iterator[Conversation]:
    """Yield the conversations of a record that was read at `where`: one, or one for each question in `qa`.

    Raises:
        RecordError: no known set of fields, a field of the wrong type, an unknown role, no user message, or no answer
            at the end.
    """
    kind = fields.get("kind")
    if kind is not None and (not isinstance(kind, str) or not kind.strip()):
        raise RecordError(f"has the kind {kind!r}, which is not a non-empty string")
    tools = tuple(_objects(fields.get("tools"), "tools"))
    for document, messages in _messages_of(fields):
        roles = [message.role for message in messages]
        if roles[-1] != "assistant" or "user" not in roles:
            raise RecordError(f"must have a user message and end with the assistant; its roles are {', '.join(roles)}")
        yield Conversation(tuple(messages), where, kind, document, tools)


def _messages_of(fields: dict[str, Any]) -> Iterator[tuple[str | None, list[Message]]]:
    """The messages of each conversation of a record, with the document that may be cut, if there is one."""
    match fields:
        case {"messages": _}:
            yield None, _message_list(fields, "messages")
        case {"conversations": _}:
            system = [] if fields.get("system") in (None, "") else [Message("system", string_field(fields, "system"))]
            yield None, [*system, *_message_list(fields, "conversations")]
        case {"document": _, "qa": _}:
            yield from _document_messages(fields)
        case {"prompt": _, "completion": _}:
            sides = (("prompt", "user"), ("completion", "assistant"))
            yield None, [message for name, role in sides for message in _message_list(fields, name, role)]
        case {"instruction": _, "output": _}:
            names = [name for name in ("instruction", "input") if fields.get(name) is not None]
            prompt = "\n\n".join(part for name in names if (part := string_field(fields, name).strip()))
            yield None, [Message("user", prompt), Message("assistant", string_field(fields, "output"))]
        case {"document": _, "question": _}:
            yield from _document_messages(fields)
        case _:
            raise RecordError(
                f"has {', '.join(fields) or 'no fields'}, but none of the supported sets of fields: messages; "
                "conversations; document and qa; prompt and completion; instruction and output; document and question"
            )


def _document_messages(fields: dict[str, Any]) -> Iterator[tuple[str, list[Message]]]:
    document = string_field(fields, "document").strip()
    for question, answers in questions_of(fields):
        if not answers:
            raise RecordError(f"has no answer to the question {question!r}")
        yield document, [Message("user", f"{document}\n\n{question.strip()}"), Message("assistant", answers[0])]


def _message_list(fields: dict[str, Any], name: str, role: str | None = None) -> list[Message]:
    """The messages of a field, which may also be the text of one message if a `role` is given."""
    value = fields[name]
    if role is not None and not isinstance(value, list):
        return [Message(role, string_field(fields, name))]
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise RecordError(f"has a field {name!r} that is not a non-empty list of messages with role and content")
    return [_message(message) for message in value]


def _message(fields: dict[str, Any]) -> Message:
    """A message from fields named as in transformers or as in ShareGPT."""
    name = fields.get("role", fields.get("from"))
    role = _SHAREGPT_ROLES.get(name, name) if isinstance(name, str) else name
    if role not in ROLES:
        raise RecordError(f"has the role {role!r}, which is not one of {', '.join(ROLES)}")
    content = "value" if "value" in fields and "content" not in fields else "content"
    value = fields.get(content)
    if name == "function_call":
        return Message(role, "", _tool_calls(value, content))
    calls = _tool_calls(fields.get("tool_calls"), "tool_calls")
    if isinstance(value, list):
        text = "\n".join(map(_part, value))
    else:
        text = "" if value is None and calls else string_field(fields, content)
    names = (string_field(fields, key) if fields.get(key) is not None else None for key in ("name", "tool_call_id"))
    return Message(role, text, calls, *names)


def _part(part: Any) -> str:
    """The text of one part of a content."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text":
        raise RecordError(f"has a content part of type {kind}; only parts of type text are supported")
    return string_field(part, "text")


def _tool_calls(value: Any, field: str) -> tuple[dict[str, Any], ...]:
    """Tool calls as templates take them. Arguments are parsed, since a template would quote a string of JSON again."""
    calls = []
    for call in _objects(value, field):
        function = call.get("function", call)
        if not isinstance(function, dict):
            raise RecordError(f"has a field {field!r} whose function is not an object with name and arguments")
        arguments = _parsed(function.get("arguments") or {}, "arguments")
        if not isinstance(arguments, dict):
            raise RecordError(f"has a tool call whose arguments are not an object: {arguments!r}")
        by_name = {"name": string_field(function, "name"), "arguments": arguments}
        calls.append({"type": "function", "function": by_name} | ({"id": call["id"]} if call.get("id") else {}))
    return tuple(calls)


def _objects(value: Any, field: str) -> list[dict[str, Any]]:
    """The objects of a field that has none, one, or a list of them, or any of these as a string of JSON."""
    value = _parsed(value or [], field)
    objects = [value] if isinstance(value, dict) else value
    if not isinstance(objects, list) or not all(isinstance(one, dict) for one in objects):
        raise RecordError(f"has a field {field!r} that is not a list of objects")
    return objects


def _parsed(value: Any, field: str) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise RecordError(f"has a field {field!r} that is not JSON: {error}") from None
