"""Files to documents. A file's suffix says how it holds them:

.jsonl  .jsonl.gz  .jsonl.zst  .parquet    records; a document is the string in a field of each
anything else                              UTF-8 text: one document, or split at each separator
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from zebra.data.records import RecordError, read_records, record_suffix, string_field
from zebra.errors import ZebraError


class Document(NamedTuple):
    """A document without whitespace at its ends, and how many bytes of its file were read to get it."""

    text: str
    bytes_read: int


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files that a list of files, folders and globs names, each once, in the order given; folders sorted.

    Raises:
        ZebraError: a pattern that names nothing.
    """
    paths: dict[Path, None] = {}
    for pattern in patterns:
        matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True)) or [pattern]
        files = [
            file
            for match in map(Path, matches)
            for file in (sorted(match.rglob("*")) if match.is_dir() else [match])
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(match).parts)
        ]
        if not files:
            raise ZebraError(f"there is no text at {pattern}. Give files, folders or globs that exist.")
        paths |= dict.fromkeys(files)
    return list(paths)


def document_format(file: Path, separator: str | None, field: str) -> tuple[str, str]:
    """How a file becomes documents: `("text", separator)` or `(suffix of records, field)`.

    Raises:
        ZebraError: a separator for a file of records.
    """
    suffix = record_suffix(file)
    if suffix is None:
        return ("text", separator or "")
    if separator:
        raise ZebraError(
            f"a separator splits text, but {file} holds records, a document each; got the separator {separator!r}. "
            "Leave it out, and name the field that has the text."
        )
    return (suffix, field)


def read_documents(files: Sequence[Path], separator: str | None = None, field: str = "text") -> Iterator[Document]:
    """The documents of the files in their order, without whitespace at both ends; blank ones are left out.

    Args:
        separator: splits a text file into documents; None makes each text file one document.
        field: the field of a record, or the column of a parquet file, that has the text.

    Raises:
        ZebraError: a file that is not what its suffix says, with the place; a record without text in the field; files
            without any text; a separator for a file of records; an extra that is not installed.
    """
    empty = True
    for file in files:
        kind, _ = document_format(file, separator, field)
        for document in _read_text(file, separator) if kind == "text" else _read_fields(file, field):
            if text := document.text.strip():
                empty = False
                yield Document(text, document.bytes_read)
    if empty:
        raise ZebraError(f"there is no text in {', '.join(map(str, files))}: only blanks. Give files with text.")


def _read_text(file: Path, separator: str | None) -> Iterator[Document]:
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ZebraError(
            f"{file} is not UTF-8 text: byte {error.start} is {raw[error.start]:#04x}. Convert it to UTF-8."
        ) from None
    for document in text.split(separator) if separator else [text]:
        yield Document(document, len(document.encode()))


def _read_fields(file: Path, field: str) -> Iterator[Document]:
    position = 0
    for record in read_records(file, field):
        try:
            yield Document(string_field(record.fields, field), record.bytes_read - position)
        except RecordError as error:
            raise ZebraError(
                f"{record.where} {error}. Name the field that has the text, or correct the file."
            ) from None
        position = record.bytes_read
