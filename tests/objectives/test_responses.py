"""Where responses end and what their scores become."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loops import assert_close

from instar.errors import UserError
from instar.objectives.responses import adjust_scores, length_mask, truncate

EOS = 2


def truncated(tokens: np.ndarray, lengths: np.ndarray, stop: set[int]) -> tuple[list, list]:
    ends, finished = [], []
    for row, length in zip(tokens, lengths, strict=True):
        places = [place for place in range(length) if row[place] in stop]
        ends.append(places[0] + 1 if places else length)
        finished.append(bool(places))
    return ends, finished


@pytest.mark.parametrize("stop", [EOS, [EOS, 4]])
def test_truncation_equals_loops(stop):
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(0, 7, (40, 6)), rng.integers(0, 7, 40)
    found = jax.jit(truncate)(tokens, lengths, np.array(stop))
    expected = truncated(tokens, lengths, set(np.atleast_1d(stop).tolist()))
    assert set(expected[1]) == {True, False} and 0 in lengths and 6 in lengths
    assert_close(found, tuple(map(np.array, expected)), 0)


def test_padding_with_the_stop_token_ends_nothing():
    tokens = np.array([[5, 6, EOS, EOS], [5, 6, EOS, EOS], [EOS] * 4])
    lengths, finished = truncate(tokens, np.array([2, 3, 0]), EOS)
    assert lengths.tolist() == [2, 3, 0]
    assert finished.tolist() == [False, True, False]


def test_length_mask():
    mask = length_mask(jnp.array([0, 2, 3]), 3)
    assert mask.tolist() == [[False] * 3, [True, True, False], [True] * 3]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [7.5, 7.5, -0.25]),
        ({"limit": 5.0}, [5.0, 5.0, -0.25]),
        ({"penalty": 0.5}, [7.5, 7.0, -0.75]),
        # The limit is on the model's score: the penalty still tells the two apart.
        ({"limit": 5.0, "penalty": 0.5}, [5.0, 4.5, -0.75]),
        ({"replacement": -1.0}, [7.5, -1.0, -1.0]),
        ({"replacement": 0.0, "limit": 5.0}, [5.0, 0.0, 0.0]),
    ],
)
def test_scores_of_unfinished_responses(options, expected):
    scores, finished = np.array([7.5, 7.5, -0.25], np.float32), np.array([True, False, False])
    assert adjust_scores(scores, finished, **options).tolist() == expected


def test_a_fractional_penalty_survives_integer_scores():
    assert adjust_scores(np.array([1, 1]), np.array([0, 1]), penalty=0.5).tolist() == [0.5, 1.0]


def test_bfloat16_scores_are_adjusted_in_float32():
    """257 is no bfloat16."""
    found = adjust_scores(np.array([256.0], jnp.bfloat16), np.array([False]), penalty=-1.0)
    assert found.tolist() == [257.0]


def test_penalty_and_replacement_exclude_each_other():
    with pytest.raises(UserError, match="give one"):
        adjust_scores(np.zeros(2), np.ones(2), penalty=0.5, replacement=-1.0)
