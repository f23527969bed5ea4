"""Tokenise text once: from files to documents to one memory-mapped array of tokens, cached by content.

    files -> documents -> tokens.npy, offsets.npy, hashes.npy

The cache key is a hash of the texts, the tokenizer and the options. An entry is either complete or absent, even if the
process is killed. A damaged entry, or one of another format version, is rebuilt.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zebra.data.documents import Document, Names, check_formats, document_format, find_files, read_documents
from zebra.data.encoding import Encoder, encode_batches
from zebra.errors import ZebraError, first_line
from zebra.files import atomic_directory, file_digest, user_cache_dir
from zebra.progress import bar, console

_BATCH_CHARACTERS = 1 << 20
_COPY_BYTES = 1 << 24
_REMEDY = "Set XDG_CACHE_HOME, or data.cache_dir in a recipe, to a writable folder with free space."
_VERSION = 4


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents as tokens, one after another: document `i` is `tokens[offsets[i]:offsets[i + 1]]`.

    Attributes:
        tokens: (tokens of all documents,).
        offsets: (documents + 1,).
        hashes: (documents,), a hash of the text of each document; empty if the documents were joined, drawn or split.
    """

    tokens: NDArray[np.integer]
    offsets: NDArray[np.int64]
    hashes: NDArray[np.uint64] = dataclasses.field(default_factory=lambda: np.empty(0, dtype=np.uint64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> NDArray[np.integer]:
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def __iter__(self) -> Iterator[NDArray[np.integer]]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, (documents,)."""
        return np.diff(self.offsets)

    def joined(self, length: int) -> Corpus:
        """Join neighbouring documents, without cutting any, into documents of at least `length` tokens.

        Raises:
            ZebraError: the corpus has fewer tokens.
        """
        ends: list[int] = []
        start = 0
        for end in self.offsets[1:]:
            if end - start >= length:
                ends.append(int(end))
                start = int(end)
        total = int(self.offsets[-1])
        if not ends:
            raise ZebraError(
                f"joined documents must have at least {length:,} tokens; all documents together have {total:,}. "
                "Give more text, or use a smaller length."
            )
        ends[-1] = total
        return Corpus(self.tokens, np.array([0, *ends], dtype=np.int64))


def read_corpus(
    patterns: Names,
    encoder: Encoder,
    *,
    separator: str | None = None,
    field: str | None = None,
    num_proc: int = 1,
    cache: str | os.PathLike[str] | None = None,
) -> Corpus:
    """Tokenise texts, or load their tokens from the cache.

    Args:
        patterns: files, folders and globs.
        separator, field: see `read_documents`.
        num_proc: number of worker processes; 1 tokenises in this process. It does not change the tokens.
        cache: the folder of the cache; None for the user's.

    Raises:
        ZebraError: as `read_documents`; the texts change meanwhile or have no tokens; the cache cannot be used.
    """
    files = find_files(patterns)
    check_formats(files, separator, field)
    digests = [file_digest(file) for file in files]
    key = hashlib.sha256(json.dumps([encoder.digest, encoder.append]).encode())
    for file, digest in zip(files, digests, strict=True):
        key.update(json.dumps([*document_format(file, separator, field), digest]).encode())
    entry = _cache_folder(cache) / key.hexdigest()[:32]
    try:
        if entry.exists() and (corpus := _open_whole(entry)):
            return corpus
        try:
            with atomic_directory(entry) as directory, _unchanged(files, digests):
                size = sum(file.stat().st_size for file in files)
                _write_entry(directory, read_documents(files, separator, field), encoder, num_proc, size)
        except (OSError, ZebraError):
            if not entry.exists():  # otherwise another process has written the same tokens
                raise
        return _open(entry)
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ZebraError(f"the token cache {entry} cannot be used: {reason}. {_REMEDY}") from None


def _cache_folder(cache: str | os.PathLike[str] | None) -> Path:
    try:
        return Path(cache or user_cache_dir("tokens"))
    except RuntimeError:
        raise ZebraError(f"the token cache requires a home folder, and this user has none. {_REMEDY}") from None


@contextmanager
def _unchanged(files: Sequence[Path], digests: Sequence[str]) -> Iterator[None]:
    """Check that files have not changed after the body, even if it fails: a changed file explains the error."""

    def check() -> None:
        for file, digest in zip(files, digests, strict=True):
            if not file.exists() or file_digest(file) != digest:
                raise ZebraError(
                    f"{file} changed while it was tokenised. Run again when no other program writes to it."
                ) from None

    try:
        yield
    except (OSError, ZebraError):
        check()
        raise
    check()


def _open_whole(entry: Path) -> Corpus | None:
    """Open an entry. If it is damaged or of another version, remove it and return None."""
    try:
        return _open(entry)
    except (EOFError, OSError):
        message = f"the cache entry {entry} is damaged or of another version; tokenising again."
        console.print(message, soft_wrap=True)
        shutil.rmtree(entry, ignore_errors=True)
        return None


def _open(entry: Path) -> Corpus:
    """Open an entry.

    Raises:
        OSError, EOFError: it cannot be read, is of another version, or incomplete.
    """
    try:
        version = json.loads((entry / "version.json").read_text())
        tokens = np.load(entry / "tokens.npy", mmap_mode="r")
        corpus = Corpus(tokens, np.load(entry / "offsets.npy"), np.load(entry / "hashes.npy"))
    except ValueError as error:
        raise EOFError(f"it is damaged: {error}") from None
    if version != _VERSION or len(corpus.tokens) != corpus.offsets[-1] or len(corpus) != len(corpus.hashes):
        raise EOFError(f"it has format version {version}, or is incomplete")
    return corpus


def _write_entry(directory: Path, documents: Iterator[Document], encoder: Encoder, num_proc: int, size: int) -> None:
    lengths: list[int] = []
    hashes: list[NDArray[np.uint64]] = []
    largest = total = 0
    start = time.perf_counter()
    with bar("tokenising", size, "B") as advance, (directory / "tokens.raw").open("wb") as raw:
        for batch in encode_batches(_batches(documents, advance), encoder, num_proc):
            raw.write(batch.tokens.data)
            lengths += batch.lengths
            hashes.append(batch.hashes)
            largest = max(largest, int(batch.tokens.max(initial=0)))
            total += len(batch.tokens)
            advance(note=f"{total:,} tokens, {total / (time.perf_counter() - start):,.0f} tokens/s")
    if not total:
        raise ZebraError(f"the tokenizer produces no tokens from the {len(lengths):,} documents. Use other text.")
    dtype = np.uint16 if largest < 1 << 16 else np.uint32
    # Written, not memory-mapped: on a full disk a write fails, but a store to mapped memory kills the process.
    with (directory / "tokens.raw").open("rb") as raw, (directory / "tokens.npy").open("wb") as narrow:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (total,)}
        np.lib.format.write_array_header_1_0(narrow, header)
        while chunk := raw.read(_COPY_BYTES):
            narrow.write(np.frombuffer(chunk, np.uint32).astype(dtype).data)
    (directory / "tokens.raw").unlink()
    np.save(directory / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    np.save(directory / "hashes.npy", np.concatenate(hashes))
    (directory / "version.json").write_text(json.dumps(_VERSION))


def _batches(documents: Iterator[Document], advance: Callable[..., None]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document.text)
        size += len(document.text)
        advance(document.bytes_read)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
