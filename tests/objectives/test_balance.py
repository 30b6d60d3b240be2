"""The loss that balances experts, from its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instar.objectives.balance import balance_loss, load_extremes


def test_it_is_one_where_all_is_even_and_the_count_where_one_expert_has_all():
    even, all_in_one = jnp.full((1, 8), 5.0), jnp.eye(8)[:1] * 40
    assert float(balance_loss(even, even)[0]) == pytest.approx(1)
    assert float(balance_loss(all_in_one, all_in_one)[0]) == pytest.approx(8)
    assert float(balance_loss(jnp.zeros(8), jnp.zeros(8))) == 0


def test_it_is_fedus_et_al_s_sum_over_tokens_and_only_probabilities_learn():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(5), 37)
    chosen = rng.integers(0, 5, 37)
    load = np.bincount(chosen, minlength=5)
    f = [(chosen == e).mean() for e in range(5)]
    p = [probabilities[:, e].mean() for e in range(5)]
    expected = 5 * sum(a * b for a, b in zip(f, p, strict=True))
    with jax.enable_x64(True):
        gradients = jax.grad(balance_loss, argnums=(0, 1))
        arguments = jnp.asarray(load, float), jnp.asarray(probabilities.sum(0))
        assert float(balance_loss(*arguments)) == pytest.approx(expected, rel=1e-12)
        of_load, of_probability = gradients(*arguments)
    assert not np.any(of_load) and np.argmax(of_probability) == np.argmax(load)


def test_loads_are_told_as_multiples_of_the_mean():
    highest, lowest = load_extremes(jnp.asarray([[2.0, 2.0, 2.0, 2.0], [1.0, 6.0, 1.0, 0.0]]))
    assert (float(highest), float(lowest)) == (3.0, 0.0)
