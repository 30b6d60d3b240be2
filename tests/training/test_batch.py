"""Batches that grow, against Megatron-LM's rule step by step."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instar.training.batch import (
    BatchConfig,
    RampConfig,
    count_rows,
    levels_of,
    rows_before,
    rows_of_steps,
    steps_of_rows,
)

BLOOM = BatchConfig(2048, 16, RampConfig(192, 16, 9_765_625))
JUMPY = BatchConfig(64, None, RampConfig(2, 2, 40))  # each step passes several increments
CONSTANT = BatchConfig(8)


def megatron(config: BatchConfig, steps: int) -> list[int]:
    """The batch sizes of its --rampup-batch-size, from the samples consumed before each step."""
    ramp, consumed, sizes = config.ramp, 0, []
    for _ in range(steps):
        size = config.size
        if ramp is not None and consumed <= ramp.rows:
            increments = (config.size - ramp.start) // ramp.increment
            size = ramp.start + consumed * increments // ramp.rows * ramp.increment
        sizes.append(size)
        consumed += size
    return sizes


ramps = st.builds(
    lambda start, increment, count, rows: BatchConfig(
        start + increment * count, None, RampConfig(start, increment, rows)
    ),
    *(st.integers(1, 20), st.integers(1, 20), st.integers(1, 30), st.integers(1, 3000)),
)


@given(ramps, st.integers(1, 400))
def test_a_ramp_is_megatrons(config, steps):
    sizes = megatron(config, steps)
    assert list(itertools.islice(rows_of_steps(config), steps)) == sizes
    assert count_rows(config, steps) == sum(sizes)
    assert steps_of_rows(config, sum(sizes)) == steps
    assert steps_of_rows(config, sum(sizes) + 1) == steps + 1


@pytest.mark.parametrize("config", [BLOOM, JUMPY, CONSTANT])
def test_the_rows_before_a_step_are_those_of_the_steps_before_it(config):
    sizes = megatron(config, 13_000)
    before = np.cumsum([0, *sizes])
    steps = np.unique([0, 1, 2, 30, *(level.step for level in levels_of(config)), 12_999, 13_000])
    rows = jax.jit(rows_before(config))
    np.testing.assert_allclose(rows(steps), before[steps], rtol=1e-6)


def test_blooms_batch_has_the_published_sizes():
    levels = levels_of(BLOOM)
    assert [level.size for level in levels] == list(range(192, 2049, 16))
    assert 9_765_625 <= levels[-1].rows < 9_765_625 + 2048


def test_a_ramp_that_ends_where_it_begins_is_none():
    assert levels_of(BatchConfig(8, None, RampConfig(8, 4, 100))) == levels_of(CONSTANT)


def test_a_last_increment_may_be_shorter():
    config = BatchConfig(10, None, RampConfig(4, 4, 16))
    assert list(itertools.islice(rows_of_steps(config), 5)) == [4, 4, 8, 10, 10]
