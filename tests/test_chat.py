"""Chat templates: which tokens are trained on, one by one, and what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import STORIES
from transformers import AutoTokenizer

from zebra.data.conversations import Conversation, Message, conversations_of
from zebra.errors import ZebraError
from zebra.train.chat import NAMED, Chat
from zebra.train.gate import conversation_hash

LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""A template without marks, of which trl has no copy."""
ONLY_LAST = (
    "{% for m in messages %}{% if loop.last %}{{ m['role'] + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TURNS = Conversation(
    (
        *(Message("user", "Who ran?"), Message("assistant", "The dog.")),
        *(Message("user", "Who sat?"), Message("assistant", "A cat.")),
    ),
    "here",
)


def tokenizer(template: str | None = None, *extra: str) -> Any:
    stories_tokenizer = AutoTokenizer.from_pretrained(STORIES)
    if extra:
        stories_tokenizer.add_special_tokens({"additional_special_tokens": list(extra)})
    stories_tokenizer.chat_template = template
    return stories_tokenizer


def llama_3() -> tuple[Any, None]:
    from trl.chat_template_utils import llama3_chat_template

    return tokenizer(llama3_chat_template, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), None


# What is trained on stands in braces; _ is the tokenizer's mark of a blank.
MASKS: dict[str, tuple[Any, str, str]] = {
    "named, with marks": (
        lambda: (tokenizer(), "plain"),
        "<s> _ U s er : \\n W h o _r an ? \\n \\n A s s is t an t : \\n {T} {he} {_do} {g} {.} {</s>} _ \\n "
        "U s er : \\n W h o _s at ? \\n \\n A s s is t an t : \\n {A} {_c} {at} {.} {</s>} _ \\n",
        "</s>",
    ),
    "chatml": (
        lambda: (tokenizer(None, "<|im_start|>", "<|im_end|>"), "chatml"),
        "<|im_start|> _u s er \\n W h o _r an ? <|im_end|> _ \\n "
        "<|im_start|> _a s s is t an t \\n {T} {he} {_do} {g} {.} {<|im_end|>} _ \\n "
        "<|im_start|> _u s er \\n W h o _s at ? <|im_end|> _ \\n "
        "<|im_start|> _a s s is t an t \\n {A} {_c} {at} {.} {<|im_end|>} _ \\n",
        "<|im_end|>",
    ),
    "its own, with trl's marks": (
        llama_3,
        "<s> <|start_header_id|> _u s er <|end_header_id|> _ \\n \\n W h o _r an ? <|eot_id|> "
        "<|start_header_id|> _a s s is t an t <|end_header_id|> _ \\n \\n {T} {he} {_do} {g} {.} {<|eot_id|>} "
        "<|start_header_id|> _u s er <|end_header_id|> _ \\n \\n W h o _s at ? <|eot_id|> "
        "<|start_header_id|> _a s s is t an t <|end_header_id|> _ \\n \\n {A} {_c} {at} {.} {<|eot_id|>}",
        "<|eot_id|>",
    ),
    "its own, without marks": (
        lambda: (tokenizer(LLAMA_2), None),
        "<s> _ [ I N S T ] _ W h o _r an ? _ [ / I N S T ] {_The} {_do} {g} {.} {_} {</s>} "
        "_ [ I N S T ] _ W h o _s at ? _ [ / I N S T ] {_} {A} {_c} {at} {.} {_} {</s>}",
        "</s>",
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_the_mask_token_by_token(name: str) -> None:
    make, expected, stop = MASKS[name]
    words, named = make()
    chat = Chat(words, named, "here")
    tokenized = chat.encode(TURNS)
    pieces = [
        piece.replace("▁", "_").replace("<0x0A>", "\\n") for piece in words.convert_ids_to_tokens(tokenized.input_ids)
    ]
    shown = [
        f"{{{piece}}}" if answer else piece for piece, answer in zip(pieces, tokenized.assistant_mask, strict=True)
    ]
    assert " ".join(shown) == expected
    assert words.convert_ids_to_tokens([chat.stop]) == [stop]
    # What is trained on is what the template renders, to the token.
    own = chat.template
    assert (
        tokenized.input_ids
        == words.apply_chat_template([m.for_template() for m in TURNS.messages], chat_template=own)["input_ids"]
    )


def test_prompts_at_inference_are_the_beginning_of_what_was_trained_on() -> None:
    for make, _, _ in MASKS.values():
        words, named = make()
        chat = Chat(words, named, "here")
        whole = chat.encode(TURNS)
        prompt = words.apply_chat_template(
            [TURNS.messages[0].for_template()], chat_template=chat.template, add_generation_prompt=True
        )["input_ids"]
        assert whole.input_ids[: len(prompt)] == prompt
        assert whole.assistant_mask[: len(prompt) + 1] == [False] * len(prompt) + [True]


def test_the_written_template_has_no_marks_and_says_the_same() -> None:
    words = tokenizer(None, "<|im_start|>", "<|im_end|>")
    for name, marked in NAMED.items():
        plain = Chat(words, name, "here").template
        assert "generation %}" not in plain.replace("add_generation_prompt", "")
        dialogue = [Message("system", "Be kind.").for_template(), *(m.for_template() for m in TURNS.messages)]
        for options in ({}, {"add_generation_prompt": True}):
            texts = {
                words.apply_chat_template(dialogue, chat_template=of, tokenize=False, **options)
                for of in (plain, marked)
            }
            assert len(texts) == 1


def test_what_has_no_template_or_the_wrong_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ZebraError, match=r"no chat template\. Set chat_template to plain, chatml"):
        Chat(tokenizer(), None, "here")
    with pytest.raises(ZebraError, match="got 'alpaca'"):
        Chat(tokenizer(), "alpaca", "here")
    with pytest.raises(ZebraError, match=r"chatml requires <\|im_start\|> and <\|im_end\|>"):
        Chat(tokenizer(), "chatml", "here")
    endless = tokenizer()
    endless.eos_token = None
    with pytest.raises(ZebraError, match="plain requires an end-of-text token"):
        Chat(endless, "plain", "here")
    with pytest.raises(ZebraError, match="answers cannot be located"):
        Chat(tokenizer(ONLY_LAST), None, "here").encode(TURNS)
    (tmp_path / "own.jinja").write_text(LLAMA_2)
    assert Chat(tokenizer(), str(tmp_path / "own.jinja"), "here").encode(TURNS).assistant_mask.count(True) == 13


def test_what_a_template_does_not_take_is_refused_with_its_line() -> None:
    strict = tokenizer(
        LLAMA_2.replace("{% else %}", "{% elif m['role'] == 'system' %}{{ raise_exception('no system') }}{% else %}")
    )
    dialogue = Conversation((Message("system", "x"), *TURNS.messages), "file, line 3")
    with pytest.raises(ZebraError, match="file, line 3: the chat template of here cannot be rendered: no system"):
        Chat(strict, None, "here").encode(dialogue)


STORY = " ".join(f"Then number {i} came and sat with the little dog." for i in range(60))


@pytest.mark.parametrize("length", [120, 200, 333, 900])
def test_a_long_document_is_cut_in_its_middle_and_nothing_else(length: int) -> None:
    words = tokenizer()
    chat = Chat(words, "plain", "here")
    long = next(
        conversations_of({"document": STORY, "question": "Who came first?", "answer": "Number 0 came."}, "here")
    )
    whole = chat.encode(long)
    tokenized, cut = chat.fitted(long, length)
    assert length - 24 < len(tokenized.input_ids) <= length
    assert 0 <= len(whole.input_ids) - len(tokenized.input_ids) <= cut
    text = words.decode(tokenized.input_ids)
    before, behind = text.split("[...]")
    assert text.endswith("Who came first?\n\nAssistant:\nNumber 0 came.</s> \n")
    assert before.removeprefix("<s> User:\n").strip() in STORY
    assert behind.split("\n\nWho")[0].strip() in STORY
    assert [t for t, a in zip(*tokenized, strict=True) if a] == [t for t, a in zip(*whole, strict=True) if a]
    assert chat.fitted(long, len(whole.input_ids)) == (whole, 0)


def test_what_no_cut_makes_short_enough_is_refused() -> None:
    chat = Chat(tokenizer(), "plain", "here")
    with pytest.raises(
        ZebraError, match=r"file, line 9 is too long: it has \d+ tokens, train.length is 32, and it has no"
    ):
        chat.fitted(next(conversations_of({"prompt": "a dog " * 40, "completion": "x"}, "file, line 9")), 32)
    record = {"document": "a dog ran " * 40, "question": "Who? " * 30, "answer": "x"}
    with pytest.raises(ZebraError, match="does not fit without its document either"):
        chat.fitted(next(conversations_of(record, "here")), 32)


CALL: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1, "b": 1}'}}]},
        {"role": "tool", "name": "add", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ],
    "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
}


