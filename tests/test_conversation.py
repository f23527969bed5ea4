"""A conversation: each answer equals that of a fresh `generate` on all messages, but nothing is read twice."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import STORIES, TEXT, generate_tokens
from transformers import AutoTokenizer

import zebra
from zebra.conversation import Conversation
from zebra.decoding import Decoding
from zebra.errors import ZebraError
from zebra.generation import encode_messages
from zebra.model.prefix_cache import PrefixCache
from zebra.streaming import AnswerStream, ContextLengthError, Step, answer

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
    """The tokens of an answer without any cached prefix."""
    rendered = [
        {"role": one["role"], "content": "\n\n".join([*one.get("documents", []), one["content"]])} for one in answered
    ]
    ids = encode_messages(rendered, chat.tokenizer, remedy="")
    return tuple(generate_tokens(chat.model, chat.tokenizer, ids[None], max_new_tokens=new, **options)[0])


def checked(chat: Conversation, pieces: Iterator[str], new: int = 12, **options: Any) -> int:
    """Exhaust an answer, compare it with a fresh one; returns the cached tokens."""
    text = "".join(pieces)
    assert chat.last is not None
    assert chat.messages[-1] == {"role": "assistant", "content": text}
    assert chat.last.text == text
    assert chat.last.tokens == fresh(chat, chat.messages[:-1], new, **options)
    return chat.last.cached_tokens


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "chunk", [100, pytest.param(7, marks=pytest.mark.full), pytest.param(None, marks=pytest.mark.full)]
)
def test_every_answer_equals_a_fresh_one(models: Any, tokenizer: Any, way: str, chunk: int | None) -> None:
    chat = Conversation(models(way), tokenizer=tokenizer, max_new_tokens=12, prefill_chunk=chunk)
    chat.system = "You tell stories."
    chat.add_document(DOCUMENT)
    assert checked(chat, chat.reply("Who ran away?")) > 60, "the document was read twice"
    assert chat.last is not None
    # The last 32 tokens of a prompt may be read again, and under full decoding the answer.
    before = chat.last.prompt_tokens - 32
    assert checked(chat, chat.reply("And then?")) >= before
    assert checked(chat, chat.regenerate()) >= before
    assert chat.undo() == "And then?"
    assert checked(chat, chat.reply("What did the dog say to the cat?")) >= before
    chat.messages[-4]["content"] = "Who was it that ran away?"
    del chat.messages[-3:]
    assert checked(chat, chat.regenerate()) > 60
    pieces = chat.reply("Tell me more.", max_new_tokens=60)
    some = [next(pieces) for _ in range(5)]
    pieces.close()
    assert chat.messages[-1]["content"].startswith("".join(some))
    assert chat.last.ended == "cancel"
    assert 5 <= len(chat.last.tokens) < 60
    assert chat.last.tokens == fresh(chat, chat.messages[:-1], 60)[: len(chat.last.tokens)]
    assert checked(chat, chat.reply("Yes?")) >= chat.context_used // 2
    assert [message["role"] for message in chat.messages] == ["system", *["user", "assistant"] * 3]


@pytest.mark.parametrize("prompt", [20, 60])
def test_an_answer_of_full_decoding_is_not_stored_as_text(tokenizer: Any, prompt: int) -> None:
    """Under Self-Extend a short prompt has no snapshot, and its cache cannot be cut before the answer."""
    model = zebra.load(STORIES, stripes="GL:9", self_extend="2:16", full_decode=True)
    ids = torch.randint(3, 500, (prompt,), generator=torch.Generator().manual_seed(0))
    prefixes, decoding = PrefixCache(model), Decoding(max_new_tokens=30)
    first = answer(model, tokenizer, ids, decoding, prefixes)
    more = torch.cat([ids, torch.tensor(first.tokens), ids[:10]])
    steps: dict[str, list[Step]] = {"stored": [], "fresh": []}
    for store, own in zip((prefixes, PrefixCache(model)), steps.values(), strict=True):
        answer(model, tokenizer, more, Decoding(max_new_tokens=4), store, logprobs=0, on_step=own.append)
    of_stored, of_fresh = ([step.logprob for step in one] for one in steps.values())
    assert of_stored == pytest.approx(of_fresh, abs=1e-4)


def test_draws_are_those_of_a_fresh_generate_and_another_seed_each_time(models: Any, tokenizer: Any) -> None:
    chat = Conversation(models("striped"), tokenizer=tokenizer, temperature=0.9, top_p=0.9, seed=5, max_new_tokens=20)
    options = {"temperature": 0.9, "top_p": 0.9}
    before, texts = torch.get_rng_state(), set()
    for seed in (5, 6, 7):
        pieces = chat.regenerate() if chat.messages else chat.reply("Once upon a time")
        checked(chat, pieces, 20, seed=seed, **options)
        texts.add(chat.messages[-1]["content"])
    assert len(texts) == 3
    assert torch.equal(torch.get_rng_state(), before)
    checked(chat, chat.reply("Stop.", temperature=0.0, top_p=None), 20)


def test_conversations_that_share_a_store_do_not_disturb_each_other(models: Any, tokenizer: Any) -> None:
    """Each goes on from the document that one of them read."""
    prefixes = PrefixCache(models("striped"), max_texts=3)
    options = {"tokenizer": tokenizer, "prefixes": prefixes, "max_new_tokens": 10}
    chats = [Conversation(models("striped"), **options) for _ in range(2)]
    chats[0].add_document(DOCUMENT)
    chats[1].documents = [DOCUMENT]
    for question in ("Who ran?", "Why?"):
        for chat in chats:
            assert checked(chat, chat.reply(question + " Tell me." * chats.index(chat)), 10) > 60
    assert len(prefixes) == 2


def test_what_is_longer_than_the_model_reaches_is_refused_before_it_is_read(models: Any, tokenizer: Any) -> None:
    model = models("full")
    chat = Conversation(model, tokenizer=tokenizer, max_new_tokens=5)
    checked(chat, chat.reply("Hello"), 5)
    before, forwards = list(chat.messages), []
    remedy = r"has 1,\d{3} tokens, but this model reads 512.*Self-Extend \(--self-extend auto:2048\)"
    with model.register_forward_hook(lambda *_: forwards.append(1)):
        for call in (chat.reply, chat.add_document):
            with pytest.raises(ContextLengthError, match=remedy):
                call("word " * 600)
    assert (chat.messages, chat.documents, forwards) == (before, [], [])
    extended = Conversation(models("auto"), tokenizer=tokenizer, max_new_tokens=5)
    assert extended.context_length == zebra.SelfExtend.parse("auto:4096", 512).reach(512)
    checked(extended, extended.reply("word " * 600), 5)


def test_an_answer_ends_where_the_model_reads_no_more(models: Any, tokenizer: Any) -> None:
    chat = Conversation(models("full"), tokenizer=tokenizer)
    text = "word " * 155
    "".join(chat.reply(text))
    assert chat.last is not None
    assert (chat.last.ended, chat.context_used) == ("context", 512)
    with pytest.raises(ContextLengthError):
        chat.reply("And?")


def test_an_answer_that_is_stopped_before_it_begins_leaves_all_as_it_was(models: Any, tokenizer: Any) -> None:
    chat = Conversation(models("striped"), tokenizer=tokenizer, prefill_chunk=10, max_new_tokens=5)
    read: list[int] = []

    def stop_at_50(done: int, total: int) -> None:
        read.append(done)
        if done >= 50:
            stopped.set()

    stopped = threading.Event()
    chat.on_prefill = stop_at_50
    assert chat.add_document(DOCUMENT, stopped.is_set) is None
    assert (chat.messages, chat.documents, read) == ([], [], [0, 10, 20, 30, 40, 50])
    chat.on_prefill = lambda done, total: None
    tokens = chat.add_document(DOCUMENT)
    assert tokens is not None
    pieces = chat.reply("Who ran?")
    del pieces  # it was never begun
    assert (chat.messages, chat.documents, chat.last) == ([], [DOCUMENT], None)
    assert checked(chat, chat.reply("Who ran?"), 5) == tokens
    assert chat.documents == []


def test_text_comes_in_whole_characters(models: Any, tokenizer: Any) -> None:
    """Byte tokens of a character are held back until it is whole, and at the end as they are."""
    forced = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "né☃".encode() + b"\xe2\x98"]
    model = models("full")

    def force(module: Any, args: Any, output: Any) -> None:
        output.logits[0, -1, forced[len(steps)]] = 1e4

    steps: list[Step] = []
    ids, decoding = torch.tensor(tokenizer("Once upon a time")["input_ids"] * 3), Decoding(max_new_tokens=len(forced))
    with model.register_forward_hook(force):
        done = answer(model, tokenizer, ids, decoding, PrefixCache(model), on_step=steps.append)
    assert [step.token for step in steps] == [*forced, None]
    assert [step.text for step in steps] == ["n", "", "é", "", "", "☃", "", "", "\ufffd" * 2]
    assert done.text == "né☃\ufffd\ufffd"


def test_an_answer_ends_with_the_token_that_cancels_it(models: Any, tokenizer: Any) -> None:
    """As at a stop string of the server: transformers calls stopping criteria before it gives a token to a streamer."""
    model, steps = models("full"), list[Step]()
    ids = torch.tensor(tokenizer("Once upon a time").input_ids)
    decoding, prefixes = Decoding(max_new_tokens=12), PrefixCache(model)
    generated = answer(
        model, tokenizer, ids, decoding, prefixes, on_step=steps.append, cancelled=lambda: len(steps) >= 3
    )
    assert generated.ended == "cancel"
    assert generated.tokens == tuple(step.token for step in steps)
    assert len(steps) == 3


@pytest.mark.parametrize("stop", [(), ("upon",)], ids=["end token", "stop string"])
def test_a_token_that_transformers_undoes_is_no_step(
    models: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, stop: tuple[str, ...]
) -> None:
    """As on Apple's GPUs, where it checks one step late whether the text has ended."""
    deferred = pytest.importorskip("transformers.generation.utils")
    if not hasattr(deferred, "DeferredStopCheck"):
        pytest.skip("this transformers looks at once")
    events = SimpleNamespace(record=lambda: None, synchronize=lambda: None)  # a CPU has none
    monkeypatch.setattr(torch, "Event", lambda **options: events)
    monkeypatch.setattr(deferred.DeferredStopCheck, "is_supported", staticmethod(lambda *args, **kwargs: True))
    model, ids = models("full"), torch.tensor(tokenizer("Once").input_ids)
    plain = answer(model, tokenizer, ids, Decoding(max_new_tokens=12), PrefixCache(model))
    if not stop:
        monkeypatch.setattr("zebra.streaming.end_tokens", lambda *args: [plain.tokens[4]])
        monkeypatch.setattr("zebra.generation.end_tokens", lambda *args: [plain.tokens[4]])
    steps: list[Step] = []
    options: Any = {"on_step": steps.append}
    generated = answer(model, tokenizer, ids, Decoding(max_new_tokens=12, stop=stop), PrefixCache(model), **options)
    assert len(generated.tokens) < 12
    assert generated.text == "".join(step.text for step in steps)
    assert tuple(step.token for step in steps if step.token is not None) == generated.tokens


