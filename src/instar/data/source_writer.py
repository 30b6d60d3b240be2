"""Writes the documents of one source: shards of tokens, and what the shards hold."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from instar.data.arrays import load_arrays, save_arrays
from instar.data.dataset import Documents, Targets, Turns, token_dtype
from instar.data.encoders import Document, Encoder
from instar.data.formats import Broken, in_words
from instar.data.packing import pack
from instar.data.prepare_config import PrepareConfig, is_held_out
from instar.data.sources import Record, SourceConfig, file_digest, read_records
from instar.errors import UserError
from instar.workdir import read_json, write_json

# How many documents are given to the tokenizer at a time.
TOKENIZER_BATCH = 1024


@dataclass(frozen=True)
class _Cursor:
    """What is done: the next record to read, and how many there are by now of each thing.

    `documents` are stored, and `skipped` records are broken.
    """

    file: int = 0
    record: int = 0
    shards: int = 0
    token_records: int = 0
    documents: int = 0
    skipped: int = 0


class SourceWriter:
    """Writes one source, shard by shard.

    A shard is three files, tokens, documents and skipped records, and where there are any, targets
    and the turns of dialogues, each renamed when whole; the cursor in progress.json moves on only
    after that, so that whatever an interruption leaves behind is written again.
    """

    def __init__(
        self,
        config: PrepareConfig,
        source: SourceConfig,
        files: list[epath.Path],
        folder: epath.Path,
        encode: Encoder,
        vocab_size: int,
    ):
        self._config, self._source, self._files = config, source, files
        self._folder, self._encode = folder, encode
        self._dtype = token_dtype(vocab_size)

    def write(self, tell: Callable[[str], None]) -> dict:
        """Writes what is missing, and returns the source's entry in the manifest.

        Args:
          tell: takes a line about how far it is, now and then.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        progress = self._folder / "progress.json"
        digests = {str(file): file_digest(file, "sources.path") for file in self._files}
        cursor = _Cursor()
        if progress.exists():
            saved = read_json(progress)
            if saved["digests"] != digests:
                raise UserError(
                    f"the files of source {self._source.name} have changed since its preparation "
                    f"began: prepare it in a new folder, or remove {self._folder}"
                )
            # The shards of an earlier release lack the turns: they are written again.
            if saved["cursor"].keys() == vars(cursor).keys():
                cursor = _Cursor(**saved["cursor"])
        encoded = self._encoded(cursor, tell)
        while cursor.file < len(self._files):
            cursor = self._write_shard(cursor, encoded)
            self._refuse_rubbish(cursor)
            write_json(progress, {"digests": digests, "cursor": cursor.__dict__})
        return self._finish(cursor, digests)

    def _records(self, cursor: _Cursor) -> Iterator[tuple[int, Record]]:
        for number, file in enumerate(self._files):
            if number >= cursor.file:
                start = cursor.record if number == cursor.file else 0
                yield from ((number, record) for record in read_records(self._source, file, start))

    def _encoded(
        self, cursor: _Cursor, tell: Callable[[str], None]
    ) -> Iterator[tuple[int, Record, list[Document] | Broken]]:
        """The records from the cursor on, with what they are as documents."""
        documents, new_tokens, start = cursor.documents, 0, time.monotonic()
        for batch in _batched(self._records(cursor), TOKENIZER_BATCH):
            encoded = self._encode([record for _, record in batch if record.text is not None])
            whole = [each for made in encoded if isinstance(made, list) for each in made]
            documents += len(whole)
            new_tokens += sum(len(document.ids) for document in whole)
            speed = new_tokens / max(time.monotonic() - start, 1e-3)
            tell(f"{self._source.name}: {documents:,} documents, {speed:,.0f} tokens/s")
            outcomes = iter(encoded)
            for number, record in batch:
                broken = record.text is None
                yield number, record, Broken(record.reason) if broken else next(outcomes)

    def _write_shard(
        self,
        cursor: _Cursor,
        encoded: Iterator[tuple[int, Record, list[Document] | Broken]],
    ) -> _Cursor:
        """Takes records until the shard is full or the source ends; returns the cursor after."""
        name = f"{cursor.shards:05d}"
        first, held_out, skipped = [], [], []
        written: list[Document] = []
        token_records, total = cursor.token_records, 0
        at = (len(self._files), 0)
        with _array_record(self._folder / f"tokens-{name}.array_record") as write:
            for number, record, made in encoded:
                match made:
                    case Broken(reason):
                        line = {"file": record.file, "position": record.position, "reason": reason}
                        skipped.append(json.dumps(line) + "\n")
                    case documents:
                        for document in documents:
                            first.append(token_records)
                            held_out.append(is_held_out(record.text, self._config))
                            tokens = document.ids.astype(self._dtype)
                            for start in range(0, len(tokens), self._config.record_tokens):
                                write(tokens[start : start + self._config.record_tokens].tobytes())
                                token_records += 1
                            written.append(dataclasses.replace(document, ids=tokens))
                            total += len(tokens)
                if total >= self._config.shard_tokens:
                    at = (number, record.position + 1)
                    break
        documents = Documents(
            np.asarray(first, np.int64),
            np.asarray([len(document.ids) for document in written], np.int64),
            np.asarray([document.bytes for document in written], np.int64),
            np.asarray(held_out, bool),
        )
        save_arrays(self._folder / f"documents-{name}.npz", documents.__dict__)
        if self._encode.marks_targets:
            targets = Targets.of([document.targets for document in written])
            save_arrays(self._folder / f"targets-{name}.npz", targets.__dict__)
        if self._source.dialogue:
            ends, sizes = ([getattr(d, field) for d in written] for field in ("ends", "sizes"))
            turns = Turns.of(ends, sizes, cursor.documents)
            save_arrays(self._folder / f"turns-{name}.npz", turns.__dict__)
        write_text(self._folder / f"skipped-{name}.jsonl", "".join(skipped))
        return _Cursor(
            *at,
            shards=cursor.shards + 1,
            token_records=token_records,
            documents=cursor.documents + len(written),
            skipped=cursor.skipped + len(skipped),
        )

    def _refuse_rubbish(self, cursor: _Cursor) -> None:
        if cursor.skipped > cursor.documents:
            total = cursor.skipped + cursor.documents
            first = first_skipped(self._folder)
            self._refuse(in_disorder(self._source, self._config, cursor.skipped, total, first))
        if cursor.file == len(self._files) and not cursor.documents:
            self._refuse(f"there is no document in {self._source.path}: look at its path and kind")

    def _refuse(self, reason: str) -> NoReturn:
        """Raises UserError, with no progress left, for it takes another config to go on."""
        (self._folder / "progress.json").unlink(missing_ok=True)
        raise UserError(f"source {self._source.name}: {reason}")

    def _finish(self, cursor: _Cursor, digests: dict[str, str]) -> dict:
        """Joins what is known of the documents, packs both splits, and describes the source."""
        names = [f"{number:05d}" for number in range(cursor.shards)]
        documents = Documents(**self._joined("documents", names))
        if self._encode.marks_targets:
            parts = [load_arrays(self._folder / f"targets-{name}.npz") for name in names]
            targets = Targets.joined([Targets(**part) for part in parts])
            save_arrays(self._folder / "targets.npz", targets.__dict__)
        turns = Turns(**self._joined("turns", names)) if self._source.dialogue else None
        lines = [(self._folder / f"skipped-{name}.jsonl").read_text() for name in names]
        write_text(self._folder / "skipped.jsonl", "".join(lines))
        packing = "best_fit" if self._encode.marks_targets else self._config.packing
        chosen = {split: documents.of(split) for split in ("train", "held_out")}
        rows = {}
        for length in self._config.sequence_lengths:
            kept = documents.tokens
            if turns is not None:
                kept = turns.whole(np.full_like(kept, length + 1))
                cut = (kept > 0) & (kept < documents.tokens)
                rows[str(length)] = {"cut": int(cut.sum()), "too_long": int((kept == 0).sum())}
            for split, numbers in chosen.items():
                index = pack(numbers, kept[numbers], length, packing)
                save_arrays(self._folder / f"pack-{split}-{length}.npz", index.__dict__)
        self._refuse_too_long(rows, cursor)
        return {
            "documents": cursor.documents,
            "tokens": int(documents.tokens.sum()),
            "skipped": cursor.skipped,
            **({"rows": rows} if rows else {}),
            "splits": {
                split: {
                    "documents": len(numbers),
                    "tokens": int(documents.tokens[numbers].sum()),
                    "bytes": int(documents.bytes[numbers].sum()),
                }
                for split, numbers in chosen.items()
            },
            "files": [
                {"name": epath.Path(name).name, "sha256": digest}
                for name, digest in digests.items()
            ],
            "shards": {
                name: file_digest(self._folder / name, "--workdir")
                for name in (f"tokens-{n}.array_record" for n in names)
            },
        }

    def _joined(self, kind: str, names: list[str]) -> dict[str, np.ndarray]:
        """The shards' arrays of a kind one after the other, which become a file of their own."""
        parts = [load_arrays(self._folder / f"{kind}-{name}.npz") for name in names]
        arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        save_arrays(self._folder / f"{kind}.npz", arrays)
        return arrays

    def _refuse_too_long(self, rows: dict[str, dict[str, int]], cursor: _Cursor) -> None:
        if rows and all(lost["too_long"] == cursor.documents for lost in rows.values()):
            self._refuse(
                f"none of its {cursor.documents} dialogues fits into "
                f"{max(self._config.sequence_lengths)} tokens: add a larger length to "
                "sequence_lengths"
            )


def in_disorder(
    source: SourceConfig, config: PrepareConfig, broken: int, records: int, first: Mapping
) -> str:
    """What is said of a source that is mostly broken; `first` is as `in_words` takes it."""
    place = f"sources.{config.sources.index(source)}"
    return (
        f"{broken} of {records} records are broken; the first is {in_words(first)}: "
        f"set {place}.{'dialogue' if source.dialogue else 'field'} or {place}.kind"
    )


def first_skipped(folder: epath.Path) -> dict:
    """The first of a source's broken records, of which it has one at least."""
    shards = sorted(folder.glob("skipped-*.jsonl"))
    lines = (line for shard in shards for line in shard.read_text(encoding="utf-8").splitlines())
    return json.loads(next(lines))


def _batched(items: Iterable, size: int) -> Iterator[list]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


@contextlib.contextmanager
def _array_record(path: epath.Path) -> Iterator[Callable[[bytes], None]]:
    """A function that appends records to a file that gets its name when it is whole."""
    partial = path.parent / f"{path.name}.partial"
    writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
    yield writer.write
    writer.close()
    partial.replace(path)


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file by way of a rename, so that it is never seen half-written."""
    partial = path.parent / f"{path.name}.partial"
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
