"""The batches of the reward stage: a draw of groups for each member, packed into rows."""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from instar.data.preferences import Comparisons
from instar.data.text_rows import TextRows, pack_texts
from instar.sharding.inputs import BatchLayout
from instar.sharding.rules import batch_sharding, batch_shards, replicated
from instar.training.batch import BatchConfig, rows_of_steps
from instar.training.loop import Position

# A batch has rows for the tokens of its texts on average, for so many standard deviations more, and
# for what packing leaves empty. Where those are too few, it has a share more of them, and a program
# of its own.
_DEVIATIONS = 4
_EMPTY = 1 / 32
_MORE = 1 / 16


class ComparisonBatches:
    """The batches of a run, each a function of its position.

    Member m draws its groups with the seed `seed` + m, so that members learn from the same data in
    orders of their own. The texts of a microbatch are packed: each is read once, whatever number
    of comparisons it is part of, and little of a row is empty.

    Args:
      row_length: L, at least the tokens of the longest text.
    """

    def __init__(
        self,
        comparisons: Comparisons,
        config: BatchConfig,
        layout: BatchLayout,
        *,
        members: int,
        seed: int,
        row_length: int,
    ):
        self._comparisons, self._config, self._layout = comparisons, config, layout
        self._members, self._seed, self._length = members, seed, row_length
        mean, deviation = comparisons.group_tokens
        groups = layout.microbatch
        tokens = groups * mean * (1 + _EMPTY) + _DEVIATIONS * groups**0.5 * deviation
        self._rows = self._divisible(tokens / row_length)

    def __call__(self, step: int, position: Position) -> Iterator[tuple[dict, Position]]:
        """The batches from a position on, on the mesh, each with the position after it.

        A batch holds int32 `tokens`, `positions` and `segment_ids` [microbatches, R, members, L];
        for P prompts of K completions `ends` int32 (see `TextRows`), `ranks` float32 and `mask`
        bool [microbatches, P, members, K]; and `microbatches` int32. R is almost always the same.
        """
        for number, count in enumerate(rows_of_steps(self._config)):
            if number < step:
                continue
            arrays, tokens = self._arrays(position["group"], count)
            position = {
                "group": position["group"] + count,
                "tokens": position["tokens"] + tokens,
            }
            yield self._place(arrays, count), position

    def _arrays(self, first: int, count: int) -> tuple[dict[str, np.ndarray], int]:
        """The groups from `first` on of every member, and the number of their tokens."""
        micro = self._layout.microbatch
        drawn = [
            self._comparisons.batch(self._seed + member, first, count)
            for member in range(self._members)
        ]
        packed = [
            [
                self._pack({name: each[start : start + micro] for name, each in groups.items()})
                for groups in drawn
            ]
            for start in range(0, count, micro)
        ]
        most = self._rows_for(max(len(rows) for part in packed for rows, _ in part))
        # [microbatches][members] of dicts becomes a dict of [microbatches, R, members, L].
        arrays = {
            name: np.stack(
                [np.stack([rows.padded(most)[name] for rows, _ in part], axis=1) for part in packed]
            )
            for name in ("tokens", "positions", "segment_ids")
        }
        arrays["ends"] = np.stack([np.stack([ends for _, ends in part], axis=1) for part in packed])
        for name in ("ranks", "mask"):
            whole = np.stack([groups[name] for groups in drawn], axis=1)
            arrays[name] = whole.reshape(-1, micro, *whole.shape[1:])
        return arrays, int(np.count_nonzero(arrays["segment_ids"]))

    def _pack(self, groups: dict[str, np.ndarray]) -> tuple[TextRows, np.ndarray]:
        """The rows of groups, and the `ends` [P, K] of their completions."""
        real = np.flatnonzero(groups["mask"])
        tokens = groups["tokens"].reshape(-1, groups["tokens"].shape[-1])
        lengths = groups["lengths"].reshape(-1)
        rows = pack_texts([tokens[i, : lengths[i]] for i in real], self._length)
        ends = np.zeros(groups["mask"].size, np.int32)
        ends[real] = rows.ends
        return rows, ends.reshape(groups["mask"].shape)

    def _rows_for(self, needed: int) -> int:
        """R for texts that fill `needed` rows: of a few sizes, since each is compiled."""
        rows = self._rows
        while rows < needed:
            rows = self._divisible(rows * (1 + _MORE) + 1)
        return rows

    def _divisible(self, rows: float) -> int:
        shards = batch_shards(self._layout.mesh)
        return max(math.ceil(rows / shards), 1) * shards

    def _place(self, arrays: dict[str, np.ndarray], count: int) -> dict[str, jax.Array]:
        """Arrays that every process holds whole, split over the mesh along R or P."""
        layout = self._layout
        sharding = batch_sharding(layout.mesh, leading=1)
        missing = layout.microbatches - count // layout.microbatch

        def array(values: np.ndarray) -> jax.Array:
            if missing:
                values = np.pad(values, ((0, missing), *((0, 0),) * (values.ndim - 1)))
            return jax.make_array_from_callback(values.shape, sharding, lambda i: values[i])

        placed = {name: array(values) for name, values in arrays.items()}
        number = jax.device_put(jnp.int32(count // layout.microbatch), replicated(layout.mesh))
        return placed | {"microbatches": number}
