"""KL estimates, shaped rewards and advantages, against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loops import assert_close, assert_gradient, draw_mask, spoil

from instar.errors import UserError
from instar.objectives.rewards import adaptive_beta, gae, kl, shape_rewards

BATCH, LENGTH, BETA = 6, 8, 0.3


def draw(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (BATCH, LENGTH)
    return {
        "scores": rng.standard_normal(BATCH),
        "log_probs": -rng.exponential(2, shape),
        "ref_log_probs": -rng.exponential(2, shape),
        "rewards": rng.standard_normal(shape),
        "values": rng.standard_normal(shape),
        "mask": draw_mask(rng, *shape),
    }


def shaped(x: dict) -> np.ndarray:
    out = np.zeros((BATCH, LENGTH))
    for row, length in enumerate(x["mask"].sum(1)):
        for t in range(length):
            out[row, t] = -BETA * (x["log_probs"][row, t] - x["ref_log_probs"][row, t])
        if length:
            out[row, length - 1] += x["scores"][row]
    return out


def advantages(x: dict, gamma: float, lam: float) -> np.ndarray:
    """The sum that defines them (Schulman et al. 2016, equation 16), not the recursion."""
    out = np.zeros((BATCH, LENGTH))
    for row, length in enumerate(x["mask"].sum(1)):
        values = [*x["values"][row, :length], 0.0]
        for t in range(length):
            for k in range(t, length):
                delta = x["rewards"][row, k] + gamma * values[k + 1] - values[k]
                out[row, t] += (gamma * lam) ** (k - t) * delta
    return out


def spoiled(x: dict) -> dict:
    per_token = {"log_probs", "ref_log_probs", "rewards", "values"}
    return x | {name: spoil(x[name], x["mask"]) for name in per_token}


def shape_all(x: dict) -> jax.Array:
    return shape_rewards(x["scores"], x["log_probs"], x["ref_log_probs"], x["mask"], BETA)


def test_kl_estimators_equal_loops():
    x = draw(0)
    with jax.enable_x64(True):
        for place in np.ndindex(BATCH, LENGTH):
            p, q = np.exp(x["log_probs"][place]), np.exp(x["ref_log_probs"][place])
            expected = {"k1": np.log(p / q), "k2": np.log(p / q) ** 2 / 2}
            expected["k3"] = q / p - 1 + np.log(p / q)
            for name, value in expected.items():
                found = kl(x["log_probs"][place], x["ref_log_probs"][place], name)
                assert_close(found, value)


def test_k1_and_k3_are_unbiased():
    """Their exact expectations over all tokens are the divergence; that of k2 is not."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.3, 0.6])
    divergence = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))
    with jax.enable_x64(True):
        means = {name: p @ kl(np.log(p), np.log(q), name) for name in ("k1", "k2", "k3")}
    assert means["k1"] == pytest.approx(divergence, abs=1e-12)
    assert means["k3"] == pytest.approx(divergence, abs=1e-12)
    assert means["k2"] != pytest.approx(divergence, abs=1e-2)


def test_k3_of_close_policies_keeps_its_digits_in_float32():
    assert kl(np.float32(1e-4), np.float32(0), "k3") == pytest.approx(5e-9, rel=1e-2)


def test_an_unknown_estimator_is_named():
    with pytest.raises(UserError, match="'k4': use k1, k2 or k3"):
        kl(np.zeros((1, 1)), np.zeros((1, 1)), "k4")


@pytest.mark.parametrize(
    ("nats", "error"), [(6.0, 0.0), (6.6, 0.1), (5.4, -0.1), (60.0, 0.2), (0.0, -0.2)]
)
def test_adaptive_beta(nats, error):
    """With Ziegler's target and horizon: 64 / 10000 of an error that is clipped to +-0.2."""
    with jax.enable_x64(True):
        found = adaptive_beta(0.15, nats, 64, 6.0, 10_000)
    assert found == pytest.approx(0.15 * (1 + error * 0.0064), rel=1e-12)


