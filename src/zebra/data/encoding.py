"""Documents to tokens and hashes, batch by batch, here or in worker processes; the order is that of the documents.

    documents -> batches -> workers 0, 1, 2, 0, 1, 2, ... -> batches of tokens, in the same order

Each worker has a pipe of its own, of which only this process holds the other end: when this process is killed, the
workers read the end of their pipes and go too.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from zebra.errors import ZebraError

Encode = Callable[[list[str]], list[list[int]]]
"""Documents to their tokens, special tokens included; for worker processes it must be picklable."""


@dataclass(frozen=True)
class Encoder:
    """A tokenizer by its definition (the text of a tokenizer.json), so that it can go to another process."""

    definition: str
    specials_as_text: bool = False

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text, never cut or padded."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(self.definition)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = self.specials_as_text
        return tokenizer

    def __reduce__(self) -> tuple[type[Encoder], tuple[str, bool]]:
        return Encoder, (self.definition, self.specials_as_text)


class Encoded(NamedTuple):
    """A batch of documents: its tokens end to end, the tokens of each, and a hash of each one's text."""

    tokens: NDArray[np.uint32]
    lengths: list[int]
    hashes: NDArray[np.uint64]


def encoded(batches: Iterable[list[str]], encode: Encode, append: int | None, workers: int) -> Iterator[Encoded]:
    """Encode batches of documents, each followed by the token `append` if there is one, in `workers` processes."""
    if workers == 1:
        for batch in batches:
            yield _encoded(batch, encode, append)
        return
    with ExitStack() as pool:
        waiting: deque[Connection] = deque()  # the oldest first; a worker holds one batch at a time
        for batch in batches:
            if len(waiting) < workers:
                waiting.append(pool.enter_context(_worker(encode, append)))
                waiting[-1].send(batch)
                continue
            waiting.rotate(-1)
            answer = _answer(waiting[-1])
            waiting[-1].send(batch)
            yield answer
        for pipe in waiting:
            yield _answer(pipe)


def _encoded(batch: list[str], encode: Encode, append: int | None) -> Encoded:
    documents = [np.array(ids if append is None else [*ids, append], dtype=np.uint32) for ids in encode(batch)]
    hashes = [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") for text in batch]
    return Encoded(np.concatenate(documents), [len(d) for d in documents], np.array(hashes, dtype=np.uint64))


@contextmanager
def _worker(encode: Encode, append: int | None) -> Iterator[Connection]:
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    ours, theirs = context.Pipe()
    worker = context.Process(target=_serve, args=(theirs, encode, append), daemon=True)
    worker.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()  # it is what ends the worker
        worker.join()


def _serve(pipe: Connection, encode: Encode, append: int | None) -> None:
    """A worker's life: batches in, tokens out, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    while True:
        try:
            batch = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer: Encoded | Exception = _encoded(batch, encode, append)
        except Exception as error:
            answer = error
        try:
            pipe.send(answer)
        except OSError:  # the parent is gone
            return


def _answer(pipe: Connection) -> Encoded:
    try:
        answer = pipe.recv()
    except (EOFError, OSError):
        raise ZebraError("a worker that tokenises was killed, perhaps for its memory. Take fewer workers.") from None
    if isinstance(answer, Exception):
        raise answer
    return answer
