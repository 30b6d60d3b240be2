"""The scores of a reward model's members."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instar.families.registry import ModelConfig, build_spec
from instar.models.language_model import LanguageModel
from instar.models.reward_model import RewardModel
from instar.training.flops import parameter_count

SPEC = build_spec(
    ModelConfig(family="llama", depth=2, width=16, heads=2, mlp_width=32, tied=False),
    vocab_size=50,
    max_positions=32,
)


@pytest.fixture(scope="module")
def parent() -> dict:
    return LanguageModel(SPEC).init(jax.random.key(0))


def test_each_member_scores_the_last_real_token_with_a_head_of_its_own(parent):
    model, language = RewardModel(SPEC, members=2), LanguageModel(SPEC)
    params = model.from_language(parent, jax.random.key(1))
    tokens = jax.random.randint(jax.random.key(2), (3, 7), 0, 50)
    lengths = [7, 3, 1]
    scores = model.scores(params, tokens, jnp.asarray(lengths))
    for member, got in enumerate(scores):
        head = params[f"member_{member}"]["score_head"]
        for row, length in enumerate(lengths):
            hidden, _ = language.apply(parent, tokens[row : row + 1, :length])
            expected = np.dot(hidden[0, -1], head["kernel"][:, 0]) + head["bias"][0]
            np.testing.assert_allclose(got[row], expected, rtol=1e-4, atol=1e-5)
    assert np.all(np.abs(scores[0] - scores[1]) > 1e-3)


def test_heads_are_drawn_with_the_published_spread_and_counted(parent):
    wide = SPEC.replace(width=512)
    head = RewardModel(wide).init(jax.random.key(0))["member_0"]["score_head"]
    assert np.std(head["kernel"]) == pytest.approx(513**-0.5, rel=0.15)
    assert not np.any(head["bias"])
    sizes = [leaf.size for leaf in jax.tree.leaves(RewardModel(SPEC).shapes)]
    assert sum(sizes) == parameter_count(RewardModel(SPEC).spec).total
