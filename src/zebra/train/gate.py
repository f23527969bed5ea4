"""The gate that conversations pass before training: it finds faults in the text, and on request by a model's loss.

An answer depends on its document to the extent that the document lowers the answer's loss, in nats per token:

    gain = loss(answer | question) - loss(answer | document, question)
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from zebra.data.conversations import Conversation
from zebra.data.documents import find_files, read_documents
from zebra.data.quality import evaluation_text, faults, ngrams
from zebra.data.records import Record, parse_records, record_suffix
from zebra.evaluate.answers import answer_losses
from zebra.train.chat import Chat
from zebra.train.tune_recipe import TuneRecipe


class Gate:
    """Selects the conversations to train on; `counts` holds the number with each fault, and later of what was cut."""

    def __init__(
        self,
        recipe: TuneRecipe,
        chat: Chat,
        load: Callable[[], PreTrainedModel],
        suites: Sequence[Conversation],
    ):
        self._recipe, self._chat = recipe, chat
        self._load = functools.cache(load)  # once, for all sources
        self._checks = recipe.data.quality
        self.counts: Counter[str] = Counter()
        self._measured: frozenset[int] = frozenset()
        if self._checks.act != "off":
            self.measure(suites)
            if self._checks.leaks:
                files = find_files(self._checks.leaks)
                self._measured |= ngrams(text for file in files for text in _texts(file))

    def measure(self, conversations: Sequence[Conversation]) -> None:
        """Add conversations for evaluation, which must not be trained on."""
        self._measured |= ngrams(map(evaluation_text, conversations))

    def __call__(self, conversations: Sequence[Conversation]) -> list[Conversation]:
        """The conversations that pass; all of them where faults are only flagged."""
        if self._checks.act == "off":
            return list(conversations)
        share = self._recipe.data.held_out or 0.0
        faulty = {
            i: fault
            for i, fault in faults(conversations, self._measured).items()
            if not (fault == "leak" and is_held_out(conversations[i], share))
        }
        if self._checks.independent is not None:
            rest = [i for i, one in enumerate(conversations) if i not in faulty and one.document is not None]
            faulty |= dict.fromkeys(self._independent(conversations, rest), "independent answer")
        self.counts.update(faulty.values())
        return [one for i, one in enumerate(conversations) if i not in faulty or self._checks.act == "flag"]

    def _independent(self, conversations: Sequence[Conversation], which: Sequence[int]) -> list[int]:
        """The indices of conversations whose answers are about as likely without the document."""
        length = self._recipe.train.length
        shortened = {i: self._chat.shortened(conversations[i], length) for i in which}
        with_document = {i: tokens[0] for i, tokens in shortened.items() if tokens is not None}
        if not with_document:
            return []
        without = [self._chat.encode(conversations[i].with_document("")) for i in with_document]
        model = self._load()
        losses = [
            sums / counts
            for sums, counts in (answer_losses(model, tokens) for tokens in (list(with_document.values()), without))
        ]
        gains = losses[1] - losses[0]
        return [i for i, gain in zip(with_document, gains, strict=True) if gain < (self._checks.independent or 0.0)]


def _texts(file: Path) -> Iterable[str]:
    """The texts of a file that must not be trained on: its documents, or the longest string of each record."""
    if record_suffix(file) is None:
        return (document.text for document in read_documents([file]))

    def longest(record: Record) -> list[str]:
        return [max((value for value in record.fields.values() if isinstance(value, str)), key=len, default="")]

    return parse_records(file, longest, "A record must be a JSON object.")


def conversation_hash(one: Conversation) -> int:
    """A 64-bit hash: 32 bits of the document, then 32 of the conversation, so one document's are held out together."""
    document = one.text if one.document is None else one.document
    # Salted, because without a document both halves hash the same text.
    digests = [blake2b(document.encode(), digest_size=4), blake2b(one.text.encode(), digest_size=4, salt=b"text")]
    return int.from_bytes(b"".join(digest.digest() for digest in digests), "big")


def is_held_out(one: Conversation, share: float) -> bool:
    """Whether a conversation is held out: by its hash, as in `zebra.data.mixture.split_sources`."""
    return bool(np.uint64(conversation_hash(one)) < np.uint64(share * 2**64))
