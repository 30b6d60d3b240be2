"""The roles of PPO: how each lies on the mesh, in which dtype, and what memory it takes."""

import math
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from instar.models.language_model import LanguageModel
from instar.models.parameters import Axes
from instar.models.reward_model import RewardModel
from instar.sharding import rules
from instar.sharding.execution import on_mesh

Placement = Literal["sharded", "replicated"]


@dataclass(frozen=True)
class RoleConfig:
    """Where a role's parameters are, and in which dtype if it is a frozen one.

    `sharded` splits them over the mesh by the rule table, `replicated` keeps them whole on every
    device. `auto` is bfloat16 on accelerators and float32 on a CPU, whose products of bfloat16 are
    slower. What is trained has float32 masters in any case.
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


def frozen_dtype(config: RoleConfig) -> jnp.dtype:
    """The dtype of a frozen role's parameters."""
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


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

    def size(tree: object, dtype: jnp.dtype | None = None) -> int:
        shardings = role_shardings(config, mesh, tree, model.axes)
        return sum(
            math.prod(sharding.shard_shape(leaf.shape)) * jnp.dtype(dtype or leaf.dtype).itemsize
            for leaf, sharding in zip(
                jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True
            )
        )

    params = size(model.shapes, dtype)
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
