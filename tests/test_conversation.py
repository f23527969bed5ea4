"""A conversation: each answer is that of a fresh `generate` of the whole of it; what was read is not read again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import STORIES, TEXT
from transformers import AutoTokenizer

import zebra
from zebra.conversation import Conversation
from zebra.generation import encode_messages, generate_tokens

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
DOCUMENT = (TEXT / "tinystories_test.txt").read_text()[:300]
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "striped": {"stripes": "GLLL:33"},
    "sinks": {"stripes": "LLLG:17+4"},
    "full decode": {"stripes": "GLLL:33", "full_decode": True},
    "self-extend": {"self_extend": "8:64"},
    "auto": {"self_extend": "auto:4096"},
    "striped self-extend": {"stripes": "GLLL:33", "self_extend": "4:48"},
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def models() -> Callable[[str], Any]:
    loaded: dict[str, Any] = {}

    def load(way: str) -> Any:
        if way not in loaded:
            loaded[way] = zebra.load(STORIES, **WAYS[way])
        return loaded[way]

    return load


def fresh(chat: Conversation, answered: list[dict[str, Any]], new: int, **options: Any) -> tuple[int, ...]:
    """The tokens of an answer to messages that nothing was read of before."""
    rendered = [
        {"role": one["role"], "content": "\n\n".join([*one.get("documents", []), one["content"]])} for one in answered
    ]
    ids = encode_messages(rendered, chat.tokenizer, remedy="")
    return tuple(generate_tokens(chat.model, chat.tokenizer, ids[None], max_new_tokens=new, **options)[0])


def checked(chat: Conversation, pieces: Iterator[str], new: int = 24, **options: Any) -> int:
    """Exhaust an answer, compare it with a fresh one; returns the cached tokens."""
    text = "".join(pieces)
    assert chat.last is not None
    assert chat.messages[-1] == {"role": "assistant", "content": text}
    assert chat.last.text == text
    assert chat.last.tokens == fresh(chat, chat.messages[:-1], new, **options)
    return chat.last.cached_tokens


@pytest.mark.parametrize("chunk", [None, pytest.param(7, marks=pytest.mark.full), 100])
@pytest.mark.parametrize("way", WAYS)
def test_every_answer_equals_a_fresh_one(models: Any, tokenizer: Any, way: str, chunk: int | None) -> None:
    chat = Conversation(models(way), tokenizer=tokenizer, max_new_tokens=24, prefill_chunk=chunk)
    chat.system = "You tell stories."
    chat.add_document(DOCUMENT)
    read = checked(chat, chat.reply("Who ran away?"))
    assert read > 60, "the document was read twice"
    first = chat.last
    assert first is not None
    prompt = first.prompt_tokens
    assert checked(chat, chat.reply("And then?")) >= prompt - 40
    assert checked(chat, chat.reply("Why?")) >= prompt - 40
    assert checked(chat, chat.regenerate()) >= prompt - 40
    assert chat.undo() == "Why?"
    assert checked(chat, chat.reply("What did the dog say to the cat?")) >= prompt - 40
    chat.messages[-4]["content"] = "And what did they do after that?"
    del chat.messages[-2:]
    assert checked(chat, chat.regenerate()) > 60
    pieces = chat.reply("Tell me more.", max_new_tokens=60)
    some = [next(pieces) for _ in range(5)]
    pieces.close()
    assert chat.messages[-1]["content"].startswith("".join(some))
    assert chat.last is not None
    assert chat.last.ended == "cancel"
    assert 5 <= len(chat.last.tokens) < 60
    assert chat.last.tokens == fresh(chat, chat.messages[:-1], 60)[: len(chat.last.tokens)]
    assert checked(chat, chat.reply("Yes?")) > prompt - 40
    assert len(chat.messages) == 9
