"""From sources of text to a prepared data set: `instar prepare`."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from rich.console import Console

from instar.config import to_dict
from instar.data.arrays import load_arrays, save_arrays
from instar.data.dataset import FORMAT, Documents, token_dtype
from instar.data.packing import Strategy, pack
from instar.data.sources import Record, SourceConfig, file_digest, read_records, source_files
from instar.data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer
from instar.errors import UserError
from instar.workdir import claim, read_json, write_json

# How many documents are given to the tokenizer at a time.
TOKENIZER_BATCH = 1024


@dataclass(frozen=True)
class PrepareConfig:
    """Everything that `instar prepare` is told.

    A document is held out with probability `held_out` by a hash of `seed` and its text, so that
    copies of a text fall on one side. A shard is closed after `shard_tokens` tokens; a document of
    more than `record_tokens` is stored in several records.
    """

    sources: tuple[SourceConfig, ...]
    sequence_lengths: tuple[int, ...]
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    packing: Strategy = "concat"
    held_out: float = 0.01
    seed: int = 0
    shard_tokens: int = 2**26
    record_tokens: int = 2**14

    def check(self) -> None:
        names = [source.name for source in self.sources]
        if not names:
            raise UserError("sources must name at least one source")
        if len(set(names)) < len(names):
            raise UserError(f"sources must have different names, not {', '.join(names)}")
        if not self.sequence_lengths or min(self.sequence_lengths) < 1:
            raise UserError("sequence_lengths must be at least one positive length")
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out must be in [0, 1), not {self.held_out}")
        if self.shard_tokens < 1 or self.record_tokens < 1:
            raise UserError("shard_tokens and record_tokens must each be at least 1")


def prepare(config: PrepareConfig, workdir: epath.PathLike) -> dict:
    """Writes a prepared data set and returns its manifest, which is written last.

    A preparation that was interrupted goes on after the last whole shard, with the same result;
    one that is finished is left as it is.

    Raises:
      UserError: a source is missing, empty or mostly broken; the workdir cannot be written or
        belongs to another config.
    """
    folder = epath.Path(workdir)
    if "://" in str(folder):
        raise UserError(
            f"workdir {folder}: ArrayRecord files are written to a local or mounted disk only; "
            "prepare the data there"
        )
    path = folder / "manifest.json"
    if path.exists():  # the sources need not be there any more
        claim(folder, to_dict(config))
        return read_json(path)
    files = {source.name: source_files(source) for source in config.sources}
    claim(folder, to_dict(config))
    console = Console(stderr=True)
    with console.status("tokenizer"):
        tokenizer = make_tokenizer(config, files, folder / "tokenizer")
    console.print(f"tokenizer: {tokenizer.vocab_size} tokens, {tokenizer.digest[:12]}")
    sources = {}
    for source in config.sources:
        writer = _SourceWriter(config, source, files[source.name], folder / source.name, tokenizer)
        with console.status(source.name) as status:
            sources[source.name] = facts = writer.write(status.update)
        console.print(
            f"{source.name}: {facts['documents']:,} documents, {facts['tokens']:,} tokens, "
            f"{facts['skipped']:,} records skipped"
        )
    manifest = {
        "format": FORMAT,
        "tokenizer": tokenizer.digest,
        "config": to_dict(config),
        "sources": sources,
    }
    write_json(path, manifest)
    return manifest


def make_tokenizer(
    config: PrepareConfig, files: dict[str, list[epath.Path]], folder: epath.Path
) -> Tokenizer:
    """The tokenizer of the data set: the one in `folder`, or a new one, saved there.

    It is trained on training documents alone, from all sources and all over each of them.
    """
    if folder.exists():
        return load_tokenizer(folder)
    if config.tokenizer.path is not None:
        tokenizer = load_tokenizer(epath.Path(config.tokenizer.path))
    else:
        tokenizer = train_tokenizer(_training_texts(config, files), config.tokenizer)
    partial = folder.parent / f"{folder.name}.partial"
    if partial.exists():
        partial.rmtree()
    tokenizer.save(partial)
    partial.rename(folder)
    return tokenizer


def _training_texts(config: PrepareConfig, files: dict[str, list[epath.Path]]) -> Iterator[str]:
    """A sample of the training split, from each source at most its share of the bytes."""
    share = config.tokenizer.train_bytes // len(config.sources)
    for source in config.sources:
        # Drawn over the whole source, which is often sorted. (A packed one gives more text than
        # its files have bytes: then only the cap stops it.)
        fraction = share / max(1, sum(file.stat().length for file in files[source.name]))
        left = share
        records = (r for file in files[source.name] for r in read_records(source, file))
        for record in records:
            if (
                record.text is None
                or is_held_out(record.text, config)
                or draw(record.text, f"tokenizer\0{config.seed}") >= fraction
            ):
                continue
            yield record.text
            left -= len(record.text.encode())
            if left <= 0:
                break


def is_held_out(text: str, config: PrepareConfig) -> bool:
    """Whether a document is kept from training."""
    return draw(text, str(config.seed)) < config.held_out


def draw(text: str, salt: str) -> float:
    """A number in [0, 1] that is uniform over texts, and the same for the same text and salt."""
    digest = hashlib.blake2b(f"{salt}\0{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


@dataclass(frozen=True)
class _Cursor:
    """What is done: the next record to read, and how many shards, records and documents."""

    file: int = 0
    record: int = 0
    shards: int = 0
    token_records: int = 0
    documents: int = 0
    skipped: int = 0


class _SourceWriter:
    """Writes one source, shard by shard.

    A shard is three files, tokens, documents and skipped records, each renamed when whole; the
    cursor in progress.json moves on only after that, so that whatever an interruption leaves
    behind is written again.
    """

    def __init__(
        self,
        config: PrepareConfig,
        source: SourceConfig,
        files: list[epath.Path],
        folder: epath.Path,
        tokenizer: Tokenizer,
    ):
        self._config, self._source, self._files = config, source, files
        self._folder, self._tokenizer = folder, tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)

    def write(self, tell: Callable[[str], None]) -> dict:
        """Writes what is missing, and returns the source's entry in the manifest.

        Args:
          tell: takes a line about how far it is, now and then.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        progress = self._folder / "progress.json"
        digests = {str(file): file_digest(file) for file in self._files}
        cursor = _Cursor()
        if progress.exists():
            saved = read_json(progress)
            if saved["digests"] != digests:
                raise UserError(
                    f"the files of source {self._source.name} have changed since its preparation "
                    f"began: prepare it in a new folder, or remove {self._folder}"
                )
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
    ) -> Iterator[tuple[int, Record, np.ndarray | None]]:
        """The records from the cursor on, with the tokens of those that are whole."""
        documents, new_tokens, start = cursor.documents, 0, time.monotonic()
        for batch in _batched(self._records(cursor), TOKENIZER_BATCH):
            texts = [record.text for _, record in batch if record.text is not None]
            encoded = self._tokenizer.encode_batch(texts)
            documents += len(texts)
            new_tokens += sum(map(len, encoded))
            speed = new_tokens / max(time.monotonic() - start, 1e-3)
            tell(f"{self._source.name}: {documents:,} documents, {speed:,.0f} tokens/s")
            tokens = iter(encoded)
            for number, record in batch:
                yield number, record, None if record.text is None else next(tokens)

    def _write_shard(
        self, cursor: _Cursor, encoded: Iterator[tuple[int, Record, np.ndarray | None]]
    ) -> _Cursor:
        """Takes records until the shard is full or the source ends; returns the cursor after."""
        name = f"{cursor.shards:05d}"
        first, lengths, sizes, held_out, skipped = [], [], [], [], []
        token_records, total = cursor.token_records, 0
        at = (len(self._files), 0)
        with _array_record(self._folder / f"tokens-{name}.array_record") as write:
            for number, record, tokens in encoded:
                if tokens is None:
                    skipped.append(record)
                else:
                    first.append(token_records)
                    tokens = np.concatenate(
                        [[self._tokenizer.bos_id], tokens, [self._tokenizer.eos_id]]
                    ).astype(self._dtype)
                    for start in range(0, len(tokens), self._config.record_tokens):
                        write(tokens[start : start + self._config.record_tokens].tobytes())
                        token_records += 1
                    lengths.append(len(tokens))
                    sizes.append(len(record.text.encode()))
                    held_out.append(is_held_out(record.text, self._config))
                    total += len(tokens)
                if total >= self._config.shard_tokens:
                    at = (number, record.position + 1)
                    break
        documents = Documents(
            np.asarray(first, np.int64),
            np.asarray(lengths, np.int64),
            np.asarray(sizes, np.int64),
            np.asarray(held_out, bool),
        )
        save_arrays(self._folder / f"documents-{name}.npz", documents.__dict__)
        lines = "".join(
            json.dumps({"file": r.file, "position": r.position, "reason": r.reason}) + "\n"
            for r in skipped
        )
        _write_text(self._folder / f"skipped-{name}.jsonl", lines)
        return _Cursor(
            *at,
            shards=cursor.shards + 1,
            token_records=token_records,
            documents=cursor.documents + len(lengths),
            skipped=cursor.skipped + len(skipped),
        )

    def _refuse_rubbish(self, cursor: _Cursor) -> None:
        if cursor.skipped > cursor.documents:
            first = (self._folder / "skipped-00000.jsonl").read_text().splitlines()[:1]
            raise UserError(
                f"source {self._source.name}: {cursor.skipped} of "
                f"{cursor.skipped + cursor.documents} records are broken; the first: {first}; see "
                f"{self._folder}/skipped-*.jsonl, and look at the source's kind and field"
            )
        if cursor.file == len(self._files) and not cursor.documents:
            raise UserError(
                f"source {self._source.name} has no document in {self._source.path}: "
                "look at its path and kind"
            )

    def _finish(self, cursor: _Cursor, digests: dict[str, str]) -> dict:
        """Joins the shards' documents, packs both splits, and describes the source."""
        names = [f"{number:05d}" for number in range(cursor.shards)]
        parts = [load_arrays(self._folder / f"documents-{name}.npz") for name in names]
        documents = Documents(**{k: np.concatenate([p[k] for p in parts]) for k in parts[0]})
        save_arrays(self._folder / "documents.npz", documents.__dict__)
        lines = [(self._folder / f"skipped-{name}.jsonl").read_text() for name in names]
        _write_text(self._folder / "skipped.jsonl", "".join(lines))
        splits = {}
        for split in ("train", "held_out"):
            chosen = documents.of(split)
            for length in self._config.sequence_lengths:
                index = pack(chosen, documents.tokens[chosen], length, self._config.packing)
                save_arrays(self._folder / f"pack-{split}-{length}.npz", index.__dict__)
            splits[split] = {
                "documents": len(chosen),
                "tokens": int(documents.tokens[chosen].sum()),
                "bytes": int(documents.bytes[chosen].sum()),
            }
        return {
            "documents": cursor.documents,
            "tokens": int(documents.tokens.sum()),
            "skipped": cursor.skipped,
            "splits": splits,
            "files": [
                {"name": epath.Path(name).name, "sha256": digest}
                for name, digest in digests.items()
            ],
            "shards": {
                f"tokens-{n}.array_record": file_digest(self._folder / f"tokens-{n}.array_record")
                for n in names
            },
        }


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


def _write_text(path: epath.Path, text: str) -> None:
    partial = path.parent / f"{path.name}.partial"
    partial.write_text(text)
    partial.replace(path)
