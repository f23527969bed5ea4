"""Read documents from files. The suffix of a file determines how it is read:

a suffix of zebra.data.records    records; a field of each holds a document
anything else                     UTF-8 text: one document, or split at each separator

All line ends are read as \\n.
"""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from zebra.data.records import RECORD_FILES, RecordError, read_records, record_suffix, string_field, with_line_feeds
from zebra.errors import ZebraError, first_line, missing_package
from zebra.progress import console

_FIELD = "text"
_MOST_FILES = 100_000
T = TypeVar("T", str, Path)
Names = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""One path or name, or a sequence of them."""


class Document(NamedTuple):
    """A document without whitespace at its ends, its file, and how many bytes of the file were read for it."""

    text: str
    file: Path
    bytes_read: int


def names_of(names: Names) -> list[str]:
    """Paths or names as a list of strings; a single string is one name, not a sequence of letters.

    Raises:
        ZebraError: anything that is neither a path nor a string, nor a sequence of these.
    """
    several = [names] if isinstance(names, str | os.PathLike) else names
    if not isinstance(several, Iterable) or not all(isinstance(one, str | os.PathLike) for one in several):
        raise ZebraError(f"a name must be a string, a path or a list of these; got {names!r}. Pass one of them.")
    return [os.fspath(one) for one in several]


def find_files(patterns: Names) -> list[Path]:
    """Find the files that paths and globs name, each once, in the given order; those of a folder or glob are sorted.

    Hidden files in folders are left out.

    Raises:
        ZebraError: as `names_of`; a pattern names nothing, the whole file system, or over 100,000 files and folders.
    """
    paths: dict[Path, None] = {}
    for pattern in names_of(patterns):
        top = os.path.abspath(os.path.expanduser(pattern).partition("**")[0])
        if top == os.path.abspath(os.sep) and ("**" in pattern or os.path.isdir(pattern)):
            raise ZebraError(f"{pattern} matches the whole file system. Name a folder in it.")
        matches = sorted(_bounded(glob.iglob(os.path.expanduser(pattern), recursive=True), pattern)) or [pattern]
        files = [
            file
            for match in map(Path, matches)
            for file in (sorted(_bounded(match.rglob("*"), pattern)) if match.is_dir() else [match])
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(match).parts)
        ]
        if not files:
            raise ZebraError(f"no file matches {pattern}. Give files, folders or globs that exist.")
        paths |= dict.fromkeys(files)
    return list(paths)


def _bounded(matches: Iterator[T], pattern: str) -> list[T]:
    few = list(itertools.islice(matches, _MOST_FILES + 1))
    if len(few) > _MOST_FILES:
        raise ZebraError(f"{pattern} matches more than {_MOST_FILES:,} files and folders. Name a folder with fewer.")
    return few


def document_format(file: Path, separator: str | None, field: str | None) -> tuple[str, str]:
    """How a file is read: `("text", separator)`, or `(suffix, field)` for records."""
    suffix = record_suffix(file)
    return ("text", separator or "") if suffix is None else (suffix, field or _FIELD)


def check_formats(files: Sequence[Path], separator: str | None, field: str | None) -> None:
    """Check that each reading option applies to at least one of the files.

    Raises:
        ZebraError: an empty separator, a separator without a text file, or a field without a file of records.
    """
    if separator == "":
        raise ZebraError("the separator must have at least one character; got an empty one. Leave it out.")
    if separator and not _texts(files):
        raise ZebraError(
            f"a separator applies only to text files; got the separator {separator!r} for {_listed(files)}, where each "
            "record is one document. Leave it out, and name the field that has the text."
        )
    if field is not None and len(_texts(files)) == len(files):
        raise ZebraError(
            f"a field applies only to files of records, which end in {RECORD_FILES}; got the field {field!r} for "
            f"{_listed(files)}. Leave it out, or use such files."
        )


def check_texts(patterns: Names, *, separator: str | None = None, field: str | None = None) -> None:
    """Check texts before any other work: the options, and each file up to its first document.

    Raises:
        ZebraError: as `read_documents`.
    """
    files = find_files(patterns)
    _check_options(files, separator, field)
    first = [next(_documents(file, separator, field, []), None) for file in files]
    if files and not any(first):
        raise _no_text(files)


def read_documents(files: Sequence[Path], separator: str | None = None, field: str | None = None) -> Iterator[Document]:
    """Yield the documents of files in order, without whitespace at their ends; blank documents are left out.

    Args:
        separator: splits a text file into documents; None makes each text file one document.
        field: the field of a record, or the column of a table, that has the text; `text` if None.

    Raises:
        ZebraError: as `check_formats`; a file is damaged or not UTF-8 text, a record has no text in the field, the
            separator never occurs, no file has text, or an extra is not installed. The error names the line or row.
    """
    _check_options(files, separator, field)
    empty, converted = True, list[Path]()
    for file in files:
        for document in _documents(file, separator, field, converted):
            empty = False
            yield document
    if empty:
        raise _no_text(files)
    if converted:
        message = f"line endings in {_listed(converted)} are read as \\n."
        console.print(message, soft_wrap=True)


def document_text(file: Path) -> str:
    """All text of one file: the pages of a PDF or the documents of any other file, separated by blank lines.

    Raises:
        ZebraError: as `read_documents`; no such file; a PDF that is damaged, encrypted or has only images; the extra
            `chat` is not installed, which PDFs need.
    """
    (file,) = find_files([glob.escape(str(file))])[:1]
    if file.suffix.lower() == ".pdf":
        return _pdf_text(file)
    return "\n\n".join(document.text for document in read_documents([file]))


def _pdf_text(file: Path) -> str:
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError:
        raise missing_package(str(file), "pypdf", "chat") from None
    try:
        text = "\n\n".join(filter(None, (page.extract_text().strip() for page in PdfReader(file).pages)))
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ZebraError(f"{file} cannot be read as a PDF: {first_line(error)}. Save it as text.") from None
    if not text:
        raise ZebraError(f"{file} has no text; its pages may be images. Run OCR on it first, or use a text file.")
    return text


def _check_options(files: Sequence[Path], separator: str | None, field: str | None) -> None:
    check_formats(files, separator, field)
    texts = _texts(files)
    if separator and not any(with_line_feeds(separator) in with_line_feeds(_read_text(file)) for file in texts):
        raise ZebraError(
            f"the separator {separator!r} does not occur in {_listed(texts)}. Correct it, or leave it out to read each "
            "file as one document."
        )


def _texts(files: Sequence[Path]) -> list[Path]:
    return [file for file in files if record_suffix(file) is None]


def _documents(file: Path, separator: str | None, field: str | None, converted: list[Path]) -> Iterator[Document]:
    """Yield the documents of a file that are not blank; append the file to `converted` if its line ends change."""
    if record_suffix(file):
        documents = _read_fields(file, field or _FIELD, converted)
    else:
        raw = _read_text(file)
        text = with_line_feeds(raw)
        converted += [file] if text != raw else []
        pieces = text.split(with_line_feeds(separator)) if separator else [text]
        documents = (Document(piece, file, len(piece.encode())) for piece in pieces)
    for document in documents:
        if text := document.text.strip():
            yield document._replace(text=text)


def _read_text(file: Path) -> str:
    raw = file.read_bytes()
    if raw.startswith(b"%PDF-"):  # a PDF may be valid UTF-8
        raise ZebraError(f"{file} is a PDF, not text. Extract its text first, for example with pdftotext.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ZebraError(
            f"{file} is not UTF-8 text: byte {error.start} is {raw[error.start]:#04x}. Convert it to UTF-8, or "
            "decompress it."
        ) from None
    if "\0" in text:  # UTF-16 without a BOM, or binary data
        raise ZebraError(f"{file} is not UTF-8 text: character {text.index(chr(0))} is NUL. Convert it to UTF-8.")
    return text


def _listed(files: Sequence[Path]) -> str:
    more = f" and {len(files) - 3:,} more" if len(files) > 3 else ""
    return ", ".join(map(str, files[:3])) + more


def _no_text(files: Sequence[Path]) -> ZebraError:
    return ZebraError(f"there is no text in {_listed(files)}, only whitespace. Give files with text.")


def _read_fields(file: Path, field: str, converted: list[Path]) -> Iterator[Document]:
    position = 0
    for record in read_records(file, field):
        try:
            text = string_field(record.fields, field)
            converted += [file] if text != record.fields[field] and file not in converted else []
            yield Document(text, file, record.bytes_read - position)
        except RecordError as error:
            raise ZebraError(
                f"{record.where} {error}. Name the field that has the text, or correct the file."
            ) from None
        position = record.bytes_read
