"""One table from logical axes to mesh axes, and what follows from it."""

import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from instar.errors import UserError
from instar.models.parameters import Axes

Rules = dict[str, tuple[str, ...]]

# Names that are not in the table (layers, head_dim, latent, norm, positions) are not split.
# `residual` is the sequence where it is that of the residual stream, between blocks; `rank` is a
# latent where it is the input of a matrix.
RULES: Rules = {
    "batch": ("slice", "data", "fsdp", "expert"),
    "sequence": ("context",),
    "residual": ("context", "tensor"),
    "embed": ("fsdp",),
    "rank": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "vocab": ("tensor",),
    "experts": ("expert",),
}

# Where a model lies that generates: the devices of `fsdp`, over which its weights would have to be
# gathered for every token, take rows of their own, or heads of the same rows.
GENERATION: dict[str, Rules] = {
    "rows": RULES | {"embed": (), "rank": ()},
    "heads": RULES
    | {"embed": (), "rank": ()}
    | {"batch": tuple(axis for axis in RULES["batch"] if axis != "fsdp")}
    | {name: (*RULES[name], "fsdp") for name in ("residual", "mlp", "heads", "kv_heads", "vocab")},
}

# What need not divide: a vocabulary is padded for use, heads of keys and values are repeated.
FLEXIBLE = ("vocab", "kv_heads")


def size_of(mesh: Mesh, axes: Sequence[str]) -> int:
    """How many devices lie along all of these mesh axes."""
    return math.prod(mesh.shape[axis] for axis in axes)


def parts(mesh: Mesh, name: str, rules: Rules = RULES) -> int:
    """Into how many parts the mesh splits a logical axis."""
    return size_of(mesh, rules.get(name, ()))


def param_spec(mesh: Mesh, names: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
    """How a parameter lies on the mesh, whose dimensions have these names and sizes.

    A vocabulary, or heads of keys and values, that do not divide leave their mesh axes to `embed`,
    if that divides over both: parameters and the optimiser's state are never padded nor repeated,
    so that a checkpoint does not depend on the mesh.
    """
    spec = [RULES.get(name, ()) for name in names]
    for i, name in enumerate(names):
        if name in FLEXIBLE and shape[i] % parts(mesh, name):
            left, spec[i] = spec[i], ()
            for j, other in enumerate(names):
                if other == "embed" and shape[j] % size_of(mesh, left + spec[j]) == 0:
                    spec[j] = left + spec[j]
    return PartitionSpec(*(axes or None for axes in spec))


def param_shardings(mesh: Mesh, axes: dict, shapes: dict) -> dict:
    """The tree of shardings beside a tree of `Axes` and one of arrays or shapes."""
    return jax.tree.map(
        lambda a, leaf: NamedSharding(mesh, param_spec(mesh, a.names, leaf.shape)), axes, shapes
    )


def activation_spec(
    mesh: Mesh, names: tuple[str | None, ...], shape: tuple[int, ...], rules: Rules = RULES
) -> PartitionSpec:
    """How an activation lies on the mesh: along the first of each name's axes that divide its size.

    Those that do not are left out: the one token of a step of decoding is on all devices.
    """

    def fitting(name: str | None, size: int) -> tuple[str, ...] | None:
        axes = rules.get(name, ())
        while size % size_of(mesh, axes):
            axes = axes[:-1]
        return axes or None

    return PartitionSpec(*map(fitting, names, shape))


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """The sharding of arrays [..., batch, ...] with `leading` dimensions before the batch."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, RULES["batch"]))


def row_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """The sharding of arrays [..., batch, sequence] with `leading` dimensions before the batch."""
    names = (RULES["batch"], RULES["sequence"])
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, *names))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the mesh splits a batch."""
    return parts(mesh, "batch")


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
                return NamedSharding(mesh, param_spec(mesh, found.names, leaf.shape))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding, state)


def constrain(
    mesh: Mesh, rules: Rules = RULES
) -> Callable[[jax.Array, tuple[str | None, ...]], jax.Array]:
    """The function by which a model pins its activations, named by logical axes, to the mesh."""
    if mesh.size == 1:
        return lambda x, names: x
    return lambda x, names: jax.lax.with_sharding_constraint(
        x, NamedSharding(mesh, activation_spec(mesh, names, x.shape, rules))
    )


def axes_told(mesh: Mesh, axes: Sequence[str]) -> str:
    """The axes of more than one device, for a message: mesh.data x mesh.fsdp."""
    return " x ".join(f"mesh.{axis}" for axis in axes if mesh.shape[axis] > 1)


def check_divisible(mesh: Mesh, axes: dict, shapes: dict, rules: Rules = RULES) -> None:
    """Raises UserError where a parameter does not divide over the mesh, naming axis and sizes.

    A vocabulary always does, and heads of keys and values also do where they divide the devices.
    """
    for axis, array in zip(jax.tree.leaves(axes), jax.tree.leaves(shapes), strict=True):
        _check_parameter(mesh, axis, array.shape, rules)


def _check_parameter(mesh: Mesh, axes: Axes, shape: tuple[int, ...], rules: Rules) -> None:
    for name, size in zip(axes.names, shape, strict=True):
        count = parts(mesh, name, rules)
        if size % count == 0 or name == "vocab" or (name == "kv_heads" and count % size == 0):
            continue
        how = "split or repeated" if name == "kv_heads" else "split"
        raise UserError(
            f"{size} {name} cannot be {how} evenly over {axes_told(mesh, rules[name])} = {count}: "
            f"change the model's {name} or the mesh"
        )
