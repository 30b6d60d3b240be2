"""Experts in the train step: what balances them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import packed_batch, quick_compilation

from instar.errors import UserError
from instar.families import mixtral
from instar.models.language_model import LanguageModel
from instar.models.parameters import Initialization
from instar.objectives.language import next_token_sums
from instar.training.balance import Balance, RouterConfig
from instar.training.optimizer import OptimizerConfig, make_optimizer
from instar.training.state import make_initializer
from instar.training.step import make_step

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


def test_training_evens_the_loads():
    """By the loss or by the bias, from the same beginning."""
    model = LanguageModel(SPEC)
    # A decay of everything, which must not reach a bias.
    config = OptimizerConfig(learning_rate=0.02, decay=("matrix", "embedding", "vector"))
    optimizer = make_optimizer(config, model.axes)
    rows = packed_batch(0, [[9], [4, 5], [8], [6, 3]] * 8, 9, 19)
    batch = {name: values[None] for name, values in rows.items()} | {"microbatches": 1}

    @jax.jit
    def step(state, batch, balance_loss, bias_rate):
        balance = Balance(RouterConfig(balance_loss, bias_rate=bias_rate), SPEC)

        def loss_sums(params, frozen, batch, key):
            inputs = {name: batch[name] for name in ("positions", "segment_ids")}
            hidden, aux = model.apply(params, batch["tokens"], **inputs)
            head = model.head(params)
            sums = next_token_sums(hidden, head, batch["targets"], batch["weights"])
            routers, reported = balance.losses(aux, sums["weight"])
            reported |= {"loss": sums["nats"], "weight": sums["weight"]}
            return sums["nats"] + routers, reported

        rates = {"learning_rate": 0.02, "clip_norm": None}
        one = make_step(loss_sums, optimizer, lambda step: 1.0, **rates, settle=balance.settle)
        return one(state, None, batch)

    def run(balance_loss: float, bias_rate: float) -> tuple[list[float], jax.Array]:
        """The largest load at each of 30 steps, and the biases after them."""
        state, loads = begin(jax.random.key(0)), []
        for _ in range(30):
            state, metrics = step(state, batch, balance_loss, bias_rate)
            loads.append(float(metrics["max_load"]))
        return loads, state.params["group_0"]["layer_0"]["mlp"]["choice_bias"]

    with quick_compilation():
        begin = jax.jit(make_initializer(model, optimizer, Initialization(std=0.3)))
        without, bias = run(0.0, 0.0)
        assert not np.any(bias)
        by_loss, _ = run(1.0, 0.0)
        by_bias, bias = run(0.0, 0.02)
    assert np.all(np.any(bias, axis=-1))
    for loads in (by_loss, by_bias):
        assert loads[0] == without[0] > 1.3
        assert np.mean(loads[-10:]) < np.mean(without[-10:]) - 0.03, (loads, without)


def test_impossible_settings_are_refused():
    with pytest.raises(UserError, match=r"router\.bias_rate must not be negative"):
        RouterConfig(bias_rate=-1.0).check()
