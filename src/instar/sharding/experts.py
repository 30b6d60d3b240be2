"""Experts on a mesh: each device sends its tokens to the devices that hold their experts.

Between the devices along the axis that splits the experts, rows travel by `ragged_all_to_all`, as
many as there are for each. XLA's CPU backend has no such operation: there every device gathers the
rows of all and takes its own, which gives the same numbers. Buffers hold the most rows that can
come, so that no token is ever dropped. Along the other axes of a batch, tokens stay where they are.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from instar.models import spec as specs
from instar.models.experts import (
    Dispatch,
    Kernels,
    dispatch,
    dispatch_here,
    expert_mlp,
    group_of,
)
from instar.sharding.rules import RULES, Rules, activation_spec

(AXIS,) = RULES["experts"]
KERNELS = {
    "up": ("experts", None, "mlp"),
    "gate": ("experts", None, "mlp"),
    "down": ("experts", "mlp", None),
}


def make_dispatch(mesh: Mesh, rules: Rules = RULES, platform: str | None = None) -> Dispatch:
    """The `Dispatch` of a mesh; the count of experts must divide over its axis.

    `platform` ("cpu", "gpu", "tpu") is that of the mesh's devices where None.
    """
    if mesh.size == 1:
        return dispatch_here
    platform = platform or mesh.devices.flat[0].platform

    def dispatch_on_mesh(
        x: jax.Array,
        chosen: jax.Array,
        weights: jax.Array,
        kernels: Kernels,
        spec: specs.Experts,
    ) -> jax.Array:
        tokens = token_spec(mesh, rules, x.shape)
        split = {
            name: PartitionSpec(*(rules.get(axis) for axis in KERNELS[name])) for name in kernels
        }
        run = functools.partial(_on_device, spec=spec, mesh=mesh, rules=rules, platform=platform)
        return jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(tokens, tokens, tokens, split),
            out_specs=tokens,
            check_vma=False,
        )(x, chosen, weights, kernels)

    return dispatch_on_mesh


def token_spec(mesh: Mesh, rules: Rules, shape: tuple[int, ...]) -> PartitionSpec:
    """How [B, S, ...] lies on the mesh: not along the axes that split an expert's own matrices."""
    names = ("batch", "sequence", None)
    apart = {name: tuple(a for a in rules[name] if a not in rules["mlp"]) for name in names[:2]}
    return activation_spec(mesh, names, shape, apart)


def _on_device(
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    kernels: Kernels,
    *,
    spec: specs.Experts,
    mesh: Mesh,
    rules: Rules,
    platform: str,
) -> jax.Array:
    """What one device does for its own tokens, and with its own part of the kernels for others."""
    parts, experts = mesh.shape[AXIS], spec.count

    def here(rows: jax.Array, sizes: jax.Array) -> jax.Array:
        return expert_mlp(rows, sizes, kernels, spec.expert.activation, platform)

    def there(rows: jax.Array, sizes: jax.Array) -> jax.Array:
        # From each device (rows) how many rows for each expert, and for each device.
        wanted = jax.lax.all_gather(sizes, AXIS).reshape(parts, parts, experts // parts)
        sent = wanted.sum(-1, dtype=jnp.int32)
        # A token sends at most one row to each expert.
        most = len(rows) // spec.top_k * min(spec.top_k, experts // parts)
        exchange = functools.partial(_exchange, platform=platform)
        received = exchange(rows, sent, parts * most)
        # What came is sorted by device, then by expert: by expert alone each is one group.
        mine = wanted[:, jax.lax.axis_index(AXIS)]
        group = group_of(mine.reshape(-1), len(received))
        expert = jnp.where(group < mine.size, group % mine.shape[1], mine.shape[1])
        order = jnp.argsort(expert)
        result = here(received.at[order].get(unique_indices=True), mine.sum(0, dtype=jnp.int32))
        result = result.at[jnp.argsort(order)].get(unique_indices=True)
        return exchange(result, sent.T, len(rows))

    out = dispatch(x, chosen, weights, experts, here if parts == 1 else there)
    return jax.lax.psum(out, rules["mlp"])


def _exchange(rows: jax.Array, sent: jax.Array, capacity: int, *, platform: str) -> jax.Array:
    """Sends each device of the axis the rows that are for it.

    Args:
      rows: [N, embed], sorted by the device that they are for.
      sent: int32 [from, to], how many rows go from which device to which.

    Returns:
      [capacity, embed]: what came, sorted by the device that it is from, then zeros.
    """
    here = jax.lax.axis_index(AXIS)
    starts = jnp.cumsum(sent, axis=1, dtype=jnp.int32) - sent  # in the rows of the sender
    if platform != "cpu":
        places = jnp.cumsum(sent, axis=0, dtype=jnp.int32) - sent  # in those of the receiver
        empty = jnp.zeros((capacity, rows.shape[1]), rows.dtype)
        return jax.lax.ragged_all_to_all(
            rows, empty, starts[here], sent[here], places[here], sent[:, here], axis_name=AXIS
        )
    everything = jax.lax.all_gather(rows, AXIS)
    received = sent[:, here]
    source = jnp.minimum(group_of(received, capacity), len(received) - 1)
    inner = jnp.arange(capacity) - (jnp.cumsum(received) - received)[source]
    row = jnp.where(inner < received[source], starts[source, here] + inner, len(rows))
    return everything.at[source, row].get(mode="fill", fill_value=0)
