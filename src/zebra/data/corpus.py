"""Text, tokenised once: files to documents to one memory-mapped array of tokens, found again by content.

    files -> documents (one a file, or split at a separator line) -> tokens.npy + offsets.npy

The cache's key is a hash of the texts, the tokenizer and the options, so a changed file or tokenizer never meets stale
tokens. An entry is written aside and renamed: it is whole or absent, whenever the process is killed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zebra.progress import bar
from zebra.refusal import Refusal
from zebra.staged import staged

Encode = Callable[[list[str]], list[list[int]]]
"""Documents to their tokens, special tokens included."""

_BATCH_CHARACTERS = 1 << 20
_VERSION = 1


@dataclass(frozen=True)
class Corpus:
    """Documents as tokens: `tokens` end to end, document `i` at `tokens[offsets[i]:offsets[i + 1]]`."""

    tokens: NDArray[np.integer]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> NDArray[np.integer]:
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return np.diff(self.offsets)

    def joined(self, length: int) -> Corpus:
        """The same tokens with neighbouring documents joined into long ones of at least `length` tokens.

        Documents are joined whole. What is left at the end and is shorter joins the last long one.
        """
        ends: list[int] = []
        start = 0
        for end in self.offsets[1:]:
            if end - start >= length:
                ends.append(int(end))
                start = int(end)
        total = int(self.offsets[-1])
        if not ends:
            raise Refusal(
                f"all documents joined have {total:,} tokens, fewer than one of {length:,}. "
                "Give more text or a smaller length."
            )
        ends[-1] = total
        return Corpus(self.tokens, np.array([0, *ends], dtype=np.int64))


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files that a list of files, folders and globs names, each once, in the order given; folders sorted.

    Raises:
        Refusal: a pattern that names nothing.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True)) or [pattern]
        files = [
            file
            for match in map(Path, matches)
            for file in (sorted(match.rglob("*")) if match.is_dir() else [match])
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(match).parts)
        ]
        if not files:
            raise Refusal(f"there is no text at {pattern}. Give files, folders or globs that exist.")
        found |= dict.fromkeys(files)
    return list(found)


def read_documents(files: Sequence[Path], separator: str | None) -> Iterator[str]:
    """The documents of the files, stripped of blanks at both ends: one a file, or split at each `separator`.

    Raises:
        Refusal: a file that is not UTF-8, with the place; files without any text.
    """
    empty = True
    for file in files:
        raw = file.read_bytes()
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Refusal(
                f"{file} is not UTF-8 text: byte {error.start} is {raw[error.start]:#04x}. Convert it to UTF-8."
            ) from None
        for document in text.split(separator) if separator else [text]:
            if document.strip():
                empty = False
                yield document.strip()
    if empty:
        raise Refusal(f"there is no text in {', '.join(map(str, files))}: only blanks. Give files with text.")


def default_cache() -> Path:
    """Where tokens are kept unless a recipe says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zebra" / "tokens"


def tokenise(
    patterns: Sequence[str],
    encode: Encode,
    *,
    tokenizer: str,
    separator: str | None = None,
    append: int | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> Corpus:
    """Tokenise texts, or find them tokenised.

    Args:
        patterns: files, folders and globs.
        encode: the tokenizer's function.
        tokenizer: what tells this tokenizer from others, a hash of its definition.
        separator: splits a file into documents; None makes each file one document.
        append: a token to put after each document (end of text), or None.
        cache: the folder of the cache; `default_cache()` where None.

    Raises:
        Refusal: nothing found, an empty text, a text that is not UTF-8.
    """
    files = find_files(patterns)
    digest = hashlib.sha256(json.dumps([_VERSION, tokenizer, separator, append]).encode())
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    entry = Path(cache or default_cache()) / digest.hexdigest()[:32]
    if entry.exists():
        try:
            return _open(entry)
        except (OSError, ValueError, EOFError):  # damaged from outside; it can be made again
            shutil.rmtree(entry)
    try:
        with staged(entry) as aside:
            _build(aside, files, encode, separator, append)
    except (OSError, Refusal):
        if not entry.exists():  # else another process was first, with the same tokens
            raise
    return _open(entry)


def _open(entry: Path) -> Corpus:
    corpus = Corpus(np.load(entry / "tokens.npy", mmap_mode="r"), np.load(entry / "offsets.npy"))
    if len(corpus.tokens) != corpus.offsets[-1]:
        raise ValueError(f"{entry} is cut")
    return corpus


def _build(aside: Path, files: list[Path], encode: Encode, separator: str | None, append: int | None) -> None:
    lengths: list[int] = []
    largest = 0
    size = sum(file.stat().st_size for file in files)
    with bar("tokenising", size, "B") as advance, (aside / "tokens.raw").open("wb") as raw:
        for batch in _batches(read_documents(files, separator)):
            for ids in encode(batch):
                document = np.array(ids if append is None else [*ids, append], dtype=np.uint32)
                document.tofile(raw)
                lengths.append(len(document))
                largest = max(largest, int(document.max(initial=0)))
            advance(sum(len(text.encode()) for text in batch))
    if not sum(lengths):
        raise Refusal(f"the tokenizer makes no token of the text in {', '.join(map(str, files))}. Give other text.")
    wide = np.memmap(aside / "tokens.raw", dtype=np.uint32, mode="r")
    kind = np.uint16 if largest < 1 << 16 else np.uint32
    narrow = np.lib.format.open_memmap(aside / "tokens.npy", mode="w+", dtype=kind, shape=wide.shape)
    for start in range(0, len(wide), 1 << 24):
        narrow[start : start + (1 << 24)] = wide[start : start + (1 << 24)]
    narrow.flush()
    np.save(aside / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    del wide, narrow
    (aside / "tokens.raw").unlink()


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
