"""Whole texts packed into rows, each to be found again by where it ends."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TextRows:
    """Texts in R rows of L tokens.

    Attributes:
      tokens: int32 [R, L], zeros where there is no text.
      positions: int32 [R, L], from 0 in each text.
      segment_ids: int32 [R, L], 1, 2, ... for the texts of a row, 0 where there is none.
      ends: int32 [N], the place r * L + column of the last token of each text.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self.tokens)

    def padded(self, rows: int) -> dict[str, np.ndarray]:
        """`tokens`, `positions` and `segment_ids` with empty rows behind, `rows` in all."""
        missing = ((0, rows - len(self)), (0, 0))
        names = ("tokens", "positions", "segment_ids")
        return {name: np.pad(getattr(self, name), missing) for name in names}


def pack_texts(texts: Sequence[Sequence[int]], length: int) -> TextRows:
    """Packs texts, longest first, each into the first row that has room.

    Args:
      texts: N texts of 1 to `length` tokens each. length: L.
    """
    sizes = np.asarray([len(text) for text in texts], np.int64)
    room = np.full(max(len(texts), 1), length)
    used = np.zeros(len(room), np.int64)
    tokens, positions, segments = (np.zeros((len(room), length), np.int32) for _ in range(3))
    ends = np.zeros(len(texts), np.int32)
    for text in np.argsort(-sizes, kind="stable"):
        size = sizes[text]
        row = int(np.argmax(room >= size))
        start = length - room[row]
        span = (row, slice(start, start + size))
        used[row] += 1
        tokens[span], positions[span], segments[span] = texts[text], np.arange(size), used[row]
        room[row] -= size
        ends[text] = row * length + start + size - 1
    rows = int(np.count_nonzero(used))
    return TextRows(tokens[:rows], positions[:rows], segments[:rows], ends)