@pytest.mark.parametrize("dtype", [bool, np.int32, np.float32])
def test_shaped_rewards_equal_loops(dtype):
    """Fractional scores stay what they are, whatever the dtype of the mask."""
    x = draw(1)
    with jax.enable_x64(True):
        found = jax.jit(shape_all)(spoiled(x) | {"mask": x["mask"].astype(dtype)})
        assert_close(found, shaped(x))


def test_integer_scores_and_log_probs_give_float_rewards():
    log_probs, zeros, mask = np.array([[0, -1]]), np.zeros((1, 2), int), np.ones((1, 2), int)
    found = shape_rewards(np.array([1]), log_probs, zeros, mask, 0.5)
    assert found.tolist() == [[0.0, 1.5]]


def test_the_score_of_a_response_without_tokens_is_dropped():
    x = draw(2)
    empty = x["mask"].sum(1) == 0
    scores = np.where(empty, np.nan, x["scores"])
    assert empty.any()
    with jax.enable_x64(True):
        assert_close(shape_all(x | {"scores": scores}), shaped(x))
        gradient = jax.grad(lambda s: jnp.sum(shape_all(x | {"scores": s})))(scores)
    assert_close(gradient, np.where(empty, 0.0, 1.0))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.9, 0.0), (1.0, 1.0)])
def test_gae_equals_its_sum(gamma, lam):
    x = draw(3)
    expected = advantages(x, gamma, lam)
    bad = spoiled(x)
    with jax.enable_x64(True):
        found = jax.jit(gae)(bad["rewards"], bad["values"], x["mask"], gamma, lam)
        assert_close(found, (expected, expected + x["values"] * x["mask"]))


def test_gae_passes_over_what_lies_between_the_tokens_of_a_response():
    """A prompt before them and a tool's answer among them change no token's advantage."""
    rng = np.random.default_rng(4)
    rewards, values = rng.standard_normal((2, 1, 7))
    mask = np.array([[0, 1, 1, 0, 0, 1, 0]])
    on = mask[0] == 1
    with jax.enable_x64(True):
        found = gae(rewards, values, mask, 0.9, 0.8)
        short = gae(rewards[:, on], values[:, on], mask[:, on], 0.9, 0.8)
        assert_close([a[:, on] for a in found], list(short))
        assert_close([a[:, ~on] for a in found], [np.zeros((1, 4))] * 2)
        score = shape_rewards(np.ones(1), 0 * values, 0 * values, mask, 1.0)
    assert score.tolist() == [[0, 0, 0, 0, 0, 1, 0]]


def test_gradients_of_rewards_and_advantages():
    x = draw(5)
    with jax.enable_x64(True):
        assert_gradient(lambda p: jnp.sum(shape_all(x | {"log_probs": p}) ** 2), x["log_probs"])
        for name in ("rewards", "values"):

            def loss(array, name=name):
                y = x | {name: array}
                return jnp.sum(gae(y["rewards"], y["values"], x["mask"], 0.9, 0.8)[0] ** 2)

            assert_gradient(loss, x[name])


def test_an_empty_mask_gives_zeros():
    nans, mask = np.full((2, 3), np.nan, np.float32), np.zeros((2, 3), int)
    found = gae(nans, nans, mask, 1.0, 0.95), shape_rewards(nans[:, 0], nans, nans, mask, BETA)
    assert_close(found, jax.tree.map(np.zeros_like, found))


def test_bfloat16_is_computed_in_float32():
    x = draw(6)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.dtype == float else a, x)
    same = jax.tree.map(lambda a: a.astype(np.float64), half)
    same["mask"] = x["mask"]
    found = gae(half["rewards"], half["values"], x["mask"], 1.0, 0.95)[0]
    rewards = shape_all(half)
    assert found.dtype == rewards.dtype == jnp.float32
    assert_close(found, advantages(same, 1.0, 0.95), 1e-5)
    assert_close(rewards, shaped(same), 1e-5)
