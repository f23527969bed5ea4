"""Encode text to tokens: documents, which are complete, and prompts, which a model continues.

document    <s> A </s>      as the tokenizer encodes a text; in batches, in this process or in workers
prompt      <s> A           without the tokens that the tokenizer appends to every text
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import multiprocessing
import os
import re
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from zebra.errors import ZebraError


class DocumentTokenizer(Protocol):
    """What encoding needs from a tokenizer of transformers; fast ones also have a `backend_tokenizer`."""

    split_special_tokens: bool
    eos_token_id: int | None
    special_tokens_map: Any

    def __call__(self, text: Any, **options: Any) -> Any: ...  # noqa: D102

    def save_pretrained(self, save_directory: str) -> Any: ...  # noqa: D102


def decode(tokenizer: Any, ids: Sequence[int], *, special: bool = False) -> str:
    """Decode tokens to text, without special tokens unless `special`.

    Ids beyond the vocabulary (of padded embeddings) are skipped: fast tokenizers do so themselves, others raise errors.
    """
    if not getattr(tokenizer, "is_fast", True):
        ids = [token for token in ids if token < len(tokenizer)]
    return str(tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False))


def decode_after(tokenizer: Any, before: Sequence[int], ids: Sequence[int], *, special: bool = False) -> str:
    """The text that tokens add after others. Decoded alone, they might lose their leading space."""
    first, whole = (decode(tokenizer, tokens, special=special) for tokens in (before, [*before, *ids]))
    # After bytes that form no character, a decoder may drop earlier characters too.
    return whole[len(first) :] if whole.startswith(first) else decode(tokenizer, ids, special=special)


def _definition(tokenizer: DocumentTokenizer) -> str | None:
    """The JSON of a fast tokenizer; None for a slow one, which encodes in Python (ByT5, sentencepiece)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else str(backend.to_str())


