"""A prepared data set: token shards, documents, pack indexes and tokenizer, opened for reading."""

import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import grain
import numpy as np
from etils import epath

from instar.config import build
from instar.data.arrays import load_arrays
from instar.data.infilling import BlankTokens
from instar.data.packing import PackIndex
from instar.data.prepare_config import InfillingConfig
from instar.data.tokenizer import Tokenizer, load_tokenizer
from instar.errors import UserError
from instar.workdir import read_json

Split = Literal["train", "held_out"]
FORMAT = 1
CHAT_TEMPLATE = "chat_template.jinja"


def token_dtype(vocab_size: int) -> np.dtype:
    """How token ids are stored: uint16 where they fit, else uint32; little-endian."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


@dataclass(frozen=True)
class Documents:
    """What is known of each document of a source, arrays [D].

    `first_record` is the number of its first record in the shards, `tokens` its length with BOS
    and EOS, `bytes` that of its text in UTF-8 (where it has targets: of what is learnt of it), and
    `held_out` whether it is kept from training.
    """

    first_record: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    held_out: np.ndarray

    def of(self, split: Split) -> np.ndarray:
        """The numbers of a split's documents, ascending."""
        return np.flatnonzero(self.held_out == (split == "held_out"))


@dataclass(frozen=True)
class Targets:
    """Which tokens of a source are to be learnt: of dialogues mostly what the assistant says.

    Document d has the spans `offsets[d]` to `offsets[d + 1]`, each of which is the document's
    tokens from `start` to before `end`. All arrays are int64 [D + 1] or [spans].
    """

    offsets: np.ndarray
    start: np.ndarray
    end: np.ndarray

    @classmethod
    def of(cls, masks: Sequence[np.ndarray]) -> "Targets":
        """The spans of documents' masks, bool [tokens] each."""
        edges = [np.flatnonzero(np.diff(mask, prepend=False, append=False)) for mask in masks]
        flat = np.concatenate([np.zeros(0, np.int64), *edges])
        offsets = np.cumsum([0, *(len(edge) // 2 for edge in edges)])
        return cls(offsets, flat[::2].copy(), flat[1::2].copy())

    @classmethod
    def joined(cls, parts: Sequence["Targets"]) -> "Targets":
        """Those of one part's documents after the other's."""
        counts = [np.diff(part.offsets) for part in parts]
        return cls(
            np.cumsum(np.concatenate([[0], *counts])),
            np.concatenate([part.start for part in parts]),
            np.concatenate([part.end for part in parts]),
        )

    def within(
        self, document: np.ndarray, start: np.ndarray, length: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The targets in pieces of documents, int64 [N] each: (piece, begin, end in the piece).

        A span of targets that a piece has no part of comes out empty.
        """
        first, counts = self.offsets[document], np.diff(self.offsets)[document]
        piece = np.repeat(np.arange(len(document)), counts)
        span = np.arange(len(piece)) - np.repeat(np.cumsum(counts) - counts - first, counts)
        begin, end = (
            np.clip(edge[span] - start[piece], 0, length[piece]) for edge in (self.start, self.end)
        )
        return piece, begin, end


@dataclass(frozen=True)
class Turns:
    """The assistant's turns in a source of dialogues, document by document: arrays [turns].

    Each ends before the token `end` of the document with the number `document`, and adds `bytes`,
    in UTF-8, to what is learnt of it.
    """

    document: np.ndarray
    end: np.ndarray
    bytes: np.ndarray

    @classmethod
    def of(
        cls, ends: Sequence[Sequence[int]], sizes: Sequence[Sequence[int]], first: int
    ) -> "Turns":
        """Those of the documents from the number `first` on."""
        numbers = np.repeat(first + np.arange(len(ends)), [len(each) for each in ends])
        flat = (np.fromiter(itertools.chain(*values), np.int64) for values in (ends, sizes))
        return cls(numbers.astype(np.int64), *flat)

    def fitting(self, limits: np.ndarray) -> np.ndarray:
        """Which turns end within the first `limits` (int [documents]) tokens: bool [turns]."""
        return self.end <= limits[self.document]

    def whole(self, limits: np.ndarray) -> np.ndarray:
        """How many tokens of each document the turns that do make up: int64 [documents]."""
        kept, fits = np.zeros(len(limits), np.int64), self.fitting(limits)
        np.maximum.at(kept, self.document[fits], self.end[fits])
        return kept


class TokenSource:
    """One source of a prepared data set."""

    def __init__(self, folder: epath.Path, facts: dict, vocab_size: int, record_tokens: int):
        self.name, self.facts = folder.name, facts
        self._folder, self._record_tokens = folder, record_tokens
        self._dtype = token_dtype(vocab_size)

    @functools.cached_property
    def documents(self) -> Documents:
        return Documents(**load_arrays(self._folder / "documents.npz"))

    @functools.cached_property
    def targets(self) -> Targets | None:
        """The targets of dialogues, or of blanks to fill in; None where every token is one."""
        path = self._folder / "targets.npz"
        return Targets(**load_arrays(path)) if path.exists() else None

    @functools.cached_property
    def turns(self) -> Turns | None:
        """The turns of dialogues; None where there are none."""
        path = self._folder / "turns.npz"
        return Turns(**load_arrays(path)) if path.exists() else None

    @functools.cached_property
    def _records(self) -> grain.sources.ArrayRecordDataSource:
        return grain.sources.ArrayRecordDataSource(
            [str(self._folder / name) for name in self.facts["shards"]]
        )

    def pack_index(self, split: Split, sequence_length: int) -> PackIndex:
        """How this split is packed into rows of `sequence_length`.

        Raises:
          UserError: it was not packed for that length.
        """
        path = self._folder / f"pack-{split}-{sequence_length}.npz"
        if not path.exists():
            lengths = sorted(
                int(p.name.split("-")[-1].removesuffix(".npz"))
                for p in self._folder.glob(f"pack-{split}-*.npz")
            )
            raise UserError(
                f"{self._folder} is not packed for rows of {sequence_length} tokens, only of "
                f"{lengths}: use one of these as data.sequence_length, or add "
                f"{sequence_length} to the data config's sequence_lengths and prepare again"
            )
        return PackIndex(**load_arrays(path))

    def read_spans(self, document: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        """The tokens of spans, one after the other: int32 [sum of `length`]."""
        size = self._record_tokens
        first, last = start // size, (start + length - 1) // size
        counts = last - first + 1
        span = np.repeat(np.arange(len(document)), counts)
        piece = np.arange(len(span)) - np.repeat(np.cumsum(counts) - counts, counts) + first[span]
        wanted, inverse = np.unique(
            self.documents.first_record[document[span]] + piece, return_inverse=True
        )
        records = self._records.__getitems__(wanted.tolist())
        begin = np.maximum(start[span] - piece * size, 0).tolist()
        end = np.minimum(start[span] + length[span] - piece * size, size).tolist()
        arrays = [np.frombuffer(record, self._dtype) for record in records]
        pieces = zip(inverse.tolist(), begin, end, strict=True)
        return np.concatenate([arrays[i][a:b] for i, a, b in pieces]).astype(np.int32)

    def read_targets(
        self, document: np.ndarray, start: np.ndarray, length: np.ndarray
    ) -> np.ndarray:
        """Which of the tokens that `read_spans` gives are targets: bool [sum of `length`]."""
        ends = np.cumsum(length)
        if self.targets is None:
            return np.ones(ends[-1], bool)
        piece, begin, end = self.targets.within(document, start, length)
        offset, size = (ends - length)[piece], ends[-1] + 1
        steps = np.bincount(begin + offset, minlength=size)
        steps -= np.bincount(end + offset, minlength=size)
        return np.cumsum(steps)[:-1] > 0

    def predicted(self, index: PackIndex) -> int:
        """How many targets are predicted in all rows together: no span's first token is."""
        if self.targets is None:
            return index.targets
        _, begin, end = self.targets.within(index.document, index.start, index.length)
        return int(np.maximum(end - np.maximum(begin, 1), 0).sum())

    def text_bytes(self, index: PackIndex) -> int:
        """The bytes, in UTF-8, of what is learnt of the documents in all rows together."""
        if self.turns is None:
            return int(self.documents.bytes[np.unique(index.document)].sum())
        read = np.zeros(len(self.documents.tokens), np.int64)
        read[index.document] = index.length
        return int(self.turns.bytes[self.turns.fitting(read)].sum())

    def document_tokens(self, documents: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """The tokens of whole documents, all that is around a text included: int32 arrays."""
        documents = np.asarray(documents, np.int64)
        lengths = self.documents.tokens[documents]
        tokens = self.read_spans(documents, np.zeros_like(lengths), lengths)
        return np.split(tokens, np.cumsum(lengths)[:-1])


@dataclass(frozen=True)
class TokenDataset:
    """What `instar prepare` wrote: the sources by name, the tokenizer, the manifest."""

    path: epath.Path
    manifest: dict
    tokenizer: Tokenizer
    sources: dict[str, TokenSource]

    @classmethod
    def open(cls, path: epath.PathLike) -> "TokenDataset":
        """Opens a data set; its arrays are read when they are first used.

        Raises:
          UserError: it is not there, a file, not whole, of another format, or its tokenizer has
            changed.
        """
        folder = epath.Path(path)
        if folder.is_file():
            raise UserError(
                f"the data set {folder} is a file: prepare it first (instar prepare "
                f"--config configs/data/... --config.sources.0.path={folder} --workdir ...) and "
                "name that workdir"
            )
        if not (folder / "manifest.json").exists():
            state = "is not finished" if (folder / "config.json").exists() else "does not exist"
            raise UserError(
                f"the data set {folder} {state}: run instar prepare --config configs/data/... "
                f"--workdir {folder}"
            )
        manifest = read_json(folder / "manifest.json")
        if manifest.get("format") != FORMAT:
            raise UserError(
                f"{folder} has the format {manifest.get('format')}, and this version reads "
                f"{FORMAT}: prepare it again in a new folder"
            )
        tokenizer = load_tokenizer(folder / "tokenizer")
        if tokenizer.digest != manifest["tokenizer"]:
            raise UserError(
                f"the tokenizer in {folder}/tokenizer is not the one that the tokens were made "
                "with: restore it, or prepare the data again in a new folder"
            )
        sources = {
            name: TokenSource(
                folder / name, facts, tokenizer.vocab_size, manifest["config"]["record_tokens"]
            )
            for name, facts in manifest["sources"].items()
        }
        return cls(folder, manifest, tokenizer, sources)

    @functools.cached_property
    def chat_template(self) -> str | None:
        """The source of the template that wrote the dialogues, BOS included; None without any."""
        path = self.path / CHAT_TEMPLATE
        return path.read_text(encoding="utf-8") if path.exists() else None

    @functools.cached_property
    def dialogues(self) -> frozenset[str]:
        """The names of the sources of dialogues."""
        sources = self.manifest["config"]["sources"]
        return frozenset(each["name"] for each in sources if each["dialogue"] is not None)

    @functools.cached_property
    def blanks(self) -> BlankTokens | None:
        """The tokens of the blanks that its texts have; None where they are plain texts."""
        values = self.manifest["config"].get("infilling")
        if values is None:
            return None
        return BlankTokens.of(build(values, InfillingConfig), self.tokenizer)

    @property
    def digest(self) -> str:
        """SHA-256 over tokenizer, chat template and digests of all shards, wherever they lie."""
        shards = {name: source.facts["shards"] for name, source in self.sources.items()}
        parts = [self.manifest["tokenizer"], self.chat_template, shards]
        content = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()
