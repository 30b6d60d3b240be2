"""The shuffle: a bijection of any range, without visible order, the same for ever."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instar.data.permutation import derive_keys, permute


@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40))
def test_each_index_goes_to_its_own_place(size, seed):
    places = permute(np.arange(size), size, derive_keys(seed))
    assert np.array_equal(np.sort(places), np.arange(size))


@pytest.mark.parametrize("size", [2**30, 2**30 + 1, 2**48 - 1, 2**50])
def test_large_ranges_stay_in_range_and_apart(size):
    index = np.random.default_rng(0).integers(0, size, 2000)
    index = np.unique(np.concatenate([index, [0, size - 1]]))
    places = permute(index, size, derive_keys("large"))
    assert places.min() >= 0 and places.max() < size
    assert len(np.unique(places)) == len(index)


def test_a_size_and_a_key_for_each_index_equal_one_at_a_time():
    sizes = np.asarray([5, 7, 1000, 1])
    keys = np.stack([derive_keys(i) for i in range(4)])
    index = np.asarray([4, 0, 321, 0])
    together = permute(index, sizes, keys)
    alone = [permute(index[i : i + 1], int(sizes[i]), keys[i])[0] for i in range(4)]
    assert together.tolist() == alone


def test_neighbours_and_seeds_do_not_resemble_one_another():
    size = 10_000
    a, b = (permute(np.arange(size), size, derive_keys(seed)) for seed in (1, 2))
    # Correlations of independent uniform permutations have a standard deviation of 1/sqrt(size).
    bound = 5 / np.sqrt(size)
    assert abs(np.corrcoef(a, np.arange(size))[0, 1]) < bound
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < bound
    assert abs(np.corrcoef(a, b)[0, 1]) < bound
    # Steps between neighbours take many values: an affine map has two of them.
    assert len(np.unique(np.diff(a))) > size / 2


def test_it_never_changes():
    # A resumed run must find the order in which it was interrupted, in any later version too.
    assert permute(np.arange(8), 8, derive_keys(0, "rows")).tolist() == FIXED


FIXED = [1, 5, 4, 3, 0, 7, 6, 2]
