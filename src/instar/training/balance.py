"""Experts in the train step: their losses, their loads, and the bias that balances them."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from instar.errors import UserError
from instar.models.language_model import Params
from instar.models.spec import Experts, ModelSpec
from instar.objectives.balance import balance_loss, load_extremes

Scalars = dict[str, jax.Array]


@dataclass(frozen=True)
class RouterConfig:
    """What keeps the experts of a model balanced; without effect where it has none.

    `balance_loss` is the coefficient of the auxiliary loss (Fedus et al. 2021, eq. 4); None is
    0.01, or 0 for a model whose routers have a bias. `z_loss` is that of squared log normalisers of
    routers (Zoph et al. 2022, eq. 5). `bias_rate` is by how much a step moves the bias of each
    expert towards an even load (Wang et al. 2024, 2408.15664, algorithm 1).
    """

    balance_loss: float | None = None
    z_loss: float = 0.0
    bias_rate: float = 1e-3

    def check(self) -> None:
        for name in ("balance_loss", "z_loss", "bias_rate"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"router.{name} must not be negative ({value})")


class Balance:
    """What the layers of experts of a model add to its training."""

    def __init__(self, config: RouterConfig, spec: ModelSpec):
        layers = [layer.mlp for layer in spec.each_layer() if isinstance(layer.mlp, Experts)]
        biased = any(layer.choice_bias for layer in layers)
        default = 0.0 if biased else 0.01
        self._rate = config.bias_rate
        self._z_loss = config.z_loss
        self._loss = default if config.balance_loss is None else config.balance_loss

    def losses(self, aux: dict, weight: jax.Array) -> tuple[jax.Array, dict]:
        """What the routers of a microbatch add to the sum of its loss and to the sums it reports.

        The losses are means over layers, over the whole microbatch wherever its rows lie. They
        count as the `weight` of its targets does.

        Args:
          aux: that of `LanguageModel.apply`.
        """
        routing = aux.get("routing")
        if not routing:
            return jnp.zeros_like(weight), {}
        layers = list(_layers(routing))
        balance = _mean([balance_loss(each["load"], each["probability"]) for each in layers])
        z = _mean([x["log_z_squared"] / jnp.maximum(x["tokens"], 1) for x in layers])
        loads = jax.tree.map(lambda x: x["load"], routing, is_leaf=lambda x: "load" in x)
        loss = (self._loss * balance + self._z_loss * z) * weight
        return loss, {"balance_loss": balance * weight, "counts": loads}

    def settle(self, params: Params, loads: dict) -> tuple[Params, Scalars]:
        """Moves the biases of routers by the loads of a step; see `instar.training.step.Settle`."""
        if not loads:
            return params, {}
        extremes = [load_extremes(load) for load in jax.tree.leaves(loads)]
        highest, lowest = zip(*extremes, strict=True)
        scalars = {"max_load": jnp.stack(highest).max(), "min_load": jnp.stack(lowest).min()}
        return self._moved(params, loads), scalars

    def _moved(self, params: Params, loads: dict | jax.Array) -> Params:
        """The parameters with the bias of each layer that `loads` names moved towards its mean."""
        if not isinstance(loads, dict):
            mlp = params["mlp"]
            if "choice_bias" not in mlp:
                return params
            step = jnp.sign(loads.mean(-1, keepdims=True) - loads)
            bias = mlp["choice_bias"]
            moved = bias + (self._rate * step).astype(bias.dtype)
            return params | {"mlp": mlp | {"choice_bias": moved}}
        return params | {name: self._moved(params[name], load) for name, load in loads.items()}


def _layers(routing: dict) -> list[dict]:
    """The statistics of each layer of a period."""
    return [layer for group in routing.values() for layer in group.values()]


def _mean(values: list[jax.Array]) -> jax.Array:
    return jnp.concatenate([value.reshape(-1) for value in values]).mean()