def tokenizer_digest(tokenizer: DocumentTokenizer) -> str:
    """A hash of everything that determines which tokens a text becomes."""
    definition = _definition(tokenizer)
    if definition is None:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
            definition = "".join(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()} " for file in files)
    parts = [definition, str(tokenizer.special_tokens_map), type(tokenizer).__name__]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def token_spans(tokenizer: DocumentTokenizer, text: str) -> list[tuple[int, int]]:
    """Where each token of a text begins and ends, in characters.

    Slow tokenizers do not report this: with them, the tokens of a word share its characters evenly.
    """
    if _definition(tokenizer) is not None:
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        return list(tokenizer(text, **options)["offset_mapping"])
    words = list(re.finditer(r"\s*\S+|\s+", text))
    tokens = [tokenizer(word[0], add_special_tokens=False, verbose=False)["input_ids"] for word in words]
    spans = []
    for word, n in zip(words, map(len, tokens), strict=True):
        ends = [word.start() + (word.end() - word.start()) * i // n for i in range(n + 1)] if n else []
        spans += list(itertools.pairwise(ends))
    return spans


class TextEncoding(Protocol):
    """What a prompt needs from a tokenizer; those of transformers provide it."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Encode text to tokens."""
        ...


class Affixes(NamedTuple):
    """The tokens that a tokenizer puts before and after every text."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: TextEncoding) -> Affixes:
        """The affixes of a tokenizer, from its encoding of one letter."""
        bare, full = (tokenizer.encode("x", add_special_tokens=added) for added in (False, True))
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return cls(tuple(full[:start]), tuple(full[start + len(bare) :]))
        return cls((), ())


def prompt_tokens(tokenizer: TextEncoding, text: str) -> list[int]:
    """The tokens of a text that a model is to continue."""
    return [*Affixes.of(tokenizer).prefix, *tokenizer.encode(text, add_special_tokens=False)]


def window_prefix(tokenizer: TextEncoding, bos: bool | None = None) -> tuple[int, ...]:
    """The tokens that begin each window of a text.

    Args:
        bos: None takes the tokens that the tokenizer puts before every text; True takes the same, or its BOS token if
            it puts none; False takes no tokens.

    Raises:
        ZebraError: True for a tokenizer without a BOS token.
    """
    prefix = () if bos is False else Affixes.of(tokenizer).prefix
    if prefix or not bos:
        return prefix
    token: int | None = getattr(tokenizer, "bos_token_id", None)
    if token is None:
        raise ZebraError("bos requires a tokenizer with a BOS token; this one has none. Leave bos out (--no-bos).")
    return (token,)


@dataclass(frozen=True)
class Window:
    """The tokens [start, end) of a text, with the tokens of `prefix` before them."""

    prefix: tuple[int, ...]
    start: int
    end: int

    def tokens(self, text: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
        """The tokens of the window, given those of the text."""
        inside = text[self.start : self.end]
        return np.concatenate([np.array(self.prefix, inside.dtype), inside]) if self.prefix else inside

    def __len__(self) -> int:
        return len(self.prefix) + self.end - self.start


def window_at(text: NDArray[np.integer[Any]], start: int, length: int, prefix: tuple[int, ...]) -> Window:
    """The window of at most `length` tokens from `start`, with its prefix unless the text itself has it there."""
    own = tuple(text[start : start + len(prefix)].tolist()) == prefix
    before = () if own else prefix
    return Window(before, start, min(len(text), start + length - len(before)))


def windows_of(text: NDArray[np.integer[Any]], length: int, prefix: tuple[int, ...]) -> Iterator[Window]:
    """Windows one after another, without overlap: [prefix, tokens][prefix, tokens][prefix, to].

    Raises:
        ZebraError: the length leaves no room beside the prefix.
    """
    if length <= len(prefix):
        raise ZebraError(
            f"a window must have at least {len(prefix) + 1} tokens, {len(prefix)} of them its prefix; got {length}. "
            "Use a longer one."
        )
    start = 0
    while start < len(text):
        yield (window := window_at(text, start, length, prefix))
        start = window.end


@dataclass(frozen=True)
class Encoder:
    """How documents become tokens. Must be picklable if worker processes encode.

    Attributes:
        encode: from texts to the tokens of each, special tokens included.
        digest: identifies `encode`: a hash of everything that determines which tokens a text becomes.
        append: the token that ends each document (EOS), added if the encoding does not end in it; None adds nothing.
    """

    encode: Callable[[list[str]], list[list[int]]]
    digest: str
    append: int | None = None

    @classmethod
    def of(cls, tokenizer: DocumentTokenizer, *, append_eos: bool = False) -> Encoder:
        """Encode as a tokenizer does, without truncation or padding; `append_eos` ends each text in its EOS token."""
        specials_as_text, definition = tokenizer.split_special_tokens, _definition(tokenizer)
        encode = functools.partial(_encode_in_python, tokenizer)
        if definition is not None:
            encode = functools.partial(_encode, definition, specials_as_text)
        digest = f"{tokenizer_digest(tokenizer)} {specials_as_text}" + " one end" * append_eos
        return cls(encode, digest, tokenizer.eos_token_id if append_eos else None)


def _encode(definition: str, specials_as_text: bool, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in _tokenizer(definition, specials_as_text).encode_batch(texts)]


def _encode_in_python(tokenizer: DocumentTokenizer, texts: list[str]) -> list[list[int]]:
    return list(tokenizer(texts, verbose=False)["input_ids"])


@functools.lru_cache(maxsize=1)
def _tokenizer(definition: str, specials_as_text: bool) -> Tokenizer:
    tokenizer = Tokenizer.from_str(definition)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = specials_as_text
    return tokenizer


class EncodedBatch(NamedTuple):
    """A batch of documents: their concatenated `tokens` (all tokens,), and `lengths` and `hashes` (documents,)."""

    tokens: NDArray[np.uint32]
    lengths: list[int]
    hashes: NDArray[np.uint64]


def encode_batches(batches: Iterable[list[str]], encoder: Encoder, num_proc: int) -> Iterator[EncodedBatch]:
    """Encode batches of documents, in order.

    Args:
        num_proc: number of worker processes; 1 encodes in this process. Workers end with it, even if it is killed.

    Raises:
        ZebraError: a worker was killed.
    """
    if num_proc == 1:
        yield from (_encode_batch(batch, encoder) for batch in batches)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    pending: deque[Future[EncodedBatch]] = deque()
    with ProcessPoolExecutor(num_proc, context, _start_worker, (encoder,)) as pool:
        try:
            for batch in batches:
                if len(pending) == num_proc:
                    yield pending.popleft().result()
                pending.append(pool.submit(_encode_in_worker, batch))
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise ZebraError("a tokenising worker was killed, perhaps for lack of memory. Lower num_proc.") from None
        finally:
            for future in pending:
                future.cancel()


def _encode_batch(batch: list[str], encoder: Encoder) -> EncodedBatch:
    end = encoder.append
    ended = [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in encoder.encode(batch)]
    documents = [np.array(ids, dtype=np.uint32) for ids in ended]
    hashes = [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") for text in batch]
    return EncodedBatch(np.concatenate(documents), [len(d) for d in documents], np.array(hashes, dtype=np.uint64))


_worker_encoder: Encoder
"""The encoder of a worker process, sent once and not with each batch."""


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit when the parent process ends. Otherwise a worker would wait for a batch forever if the parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(batch: list[str]) -> EncodedBatch:
    return _encode_batch(batch, _worker_encoder)
