"""Experts in the train step: what balances them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instar.errors import UserError
from instar.families import mixtral
from instar.models.experts import route
from instar.models.language_model import LanguageModel
from instar.training.balance import Balance, RouterConfig
from instar.training.optimizer import OptimizerConfig, make_optimizer

SPEC = mixtral.mixtral(
    depth=2, width=8, heads=2, mlp_width=6, vocab_size=19, experts=4, router_bias=True
)
LOADS = {"group_0": {"layer_0": jnp.asarray([[5.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])}}


def test_a_bias_moves_towards_the_mean_by_its_rate():
    balance = Balance(RouterConfig(bias_rate=0.25), SPEC)
    params = LanguageModel(SPEC).init(jax.random.key(0))
    moved, scalars = balance.settle(params, LOADS)
    bias = moved["group_0"]["layer_0"]["mlp"].pop("choice_bias")
    np.testing.assert_array_equal(bias, [[-0.25, 0.25, 0.25, 0.25], [0, 0, 0, 0]])
    assert {name: float(x) for name, x in scalars.items()} == {"max_load": 2.5, "min_load": 0.5}
    # And nothing else does.
    mlp = params["group_0"]["layer_0"]["mlp"]
    assert not np.any(mlp.pop("choice_bias"))
    jax.tree.map(np.testing.assert_array_equal, moved, params)


def test_a_bias_evens_the_loads_of_a_router_that_prefers_some():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal([2.0, 0.5, 0.0, -1.0], size=(1, 256, 4)))
    balance, experts = Balance(RouterConfig(bias_rate=0.02), SPEC), SPEC.each_layer()[0].mlp
    real = jnp.ones((1, 256), bool)
    params = {"group_0": {"layer_0": {"mlp": {"choice_bias": jnp.zeros((1, 4))}}}}

    @jax.jit
    def step(params):
        bias = params["group_0"]["layer_0"]["mlp"]["choice_bias"][0]
        load = route(logits, bias, experts, real)[2]["load"][None]
        return balance.settle(params, {"group_0": {"layer_0": load}})

    highest = []
    for _ in range(60):
        params, scalars = step(params)
        highest.append(float(scalars["max_load"]))
    assert highest[0] > 1.7 and max(highest[-5:]) < 1.2, highest


def test_no_optimiser_moves_or_shrinks_a_bias():
    model = LanguageModel(SPEC)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), model.shapes)
    for name in ("adamw", "muon"):
        config = OptimizerConfig(name, decay=("matrix", "embedding", "vector"))
        optimizer = make_optimizer(config, model.axes)
        update, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
        mlp = update["group_0"]["layer_0"]["mlp"]
        assert not np.any(mlp["choice_bias"]) and np.all(mlp["router"]["kernel"])


def test_impossible_settings_are_refused():
    with pytest.raises(UserError, match=r"router\.bias_rate must not be negative"):
        RouterConfig(bias_rate=-1.0).check()