def test_steps_carry_the_models_log_probabilities(models: Any, tokenizer: Any) -> None:
    model, ids = models("striped"), torch.tensor(tokenizer("Once upon a time, there was")["input_ids"])
    options: dict[str, Any] = {"temperature": 0.7, "repetition_penalty": 1.3, "max_new_tokens": 8}
    stream = AnswerStream(model, tokenizer, ids, Decoding(**options), PrefixCache(model), logprobs=3)
    steps = list(stream)
    assert stream.result is not None
    assert tuple(step.token for step in steps) == stream.result.tokens
    whole = torch.cat([ids, torch.tensor(stream.result.tokens)])
    with torch.no_grad():
        expected = model(whole[None]).logits[0].log_softmax(-1)[len(ids) - 1 : -1]
    for step, logprobs in zip(steps, expected, strict=True):
        assert step.logprob == pytest.approx(float(logprobs[step.token]), abs=1e-4)
        likeliest = logprobs.topk(3)
        assert [token for token, _ in step.top] == likeliest.indices.tolist()
        assert [value for _, value in step.top] == pytest.approx(likeliest.values.tolist(), abs=1e-4)


def test_log_probabilities_are_those_of_the_own_answer(models: Any, tokenizer: Any) -> None:
    """Another thread runs the model between a forward pass and the token that is chosen by it."""
    model, ids = models("striped"), torch.tensor(tokenizer("Once upon a time, there was")["input_ids"])
    own, steps, undisturbed = threading.get_ident(), list[Step](), list[Step]()

    def read_another_text(*_: Any) -> None:
        if threading.get_ident() == own:
            thread = threading.Thread(target=model, args=(ids.flip(0)[None],))
            thread.start()
            thread.join()

    def answered(on_step: Callable[[Step], None]) -> None:
        answer(model, tokenizer, ids, Decoding(max_new_tokens=3), PrefixCache(model), logprobs=0, on_step=on_step)

    with ExitStack() as hooks:

        def disturb(step: Step) -> None:
            if not steps:  # behind the hooks of the answer
                hooks.enter_context(model.register_forward_hook(read_another_text))
            steps.append(step)

        answered(disturb)
    answered(undisturbed.append)
    assert steps == undisturbed


