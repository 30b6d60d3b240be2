"""What roles say of trajectories, against whole forward passes without any padding in the way."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import GPT, LLAMA, random_params

from instar.generation.rollout import Trajectories, join
from instar.models.language_model import LanguageModel
from instar.models.reward_model import RewardModel
from instar.reinforcement.experience import Experience, Networks, make_assess

TEMPERATURE, LONGEST = 0.6, 6
STARTS, COUNTS = np.asarray([4, 1, 2, 3, 4, 1]), np.asarray([5, 2, 1, 3, 4, 5])
REAL = np.arange(LONGEST) < COUNTS[:, None]
# The roles need not be of one family.
POLICY, REWARD = LanguageModel(LLAMA), RewardModel(GPT, 2)
CRITIC = RewardModel(GPT).model
NETWORKS = Networks(POLICY, CRITIC, POLICY, REWARD, LanguageModel(GPT))


@functools.cache
def params() -> dict:
    return {
        "policy": random_params(POLICY, 0),
        "critic": random_params(CRITIC, 1),
        "reference": random_params(POLICY, 2),
        "reward": random_params(REWARD, 3),
        "base": random_params(NETWORKS.base, 4),
    }


@functools.cache
def trajectories() -> Trajectories:
    """The end token is 0, as is what pads."""
    rng = np.random.default_rng(0)
    prompts, responses = rng.integers(0, 37, (6, 4)), rng.integers(1, 37, (6, LONGEST)) * REAL
    finished = np.asarray([True, False, True, True, False, True])
    responses[finished, COUNTS[finished] - 1] = 0
    tokens = join(*map(jnp.asarray, (prompts, STARTS, responses, COUNTS)))
    parts = STARTS, responses, COUNTS, finished, np.zeros(REAL.shape, np.float32)
    return Trajectories(tokens, *map(jnp.asarray, parts))


@functools.cache
def assessed(rows: int, filler: int = 0, loss_chunk: int = 0) -> Experience:
    drawn = trajectories()
    behind = np.arange(4 + LONGEST) >= (STARTS + COUNTS)[:, None]
    tokens = jnp.where(behind, filler, drawn.tokens)
    responses = jnp.where(REAL, drawn.responses, filler)
    drawn = Trajectories(**vars(drawn) | {"tokens": tokens, "responses": responses})
    given = dict(params())
    arguments = given.pop("policy"), given.pop("critic"), given, drawn
    return jax.device_get(assess_with(rows, loss_chunk)(*arguments))


def assess_with(rows: int, loss_chunk: int, networks: Networks = NETWORKS) -> jax.stages.Wrapped:
    return jax.jit(make_assess(networks, temperature=TEMPERATURE, rows=rows, loss_chunk=loss_chunk))


def before_each(model: LanguageModel, role: dict) -> np.ndarray:
    """Hidden states of the positions before each response token: causal, so that what follows a
    row's end cannot reach them, and no segments are needed."""
    hidden = np.asarray(jax.jit(lambda p, t: model.apply(p, t)[0])(role, trajectories().tokens))
    return np.stack(
        [row[np.arange(s - 1, s + LONGEST - 1)] for row, s in zip(hidden, STARTS, strict=True)]
    )


def log_probs(model: LanguageModel, role: dict, temperature: float) -> tuple[np.ndarray, ...]:
    logits = np.float64(model.head(role)(jnp.asarray(before_each(model, role)))) / temperature
    every = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    taken = np.asarray(trajectories().responses)[..., None]
    return np.take_along_axis(every, taken, -1)[..., 0], -(np.exp(every) * every).sum(-1)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found[REAL], expected[REAL], rtol=2e-4, atol=2e-4)


def test_what_belongs_to_a_token_comes_from_the_position_before_it():
    found, roles = assessed(rows=6), params()
    drawn, entropy = log_probs(POLICY, roles["policy"], TEMPERATURE)
    close(found.log_probs, drawn)
    close(found.entropy, entropy)
    close(found.ref_log_probs, log_probs(POLICY, roles["reference"], TEMPERATURE)[0])
    close(found.base_log_probs, log_probs(NETWORKS.base, roles["base"], 1.0)[0])
    close(found.values, CRITIC.value_head(roles["critic"])(before_each(CRITIC, roles["critic"])))


def test_the_reward_model_reads_the_end_token():
    found = assessed(rows=6).scores
    assert found.shape == (2, 6)
    for row, end in enumerate(STARTS + COUNTS):
        for member in range(2):
            own = REWARD.member(params()["reward"], member)
            # The text alone, its last token the end token where there is one.
            hidden, _ = REWARD.model.apply(own, trajectories().tokens[row : row + 1, :end])
            expected = float(REWARD.model.value_head(own)(hidden[0, -1]))
            assert found[member, row] == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("rows", "filler", "loss_chunk"), [(2, 0, 0), (6, 9, 0), (2, 0, 3)])
def test_neither_pieces_nor_padding_matter(rows, filler, loss_chunk):
    whole, other = assessed(rows=6), assessed(rows, filler, loss_chunk)
    for name in ("log_probs", "ref_log_probs", "entropy", "values", "base_log_probs"):
        a, b = getattr(whole, name), getattr(other, name)
        np.testing.assert_allclose(a[REAL], b[REAL], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(whole.scores, other.scores, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="4 rows do not divide the 6 responses"):
        assessed(4)


@pytest.mark.parametrize("networks", [NETWORKS, Networks(POLICY, CRITIC, POLICY)])
def test_chunks_leave_no_logits_of_all_positions(networks):
    """Neither of the policy nor of the reference nor of a base; rows and chunks are joined."""

    def shapes(loss_chunk: int) -> set[str]:
        given = dict(params())
        arguments = given.pop("policy"), given.pop("critic"), given, trajectories()
        program = assess_with(3, loss_chunk, networks).trace(*arguments).jaxpr
        return set(re.findall(rf"f32\[([\d,]*),{POLICY.spec.vocab_size}\]", str(program)))

    assert f"3,{LONGEST}" in shapes(0)
    # Besides those of a chunk there are the tables alone, of an embedding or a head.
    chunked = shapes(2)
    assert "3,2" in chunked and all(found.count(",") < 2 for found in chunked - {"3,2"})
    assert f"3,{LONGEST}" not in chunked
    with pytest.raises(ValueError, match="chunk 4 does not divide the 6 positions"):
        shapes(4)
