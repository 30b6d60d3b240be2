"""Rows of packed tokens by number: for training an endless shuffled mixture, held out in order."""

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping

import numpy as np

from instar.data.dataset import Split, TokenDataset, TokenSource
from instar.data.packing import PackIndex
from instar.data.permutation import derive_keys, permute
from instar.errors import UserError

# Rows of a mixture come in blocks of this many, in which each source has a fixed number of slots.
BLOCK = 4096

Batch = dict[str, np.ndarray]


def assemble(
    source: TokenSource, index: PackIndex, rows: np.ndarray, sequence: int, pad: int
) -> Batch:
    """The rows of one source as arrays [len(rows), sequence].

    Returns:
      int32 `tokens` (inputs), `targets` (the next tokens), `positions` (from 0 in each span),
      `segment_ids` (1, 2, ... for the spans of a row, 0 for padding), and float32 `weights` (1
      where the target is a token of the same span as the input and, where not all are to be learnt,
      one of those that are; else 0).
    """
    width = sequence + 1
    first, counts = index.row_offsets[rows], np.diff(index.row_offsets)[rows]
    row = np.repeat(np.arange(len(rows)), counts)
    number = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    span = first[row] + number
    length = index.length[span]
    tokens = source.read_spans(index.document[span], index.start[span], length)

    # Where each span begins in its row: the lengths before it, less those of earlier rows.
    ends = np.cumsum(length)
    begins = ends - length
    row_begins = begins[np.cumsum(counts) - counts]
    column = begins - row_begins[row]
    position = np.arange(len(tokens)) - np.repeat(begins, length)
    place = np.repeat(row * width + column, length) + position

    def spread(values: np.ndarray, empty: int) -> np.ndarray:
        out = np.full(len(rows) * width, empty, np.int32)
        out[place] = values
        return out.reshape(len(rows), width)

    ids = spread(tokens, pad)
    segments = spread(np.repeat(number + 1, length), 0)
    targets = spread(source.read_targets(index.document[span], index.start[span], length), 0)
    learnt = (segments[:, 1:] == segments[:, :-1]) & (targets[:, 1:] > 0)
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "weights": learnt.astype(np.float32),
        "positions": spread(position, 0)[:, :-1],
        "segment_ids": segments[:, :-1],
    }


