"""The mesh of devices."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import AxisType, Mesh

from instar.errors import UserError

# From the slowest links to the fastest: what is near in a mesh is near in the machine.
AXES = ("slice", "data", "fsdp", "expert", "context", "tensor")


@dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each axis; -1 (on one axis at most) takes what is left.

    `data` replicates parameters and splits the batch, `fsdp` splits both (parameters are gathered
    layer by layer), `tensor` splits heads, MLPs and the vocabulary, `context` the positions of a
    row, `expert` the experts and, between them, the batch. `slice` is `data` between groups of
    devices (slices of a TPU, nodes) whose links are slower than those inside.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1
    expert: int = 1
    slice: int = 1

    def check(self) -> None:
        sizes = [getattr(self, axis) for axis in AXES]
        for axis, size in zip(AXES, sizes, strict=True):
            if size < 1 and size != -1:
                raise UserError(
                    f"mesh.{axis} must be at least 1, or -1 for what is left, not {size}"
                )
        if sizes.count(-1) > 1:
            raise UserError("only one axis of mesh may be -1")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (all of them by default), with the axes `AXES`.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed or (-1 not in sizes.values() and fixed != len(devices)):
        shape = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1)
        raise UserError(
            f"mesh {shape or 'of one device'} does not fit {len(devices)} devices: make the sizes "
            "multiply to that number, or set one axis to -1"
        )
    shape = tuple(len(devices) // fixed if size == -1 else size for size in sizes.values())
    return jax.make_mesh(shape, AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))
