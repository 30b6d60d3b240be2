"""PPO's losses and their statistics, against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loops import assert_close, assert_gradient, draw_mask, spoil

from instar.errors import UserError
from instar.objectives.policy import importance_weights, ppo_policy_loss, ppo_value_loss

BATCH, LENGTH, CLIP = 6, 8, 0.2
POLICY = ("log_probs", "old_log_probs", "advantages")
VALUE = ("values", "old_values", "returns")


def draw(seed: int) -> dict[str, np.ndarray]:
    """Ratios and values on either side of both clips, some within them."""
    rng = np.random.default_rng(seed)
    shape = (BATCH, LENGTH)
    x = {
        "old_log_probs": -rng.exponential(2, shape),
        "advantages": rng.standard_normal(shape),
        "old_values": rng.standard_normal(shape),
        "returns": rng.standard_normal(shape),
        "weights": rng.uniform(0, 2, shape),
        "mask": draw_mask(rng, *shape),
    }
    x["log_probs"] = x["old_log_probs"] + 0.5 * rng.standard_normal(shape)
    x["values"] = x["old_values"] + 0.4 * rng.standard_normal(shape)
    return x


def places(x: dict) -> list[tuple[int, int]]:
    return [place for place in np.ndindex(BATCH, LENGTH) if x["mask"][place]]


def policy_by_loops(x, dual_clip=None, log_ratio_limit=np.inf, weighted=False):
    terms, clipped, k1, k3, ratios = [], [], [], [], []
    for place in places(x):
        advantage = x["advantages"][place]
        change = x["log_probs"][place] - x["old_log_probs"][place]
        ratio = np.exp(min(max(change, -log_ratio_limit), log_ratio_limit))
        near = min(max(ratio, 1 - CLIP), 1 + CLIP)
        gain = min(ratio * advantage, near * advantage)
        clipped.append(near * advantage < ratio * advantage)
        if dual_clip is not None and advantage < 0:
            gain = max(gain, dual_clip * advantage)
        terms.append(-gain * (x["weights"][place] if weighted else 1))
        k1.append(-change)
        k3.append(np.exp(change) - 1 - change)
        ratios.append(ratio)
    stats = {"clip_fraction": clipped, "approx_kl_k1": k1, "approx_kl_k3": k3, "ratio": ratios}
    return np.mean(terms), {name: np.mean(values) for name, values in stats.items()}


def value_by_loops(x):
    terms, clipped = [], []
    for place in places(x):
        value, old, target = (x[name][place] for name in VALUE)
        near = old + min(max(value - old, -CLIP), CLIP)
        terms.append(max((value - target) ** 2, (near - target) ** 2) / 2)
        clipped.append(abs(value - old) > CLIP and (near - target) ** 2 > (value - target) ** 2)
    returns = np.array([x["returns"][place] for place in places(x)])
    errors = returns - np.array([x["values"][place] for place in places(x)])
    explained = 1 - np.var(errors) / np.var(returns)
    return np.mean(terms), {"clip_fraction": np.mean(clipped), "explained_variance": explained}


def policy(x: dict, **options):
    return ppo_policy_loss(*(x[name] for name in POLICY), x["mask"], CLIP, **options)


def value(x: dict):
    return ppo_value_loss(*(x[name] for name in VALUE), x["mask"], CLIP)


def spoiled(x: dict) -> dict:
    return {name: spoil(a, x["mask"]) for name, a in x.items() if name != "mask"} | {
        "mask": x["mask"]
    }


@pytest.mark.parametrize("dtype", [bool, np.int32, np.float32])
@pytest.mark.parametrize(
    "options",
    [{}, {"dual_clip": 1.3}, {"log_ratio_limit": 0.3}, {"dual_clip": 1.1, "log_ratio_limit": 0.6}],
    ids=str,
)
def test_policy_loss_equals_loops(options, dtype):
    """NaN outside the mask reaches neither the loss nor a statistic."""
    x = draw(0)
    expected = policy_by_loops(x, **options)
    assert 0 < expected[1]["clip_fraction"] < 1
    if "dual_clip" in options:
        assert expected[0] < policy_by_loops(x, **(options | {"dual_clip": None}))[0]
    with jax.enable_x64(True):
        bad = spoiled(x) | {"mask": x["mask"].astype(dtype)}
        assert_close(jax.jit(lambda bad: policy(bad, **options))(bad), expected)


def test_value_loss_equals_loops():
    x = draw(1)
    expected = value_by_loops(x)
    assert 0 < expected[1]["clip_fraction"] < 1
    with jax.enable_x64(True):
        assert_close(jax.jit(value)(spoiled(x)), expected)


def test_values_within_the_bounds_do_not_count_as_clipped():
    """In float32 old + (value - old) need not be value: rounding must not count as a clip."""
    rng = np.random.default_rng(2)
    values, old = rng.uniform(-0.09, 0.09, (2, 64, 64)).astype(np.float32)
    stats = ppo_value_loss(values, old, np.zeros_like(old), np.ones_like(old), CLIP)[1]
    assert stats["clip_fraction"] == 0


def test_explained_variance_at_its_ends():
    returns, mask = np.array([[1.0, 2.0, 4.0, 9.0]]), np.array([[1, 1, 1, 0]])

    def explained(values, returns):
        return ppo_value_loss(values, values, returns, mask, CLIP)[1]["explained_variance"]

    assert explained(returns - 3, returns) == 1
    assert explained(0 * returns, returns) == pytest.approx(0, abs=1e-6)
    assert explained(returns, 0 * returns + 2) == 0
    with jax.debug_nans(True):
        assert explained(0 * returns, 0 * returns + 2) == 0


def test_an_infinite_clip_leaves_the_plain_losses():
    x = draw(3)
    mask = x["mask"] == 1
    with jax.enable_x64(True):
        loss, stats = ppo_value_loss(*(x[name] for name in VALUE), mask, np.inf)
        assert_close(loss, np.mean((x["values"] - x["returns"])[mask] ** 2) / 2)
        assert stats["clip_fraction"] == 0
        loss, stats = ppo_policy_loss(*(x[name] for name in POLICY), mask, np.inf)
        ratio = np.exp(x["log_probs"] - x["old_log_probs"])
        assert_close(loss, -np.mean((ratio * x["advantages"])[mask]))
        assert stats["clip_fraction"] == 0


def test_weights_multiply_the_loss_and_no_statistic():
    x = draw(4)
    with jax.enable_x64(True):
        bad = spoiled(x)
        assert_close(policy(bad, weights=bad["weights"]), policy_by_loops(x, weighted=True))


def test_importance_weights_are_capped_and_carry_no_gradient():
    old, rollout = np.log([[0.5, 0.6, 0.3]]), np.log([[0.5, 0.1, 0.6]])
    with jax.enable_x64(True):
        assert_close(importance_weights(old, rollout, 2.0), [[1.0, 2.0, 0.5]])
        gradient = jax.grad(lambda p: jnp.sum(importance_weights(p, rollout, 2.0)))(old)
    assert not np.any(gradient)


def test_gradients():
    x = draw(5)
    options = {"dual_clip": 1.5, "log_ratio_limit": 1.0, "weights": x["weights"]}
    with jax.enable_x64(True):
        for chosen in ({}, options):
            assert_gradient(
                lambda p, chosen=chosen: policy(x | {"log_probs": p}, **chosen)[0], x["log_probs"]
            )
        assert_gradient(lambda v: value(x | {"values": v})[0], x["values"])


def test_the_gradient_at_the_old_policy_is_the_policy_gradient():
    """Where rho = 1 both sides of the maximum tie, and their gradients must not be halved."""
    x = draw(6)
    x["log_probs"] = x["old_log_probs"]
    with jax.enable_x64(True):
        gradient = jax.grad(lambda p: policy(x | {"log_probs": p})[0])(x["log_probs"])
    assert_close(gradient, -x["advantages"] * x["mask"] / x["mask"].sum())


def test_padding_has_no_gradient():
    x = draw(7)
    bad, outside = spoiled(x), x["mask"] == 0

    def weighted(x):
        return policy(x, weights=x["weights"])

    with jax.enable_x64(True):
        for loss, name in ((policy, "log_probs"), (weighted, "log_probs"), (value, "values")):
            gradient = jax.grad(lambda a, loss=loss, name=name: loss(bad | {name: a})[0])
            found = np.asarray(gradient(bad[name]))
            assert_close(found, jax.grad(lambda a, f=loss, n=name: f(x | {n: a})[0])(x[name]))
            assert not np.any(found[outside])
            assert np.any(found)


@pytest.mark.parametrize(("loss", "name"), [(policy, "log_probs"), (value, "values")])
def test_an_empty_mask_gives_zeros(loss, name):
    x = jax.tree.map(lambda a: np.full(a.shape, np.nan, np.float32), draw(8))
    x["mask"] = np.zeros((BATCH, LENGTH), int)

    (found, stats), gradient = jax.value_and_grad(lambda a: loss(x | {name: a}), has_aux=True)(
        x[name]
    )
    assert found == 0
    assert not np.any(gradient)
    assert all(np.isfinite(stat) for stat in stats.values())


@pytest.mark.parametrize("loss", [policy, value])
def test_bfloat16_is_computed_in_float32(loss):
    x = draw(9)
    half = {n: a if n == "mask" else a.astype(jnp.bfloat16) for n, a in x.items()}
    same = {n: a.astype(np.float64) for n, a in half.items()}
    found = loss(half)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))
    assert_close(found, {policy: policy_by_loops, value: value_by_loops}[loss](same), 1e-5)


def test_a_limit_on_the_log_ratio_keeps_the_loss_finite():
    x = {"log_probs": [[0.0]], "old_log_probs": [[-200.0]], "advantages": [[-1.0]], "mask": [[1]]}
    x = {name: np.array(array, np.float32) for name, array in x.items()}
    assert not np.isfinite(policy(x)[0])
    assert policy(x, log_ratio_limit=10.0)[0] == pytest.approx(np.exp(10), rel=1e-5)


def test_dual_clip_must_be_above_one():
    with pytest.raises(UserError, match="dual_clip"):
        policy(draw(10), dual_clip=0.2)
