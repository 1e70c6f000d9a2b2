"""Rows to texts: JSON lines, JSON arrays, Parquet, Arrow, .npz and .csv; and the errors of rows without a text."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from eso_jax.data import streams
from eso_jax.data.streams import NotText, Opener
from eso_jax.errors import EsoError

FIELDS = ("text", "sentence", "article", "article_text", "content")  # the first there is, where none is asked for
JSON = (".jsonl", ".json", ".ndjson", ".jsonlines")
COLUMNS = (".parquet", ".arrow", ".feather", ".npz")
TABLES = (".csv", ".tsv")  # their first line names the columns
Fields = Sequence[str | tuple[str, ...]]  # of several in one's place, the first that there is
SHOWN = 3  # names in a line


class Reading:
    """How files are to be read; and, while they are read, which rows and files were left out.

    Attributes:
      flag: the option that named the files, for errors.
      field: the field of rows that is the text; None: the first of `known` that a file has.
      known: names of fields with a text.
      include: patterns of the files of folders, globs and archives; none: all.
      skip_rows, skip_files: leave out what cannot be read, and count it; else that is an error.
      rows, files: what was left out, and why: a line each.
    """

    def __init__(self, field: str | None = None, include: Iterable[str] = (), skip_rows: bool = False,
                 skip_files: bool = False, flag: str = "--from", known: tuple[str, ...] = FIELDS):
        self.flag, self.field, self.known, self.include = flag, field, known, tuple(include)
        self.skip_rows, self.skip_files = skip_rows, skip_files
        self.rows: list[str] = []
        self.files: list[str] = []

    def options(self) -> dict[str, Any]:
        """All that changes what is read of the same files."""
        return {"field": self.field, "include": list(self.include), "skip_bad_rows": self.skip_rows,
                "skip_bad_files": self.skip_files}

    def bad_row(self, name: str, place: str, reason: str) -> None:
        """Counts a row, or raises an EsoError."""
        if not self.skip_rows:
            raise EsoError(f"{self.flag} = {name!r}: {place} {reason}; mend it, name another field by --field, or "
                           "leave such rows out by --skip-bad-rows")
        self.rows.append(f"{name}, {place} {reason}")

    def bad_file(self, name: str, reason: str) -> None:
        """Counts a file, or raises an EsoError."""
        if not self.skip_files:
            raise EsoError(f"{self.flag} = {name!r}: {reason}; choose files by --include (such as '*.txt'), or leave "
                           "such files out by --skip-bad-files")
        self.files.append(f"{name} {reason}")

    def report(self) -> None:
        """Says what was left out."""
        from eso_jax.console import say

        for unit, left_out in (("row", self.rows), ("file", self.files)):
            if left_out:
                more = f"; and {len(left_out) - SHOWN:,} more" if len(left_out) > SHOWN else ""
                say(f"left out {len(left_out):,} {unit}{'s' * (len(left_out) > 1)}: "
                    f"{'; '.join(left_out[:SHOWN])}{more}")


class BadRow(ValueError):
    """A row has no text, and why."""


def texts(name: str, opener: Opener, reading: Reading, fields: tuple[str, ...] = ()) -> Iterator[str]:
    """The texts of the rows of one file. Its name says its format; `opener` gives its content, decompressed.

    Args:
      fields: of each row these texts, one after the other, unless one of them is blank; none: the one that `reading`
        says.

    Raises:
      EsoError: a row has no text.
      NotText: the file has no such field, or is not what its name says.
    """
    field = reading.field
    for place, row in each(name, opener, reading, fields):
        try:
            if isinstance(row, BadRow):
                raise row
            if field is None and isinstance(row, dict):
                field = next((known for known in FIELDS if known in row), None)
            found = [text_of(row, part) for part in fields or (field,)]
            if not fields or all(text.strip() for text in found):
                yield from found
        except BadRow as error:
            reading.bad_row(name, place, str(error))


def text_of(row: Any, field: str | None) -> str:
    """The text of a row: its `field` ("a.b" is b of a), or the row itself where it is a text.

    Raises:
      BadRow: it has none.
    """
    if isinstance(row, str):
        return _as_text(row, "the row")
    if not isinstance(row, dict):
        raise BadRow(f"is {_kind(row)}, not an object with a text")
    value = row
    for part in [field] if field in row else (field or FIELDS[0]).split("."):
        if not isinstance(value, dict) or part not in value:
            there = ", ".join(map(repr, list(row)[:8])) or "none"
            raise BadRow(f"has no field {field if field else ', '.join(FIELDS)} (its fields: {there})")
        value = value[part]
    if field == "article_text" and isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "\n".join(value)  # the scientific papers
    return _as_text(value, f"field {field!r}")


def _as_text(value: Any, what: str) -> str:
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise BadRow(f"has a {what} that is not UTF-8") from None
    if not isinstance(value, str):
        turns = isinstance(value, list) and value and isinstance(value[0], dict)
        raise BadRow(f"has a {what} that is {_kind(value)}, not text" + (
            " (turns of a chat? make one text of each chat first)" if turns else ""))
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"has a {what} with half a character (a lone surrogate)") from None
    return value


def _kind(value: Any) -> str:
    kinds: list[tuple[Any, str]] = [(type(None), "null"), (bool, "true or false"), ((int, float), "a number"),
                                    (list, "a list"), (dict, "an object")]
    return next((name for kind, name in kinds if isinstance(value, kind)), type(value).__name__)


def each(name: str, opener: Opener, reading: Reading, fields: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """(where it is, the row) of each row of one file; a BadRow in place of one that cannot be parsed. Raises NotText as
    `texts` does. Of columns, those of `fields` alone are read, or that of `reading`."""
    plain, asked = streams.inner_name(name), fields or (reading.field or reading.known,)
    if plain.endswith(COLUMNS) or streams.head(opener).startswith(b"PAR1"):
        reader = _npz if plain.endswith(".npz") else _arrow if plain.endswith((".arrow", ".feather")) else _parquet
        yield from ((f"row {number}", row) for number, row in enumerate(reader(opener, asked), 1))
        return
    if plain.endswith(TABLES):
        delimiter = "\t" if plain.endswith(".tsv") else ","
        yield from ((f"row {number}", row) for number, row in enumerate(_table(opener, asked, delimiter), 1))
        return
    first = next((line for line in streams.lines(opener) if line.strip()), b"").strip()
    if first.startswith(b"[") or plain.endswith(".json") and first == b"{":
        try:
            whole = json.loads(streams.text(opener))
        except (json.JSONDecodeError, RecursionError) as error:
            if first == b"[" or first == b"{":
                raise NotText(f"is no JSON ({_reason(error)})") from error
        else:
            rows = whole if isinstance(whole, list) else [whole]
            yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
            return
    for number, line in enumerate(streams.lines(opener), 1):
        if line.strip():
            yield f"line {number}", _parse(line)


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError:
        return BadRow("is not UTF-8")
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number of thousands of digits
        cut = "" if line.endswith(b"\n") else "; the file may be cut short"
        return BadRow(f"is no JSON ({_reason(error)}{cut})")


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deep"
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _column(field: str | tuple[str, ...], columns: list[str]) -> str:
    """The column that is read, of those that there are."""
    names = (field, field.partition(".")[0]) if isinstance(field, str) else field
    column = next((name for name in names if name in columns), None)
    if column is None:
        missing = field if isinstance(field, str) else ", ".join(field)
        remedy = "--field names one" if isinstance(field, str) or field == FIELDS else "rename one"
        raise NotText(f"has no column {missing} (its columns: {', '.join(map(repr, columns[:8]))}; {remedy})")
    return column


def _parquet(opener: Opener, fields: Fields) -> Iterator[dict[str, Any]]:
    from pyarrow import parquet

    with streams.seekable(opener) as file, parquet.ParquetFile(file) as table:
        columns = [_column(field, table.schema_arrow.names) for field in fields]
        for batch in table.iter_batches(columns=columns):
            yield from batch.to_pylist()


def _arrow(opener: Opener, fields: Fields) -> Iterator[dict[str, Any]]:
    """The file format of Arrow, or the stream that save_to_disk of Hugging Face's datasets writes."""
    import pyarrow

    with streams.seekable(opener) as file:
        if streams.head(opener).startswith(b"ARROW1"):
            table = pyarrow.ipc.open_file(file)
            batches: Iterable[Any] = map(table.get_batch, range(table.num_record_batches))
        else:
            batches = table = pyarrow.ipc.open_stream(file)
        columns = [_column(field, table.schema.names) for field in fields]
        for batch in batches:
            yield from batch.select(columns).to_pylist()


def _table(opener: Opener, fields: Fields, delimiter: str) -> Iterator[Any]:
    csv.field_size_limit(sys.maxsize)  # 128 KiB otherwise, and texts are longer
    table = csv.reader(map(streams.as_text, streams.lines(opener)), delimiter=delimiter, strict=True)
    names = next(table, [])
    columns = [names.index(_column(field, names)) for field in fields]
    for row in filter(None, table):
        cells = {names[column]: row[column] for column in columns if column < len(row)}
        yield cells if len(row) == len(names) else BadRow(f"has {len(row)} cells, and the first line {len(names)}")


def _npz(opener: Opener, fields: Fields) -> Iterator[dict[str, Any]]:
    import numpy as np

    with streams.seekable(opener) as file, np.load(file) as arrays:
        columns = [_column(field, arrays.files) for field in fields]
        for values in zip(*(arrays[column].ravel().tolist() for column in columns), strict=True):
            yield dict(zip(columns, values, strict=True))
