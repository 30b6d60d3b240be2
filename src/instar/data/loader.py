"""The batches of a run, read ahead by Grain."""

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grain
import numpy as np

from instar.data.rows import Batch, TrainingRows
from instar.errors import UserError


@dataclass(frozen=True)
class LoaderConfig:
    """How many threads read, and how many batches they may be ahead."""

    threads: int = 2
    prefetch: int = 8

    def check(self) -> None:
        if self.threads < 1 or self.prefetch < 1:
            raise UserError("loader.threads and loader.prefetch must each be at least 1")


class _Steps(grain.sources.RandomAccessDataSource):
    """Element i: this process's rows of the i-th batch, how many rows it has, and the row after."""

    def __init__(
        self,
        rows: TrainingRows,
        counts: Iterator[int],
        start_row: int,
        local_offsets: Callable[[int], np.ndarray],
    ):
        self._rows, self._local_offsets = rows, local_offsets
        self._bounds = itertools.accumulate(counts, initial=start_row)
        self._known: list[int] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> tuple[Batch, int, int]:
        with self._lock:
            while len(self._known) < step + 2:
                self._known.append(next(self._bounds))
            start, end = self._known[step : step + 2]
        return self._rows.rows(start + self._local_offsets(end - start)), end - start, end

    def __repr__(self) -> str:
        return "TrainingSteps"


def batches(
    rows: TrainingRows,
    counts: Iterator[int],
    start_row: int,
    local_offsets: Callable[[int], np.ndarray],
    config: LoaderConfig,
) -> Iterator[tuple[Batch, int, int]]:
    """The batches from `start_row` on.

    Args:
      counts: how many rows each batch has, without end.
      local_offsets: count -> which of the rows of a batch, from 0, this process reads.

    Yields:
      This process's rows, the number of rows of the whole batch, and the row that follows it: the
      input position to go on from after this batch.
    """
    steps = grain.MapDataset.source(_Steps(rows, counts, start_row, local_offsets))
    options = grain.ReadOptions(
        num_threads=config.threads, prefetch_buffer_size=max(config.prefetch, config.threads)
    )
    return iter(steps.to_iter_dataset(options))