@pytest.mark.parametrize("good", [0, 3])
def test_an_error_within_an_answer_is_raised_and_the_conversation_goes_on(
    models: Any, tokenizer: Any, good: int
) -> None:
    """Also after some of its text."""
    model = models("striped")
    chat = Conversation(model, tokenizer=tokenizer, max_new_tokens=6)
    checked(chat, chat.reply("Hello"), 6)
    before, passes = list(chat.messages), itertools.count()

    def fail(*_: Any) -> None:
        if next(passes) == good:
            raise RuntimeError("out of memory")

    with model.model.layers[2].register_forward_hook(fail), pytest.raises(RuntimeError, match="out of memory"):
        list(chat.reply("And?"))
    assert chat.messages == before
    checked(chat, chat.reply("And?"), 6)


def test_sixteen_bits_differ_by_rounding(tokenizer: Any) -> None:
    """In bfloat16, the logits of a text read in parts differ from those of the whole text by rounding only."""
    model = zebra.load(STORIES, stripes="GLLL:33", dtype="bfloat16")
    ids = torch.tensor(tokenizer(DOCUMENT)["input_ids"])
    exact = zebra.load(STORIES, stripes="GLLL:33")
    with torch.no_grad():
        whole, expected = (one(ids[None]).logits[0, -1].float() for one in (model, exact))
        text = PrefixCache(model).take(ids)
        for end in (50, 90, len(ids)):
            parts = model(ids[None, len(text) : end], past_key_values=text.cache, use_cache=True).logits[0, -1]
    rounding = (whole - expected).norm() / expected.norm()
    assert (parts.float() - expected).norm() / expected.norm() < 2 * rounding


