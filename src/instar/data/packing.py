"""The pack index: which pieces of which documents make up each row of S + 1 tokens.

A row's inputs are its tokens but the last, its targets those but the first. Nothing here reads a
token: the lengths of the documents are enough, so that packing for another length is quick, and
reading a row is a look-up.
"""

import bisect
from dataclasses import dataclass
from typing import Literal

import numpy as np

Strategy = Literal["concat", "best_fit"]


@dataclass(frozen=True)
class PackIndex:
    """Rows as lists of spans, in compressed form.

    Row r is the spans `row_offsets[r]` to `row_offsets[r + 1]`; a span is `length` tokens of
    `document` from its token `start`. All arrays are int64 [rows + 1] or [spans].
    """

    row_offsets: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def targets(self) -> int:
        """How many tokens are predicted in all rows together."""
        return int(np.sum(self.length - 1))


def pack(
    documents: np.ndarray, lengths: np.ndarray, sequence: int, strategy: Strategy
) -> PackIndex:
    """Packs documents into rows of at most `sequence` + 1 tokens.

    - `concat`: documents one after the other, cut where a row ends. A cut document goes on in the
      next row with the last token of this one, so that each token but a document's first is
      predicted exactly once.
    - `best_fit`: a document stays whole unless it is longer than a row; each goes, longest first,
      to the fullest row that has room (Ding et al. 2024, 2404.10830, section 3).

    Args:
      documents: int [D], their numbers. lengths: int [D], how many tokens of each, from its first
        on, are packed; fewer than two predict nothing and are left out.
    """
    documents, lengths = np.asarray(documents, np.int64), np.asarray(lengths, np.int64)
    keep = lengths > 1
    documents, lengths = documents[keep], lengths[keep]
    if strategy == "concat":
        return _concatenate(documents, lengths, sequence)
    return _best_fit(documents, lengths, sequence)


def _concatenate(documents: np.ndarray, lengths: np.ndarray, sequence: int) -> PackIndex:
    """Counts in predictions: a document of n tokens has n - 1, and a row holds `sequence`.

    A row may end up with sequence + 1 tokens from one document, or fewer: each further document in
    it brings a first token that is read but not predicted, and takes up a place.
    """
    offsets, spans = [0], []
    room = sequence + 1
    for document, length in zip(documents.tolist(), lengths.tolist(), strict=True):
        start = 0
        while start < length - 1:
            if room < 2:
                offsets.append(len(spans))
                room = sequence + 1
            taken = min(length - start, room)
            spans.append((document, start, taken))
            room -= taken
            start += taken - 1
    if len(spans) > offsets[-1]:
        offsets.append(len(spans))
    return _index(offsets, spans)


def _best_fit(documents: np.ndarray, lengths: np.ndarray, sequence: int) -> PackIndex:
    capacity = sequence + 1
    pieces = [
        (document, start, min(length - start, capacity))
        for document, length in zip(documents.tolist(), lengths.tolist(), strict=True)
        for start in range(0, length - 1, sequence)
    ]
    pieces.sort(key=lambda piece: (-piece[2], piece[0], piece[1]))
    rows: list[list[tuple[int, int, int]]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of by_room, ascending
    for piece in pieces:
        at = bisect.bisect_left(rooms, piece[2])
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        rows[row].append(piece)
        room -= piece[2]
        if room >= 2:
            if room not in by_room:
                by_room[room] = []
                bisect.insort(rooms, room)
            by_room[room].append(row)
    offsets = np.cumsum([0, *map(len, rows)]).tolist()
    return _index(offsets, [span for row in rows for span in row])


def _index(offsets: list[int], spans: list[tuple[int, int, int]]) -> PackIndex:
    columns = np.asarray(spans, np.int64).reshape(-1, 3).T
    return PackIndex(np.asarray(offsets, np.int64), *np.ascontiguousarray(columns))
