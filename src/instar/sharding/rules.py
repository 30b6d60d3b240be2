"""One table from logical axes to mesh axes, and what follows from it."""

import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from instar.errors import UserError
from instar.models.parameters import Axes

# Names that are not in the table (layers, head_dim, norm, positions) are not split.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("slice", "data", "fsdp", "expert"),
    "sequence": ("context",),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "vocab": ("tensor",),
}


def partition_spec(names: tuple[str | None, ...]) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical names."""
    return PartitionSpec(*(RULES.get(name) if name else None for name in names))


def param_shardings(mesh: Mesh, axes: dict) -> dict:
    """The tree of shardings beside a tree of `Axes`."""
    return jax.tree.map(lambda a: NamedSharding(mesh, partition_spec(a.names)), axes)


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """The sharding of arrays [..., batch, ...] with `leading` dimensions before the batch."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, RULES["batch"]))


def row_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """The sharding of arrays [..., batch, sequence] with `leading` dimensions before the batch."""
    names = (RULES["batch"], RULES["sequence"])
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, *names))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the mesh splits a batch."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh: Mesh, state: object, axes: dict) -> object:
    """The tree of shardings beside a training state, given as shapes.

    The optimiser's trees repeat the parameters' paths below their own: a leaf whose path ends with
    that of a parameter of the same shape is laid out as that parameter is; the rest is replicated.
    """
    params = {
        tuple(k.key for k in path): a for path, a in jax.tree_util.tree_leaves_with_path(axes)
    }

    def sharding(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        names = tuple(getattr(key, "key", None) for key in path)
        for start in range(len(names)):
            found = params.get(names[start:])
            if found is not None and len(found.names) == len(leaf.shape):
                return NamedSharding(mesh, partition_spec(found.names))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, state)


def constrain(mesh: Mesh) -> Callable[[jax.Array, tuple[str | None, ...]], jax.Array]:
    """The function by which a model pins its activations, named by logical axes, to the mesh."""
    if mesh.size == 1:
        return lambda x, names: x
    return lambda x, names: jax.lax.with_sharding_constraint(
        x, NamedSharding(mesh, partition_spec(names))
    )


def axes_told(mesh: Mesh, axes: Sequence[str]) -> str:
    """The axes of more than one device, for a message: mesh.data x mesh.fsdp."""
    return " x ".join(f"mesh.{axis}" for axis in axes if mesh.shape[axis] > 1)


def check_divisible(mesh: Mesh, axes: dict, shapes: dict) -> None:
    """Raises UserError where a parameter does not divide over the mesh, naming axis and sizes."""
    for axis, array in zip(jax.tree.leaves(axes), jax.tree.leaves(shapes), strict=True):
        _check_parameter(mesh, axis, array.shape)


def _check_parameter(mesh: Mesh, axes: Axes, shape: tuple[int, ...]) -> None:
    for name, size in zip(axes.names, shape, strict=True):
        parts = math.prod(mesh.shape[axis] for axis in RULES.get(name, ()))
        if size % parts:
            raise UserError(
                f"{size} {name} cannot be split evenly over {axes_told(mesh, RULES[name])} = "
                f"{parts}: "
                f"change the model's {name} or the mesh"
            )
