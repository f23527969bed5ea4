"""JSON Lines (`.jsonl`, `.jsonl.gz`, `.jsonl.zst`): one JSON object a line, streamed, with line numbers in all errors.

zstandard, of the extra `data`, is imported when a file needs it.
"""

from __future__ import annotations

import gzip
import importlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from zebra.errors import ZebraError

T = TypeVar("T")
_CHUNK_BYTES = 1 << 16  # compressed; zstandard may yield thousands of times as much
_ERRORS_SHOWN = 5


class Record(NamedTuple):
    """A JSON object and its place: the file, the line from 1 on, and how many bytes of the file were read up to it."""

    fields: dict[str, Any]
    file: Path
    line: int
    bytes_read: int

    @property
    def where(self) -> str:
        """The place in words."""
        return f"{self.file}, line {self.line}"


class RecordError(ZebraError):
    """What is wrong with a record, as the end of a sentence that begins with its place."""


def read_records(file: Path) -> Iterator[Record]:
    """The records of a file, streamed.

    Raises:
        ZebraError: no such file, another suffix, a damaged file, a line that is not a JSON object.
    """
    for line in _read_lines(file):
        try:
            yield _parse_line(line, file)
        except RecordError as error:
            raise ZebraError(f"{file}, line {line.number} {error}. A .jsonl file has one JSON object a line.") from None


def parse_records(file: Path, parse: Callable[[Record], Iterable[T]], expected: str) -> list[T]:
    """What `parse` makes of all records of a file, in order; all bad lines are reported in one error.

    Args:
        parse: raises `RecordError` for a record that it cannot use.
        expected: a sentence that says what a line should be.

    Raises:
        ZebraError: as `read_records`, and bad lines: how many, and the number and the fault of the first ones.
    """
    results: list[T] = []
    errors: list[str] = []
    for line in _read_lines(file):
        try:
            results += parse(_parse_line(line, file))
        except RecordError as error:
            errors.append(f"line {line.number} {error}")
    if errors:
        more = f"; and {len(errors) - _ERRORS_SHOWN} more" if len(errors) > _ERRORS_SHOWN else ""
        lines = f"{len(errors)} bad {'line' if len(errors) == 1 else 'lines'}"
        raise ZebraError(f"{file} has {lines}: {'; '.join(errors[:_ERRORS_SHOWN])}{more}. {expected}")
    return results


def string_field(fields: dict[str, Any], name: str) -> str:
    """The string in a field.

    Raises:
        RecordError: no such field, no string, half a surrogate pair.
    """
    if name not in fields:
        raise RecordError(f"has no field {name!r}: its fields are {', '.join(fields) or 'none'}")
    return as_string(fields[name], name)


def as_string(value: Any, name: str) -> str:
    """A value of the field `name`, which must be a string that can be encoded.

    Raises:
        RecordError: no string, half a surrogate pair.
    """
    if not isinstance(value, str):
        raise RecordError(f"has {type(value).__name__} instead of a string in the field {name!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character
        raise RecordError(f"has half a surrogate pair at character {error.start} of the field {name!r}") from None
    return value


def import_extra(module: str, file: Path) -> Any:
    """A module of the extra `data`, which a file needs.

    Raises:
        ZebraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.partition(".")[0]
        raise ZebraError(
            f"{file} is read by {name}, which is not installed. Run pip install 'zebra-llm[data]'."
        ) from None


def damaged_file(file: Path, format: str, error: object) -> ZebraError:
    """The error for a file that is not what its suffix says."""
    message = " ".join(str(error).split()) or type(error).__name__
    return ZebraError(f"{file} is not a complete {format} file: {message}. Copy or write it again.")


class _Line(NamedTuple):
    content: bytes
    number: int
    bytes_read: int


def _read_lines(file: Path) -> Iterator[_Line]:
    """The lines of a file that are not blank."""
    if not file.is_file():
        raise ZebraError(f"there is no file at {file}. Give a JSON Lines file.")
    decompress = next((how for suffix, how in DECOMPRESS.items() if file.name.lower().endswith(suffix)), None)
    if decompress is None:
        raise ZebraError(f"a JSON Lines file ends in {', '.join(DECOMPRESS)}; got {file}. Rename or convert it.")
    with file.open("rb") as raw:
        for number, content in enumerate(_split_lines(decompress(file, raw)), start=1):
            if content.strip():
                yield _Line(content, number, raw.tell())


def _split_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    pieces: list[bytes] = []  # of the line that the chunks so far have not ended
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        pieces.append(first)
        for other in others:
            yield b"".join(pieces)
            pieces = [other]
    yield b"".join(pieces)


def _parse_line(line: _Line, file: Path) -> Record:
    try:
        fields = json.loads(line.content)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise RecordError(f"is a JSON {type(fields).__name__}, not an object")
    return Record(fields, file, line.number, line.bytes_read)


def _read_chunks(file: Path, raw: BinaryIO) -> Iterator[bytes]:
    while chunk := raw.read(_CHUNK_BYTES):
        yield chunk


def _read_gzip(file: Path, raw: BinaryIO) -> Iterator[bytes]:
    try:
        yield from _read_chunks(file, gzip.GzipFile(fileobj=raw))  # type: ignore[arg-type]
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise damaged_file(file, "gzip", error) from None


def _read_zstd(file: Path, raw: BinaryIO) -> Iterator[bytes]:
    zstandard = import_extra("zstandard", file)
    frame = None
    try:
        for compressed in _read_chunks(file, raw):
            while compressed:  # a file may be several frames
                if frame is None or frame.eof:
                    frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                yield frame.decompress(compressed)
                compressed = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise damaged_file(file, "zstandard", error) from None
    if frame is not None and not frame.eof:
        raise damaged_file(file, "zstandard", "it ends before its last frame does")


DECOMPRESS: dict[str, Callable[[Path, BinaryIO], Iterator[bytes]]] = {
    ".jsonl": _read_chunks,
    ".jsonl.gz": _read_gzip,
    ".jsonl.zst": _read_zstd,
}
"""How a file of each suffix is decompressed."""