@pytest.mark.parametrize("marked", [True, False])
def test_tools_and_calls_are_written_and_calls_are_trained_on(marked: bool) -> None:
    from trl.chat_template_utils import qwen3_chat_template, qwen3_training_chat_template

    words = tokenizer(qwen3_training_chat_template if marked else qwen3_chat_template, "<|im_start|>", "<|im_end|>")
    (conversation,) = conversations_of(CALL, "here")
    tokenized = Chat(words, None, "here").encode(conversation)
    answers = [
        words.decode([token for token, _ in group])
        for answer, group in itertools.groupby(zip(*tokenized, strict=True), key=lambda pair: pair[1])
        if answer
    ]
    assert '{"name": "add", "arguments": {"a": 1, "b": 1}}' in answers[0]  # an object, not a quoted string
    assert "It is 2." in answers[1]
    text = words.decode(tokenized.input_ids)
    assert '"parameters": {}' in text
    assert "<tool_response>\n2\n" in text.replace("\n ", "\n")


def test_a_template_that_drops_the_tools_is_refused() -> None:
    """The call would be an empty answer."""
    (conversation,) = conversations_of(CALL, "file, line 4")
    with pytest.raises(ZebraError, match="file, line 4: the chat template of here does not render the tools add"):
        Chat(tokenizer(), "plain", "here").encode(conversation)


def test_a_template_file_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_bytes(b"\xff")
    with pytest.raises(ZebraError, match=r"own\.jinja is not UTF-8"):
        Chat(tokenizer(), str(tmp_path / "own.jinja"), "here")


def test_conversations_without_a_document_have_hashes_of_64_bits() -> None:
    hashes = [conversation_hash(Conversation((Message("user", str(i)),), "")) for i in range(40)]
    assert all(one >> 32 != one & 0xFFFFFFFF for one in hashes)
    on_one = [replace(TURNS, document="a story", messages=(Message("user", str(i)),)) for i in range(2)]
    first, second = map(conversation_hash, on_one)
    assert first >> 32 == second >> 32  # held out together
    assert first != second
