"""The roles of PPO: how each lies on the mesh, in which dtype, and what memory it takes."""

import math
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from instar.models.language_model import LanguageModel, Params
from instar.models.parameters import Axes
from instar.models.reward_model import RewardModel
from instar.sharding import rules
from instar.sharding.execution import on_mesh

Placement = Literal["sharded", "replicated"]


@dataclass(frozen=True)
class RoleConfig:
    """Where a role's parameters are, and in which dtype if it is a frozen one.

    `sharded` splits them over the mesh by the rule table, `replicated` keeps them whole on every
    device. `auto` is the dtype that the run computes in (`compute_dtype`): a frozen role then says
    exactly what it would say with float32 masters, so that the KL is 0 at the start. `bfloat16`
    halves the memory of a run in float32, whose reference is then a rounded copy. Vectors (norms,
    biases, the head of a reward) and routers, which compute in float32, stay float32, and so do the
    masters of what is trained.
    """

    placement: Placement = "sharded"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


@dataclass(frozen=True)
class RolesConfig:
    """The roles: two that are trained, and those that are frozen.

    `generation` is what the devices of mesh.fsdp share of the policy while it answers, of which
    they hold a copy in the compute dtype: `rows`, with weights whole on each of them, or `heads`,
    as those of mesh.tensor do: slower for a small model, but a large one fits.
    """

    policy: RoleConfig = field(default_factory=RoleConfig)
    critic: RoleConfig = field(default_factory=RoleConfig)
    reference: RoleConfig = field(default_factory=RoleConfig)
    reward: RoleConfig = field(default_factory=RoleConfig)
    base: RoleConfig = field(default_factory=RoleConfig)
    generation: Literal["rows", "heads"] = "rows"


TRAINED = ("policy", "critic")


def frozen_dtype(config: RoleConfig, compute: jnp.dtype) -> jnp.dtype:
    """The dtype of a frozen role's matrices and tables, in a run that computes in `compute`."""
    return jnp.dtype(compute if config.dtype == "auto" else config.dtype)


def in_dtype(params: Params, axes: dict, dtype: jnp.dtype) -> Params:
    """Parameters as a role holds them: matrices and tables in `dtype`, the rest in float32.

    The rest are vectors and routers, whose values are used as they are in any compute dtype.
    """

    def cast(axes: Axes, leaf: jax.Array) -> jax.Array:
        exact = axes.kind == "vector" or "router" in axes.names
        return leaf.astype(jnp.float32 if exact else dtype)

    return jax.tree.map(cast, axes, params)


def role_shardings(config: RoleConfig, mesh: Mesh, tree: object, axes: dict) -> object:
    """The shardings beside a tree of arrays or shapes: parameters, or an optimiser's state."""
    if config.placement == "replicated":
        return jax.tree.map(lambda _: rules.replicated(mesh), tree)
    return rules.state_shardings(mesh, tree, axes)


def for_generation(policy: LanguageModel, config: RolesConfig, mesh: Mesh) -> LanguageModel:
    """The policy as it answers, in a layout of its own.

    Raises:
      UserError: its heads or its MLPs do not divide over the devices that are to share them.
    """
    table = rules.GENERATION[config.generation]
    rules.check_divisible(mesh, policy.axes, policy.shapes, table)
    return policy.with_execution(on_mesh(mesh, policy.execution, table))


@dataclass(frozen=True)
class Footprint:
    """The memory of a role on one device, in bytes; `rest` is gradients and optimiser state."""

    role: str
    parameters: int
    params_bytes: int
    rest_bytes: int
    dtype: str
    placement: str


def footprint(
    role: str,
    config: RoleConfig,
    mesh: Mesh,
    model: LanguageModel | RewardModel,
    dtype: jnp.dtype,
    opt_state: object | None = None,
) -> Footprint:
    """What a role holds on one device; `opt_state` are the shapes of a trained one's."""

    def size(tree: object) -> int:
        shardings = role_shardings(config, mesh, tree, model.axes)
        return sum(
            math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf, sharding in zip(
                jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True
            )
        )

    params = size(jax.eval_shape(lambda tree: in_dtype(tree, model.axes, dtype), model.shapes))
    rest = 0 if opt_state is None else params + size(opt_state)
    count = sum(leaf.size for leaf in jax.tree.leaves(model.shapes))
    return Footprint(role, count, params, rest, jnp.dtype(dtype).name, config.placement)


def generation_footprint(config: RolesConfig, mesh: Mesh, policy: LanguageModel) -> Footprint:
    """What the policy's copy for answering holds on one device, an untied head aside."""
    table, dtype = rules.GENERATION[config.generation], policy.execution.dtype

    def share(axes: Axes, leaf: jax.ShapeDtypeStruct) -> float:
        return leaf.size / math.prod(rules.parts(mesh, name, table) for name in axes.names)

    held = sum(jax.tree.leaves(jax.tree.map(share, policy.axes, policy.shapes)))
    count = sum(leaf.size for leaf in jax.tree.leaves(policy.shapes))
    size = math.ceil(held * jnp.dtype(dtype).itemsize)
    return Footprint("answers", count, size, 0, jnp.dtype(dtype).name, f"by {config.generation}")


def memory_table(footprints: list[Footprint]) -> str:
    """The memory of the roles, as lines of text."""
    lines = [f"{'role':10} {'parameters':>14} {'weights':>10} {'training':>10}  dtype, placement"]
    for each in footprints:
        lines.append(
            f"{each.role:10} {each.parameters:>14,} {_mib(each.params_bytes):>10} "
            f"{_mib(each.rest_bytes):>10}  {each.dtype}, {each.placement}"
        )
    total = sum(each.params_bytes + each.rest_bytes for each in footprints)
    return "\n".join([*lines, f"in all {_mib(total)} a device, activations and cache aside"])


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
