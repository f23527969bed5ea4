"""Conversations with a model: messages in its chat template, streamed answers, one prefix cache across turns.

    turn 1    [ system | document, question 1 ] answer 1
    turn 2    [        cached                          | question 2 ] answer 2
    again     [        cached           | question 1, edited ] answer 1

Each prompt is the whole conversation, rendered by the template. Its prefix from earlier turns is not read again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import fields, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zebra.decoding import Decoding
from zebra.errors import ZebraError, check_names
from zebra.generation import Generated, encode_messages
from zebra.model.context import context_length
from zebra.model.load_options import LoadOptions
from zebra.model.prefix_cache import PrefixCache, shared_tokens
from zebra.model.rope import check_fixed_rope
from zebra.model.self_extend import self_extend_of
from zebra.streaming import AnswerStream, check_streamed, context_room, read

Message = dict[str, Any]


class Conversation:
    """A conversation whose answers equal a fresh `generate` on all messages, without reading them all again.

    Args:
        model: a checkpoint, or a model of `zebra.load`.
        tokenizer: None uses that of the checkpoint.
        messages: the first messages, each with a role (system, user or assistant) and content. A user message may
            also have `documents`, texts that are put before its content.
        prefixes: a cache to share with other conversations of the same model; None creates one.
        on_prefill: called during the prefill of a prompt or a document with the number of uncached tokens read so far,
            and their total. For `reply` and `regenerate` it is called in another thread.
        options: fields of `zebra.decoding.Decoding`, of which max_new_tokens is 1,024 by default; for a checkpoint
            also those of `zebra.model.load_options.LoadOptions`.

    Attributes:
        messages: all messages so far; they may be edited between answers.
        documents: texts that will be put before the next user message.
        last: the result of the last answer; None before the first.

    Raises:
        ZebraError: as `zebra.load` and `Decoding`; no chat template; a rope that changes with length; beam search.

    Example:
        >>> chat = zebra.Conversation("./SmolLM2-135M-Instruct", self_extend="auto:32768")
        >>> chat.add_document(Path("book.txt").read_text())
        >>> for piece in chat.reply("Who is the narrator?"):
        ...     print(piece, end="")
    """

    def __init__(
        self,
        model: PreTrainedModel | str | os.PathLike[str],
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        messages: Sequence[Message] = (),
        prefixes: PrefixCache | None = None,
        on_prefill: Callable[[int, int], None] = lambda read, total: None,
        **options: Any,
    ) -> None:
        loading, rest = LoadOptions.of(options, Decoding)
        self.decoding = Decoding(**{"max_new_tokens": 1024} | rest)
        check_streamed(self.decoding)
        config, self.tokenizer = loading.config_and_tokenizer(model, tokenizer)
        check_fixed_rope(config, "a conversation")
        self._encode([{"role": "user", "content": "?"}])  # raises without a template
        self.model = model if isinstance(model, PreTrainedModel) else loading.model(model)
        self.messages: list[Message] = [dict(message) for message in messages]
        self.documents: list[str] = []
        self.last: Generated | None = None
        self.on_prefill = on_prefill
        self._prefixes = PrefixCache(self.model) if prefixes is None else prefixes
        self._attempt = 0

    @property
    def context_length(self) -> int | None:
        """The model's context length in tokens, with Self-Extend; None if it is unlimited."""
        return context_length(self.model.config, self_extend_of(self.model))

    @property
    def context_used(self) -> int:
        """Number of tokens of the last prompt and its answer."""
        return self.last.prompt_tokens + len(self.last.tokens) if self.last else 0

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV caches and their snapshots."""
        return self._prefixes.kv_bytes()

    @property
    def system(self) -> str | None:
        """The system message or None; it can be set, which does not change the other messages."""
        return self.messages[0]["content"] if self._has_system() else None

    @system.setter
    def system(self, content: str | None) -> None:
        del self.messages[: self._has_system()]
        if content:
            self.messages.insert(0, {"role": "system", "content": content})

    def transcript(self) -> list[Message]:
        """The messages as passed to the template: documents are part of the content."""
        return [_with_documents(message) for message in self.messages]

    def add_document(self, text: str, cancelled: Callable[[], bool] = lambda: False) -> int | None:
        """Add a document before the next user message, and read it into the cache now.

        Args:
            cancelled: called before each chunk; True stops. Then the document is not added, but the part that was
                read stays in the cache.

        Returns:
            The number of tokens of the conversation up to the end of the document; None if cancelled.

        Raises:
            ZebraError: an empty document.
            ContextLengthError: the conversation with it does not fit into the context; the document is not added.
        """
        if not isinstance(text, str):
            raise ZebraError(f"a document must be a string; got a {type(text).__name__}. Pass its text.")
        if not text.strip():
            raise ZebraError("the document has no text. Use another.")
        documents = [*self.documents, text]
        # The question is not known yet: the tokens that two different questions share precede any question.
        one, other = (self._encode([*self.messages, _question(letter, documents)]) for letter in "a1")
        context_room(self.model, len(one))
        ids = one[: shared_tokens(one, other)]
        if len(ids):
            chunk = self.decoding.prefill_chunk
            read(self.model, ids, self._prefixes, chunk=chunk, on_prefill=self.on_prefill, cancelled=cancelled)
        if cancelled():
            return None
        self.documents = documents
        return len(ids)

    def reply(self, content: str, **options: Any) -> Generator[str, None, None]:
        """Answer a user message; returns an iterator over pieces of text.

        Closing the iterator ends the answer, and the part so far stays in the conversation. If it is closed before the
        first piece, the conversation does not change.

        Args:
            options: fields of `Decoding` for this answer only.

        Raises:
            ZebraError: an empty message; an unknown option; the chat template rejects the messages.
            ContextLengthError: the conversation does not fit into the context; nothing is read.
        """
        if not content:
            raise ZebraError("the message is empty. Write at least one character.")
        self._attempt = 0
        return self._answer([*self.messages, _question(content, self.documents)], [], options)

    def regenerate(self, **options: Any) -> Generator[str, None, None]:
        """Answer the last user message again with another seed; the new answer replaces the last one.

        Args:
            options: as in `reply`.

        Raises:
            ZebraError: there is no user message; and as `reply`.
        """
        last = self._last_question()
        if last is None:
            raise ZebraError("there is no message to answer again. Write one first.")
        self._attempt += 1
        return self._answer(self.messages[: last + 1], self.documents, options)

    def undo(self) -> str | None:
        """Remove the last user message and its answer; its documents will be put before the next message.

        Returns:
            The content of the removed message; None if there was none.
        """
        last = self._last_question()
        if last is None:
            return None
        question = self.messages[last]
        self.documents = [*question.get("documents", []), *self.documents]
        del self.messages[last:]
        return question["content"]

    def _answer(
        self, messages: list[Message], documents: list[str], options: dict[str, Any]
    ) -> Generator[str, None, None]:
        """Check the options and the length now; start the answer when the iterator is advanced.

        Args:
            documents: the value of `self.documents` after the answer.
        """
        check_names(options, [field.name for field in fields(Decoding)])
        decoding = replace(self.decoding, **options)
        decoding = replace(decoding, seed=decoding.seed + self._attempt)
        check_streamed(decoding)
        ids = self._encode(messages)
        context_room(self.model, len(ids))

        def pieces() -> Generator[str, None, None]:
            has_text = False
            steps = AnswerStream(self.model, self.tokenizer, ids, decoding, self._prefixes, on_prefill=self.on_prefill)
            try:
                for step in steps:
                    if step.text:
                        has_text = True
                        yield step.text
            finally:
                steps.close()
                self.last = steps.result or self.last
                if steps.result and (has_text or steps.result.ended != "cancel"):
                    self.messages = [*messages, {"role": "assistant", "content": steps.result.text}]
                    self.documents = documents

        return pieces()

    def _encode(self, messages: list[Message]) -> Tensor:
        """All messages as token IDs (N)."""
        remedy = "Use a checkpoint that was tuned for chat."
        return encode_messages(list(map(_with_documents, messages)), self.tokenizer, remedy=remedy)

    def _has_system(self) -> bool:
        return bool(self.messages) and self.messages[0]["role"] == "system"

    def _last_question(self) -> int | None:
        questions = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        return questions[-1] if questions else None


def _with_documents(message: Message) -> Message:
    """A message for the template, with its documents before its content.

    Raises:
        ZebraError: the role or the content is not a string, or there are other fields, such as tool calls.
    """
    texts = message.get("role"), message.get("content"), *message.get("documents", [])
    if not all(isinstance(text, str) for text in texts) or message.keys() - {"role", "content", "documents"}:
        raise ZebraError(
            "a message must have a role and content, both strings, and no other field but documents, a list of "
            f"strings; got {str(message)[:60]}. Fix it."
        )
    content = "\n\n".join([*message.get("documents", []), message["content"]])
    return {"role": message["role"], "content": content}


def _question(content: str, documents: list[str]) -> Message:
    return {"role": "user", "content": content} | ({"documents": list(documents)} if documents else {})
