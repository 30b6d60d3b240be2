"""The mesh of devices."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from instar.errors import UserError

# From the slowest links to the fastest: what is near in a mesh is near in the machine.
AXES = ("slice", "data", "fsdp", "expert", "context", "tensor")


@dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each axis; -1 (on one axis at most) takes what is left.

    `data` replicates parameters and splits the batch, `fsdp` splits both (parameters are gathered
    layer by layer), `tensor` splits heads, MLPs, the vocabulary and, between blocks, the positions
    of a row, `context` these positions everywhere (where a stage reads rows that are never split,
    it is `data`), `expert` the experts and, between them, the batch. `slice` is `data` between
    groups of devices (slices of a TPU, nodes) whose links are slower than those inside.
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

    def of_whole_rows(self) -> "MeshConfig":
        """The same devices for rows that are never split: those of `context` have some each."""
        data = -1 if -1 in (self.data, self.context) else self.data * self.context
        return replace(self, data=data, context=1)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (all of them by default), with the axes `AXES`.

    Raises:
      UserError: the axes do not multiply to the number of devices, or the devices are in slices of
        a TPU that `slice` does not keep apart.
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
    groups = [near(shape[1:], group) for group in in_slices(devices, shape[0])]
    return Mesh(np.stack(groups), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def in_slices(devices: Sequence[jax.Device], count: int) -> list[list[jax.Device]]:
    """The devices in `count` groups, between which the slowest links of the machine lie.

    By their `slice_index` where they have one (slices of a TPU, nodes of GPUs), and in their order,
    in which those of a process are neighbours.

    Raises:
      UserError: a group has devices of two slices of a TPU.
    """
    ordered = sorted(devices, key=_slice_index)
    size = len(ordered) // count
    groups = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    mixed = any(len({*map(_slice_index, group)}) > 1 for group in groups)
    if mixed and devices[0].platform == "tpu":
        slices = len({*map(_slice_index, devices)})
        raise UserError(
            f"the devices are in {slices} slices, and mesh.slice is {count}: make it a multiple of "
            f"{slices}, so that only that axis goes from slice to slice"
        )
    return groups


def _slice_index(device: jax.Device) -> int:
    return getattr(device, "slice_index", 0)


def near(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices in that shape, as a machine's links suggest."""
    try:
        return mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:  # an axis is no whole number of a torus's own
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
