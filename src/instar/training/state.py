"""The state of a run: one pytree that a checkpoint saves whole."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from instar.models.language_model import LanguageModel, Params
from instar.models.parameters import Initialization
from instar.sharding import rules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What changes during training.

    `step` (int32) counts steps, those dropped for a non-finite gradient included. `params` are
    float32 masters. `buffers` is model state without gradients; `extras` is the stage's own.
    `key` is the data of the run's PRNG key (uint32, so that it is saved like any array): step s
    draws from `step_key`.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    key: jax.Array
    buffers: dict = dataclasses.field(default_factory=dict)
    extras: dict = dataclasses.field(default_factory=dict)


def step_key(state: TrainState) -> jax.Array:
    """The PRNG key from which the coming step draws."""
    return jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)


def make_initializer(
    model: LanguageModel, optimizer: optax.GradientTransformation, initialization: Initialization
) -> Callable[[jax.Array], TrainState]:
    """The function key -> fresh state."""

    def initialize(key: jax.Array) -> TrainState:
        params_key, run_key = jax.random.split(key)
        return _begin(model.init(params_key, initialization), optimizer, run_key)

    return initialize


def _begin(params: Params, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state of step 0."""
    opt_state, key = optimizer.init(params), jax.random.key_data(key)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state, key)


def state_template(
    initialize: Callable[[jax.Array], TrainState], mesh: Mesh, axes: dict
) -> TrainState:
    """The state as shapes with shardings: what initialisation fills and what a restore expects."""
    shapes = jax.eval_shape(initialize, jax.random.key(0))
    shardings = rules.state_shardings(mesh, shapes, axes)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def initialize_state(
    initialize: Callable[[jax.Array], TrainState], template: TrainState, seed: int
) -> TrainState:
    """A fresh state, each part made on the devices that hold it."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, template)
    return jax.jit(initialize, out_shardings=shardings)(jax.random.key(seed))


def state_of(
    params: Params, optimizer: optax.GradientTransformation, template: TrainState, seed: int
) -> TrainState:
    """The state of step 0 of a run that goes on from `params`, whose memory it takes over."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, template)

    def begin(params: Params, key: jax.Array) -> TrainState:
        return _begin(params, optimizer, jax.random.split(key)[1])

    return jax.jit(begin, out_shardings=shardings, donate_argnums=0)(params, jax.random.key(seed))
