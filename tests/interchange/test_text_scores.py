"""Scores of many texts at once are those of each alone, whatever they are packed with."""

import jax
import numpy as np
import pytest
from examples import LLAMA

from instar.errors import UserError
from instar.interchange.reward import TextScores
from instar.models.reward_model import RewardModel
from instar.sharding.mesh import MeshConfig, make_mesh

MODEL = RewardModel(LLAMA, members=2)
MESH = make_mesh(MeshConfig(), jax.devices()[:1])


def test_scores_are_those_of_each_text_alone():
    rng = np.random.default_rng(0)
    params = MODEL.init(jax.random.key(0))
    texts = [rng.integers(0, LLAMA.vocab_size, n).tolist() for n in (1, 63, 5, 17, 64, 2, 40, 33)]
    texts *= 13  # more than the rows of one call
    tokens, lengths = np.zeros((8, 64), np.int32), np.asarray([len(text) for text in texts[:8]])
    for row, text in zip(tokens, texts, strict=False):
        row[: len(text)] = text
    expected = np.asarray(jax.jit(MODEL.scores)(params, tokens, lengths))
    found = TextScores(MODEL, MESH)(params, texts)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, np.tile(expected, (1, 13)), rtol=1e-4, atol=1e-5)


def test_no_text_and_too_long_a_one():
    scores = TextScores(MODEL, MESH)
    assert scores({}, []).shape == (2, 0)
    with pytest.raises(UserError, match=f"longer than the reward model's {LLAMA.max_positions}"):
        scores({}, [[1] * (LLAMA.max_positions + 1)])
