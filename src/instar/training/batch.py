"""How many rows each step reads: a constant number, or one that grows."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from instar.errors import UserError


@dataclass(frozen=True)
class RampConfig:
    """A batch that grows linearly from `start` rows, by `increment`, over the first `rows` rows.

    It has its full size once these are read.
    """

    start: int
    increment: int
    rows: int


@dataclass(frozen=True)
class BatchConfig:
    """Rows of a step, and how many of them are on the mesh at once (None: all)."""

    size: int
    microbatch: int | None = None
    ramp: RampConfig | None = None

    def check(self) -> None:
        micro = self.microbatch or self.size
        if self.size < 1 or micro < 1 or self.size % micro:
            raise UserError(
                f"batch.size ({self.size}) must be a positive multiple of "
                f"batch.microbatch ({micro})"
            )
        ramp = self.ramp
        if ramp is None:
            return
        for name in ("start", "increment"):
            value = getattr(ramp, name)
            if value < 1 or value % micro:
                raise UserError(
                    f"batch.ramp.{name} ({value}) must be a positive multiple of "
                    f"batch.microbatch ({micro})"
                )
        if ramp.start > self.size or ramp.rows < 1:
            raise UserError(
                f"batch.ramp must start at no more than batch.size ({self.size}) rows and last "
                "for at least one row"
            )


@dataclass(frozen=True)
class Level:
    """Consecutive steps of one size: the first of them, the rows read before it, rows of each."""

    step: int
    rows: int
    size: int


def levels_of(config: BatchConfig) -> list[Level]:
    """The sizes that a batch has, in their order; the last one has no end.

    A ramp of n increments takes the i-th (from 1) once i/n of its rows are read, as Megatron-LM
    does (`--rampup-batch-size`).
    """
    levels, step, rows = [], 0, 0
    if config.ramp is not None:
        ramp = config.ramp
        increments = math.ceil((config.size - ramp.start) / ramp.increment)
        for number in range(increments):
            size = ramp.start + number * ramp.increment
            end = -(-(number + 1) * ramp.rows // increments)
            count = max(math.ceil((end - rows) / size), 0)  # a step may pass several increments
            levels += [Level(step, rows, size)] * (count > 0)
            step, rows = step + count, rows + count * size
    return [*levels, Level(step, rows, config.size)]


def rows_of_steps(config: BatchConfig) -> Iterator[int]:
    """The rows of step 0, 1, ... without end: a function of the config alone."""
    levels = levels_of(config)
    for level, following in itertools.pairwise(levels):
        yield from itertools.repeat(level.size, following.step - level.step)
    yield from itertools.repeat(levels[-1].size)


def count_rows(config: BatchConfig, steps: int) -> int:
    """How many rows the first `steps` steps read."""
    level = [level for level in levels_of(config) if level.step < steps][-1]
    return level.rows + (steps - level.step) * level.size


def steps_of_rows(config: BatchConfig, rows: int) -> int:
    """How many steps read `rows` rows, the last of which may read more."""
    level = [level for level in levels_of(config) if level.rows < rows][-1]
    return level.step + math.ceil((rows - level.rows) / level.size)


def rows_before(config: BatchConfig) -> Callable[[jax.Array | int], jax.Array]:
    """The function step (int) -> the rows that the steps before it read, in float32."""
    levels = levels_of(config)
    first = np.array([level.step for level in levels], np.int32)
    read = np.array([level.rows for level in levels], np.float32)
    size = np.array([level.size for level in levels], np.float32)

    def rows(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.int32)
        level = jnp.searchsorted(jnp.asarray(first), step, side="right") - 1
        since = step - jnp.asarray(first)[level]
        return jnp.asarray(read)[level] + since * jnp.asarray(size)[level]

    return rows