@pytest.mark.parametrize(
    ("options", "says"),
    [({"num_beams": 2}, "beam search does not support streaming"), ({"top_p": 0.5}, "temperature 0 does not sample")],
)
def test_options_that_no_conversation_can_have(models: Any, tokenizer: Any, options: Any, says: str) -> None:
    with pytest.raises(ZebraError, match=says):
        Conversation(models("full"), tokenizer=tokenizer, **options)


def test_messages_that_are_none(models: Any, tokenizer: Any) -> None:
    chat = Conversation(models("full"), tokenizer=tokenizer)
    for call, says in (
        (lambda: chat.reply(""), "empty"),
        (lambda: chat.reply("x", seeds=1), "did you mean seed"),
        (lambda: chat.reply("x", num_beams=2), "beam search does not support streaming"),
        (lambda: chat.add_document(" \n"), "no text"),
        (lambda: chat.add_document(Path("book.txt")), "a document must be a string; got a PosixPath"),
        (chat.regenerate, "no message"),
    ):
        with pytest.raises(ZebraError, match=says):
            call()
    assert chat.undo() is None
    chat.system = None
    assert chat.system is None
    assert chat.transcript() == []


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"content": "Hello"},
        {"role": "user", "content": None},
        {"role": "assistant", "content": "", "tool_calls": []},
        {"role": "user", "content": "Hello", "documents": [None]},
    ],
    ids=str,
)
def test_a_beginning_with_what_is_no_message(models: Any, tokenizer: Any, message: dict[str, Any]) -> None:
    chat = zebra.Conversation(models("full"), tokenizer=tokenizer, messages=[message])
    with pytest.raises(ZebraError, match="a role and content, both strings"):
        chat.reply("Hello")