class TrainingRows:
    """The training rows of a run, numbered from 0 without end.

    Row k is a pure function of (seed, k): block k // BLOCK gives each source its share of slots,
    permuted by (seed, block); a source's rows come in the order of a permutation by (seed, source,
    epoch). Any row is found in constant time, so nothing is replayed or skipped on resuming.

    Args:
      weights: how often rows of each source are drawn, relative to one another; those not named
        are left out. Empty: each source by the targets it predicts.

    Raises:
      UserError: a weight is negative or names no source, or there is nothing to train on.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        sequence_length: int,
        weights: Mapping[str, float],
        seed: int,
        split: Split = "train",
    ):
        self._seed, self._sequence = seed, sequence_length
        self._pad = dataset.tokenizer.pad_id
        for name, weight in weights.items():
            if name not in dataset.sources:
                raise UserError(
                    f"data.weights names {name!r}, and {dataset.path} has the sources "
                    f"{', '.join(dataset.sources)}"
                )
            if not weight >= 0:
                raise UserError(f"data.weights.{name} must not be negative ({weight})")
        names = sources_read(dataset, weights)
        self._sources = [dataset.sources[name] for name in names]
        self.dataset = dataset
        self._indexes = [source.pack_index(split, sequence_length) for source in self._sources]
        empty = [n for n, index in zip(names, self._indexes, strict=True) if not index.rows]
        if empty or not names:
            raise UserError(
                f"{dataset.path} has nothing to train on in {', '.join(empty) or 'any source'}: "
                "look at data.weights, or leave the empty sources out"
            )
        pairs = zip(self._sources, self._indexes, strict=True)
        shares = [weights[n] for n in names] if weights else [s.predicted(i) for s, i in pairs]
        self._slots = slots_of(np.asarray(shares, np.float64))
        self._first_slot = np.cumsum(self._slots) - self._slots

    def rows(self, numbers: np.ndarray) -> Batch:
        """Global rows by number, int [N] in [0, 2**50): arrays [N, sequence], see `assemble`."""
        numbers = np.asarray(numbers, np.int64)
        which, row = self.locate(numbers)
        batch: Batch = {}
        for i in np.unique(which):
            here = np.flatnonzero(which == i)
            part = assemble(
                self._sources[i], self._indexes[i], row[here], self._sequence, self._pad
            )
            for name, values in part.items():
                if name not in batch:
                    batch[name] = np.empty((len(numbers), self._sequence), values.dtype)
                batch[name][here] = values
        return batch

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source and the row in its pack index of each global row, int64 [N] each."""
        block, slot = self._slot(numbers)
        which = np.searchsorted(self._first_slot, slot, side="right") - 1
        drawn = block * self._slots[which] + slot - self._first_slot[which]
        size = np.asarray([index.rows for index in self._indexes])[which]
        epoch = drawn // size
        keys = _keys_of(
            zip(which.tolist(), epoch.tolist(), strict=True),
            lambda pair: (self._seed, "rows", self._sources[pair[0]].name, pair[1]),
        )
        return which, permute(drawn % size, size, keys)

    def _slot(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        block = numbers // BLOCK
        keys = _keys_of(block.tolist(), lambda b: (self._seed, "block", b))
        return block, permute(numbers % BLOCK, BLOCK, keys)

    def rows_of_epochs(self, epochs: float) -> int:
        """How many rows make up so many epochs of the dialogues; of all sources where none has any.

        Rows of plain text that come between the dialogues count as rows, and not as epochs.
        """
        dialogues = self.dataset.dialogues
        chosen = np.array([source.name in dialogues for source in self._sources])
        chosen |= not chosen.any()
        rows = np.array([index.rows for index in self._indexes])
        return math.ceil(epochs * rows[chosen].sum() * BLOCK / self._slots[chosen].sum())

    def epochs(self, count: int) -> dict[str, float]:
        """How many epochs of each source the first `count` rows make up."""
        blocks, rest = divmod(count, BLOCK)
        _, slots = self._slot(blocks * BLOCK + np.arange(rest))
        which = np.searchsorted(self._first_slot, slots, side="right") - 1
        drawn = blocks * self._slots + np.bincount(which, minlength=len(self._slots))
        pairs = zip(self._sources, drawn, self._indexes, strict=True)
        return {source.name: float(n / index.rows) for source, n, index in pairs}


def sources_read(dataset: TokenDataset, weights: Mapping[str, float]) -> list[str]:
    """The names of the sources that training reads: those with a weight, or all without weights."""
    return [name for name in dataset.sources if not weights or weights.get(name, 0) > 0]


def slots_of(shares: np.ndarray) -> np.ndarray:
    """BLOCK slots in proportion to `shares` (positive), by largest remainder, one each at least."""
    exact = shares / shares.sum() * (BLOCK - len(shares))
    slots = np.floor(exact).astype(np.int64)
    left = BLOCK - len(shares) - slots.sum()
    slots[np.argsort(slots - exact, kind="stable")[:left]] += 1
    return slots + 1


def _keys_of(
    names: Iterable[Hashable], parts: Callable[[Hashable], tuple[int | str, ...]]
) -> np.ndarray:
    """The permutation keys of each name, uint64 [N, ROUNDS]; equal names are hashed once."""
    names = list(names)
    keys = {name: derive_keys(*parts(name)) for name in set(names)}
    return np.stack([keys[name] for name in names]) if names else derive_keys()[None]


class HeldOutRows:
    """The rows of the held-out documents in order, in batches of one size.

    The last batch is filled up with rows of padding. With `limit`, that many rows, evenly spread.

    Args:
      weights: those of training; what it does not read is not read here.
      judged: the sources to read where training reads any of them; else all that it does.

    Raises:
      UserError: no document is held out.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        sequence_length: int,
        weights: Mapping[str, float],
        batch: int,
        judged: Collection[str] = (),
        limit: int | None = None,
    ):
        self._batch, self._sequence = batch, sequence_length
        self._pad = dataset.tokenizer.pad_id
        read = sources_read(dataset, weights)
        names = [name for name in read if name in judged] or read
        sources = [dataset.sources[name] for name in names]
        self._parts = [(each, each.pack_index("held_out", sequence_length)) for each in sources]
        total = sum(index.rows for _, index in self._parts)
        if not total:
            raise UserError(
                f"{dataset.path} holds out no document of {', '.join(names)} for rows of "
                f"{sequence_length} tokens: prepare them with a larger held_out "
                "into a new --workdir, and name that as data.path"
            )
        count = total if limit is None else min(limit, total)
        self._numbers = np.linspace(0, total - 1, count).round().astype(np.int64)
        text_bytes = sum(source.text_bytes(index) for source, index in self._parts)
        self.tokens_per_byte = sum(s.predicted(index) for s, index in self._parts) / text_bytes

    def __iter__(self) -> Iterator[Batch]:
        bounds = np.cumsum([0, *(index.rows for _, index in self._parts)])
        for at in range(0, len(self._numbers), self._batch):
            numbers = self._numbers[at : at + self._batch]
            parts = []
            for i, (source, index) in enumerate(self._parts):
                mine = numbers[(numbers >= bounds[i]) & (numbers < bounds[i + 1])] - bounds[i]
                if len(mine):
                    parts.append(assemble(source, index, mine, self._sequence, self._pad))
            missing = ((0, self._batch - len(numbers)), (0, 0))
            yield {
                name: np.pad(np.concatenate([part[name] for part in parts]), missing)
                for name in parts[0]
            }
