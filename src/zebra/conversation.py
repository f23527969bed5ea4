"""A conversation with a checkpoint: messages in its chat template, answers as they come, one cache across turns.

    turn 1    [ system | document, question 1 ] answer 1
    turn 2    [        read before                     | question 2 ] answer 2
    again     [        read before      | question 1, edited ] answer 1

Each prompt is the whole conversation as the template writes it. What it shares with the turns before is not read again.
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
from zebra.model.context import longest_text
from zebra.model.load_options import LoadOptions
from zebra.model.prefix_cache import PrefixCache, shared_tokens
from zebra.model.rope import check_fixed_rope
from zebra.model.self_extend import self_extend_of
from zebra.streaming import AnswerStream, check_streamed, context_room, read

Message = dict[str, Any]


class Conversation:
    """Messages, and answers to them that equal a fresh `generate` of the whole conversation.

    Args:
        model: a checkpoint, or a model of `zebra.load`.
        tokenizer: the checkpoint's own where None.
        messages: the first messages, each with a role (system, user or assistant) and content. A user's message may
            also have `documents`, texts that are put before its content.
        prefixes: a cache to share with other conversations of the same model; a new one where None.
        on_prefill: called while a prompt or a document is read, with the number of tokens read so far and in total.
            While an answer is read it runs in another thread.
        options: fields of `zebra.decoding.Decoding`, of which max_new_tokens is 1,024 by default; for a checkpoint
            those of `zebra.model.load_options.LoadOptions` too.

    Attributes:
        messages: all so far; may be edited between answers.
        documents: texts that are put before the user's next message.
        last: the tokens, counts and times of the last answer; None before it.

    Raises:
        ZebraError: as `zebra.load` and `Decoding`; no chat template; a rope that changes with length; beams.

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
    def reach(self) -> int | None:
        """The longest text that the model reads, with Self-Extend; None without a limit."""
        return longest_text(self.model.config, self_extend_of(self.model))

    @property
    def context_used(self) -> int:
        """Tokens of the last prompt and its answer."""
        return self.last.prompt_tokens + len(self.last.tokens) if self.last else 0

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cached keys and values, with their snapshots."""
        return self._prefixes.kv_bytes()

    @property
    def system(self) -> str | None:
        """The system message; setting it keeps all others."""
        return self.messages[0]["content"] if self._has_system() else None

    @system.setter
    def system(self, content: str | None) -> None:
        del self.messages[: self._has_system()]
        if content:
            self.messages.insert(0, {"role": "system", "content": content})

    def transcript(self) -> list[Message]:
        """The messages as the template takes them, documents within their contents."""
        return [_with_documents(message) for message in self.messages]

    def add_document(self, text: str, cancelled: Callable[[], bool] = lambda: False) -> int | None:
        """Put a document before the user's next message, and read it now.

        Args:
            cancelled: called between chunks; True ends the reading. Then the document is not added, and the part that
                was read stays in the cache.

        Returns:
            The tokens of the conversation up to the document's end; None where it was cancelled.

        Raises:
            ZebraError: an empty document.
            ContextLengthError: the conversation with it is longer than the model reads; it is not added.
        """
        if not isinstance(text, str):
            raise ZebraError(f"a document is a text; got a {type(text).__name__}. Give what it holds.")
        if not text.strip():
            raise ZebraError("the document has no text. Give another.")
        documents = [*self.documents, text]
        # The question after it is not known yet: what two questions share comes before any of them.
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
        """The answer to a message of the user, in pieces of text as they come.

        Closing the iterator ends the answer, and the part so far stays in the conversation. If it is closed before the
        first piece, the conversation does not change.

        Args:
            options: fields of `Decoding` for this answer alone.

        Raises:
            ZebraError: an empty message; an option that there is not; the chat template rejects the messages.
            ContextLengthError: the conversation is longer than the model reads; nothing is read.
        """
        if not content:
            raise ZebraError("the message is empty. Write at least one character.")
        self._attempt = 0
        return self._answer([*self.messages, _question(content, self.documents)], [], options)

    def regenerate(self, **options: Any) -> Generator[str, None, None]:
        """Another answer to the user's last message, which replaces the last answer; it is drawn with another seed.

        Args:
            options: as `reply` has them.

        Raises:
            ZebraError: there is no message of the user; as `reply`.
        """
        last = self._last_question()
        if last is None:
            raise ZebraError("there is no message to answer again. Write one first.")
        self._attempt += 1
        return self._answer(self.messages[: last + 1], self.documents, options)

    def undo(self) -> str | None:
        """Remove the user's last message and its answer; its documents are put before the next message again.

        Returns:
            The content of that message, None where there is none.
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
        """Check the options and the length now; answer as the iterator is advanced.

        Args:
            documents: those that are put before the message after this one.
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
        """All messages as tokens (N)."""
        remedy = "Take a checkpoint that was tuned to converse."
        return encode_messages(list(map(_with_documents, messages)), self.tokenizer, remedy=remedy)

    def _has_system(self) -> bool:
        return bool(self.messages) and self.messages[0]["role"] == "system"

    def _last_question(self) -> int | None:
        questions = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        return questions[-1] if questions else None


def _with_documents(message: Message) -> Message:
    """A message as the template takes it, documents before its content.

    Raises:
        ZebraError: it is no message, or has parts that would be lost here, such as tool calls.
    """
    texts = message.get("role"), message.get("content"), *message.get("documents", [])
    if not all(isinstance(text, str) for text in texts) or message.keys() - {"role", "content", "documents"}:
        raise ZebraError(
            f"a message has a role and a content, both texts, maybe documents; got {str(message)[:60]}. Change it."
        )
    content = "\n\n".join([*message.get("documents", []), message["content"]])
    return {"role": message["role"], "content": content}


def _question(content: str, documents: list[str]) -> Message:
    return {"role": "user", "content": content} | ({"documents": list(documents)} if documents else {})
