"""PPO on a mesh: an iteration that is the one of a single device, and the memory of its roles."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import random_params

from instar.errors import UserError
from instar.families import llama
from instar.generation.rollout import rollout
from instar.models.language_model import LanguageModel
from instar.models.reward_model import RewardModel
from instar.models.transformer import Execution
from instar.reinforcement.config import UpdateConfig
from instar.reinforcement.experience import Networks, make_assess
from instar.reinforcement.roles import (
    RoleConfig,
    RolesConfig,
    footprint,
    for_generation,
    frozen_dtype,
    generation_footprint,
    in_dtype,
    memory_table,
    role_shardings,
)
from instar.reinforcement.update import Learner, make_improve
from instar.sharding.execution import on_mesh
from instar.sharding.inputs import place_rows
from instar.sharding.mesh import MeshConfig, make_mesh
from instar.training.optimizer import OptimizerConfig, make_optimizer
from instar.training.state import TrainState

SPEC = llama.llama(depth=1, width=16, heads=4, kv_heads=2, head_dim=6, mlp_width=24, vocab_size=41)
BATCH, PROMPT, NEW = 8, 5, 6
PLACES = {"policy": "sharded", "critic": "sharded", "reference": "replicated", "reward": "sharded"}


def learner(model: LanguageModel) -> Learner:
    config = OptimizerConfig(learning_rate=1e-2, epsilon=1e-3)
    optimizer = make_optimizer(config, model.axes)
    return Learner(1e-2, optimizer, lambda step: jnp.float32(1), 1.0)


def iteration(config: MeshConfig, generation: str) -> tuple[TrainState, dict, jax.Array]:
    """The state after one, its metrics, and what was said."""
    mesh = make_mesh(config, jax.devices()[: config.data * config.fsdp * config.tensor])
    execution = on_mesh(mesh, Execution())
    policy, reward = LanguageModel(SPEC, execution), RewardModel(SPEC, 2, execution)
    models = {"policy": policy, "critic": reward.model, "reference": policy, "reward": reward}
    networks = Networks(**models)
    learners = {name: learner(models[name]) for name in ("policy", "critic")}

    def place(role: str, tree: object) -> object:
        settings = RoleConfig(PLACES[role])
        return jax.device_put(tree, role_shardings(settings, mesh, tree, models[role].axes))

    params = {
        role: place(role, random_params(model, seed))
        for seed, (role, model) in enumerate(models.items())
    }
    # A reference that is near the policy, so that the estimates of the KL are of ordinary size.
    params["reference"] = place("reference", random_params(policy, 0))
    opt_state = {
        role: place(role, each.optimizer.init(params[role])) for role, each in learners.items()
    }
    state = TrainState(
        jnp.int32(0),
        params["policy"],
        opt_state,
        jax.random.key_data(jax.random.key(0)),
        extras={"critic": params["critic"], "beta": jnp.float32(0.1)},
    )
    settings = UpdateConfig(epochs=1, minibatch=4)
    improve = make_improve(networks, learners, settings, microbatch=2)
    assess = make_assess(networks, temperature=1.0, rows=4)

    @jax.jit
    def run(state: TrainState, frozen: dict, prompts: dict) -> tuple:
        seeds = jnp.arange(BATCH, dtype=jnp.uint32)
        drawn = rollout(
            for_generation(policy, RolesConfig(generation=generation), mesh),
            state.params,
            prompts["tokens"],
            prompts["lengths"],
            seeds,
            max_new_tokens=NEW,
            stop_ids=(0, 1, 2),
        )
        experience = assess(state.params, state.extras["critic"], frozen, drawn)
        scores = jnp.mean(experience.scores, axis=0)
        return *improve(state, drawn, experience, scores, None), drawn.tokens

    rng = np.random.default_rng(0)
    prompts = {
        "tokens": rng.integers(0, 40, (BATCH, PROMPT)).astype(np.int32),
        "lengths": rng.integers(1, PROMPT + 1, BATCH).astype(np.int32),
    }
    frozen = {role: params[role] for role in ("reference", "reward")}
    return jax.device_get(run(state, frozen, place_rows(mesh, prompts)))


@functools.cache
def on_one_device() -> tuple[TrainState, dict, jax.Array]:
    return iteration(MeshConfig(1, 1, 1), "rows")


@pytest.mark.parametrize(
    "generation", [pytest.param("rows", marks=pytest.mark.exhaustive), "heads"]
)
def test_an_iteration_on_a_mesh_is_that_of_one_device(generation):
    """Sharded over two ways, with one role whole on every device, and answers in either layout.

    Four devices share two heads of keys and values, and a vocabulary that they do not divide.
    """
    expected, expected_metrics, expected_tokens = on_one_device()
    found, metrics, tokens = iteration(MeshConfig(2, 2, 2), generation)
    np.testing.assert_array_equal(tokens, expected_tokens)
    assert metrics["updates"] == 2 and metrics["skipped"] == 0
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(
        {k: float(v) for k, v in expected_metrics.items()}, rel=1e-3, abs=1e-4
    )

    def close(a: np.ndarray, b: np.ndarray) -> None:
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)

    jax.tree.map(close, found.params, expected.params)
    jax.tree.map(close, found.extras, expected.extras)
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), found.params, random_params(LanguageModel(SPEC), 0)
    )
    assert min(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize("placement", ["sharded", "replicated"])
def test_the_footprint_is_the_memory_that_the_arrays_take(placement):
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
    config, model = RoleConfig(placement), RewardModel(SPEC, 2)
    optimizer = make_optimizer(OptimizerConfig(), model.axes)
    params = random_params(model, 0)

    def held(tree: object) -> int:
        """The bytes on the first device."""
        placed = jax.device_put(tree, role_shardings(config, mesh, tree, model.axes))
        return sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(placed)
            for shard in leaf.addressable_shards
            if shard.device == jax.devices()[0]
        )

    halves = in_dtype(params, model.axes, jnp.dtype(jnp.bfloat16))
    frozen = footprint("reward", config, mesh, model, jnp.dtype(jnp.bfloat16))
    assert (frozen.params_bytes, frozen.rest_bytes) == (held(halves), 0)
    assert frozen.parameters == sum(x.size for x in jax.tree.leaves(params))
    opt_state = jax.eval_shape(optimizer.init, params)
    trained = footprint("critic", config, mesh, model, jnp.dtype(jnp.float32), opt_state)
    gradients = held(params)
    assert trained.params_bytes == held(params)
    assert trained.rest_bytes == gradients + held(optimizer.init(params))
    whole = sum(x.nbytes for x in jax.tree.leaves(params))
    assert (
        trained.params_bytes == whole
        if placement == "replicated"
        else trained.params_bytes < whole / 3
    )
    big = dataclasses.replace(trained, params_bytes=3 * 2**20, rest_bytes=2**19)
    assert "in all 3.5 MiB a device" in memory_table([big])


@pytest.mark.parametrize("compute", [jnp.float32, jnp.bfloat16])
def test_a_frozen_role_says_what_its_masters_would(compute):
    """In the dtype that a run computes in: the KL of a policy from its own copy is 0 exactly."""
    model = LanguageModel(SPEC, Execution(dtype=jnp.dtype(compute)))
    masters, tokens = random_params(model, 0), jnp.arange(12).reshape(2, 6)
    dtype = frozen_dtype(RoleConfig(), model.execution.dtype)
    frozen = in_dtype(masters, model.axes, dtype)
    found = {leaf.dtype for leaf in jax.tree.leaves(frozen)}
    assert found == {jnp.dtype(compute), jnp.dtype(jnp.float32)}
    said = (jax.jit(model.logits)(params, tokens) for params in (masters, frozen))
    np.testing.assert_array_equal(*said)
    assert frozen_dtype(RoleConfig(dtype="bfloat16"), jnp.dtype(compute)) == jnp.bfloat16


@pytest.mark.parametrize(("generation", "devices"), [("rows", 2), ("heads", 4)])
def test_the_footprint_of_the_policy_that_answers(generation, devices):
    """Norms are whole; heads, MLPs and the vocabulary are shared by so many devices."""
    mesh, policy = make_mesh(MeshConfig(2, 2, 2)), LanguageModel(SPEC)
    shared = {"heads", "kv_heads", "mlp", "vocab"}
    leaves = zip(jax.tree.leaves(policy.axes), jax.tree.leaves(policy.shapes), strict=True)
    expected = sum(4 * x.size / (devices if shared & {*a.names} else 1) for a, x in leaves)
    found = generation_footprint(RolesConfig(generation=generation), mesh, policy)
    assert found.params_bytes == math.ceil(expected) and found.rest_bytes == 0


def test_heads_that_cannot_be_shared_are_refused_before_anything_is_compiled():
    policy, mesh = LanguageModel(SPEC), make_mesh(MeshConfig(fsdp=8))
    with pytest.raises(UserError, match=r"4 heads cannot be split .* mesh\.fsdp = 8"):
        for_generation(policy, RolesConfig(generation="heads"), mesh)
    for_generation(policy, RolesConfig(generation="rows"), mesh)
