"""Readers of the file formats that text comes in.

A reader takes a file, the field that holds the text and the position of the first wanted record. It
yields a value for each record, which `checked_text` judges, or `Broken` in the place of a record
that cannot be read. It raises `DamagedFile` where all the rest of the file is lost.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow
import pyarrow.parquet
from etils import epath

from instar.data.streams import DamagedFile, open_binary, read_chunks, split_lines
from instar.errors import UserError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PARQUET_BATCH = 1024


@dataclass(frozen=True)
class Broken:
    """A record that cannot be used, and why."""

    reason: str


def checked_text(value: Any, field: str) -> str | Broken:
    """Returns `value`, decoded, if it is text with something in it that UTF-8 can hold."""
    if isinstance(value, Broken):
        return value
    if value is None:
        return Broken(f"{field} is missing")
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            return Broken(f"it is not UTF-8 ({error.reason} at byte {error.start})")
    if not isinstance(value, str):
        return Broken(f"{field} is not text but {type(value).__name__}")
    if not value.strip():
        return Broken(f"{field} is empty")
    if re.search("[\ud800-\udfff]", value):
        return Broken(f"{field} is not valid Unicode (half of a surrogate pair)")
    return value


def _read_text(file: epath.Path, field: str, start: int) -> Iterator[bytes]:
    if start == 0:
        yield b"".join(read_chunks(file)).removeprefix(_BYTE_ORDER_MARK)


def _lines(file: epath.Path) -> Iterator[bytes]:
    for number, line in enumerate(split_lines(read_chunks(file))):
        yield line.removeprefix(_BYTE_ORDER_MARK) if number == 0 else line


# ---------------------------------------------------------------------------------------------
# JSON lines
# ---------------------------------------------------------------------------------------------


def _read_jsonl(file: epath.Path, field: str, start: int) -> Iterator[Any]:
    position = 0
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        if position >= start:
            yield _json_field(line, number, field)
        position += 1


def _json_field(line: bytes, number: int, field: str) -> Any:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Broken(f"line {number} is not UTF-8 ({error.reason} at byte {error.start})")
    except (ValueError, RecursionError) as error:
        return Broken(f"line {number} is not JSON ({error})")
    return row.get(field) if isinstance(row, dict) else Broken(f"line {number} is no JSON object")


# ---------------------------------------------------------------------------------------------
# CSV
# ---------------------------------------------------------------------------------------------


def _read_csv(file: epath.Path, field: str, start: int) -> Iterator[str | Broken]:
    rows = _csv_rows(file)
    header = next(rows, None)
    if header is None:
        return
    column = _csv_column(header, field, file)
    for position, row in enumerate(rows):
        if position >= start:
            yield _csv_field(row, column)


def _csv_rows(file: epath.Path) -> Iterator[list[str] | Broken]:
    """Yields the rows, the header among them, blank ones left out."""
    csv.field_size_limit(2**31 - 1)  # the library's own, 128 KiB, is less than a long document
    # A row with bytes that are no UTF-8 must not end the file: they pass as lone surrogates.
    rows = csv.reader(line.decode("utf-8", "surrogateescape") for line in _lines(file))
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield Broken(f"the row is not CSV ({error})")
            continue
        if row:
            yield row


def _csv_column(header: list[str] | Broken, field: str, file: epath.Path) -> int:
    if isinstance(header, Broken):
        raise DamagedFile(f"the header cannot be read: {header.reason}")
    _require(field, header, file)
    return header.index(field)


def _csv_field(row: list[str] | Broken, column: int) -> str | Broken:
    if isinstance(row, Broken):
        return row
    if column >= len(row):
        return Broken(f"the row has only {len(row)} columns")
    if re.search("[\udc80-\udcff]", row[column]):
        return Broken("it is not UTF-8")
    return row[column]


def _read_demonstration(file: epath.Path, field: str, start: int) -> Iterator[str]:
    """The IMDb reviews alone.

    The other rows, from Rotten Tomatoes, are the very sentences that people rated in the data of
    the later stages: a model that had read them could not be judged there.
    """
    rows = _csv_rows(file)
    header = next(rows)
    text, source = header.index("text"), header.index("source")
    reviews = (row[text] for row in rows if row[source] == "imdb")
    for position, review in enumerate(reviews):
        if position >= start:
            yield review.replace("<br />", "\n")


def _require(field: str, names: list[str], file: epath.Path) -> None:
    if field not in names:
        known = ", ".join(map(repr, names)) or "no columns"
        raise UserError(f"{file} has no column {field!r} but {known}; set sources.field")


# ---------------------------------------------------------------------------------------------
# Parquet
# ---------------------------------------------------------------------------------------------


def _read_parquet(file: epath.Path, field: str, start: int) -> Iterator[bytes | None]:
    with open_binary(file) as stream:
        try:
            table = pyarrow.parquet.ParquetFile(stream)
            _check_column(table.schema_arrow, field, file)
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if start < rows:
                    yield from _row_group(table, group, field, start)
                start = max(0, start - rows)
        except (pyarrow.ArrowException, OSError) as error:
            # Arrow reports damage as an OSError too, but only the system's have a number.
            if getattr(error, "errno", None) is not None:
                raise
            raise DamagedFile(f"the file is damaged ({error})") from error


def _check_column(schema: pyarrow.Schema, field: str, file: epath.Path) -> None:
    _require(field, schema.names, file)
    kind = schema.field(field).type
    value_kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if value_kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
        raise UserError(f"{file}: column {field!r} holds {kind} and not strings; set sources.field")


def _row_group(
    table: pyarrow.parquet.ParquetFile, group: int, field: str, start: int
) -> Iterator[bytes | None]:
    for batch in table.iter_batches(_PARQUET_BATCH, row_groups=[group], columns=[field]):
        # As bytes: a value that is no UTF-8 then spoils its own record and not the batch.
        yield from batch.column(0).cast(pyarrow.large_binary())[start:].to_pylist()
        start = max(0, start - len(batch))


READERS: dict[str, Callable[[epath.Path, str, int], Iterator[Any]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "demonstration": _read_demonstration,
    "parquet": _read_parquet,
}
