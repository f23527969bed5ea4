"""Files to documents. A file's suffix says how it holds them:

    .jsonl  .jsonl.gz  .jsonl.zst    one JSON object a line; the document is the string in its field
    .parquet                         one record a row; the document is the string in its column
    anything else                    UTF-8 text: one document, or split at each separator

Records are streamed and never held together. pyarrow, of the extra `data`, is imported when a file needs it.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from zebra.data.jsonl import DECOMPRESS, RecordError, as_string, damaged_file, import_extra, read_records, string_field
from zebra.errors import ZebraError

_PARQUET_ROWS = 64  # a record may be a whole book


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
    suffix = next((suffix for suffix in (*DECOMPRESS, ".parquet") if file.name.lower().endswith(suffix)), None)
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
        suffix, split_by = document_format(file, separator, field)
        read = {"text": _read_text, ".parquet": _read_parquet}.get(suffix, _read_jsonl)
        for document in read(file, split_by):
            if text := document.text.strip():
                empty = False
                yield Document(text, document.bytes_read)
    if empty:
        raise ZebraError(f"there is no text in {', '.join(map(str, files))}: only blanks. Give files with text.")


def _read_text(file: Path, separator: str) -> Iterator[Document]:
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ZebraError(
            f"{file} is not UTF-8 text: byte {error.start} is {raw[error.start]:#04x}. Convert it to UTF-8."
        ) from None
    for document in text.split(separator) if separator else [text]:
        yield Document(document, len(document.encode()))


def _read_jsonl(file: Path, field: str) -> Iterator[Document]:
    position = 0
    for record in read_records(file):
        try:
            yield Document(string_field(record.fields, field), record.bytes_read - position)
        except RecordError as error:
            raise _no_text(record.where, error) from None
        position = record.bytes_read


def _read_parquet(file: Path, column: str) -> Iterator[Document]:
    arrow, parquet = import_extra("pyarrow", file), import_extra("pyarrow.parquet", file)
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            columns = table.schema_arrow.names
            if column not in columns:
                raise ZebraError(
                    f"{file} has no column {column!r}: its columns are {', '.join(columns)}. Name the field that has "
                    "the text."
                )
            bytes_per_row = file.stat().st_size // max(1, table.metadata.num_rows)
            for batch in table.iter_batches(_PARQUET_ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield Document(as_string(value, column), bytes_per_row)
    except RecordError as error:
        raise _no_text(f"{file}, row {number}", error) from None
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise damaged_file(file, "parquet", error) from None


def _no_text(where: str, error: RecordError) -> ZebraError:
    return ZebraError(f"{where} {error}. Name the field that has the text, or correct it.")
