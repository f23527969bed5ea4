"""The gate between conversations and training: faults by reading, and by a model's likelihood where it is asked.

An answer depends on its document as far as the document makes it likelier under the model, in nats a token:

    gain = loss(answer | question) - loss(answer | document, question)
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
    """What is let through to training; it counts what is not, and what was cut."""

    def __init__(
        self,
        recipe: TuneRecipe,
        chat: Chat,
        load: Callable[[], PreTrainedModel],
        suites: Sequence[Conversation],
    ):
        self._recipe, self._chat, self._load = recipe, chat, load
        self._asked = recipe.data.quality
        self.counts: Counter[str] = Counter()
        self._measured: frozenset[int] = frozenset()
        if self._asked.act != "off":
            self.measure(suites)
            if self._asked.leaks:
                files = find_files(self._asked.leaks)
                self._measured |= ngrams(text for file in files for text in _texts(file))

    def measure(self, conversations: Sequence[Conversation]) -> None:
        """Conversations that are measured on and must not be trained on."""
        self._measured |= ngrams(map(evaluation_text, conversations))

    def __call__(self, conversations: Sequence[Conversation]) -> list[Conversation]:
        """Those that go on: all of them where faults are flagged only."""
        if self._asked.act == "off":
            return list(conversations)
        share = self._recipe.data.held_out or 0.0
        found = {
            i: fault
            for i, fault in faults(conversations, self._measured).items()
            if not (fault == "leak" and held(conversations[i], share))
        }
        if self._asked.independent is not None:
            rest = [i for i, one in enumerate(conversations) if i not in found and one.document is not None]
            found |= dict.fromkeys(self._independent(conversations, rest), "independent answer")
        self.counts.update(found.values())
        return [one for i, one in enumerate(conversations) if i not in found or self._asked.act == "flag"]

    def _independent(self, conversations: Sequence[Conversation], which: Sequence[int]) -> list[int]:
        """Those whose answers are about as likely without their document."""
        length = self._recipe.train.length
        told = [(i, self._chat.shortened(conversations[i], length)) for i in which]
        fit = [(i, made[0]) for i, made in told if made is not None]
        if not fit:
            return []
        alone = [self._chat.encode(conversations[i].with_document("")) for i, _ in fit]
        model = self._load()
        sums = [answer_losses(model, found) for found in ([made for _, made in fit], alone)]
        gains = sums[1][0] / sums[1][1] - sums[0][0] / sums[0][1]
        return [i for (i, _), gain in zip(fit, gains, strict=True) if gain < (self._asked.independent or 0.0)]


def _texts(file: Path) -> Iterator[str]:
    """The texts of a file that must not be trained on: of each record its longest one."""
    if record_suffix(file) is None:
        yield from (document.text for document in read_documents([file]))
    else:
        yield from parse_records(file, _longest_string, "A record is a JSON object.")


def _longest_string(record: Record) -> list[str]:
    return [max((value for value in record.fields.values() if isinstance(value, str)), key=len, default="")]


def hash_of(one: Conversation) -> int:
    """A hash of the document and then of the conversation: those on one document are held out together."""
    halves = [one.document if one.document is not None else one.text, one.text]
    return int.from_bytes(b"".join(hashlib.blake2b(half.encode(), digest_size=4).digest() for half in halves), "big")


def held(one: Conversation, share: float) -> bool:
    """Whether a conversation is held out: by hash, as in `zebra.data.mixture.split_sources`."""
    return bool(np.uint64(hash_of(one)) < np.uint64(share * 2**64))
