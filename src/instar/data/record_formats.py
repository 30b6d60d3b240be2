"""The formats of text sources, each read record by record, from any record on.

What is wrong with one record never stops the others: it comes as a `Record` that says why. Where a
file itself is damaged, one such record stands for the rest of it.
"""

import contextlib
import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
from etils import epath
from pyarrow import parquet

from instar.errors import UserError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

# The csv module's own limit for a field (128 KiB) is less than a long document.
_LONGEST_CSV_FIELD = 2**31 - 1
# How many rows of a Parquet file are decoded at a time.
_PARQUET_ROWS = 1024

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """One record of a file: the `text` of a document, or None and the `reason` why it is broken.

    `position` numbers the records of a file from 0: the lines of JSON Lines, the rows of a table;
    a file of plain text is one record.
    """

    file: str
    position: int
    text: str | None
    reason: str | None = None


def read_text(path: epath.Path, start: int) -> Iterator[Record]:
    """Yields a whole file as one record, with its line ends as they are."""
    with _open(path) as file:
        whole = (file.read() for _ in range(1))
        yield from _records(path, whole, _checked, start)


def read_jsonl(path: epath.Path, start: int, field: str) -> Iterator[Record]:
    """Yields lines, each a JSON object with the text at `field`; blank lines are left out."""

    def parse(line: bytes) -> str | None:
        if line.isspace():
            return None
        try:
            value = json.loads(line.decode("utf-8-sig"))
        except UnicodeError:
            raise _BrokenError("not valid UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise _BrokenError(f"not valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise _BrokenError("not a JSON object")
        return _checked(value.get(field))

    with _open(path) as file:
        yield from _records(path, file, parse, start)


def read_csv(
    path: epath.Path, start: int, field: str, where: tuple[str, str] | None = None
) -> Iterator[Record]:
    """Yields the rows below a header, with the text in the column `field`.

    Empty rows are left out.

    Args:
      where: a column and the value it must have; rows with another are left out too.

    Raises:
      UserError: the header lacks a column.
    """
    csv.field_size_limit(_LONGEST_CSV_FIELD)
    with _open(path) as file:
        # A byte that is not UTF-8 becomes a lone surrogate, which `_checked` finds.
        lines = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.reader(lines)
        header = _header(path, rows)
        column = _column(path, field, header)
        condition = None if where is None else (_column(path, where[0], header), where[1])

        def parse(row: list[str]) -> str | None:
            if not row:
                return None
            if len(row) != len(header):
                raise _BrokenError(f"it has {len(row)} fields, and the header {len(header)}")
            if condition is not None and row[condition[0]] != condition[1]:
                return None
            return _checked(row[column])

        yield from _records(path, rows, parse, start)


def read_parquet(path: epath.Path, start: int, field: str) -> Iterator[Record]:
    """Yields the rows of a table, with the text in the column `field`.

    Raises:
      UserError: there is no such column, or it does not hold text.
    """
    with path.open("rb") as file:
        try:
            table = parquet.ParquetFile(file)
        except (pa.ArrowInvalid, OSError) as error:
            if not _is_damage(error):
                raise
            yield _damaged(path, 0, error)
            return
        schema = table.schema_arrow
        kind = schema.field(_column(path, field, schema.names)).type
        if not _holds_text(kind):
            raise UserError(f"column {field!r} of {path} holds {kind}, not text: name another one")
        yield from _records(path, _parquet_values(table, field, start), _checked, start, start)


def _parquet_values(
    table: parquet.ParquetFile, field: str, start: int
) -> Iterator[bytes | str | None]:
    """Yields the values of a column from row `start` on, without reading the groups before it."""
    first = 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        skip, first = max(start - first, 0), first + rows
        if skip >= rows:
            continue
        for batch in table.iter_batches(_PARQUET_ROWS, row_groups=[group], columns=[field]):
            column = batch.column(0)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            # As bytes, for one value that is not UTF-8 would otherwise fail the whole batch.
            yield from column.cast(pa.large_binary()).to_pylist()[skip:]
            skip = max(skip - len(column), 0)


# --- Records ------------------------------------------------------------------------------------


class _BrokenError(Exception):
    """Says what is wrong with a record."""


def _records(
    path: epath.Path,
    items: Iterator[T],
    parse: Callable[[T], str | None],
    start: int,
    first: int = 0,
) -> Iterator[Record]:
    """Yields the records from number `start` on, given the items from number `first` on.

    Args:
      parse: returns the text of an item, or None where the item is to be left out; raises
        `_BrokenError`.
    """
    position = first
    while True:
        text = reason = None
        try:
            item = next(items)
            text = parse(item) if position >= start else None
        except StopIteration:
            return
        except _BrokenError as error:
            reason = str(error)
        except csv.Error as error:
            reason = f"not a row of CSV: {error}"
        except (pa.ArrowInvalid, OSError) as error:
            if not _is_damage(error):
                raise
            yield _damaged(path, position, error)
            return
        if position >= start and (text is not None or reason is not None):
            yield Record(str(path), position, text, reason)
        position += 1


def _checked(value: Any) -> str:
    """Returns the text that `value` is, perhaps as bytes in UTF-8."""
    if value is None:
        raise _BrokenError("the field is missing")
    if not isinstance(value, str | bytes):
        raise _BrokenError(f"the field holds {type(value).__name__}, not text")
    try:
        # A str can hold lone surrogates, which are not text either.
        text = (value.encode() if isinstance(value, str) else value).decode("utf-8-sig")
    except UnicodeError:
        raise _BrokenError("not valid UTF-8") from None
    if not text or text.isspace():
        raise _BrokenError("the text is empty")
    return text


def _damaged(path: epath.Path, position: int, error: Exception) -> Record:
    return Record(str(path), position, None, f"the file is damaged from here on: {error}")


def _is_damage(error: Exception) -> bool:
    """Tells what Arrow says of a file's content from a failure of the disk or the network."""
    return isinstance(error, pa.ArrowInvalid) or (type(error) is OSError and error.errno is None)


# --- Files and columns --------------------------------------------------------------------------


@contextlib.contextmanager
def _open(path: epath.Path) -> Iterator[io.BufferedReader]:
    """Opens a file's bytes, decompressed by the ending of its name."""
    # Arrow's decompression notices a file that was cut off; zstandard's does not.
    with path.open("rb") as file:
        stream = pa.input_stream(file, compression=COMPRESSIONS.get(path.suffix))
        yield io.BufferedReader(stream, 2**20)


def _header(path: epath.Path, rows: Iterator[list[str]]) -> list[str]:
    try:
        return next(rows, [])
    except (csv.Error, OSError) as error:
        if isinstance(error, OSError) and not _is_damage(error):
            raise
        raise UserError(f"{path} cannot be read ({error}): replace it, or leave it out") from None


def _column(path: epath.Path, name: str, names: list[str]) -> int:
    if name not in names:
        raise UserError(f"{path} has no column {name!r}, only {names}: set the source's field")
    return names.index(name)


def _holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return any(getattr(pa.types, f"is_{test}")(kind) for test in tests)
