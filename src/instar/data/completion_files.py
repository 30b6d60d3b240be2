"""JSON lines about prompts and completions: read whole, with the broken ones set aside."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from etils import epath

from instar.data.completions import CompletionEncoder
from instar.data.formats import READERS, Broken, in_words
from instar.data.streams import DECOMPRESSORS, DamagedFile, file_digest
from instar.errors import UserError

T = TypeVar("T")

_SUFFIXES = tuple(f".jsonl{packed}" for packed in ("", *DECOMPRESSORS))


@dataclass(frozen=True)
class Records(Generic[T]):
    """What is in the files.

    Attributes:
      items: the records, in the order of the files.
      skipped: the broken ones: dicts with "file", "position" (from 0) and "reason".
      digest: the SHA-256 of the files' contents and of what encodes them, in hexadecimal.
    """

    items: list[T]
    skipped: list[dict]
    digest: str


def read_json_lines(
    path: epath.PathLike,
    field: str,
    encoder: CompletionEncoder,
    parse: Callable[[Mapping[str, Any]], T],
) -> Records[T]:
    """Reads a .jsonl file, perhaps packed (.gz, .zst), or all of them in a folder.

    Args:
      field: what errors call the setting that names the path.
      encoder: what `parse` encodes with.
      parse: makes a record of an object; its UserError is the reason why one is broken.

    Raises:
      UserError: there is no file, one cannot be read, or more than half of the records are broken.
    """
    files = _files(epath.Path(path), field)
    items, skipped = [], []
    for file in files:
        for position, value in enumerate(_values(file, field)):
            try:
                if isinstance(value, Broken):
                    raise UserError(value.reason)
                items.append(parse(value))
            except UserError as error:
                skipped.append({"file": str(file), "position": position, "reason": str(error)})
    if len(skipped) > len(items):
        raise UserError(
            f"{field} {path}: {len(skipped)} of {len(items) + len(skipped)} records are broken; "
            f"the first is {in_words(skipped[0])}: check that the file is of the kind that the "
            "config says"
        )
    if not items:
        raise UserError(f"{field} {path} has no record: name another file")
    digests = [file_digest(file, field) for file in files]
    return Records(items, skipped, _digest([encoder.digest, *digests]))


def joined(first: Records[T], second: Records[T], items: list[T]) -> Records[T]:
    """Two readings as one, with `items` in place of what they read."""
    digest = _digest([first.digest, second.digest])
    return Records(items, first.skipped + second.skipped, digest)


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _files(path: epath.Path, field: str) -> list[epath.Path]:
    try:
        if not path.is_dir():
            files = [path] if path.exists() else []
        else:
            files = [file for file in path.iterdir() if file.name.endswith(_SUFFIXES)]
    except OSError as error:
        raise UserError(f"{field} {path} cannot be read ({error}): check its permissions") from None
    if not files:
        what = f"has no file *{' or *'.join(_SUFFIXES)}" if path.exists() else "does not exist"
        raise UserError(f"{field} {path} {what}: name a .jsonl file or a folder of them")
    return sorted(files, key=str)


def _values(file: epath.Path, field: str) -> Iterator[Any]:
    try:
        yield from READERS["jsonl"](file, None, 0)
    except DamagedFile as damaged:
        yield Broken(f"{damaged}; the rest is lost")
    except OSError as error:
        raise UserError(f"{field} {file} cannot be read ({error}): check its permissions") from None


def required(record: Mapping[str, Any], name: str) -> Any:
    """A value of a record.

    Raises:
      UserError: it is not there.
    """
    if name not in record:
        raise UserError(f"{name} is missing")
    return record[name]


def finite(value: Any, name: str) -> float:
    """A number.

    Raises:
      UserError: it is none, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{name} must be a number, not {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise UserError(f"{name} must be finite, not {number}")
    return number


def padded(rows: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids as one array.

    Args:
      rows: of at most `length` ids each.

    Returns:
      (tokens int32 [len(rows), length], zeros behind each row's ids; lengths int32 [len(rows)]).
    """
    tokens = np.zeros((len(rows), length), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return tokens, np.asarray([len(ids) for ids in rows], np.int32)
