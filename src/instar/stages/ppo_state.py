"""What PPO changes: the policy, the critic, and how each is optimised."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from instar.models.language_model import Params
from instar.models.reward_model import RewardModel
from instar.reinforcement.experience import Networks
from instar.reinforcement.roles import TRAINED, role_shardings
from instar.reinforcement.update import CRITIC, POLICY, Learner
from instar.sharding import rules
from instar.stages.ppo_config import PpoConfig
from instar.stages.ppo_roles import Roles
from instar.training.optimizer import make_optimizer, make_schedule
from instar.training.state import TrainState


def make_learners(config: PpoConfig, networks: Networks) -> dict[str, Learner]:
    """How policy and critic are optimised."""
    settings = {
        POLICY: (config.optimizer, config.schedule, networks.policy),
        CRITIC: (config.critic.optimizer, config.critic.schedule, networks.critic),
    }
    return {
        name: Learner(
            optimizer.learning_rate,
            make_optimizer(optimizer, model.axes),
            make_schedule(schedule, config.steps, config.batch),
            optimizer.clip_norm,
        )
        for name, (optimizer, schedule, model) in settings.items()
    }


def make_state(
    config: PpoConfig,
    learners: dict[str, Learner],
    policy: Params,
    critic: Params,
    key: jax.Array,
) -> TrainState:
    """The state of iteration 0, pure."""
    extras = {CRITIC: critic, "beta": jnp.float32(config.update.beta)}
    if config.ema is not None:
        # Not the policy's arrays themselves, whose memory an iteration takes over.
        extras["ema"] = jax.tree.map(lambda x: x + 0, policy)
    params = {POLICY: policy, CRITIC: critic}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=policy,
        opt_state={name: learners[name].optimizer.init(params[name]) for name in TRAINED},
        key=jax.random.key_data(key),
        extras=extras,
    )


def make_template(
    config: PpoConfig, networks: Networks, learners: dict[str, Learner], mesh: Mesh
) -> TrainState:
    """The state as shapes with the shardings of their roles."""
    make = functools.partial(make_state, config, learners)
    shapes = jax.eval_shape(make, networks.policy.shapes, networks.critic.shapes, jax.random.key(0))
    of_policy = functools.partial(
        role_shardings, config.roles.policy, mesh, axes=networks.policy.axes
    )
    of_critic = functools.partial(
        role_shardings, config.roles.critic, mesh, axes=networks.critic.axes
    )
    whole = rules.replicated(mesh)
    shardings = dataclasses.replace(
        jax.tree.map(lambda _: whole, shapes),
        params=of_policy(shapes.params),
        opt_state={
            POLICY: of_policy(shapes.opt_state[POLICY]),
            CRITIC: of_critic(shapes.opt_state[CRITIC]),
        },
        extras={
            name: of_critic(tree) if name == CRITIC else of_policy(tree)
            for name, tree in shapes.extras.items()
        },
    )
    return jax.tree.map(lambda s, sharding: s.update(sharding=sharding), shapes, shardings)


def begin(
    config: PpoConfig,
    roles: Roles,
    networks: Networks,
    learners: dict[str, Learner],
    template: TrainState,
    mesh: Mesh,
) -> TrainState:
    """The state of iteration 0: the parent's parameters, and the critic's."""
    dtype = jnp.dtype(jnp.float32)
    policy = roles.parent.read(networks.policy, dtype, mesh)
    start = roles.critic or roles.reward
    if start is not None:
        model = RewardModel(start.card.spec, start.card.members, networks.policy.execution)
        critic = model.member(start.read(model, dtype, mesh), 0)
    else:
        model = RewardModel(networks.policy.spec, 1, networks.policy.execution)
        key = jax.random.key(config.seed)
        critic = jax.tree.map(jnp.copy, model.member(model.from_language(policy, key), 0))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, template)
    make = functools.partial(make_state, config, learners)
    made = jax.jit(make, out_shardings=shardings, donate_argnums=(0, 1))
    return made(policy, critic, jax.random.key(config.seed))


def finish(state: TrainState) -> TrainState:
    """The last state; the mean of the policy takes its place where one was kept."""
    if "ema" not in state.extras:
        return state
    extras = {**state.extras, "ema": state.params}
    return dataclasses.replace(state, params=state.extras["ema"], extras=extras)
