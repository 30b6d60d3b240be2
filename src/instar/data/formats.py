"""Readers of the file formats that text comes in.

A reader takes a file, the field that holds the text and the position of the first wanted record. It
yields a value for each record, which `checked_text` judges, or `Broken` in the place of a record
that cannot be read. It raises `DamagedFile` where all the rest of the file is lost. The readers of
JSON also take None for the field, and yield whole objects.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow
import pyarrow.parquet
from etils import epath

from instar.data.streams import DamagedFile, read_chunks, split_lines
from instar.errors import UserError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_JSON_OPENING = re.compile(r"\s*\[\s*(?:(\])\s*)?")
_JSON_SEPARATOR = re.compile(r"\s*([,\]])\s*")
_PARQUET_BATCH = 1024


@dataclass(frozen=True)
class Broken:
    """A record that cannot be used, and why."""

    reason: str


def in_words(skipped: Mapping[str, Any]) -> str:
    """Which record is broken and why, of a dict with "file", "position" (from 0) and "reason".

    It is counted from 1, as the lines of a file are.
    """
    return f"record {skipped['position'] + 1} of {skipped['file']} ({skipped['reason']})"


def missing(row: Mapping[str, Any], field: str) -> str:
    """Why a JSON object without a value for `field` is broken; names eight of its keys at most."""
    if field in row:
        return f"{field} is null"
    keys = [repr(key) for key in row]
    more = ", ..." if len(keys) > 8 else ""
    return f"{field} is missing; the record has {', '.join(keys[:8]) or 'no key'}{more}"


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
# JSON: an object a line, or one list of objects
# ---------------------------------------------------------------------------------------------


def _read_jsonl(file: epath.Path, field: str | None, start: int) -> Iterator[Any]:
    position = 0
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        if position >= start:
            value = _json_line(line, number, field)
            if position == 0 and isinstance(value, Broken) and line.lstrip().startswith(b"["):
                value = Broken(f"{value.reason}; the file is a JSON list, which is the kind json")
            yield value
        position += 1


def _json_line(line: bytes, number: int, field: str | None) -> Any:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Broken(f"line {number} is not UTF-8 ({error.reason} at byte {error.start})")
    except (ValueError, RecursionError) as error:
        return Broken(f"line {number} is not JSON ({error})")
    return _json_field(row, f"line {number}", field)


def _json_field(row: Any, place: str, field: str | None) -> Any:
    if not isinstance(row, dict):
        return Broken(f"{place} is no JSON object")
    if field is None:
        return row
    return row[field] if field in row else Broken(missing(row, field))


def _read_json(file: epath.Path, field: str | None, start: int) -> Iterator[Any]:
    for position, row in enumerate(_json_list(b"".join(read_chunks(file)))):
        if position >= start:
            yield _json_field(row, f"item {position}", field)


def _json_list(content: bytes) -> Iterator[Any]:
    """Yields the items one by one, so that those before a damage are not lost."""
    try:
        text = content.removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedFile(f"it is not UTF-8 ({error.reason} at byte {error.start})") from None
    separator = _JSON_OPENING.match(text)
    if not separator:
        raise DamagedFile("the file is not a JSON list")
    decode = json.JSONDecoder().raw_decode
    while separator[1] != "]":
        try:
            item, place = decode(text, separator.end())
        except (ValueError, RecursionError) as error:
            raise DamagedFile(f"the list is not JSON ({error})") from None
        yield item
        separator = _JSON_SEPARATOR.match(text, place)
        if not separator:
            raise DamagedFile(f"the list lacks a comma or its end at character {place}")
    if separator.end() < len(text):
        raise DamagedFile(f"there is more behind the list, at character {separator.end()}")


# ---------------------------------------------------------------------------------------------
# CSV
# ---------------------------------------------------------------------------------------------


def _read_csv(file: epath.Path, field: str, start: int) -> Iterator[str | Broken]:
    header, rows = _csv_rows(file)
    if header:
        column = _column(header, field, file)
        for position, row in enumerate(rows):
            if position >= start:
                yield row if isinstance(row, Broken) else _utf8(row[column])


def _read_demonstration(file: epath.Path, field: str, start: int) -> Iterator[str | Broken]:
    """The IMDb reviews alone.

    The other rows, from Rotten Tomatoes, are the very sentences that people rated in the data of
    the later stages: a model that had read them could not be judged there.
    """
    header, rows = _csv_rows(file)
    text, source = (_column(header, name, file) for name in (field, "source"))
    reviews = (row for row in rows if isinstance(row, Broken) or row[source] == "imdb")
    for position, row in enumerate(reviews):
        if position >= start:
            yield row if isinstance(row, Broken) else row[text].replace("<br />", "\n")


def _csv_rows(file: epath.Path) -> tuple[list[str], Iterator[list[str] | Broken]]:
    """Returns the header, empty where the file is, and the rows, blank ones left out."""
    csv.field_size_limit(2**31 - 1)  # the library's own, 128 KiB, is less than a long document
    # A row with bytes that are no UTF-8 must not end the file: they pass as lone surrogates.
    rows = csv.reader(line.decode("utf-8", "surrogateescape") for line in _lines(file))
    try:
        header = next(rows, [])
    except csv.Error as error:
        raise DamagedFile(f"the header is not CSV ({error})") from None
    return header, _whole_rows(rows, len(header))


def _whole_rows(rows: Iterator[list[str]], columns: int) -> Iterator[list[str] | Broken]:
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield Broken(f"the row is not CSV ({error})")
            continue
        if len(row) == columns:
            yield row
        elif row:
            yield Broken(f"the row has {len(row)} columns and the header {columns}")


def _utf8(text: str) -> str | Broken:
    return Broken("it is not UTF-8") if re.search("[\udc80-\udcff]", text) else text


def _column(names: list[str], field: str, file: epath.Path) -> int:
    if field not in names:
        known = ", ".join(map(repr, names)) or "none"
        raise UserError(f"{file} has no column {field!r}, only {known}: set sources.field")
    return names.index(field)


# ---------------------------------------------------------------------------------------------
# Parquet
# ---------------------------------------------------------------------------------------------


def _read_parquet(file: epath.Path, field: str, start: int) -> Iterator[bytes | None]:
    with file.open("rb") as stream:
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
    kind = schema.field(_column(schema.names, field, file)).type
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
    "json": _read_json,
    "csv": _read_csv,
    "demonstration": _read_demonstration,
    "parquet": _read_parquet,
}
