"""Conversations from JSON Lines, in the shapes that instruction sets come in:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "..." or messages, "completion": "..." or messages}
    {"instruction": "...", "input": "...", "output": "..."}            the input may be empty or absent
    {"document": "...", "question": "...", "answer": "..."}            only the document may be cut
    {"document": "...", "qa": [{"question": "...", "answers": ["...", ...]}]}      a conversation for each question

Of several answers the first is taken. A record may say its `kind` (a word for the tables); other fields are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from zebra.data.documents import find_files, read_records
from zebra.errors import ZebraError

ROLES = ("system", "user", "assistant")
GAP = "\n\n[...]\n\n"
"""What stands where a document was cut."""
_WORD = 40


class Message(NamedTuple):
    """What one side says."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Messages whose last is the assistant's.

    Attributes:
        where: the file and line it was read from.
        document: the beginning of the first message of the user that may be cut, where there is one.
    """

    messages: tuple[Message, ...]
    where: str
    kind: str | None = None
    document: str | None = None

    @property
    def answer(self) -> str:
        """The last message, the assistant's."""
        return self.messages[-1].content

    @property
    def text(self) -> str:
        """Everything that is said, with its roles: what makes two conversations the same."""
        return "\n".join(f"{role}: {content.strip()}" for role, content in self.messages)

    @property
    def question(self) -> str:
        """What the user says besides the document."""
        asked = " ".join(message.content for message in self.messages if message.role == "user")
        return asked.removeprefix(self.document or "").strip()

    def with_document(self, document: str) -> Conversation:
        """The same with another text in the document's place."""
        i = next(i for i, message in enumerate(self.messages) if message.role == "user")
        content = document + self.messages[i].content[len(self.document or "") :]
        messages = (*self.messages[:i], Message("user", content), *self.messages[i + 1 :])
        return replace(self, messages=messages, document=document)


class TokenizedConversation(NamedTuple):
    """The tokens of a conversation, and which of them the assistant says."""

    input_ids: list[int]
    assistant_mask: list[bool]


def without_middle(document: str, spans: Sequence[tuple[int, int]], keep: int) -> str:
    """A document cut in its middle, at blanks, to about `keep` tokens, half of them from each end.

        once upon a time there was a cat who slept    ->    once upon a [...] who slept

    Args:
        spans: where each token begins and ends in the document.
    """
    head, tail = keep - keep // 2, keep // 2
    first = document[: spans[head - 1][1]] if head else ""
    last = document[spans[len(spans) - tail][0] :] if tail else ""
    near = re.search(rf"\s\S{{0,{_WORD}}}$", first)  # a language without blanks is cut where it is
    first = first[: near.start()] if near else first
    near = re.match(rf"\S{{0,{_WORD}}}\s", last)
    last = last[near.end() :] if near else last
    return first + GAP + last


def read_conversations(patterns: Sequence[str]) -> list[Conversation]:
    """The conversations of files, folders and globs, in order.

    Raises:
        ZebraError: no file, a line that is no JSON or of no known shape, with its number; files without a conversation.
    """
    files = find_files(patterns)
    found = [conversation for file in files for conversation in _read(file)]
    if not found:
        raise ZebraError(f"there is no conversation in {', '.join(map(str, files))}. Give files with at least one.")
    return found


def _read(file: Path) -> Iterator[Conversation]:
    for where, record in read_records(file):
        if "messages" not in record and {"document", "qa"} <= record.keys():
            for pair in pairs_of(record["qa"], where):
                yield conversation(record | pair, where)
        else:
            yield conversation(record, where)


def pairs_of(qa: Any, where: str) -> list[dict[str, Any]]:
    """The questions of an annotated document, each with the first of its answers.

    Raises:
        ZebraError: another shape.
    """
    good = isinstance(qa, list) and all(
        isinstance(pair, dict) and "question" in pair and isinstance(pair.get("answers"), list) and pair["answers"]
        for pair in qa
    )
    if not good:
        raise ZebraError(f'{where}: qa is a list of {{"question": "...", "answers": ["...", ...]}}. Mend or drop it.')
    return [{"question": pair["question"], "answer": pair["answers"][0]} for pair in qa]


def conversation(record: dict[str, Any], where: str) -> Conversation:
    """A record of any of the shapes as a conversation.

    Raises:
        ZebraError: a record of no known shape, a field that is no string, an unknown role, an answer missing at the
            end.
    """
    shape = next((shape for shape in _SHAPES if set(shape) <= record.keys()), None)
    if shape is None:
        known = "; ".join(" and ".join(names) for names in _SHAPES)
        raise ZebraError(
            f"{where} is of no known shape: it has {', '.join(record) or 'no fields'}. A conversation has the fields "
            f"{known}. Rename the fields."
        )
    kind = record.get("kind")
    if kind is not None and (not isinstance(kind, str) or not kind.strip()):
        raise ZebraError(f"{where}: kind is a word for the tables; got {kind!r}. Write one, or leave it out.")
    made = replace(_SHAPES[shape](record, where), kind=kind)
    if made.messages[-1].role != "assistant" or all(message.role != "user" for message in made.messages):
        roles = ", ".join(message.role for message in made.messages)
        raise ZebraError(
            f"{where}: a conversation has a user and ends with the assistant; got {roles}. Mend or drop it."
        )
    return made


def _of_messages(record: dict[str, Any], where: str) -> Conversation:
    return Conversation(_messages(record["messages"], "messages", where), where)


def _of_completion(record: dict[str, Any], where: str) -> Conversation:
    sides: list[Message] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        said = record[name]
        if isinstance(said, list):
            sides += _messages(said, name, where)
        else:
            sides.append(Message(role, _string(record, name, where)))
    return Conversation(tuple(sides), where)


def _of_instruction(record: dict[str, Any], where: str) -> Conversation:
    parts = [_string(record, "instruction", where)]
    if record.get("input") is not None:
        parts.append(_string(record, "input", where))
    asked = "\n\n".join(part.strip() for part in parts if part.strip())
    return Conversation((Message("user", asked), Message("assistant", _string(record, "output", where))), where)


def _of_document(record: dict[str, Any], where: str) -> Conversation:
    document = _string(record, "document", where).strip()
    asked = Message("user", f"{document}\n\n{_string(record, 'question', where).strip()}")
    return Conversation((asked, Message("assistant", _string(record, "answer", where))), where, document=document)


_SHAPES: dict[tuple[str, ...], Callable[[dict[str, Any], str], Conversation]] = {
    ("messages",): _of_messages,
    ("prompt", "completion"): _of_completion,
    ("instruction", "output"): _of_instruction,
    ("document", "question", "answer"): _of_document,
}


def _messages(said: Any, name: str, where: str) -> tuple[Message, ...]:
    if not isinstance(said, list) or not said or not all(isinstance(one, dict) for one in said):
        raise ZebraError(f"{where}: {name} is a list of messages with role and content. Mend or drop it.")
    for one in said:
        if one.get("role") not in ROLES:
            raise ZebraError(f"{where}: a role is one of {', '.join(ROLES)}; got {one.get('role')!r}. Rename it.")
    return tuple(Message(one["role"], _string(one, "content", where)) for one in said)


def _string(record: dict[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise ZebraError(f"{where}: {name} is a string; got {type(value).__name__}. Mend or drop it.")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character
        raise ZebraError(f"{where} has half a surrogate pair at character {error.start} of {name}. Mend it.") from None
    return value
