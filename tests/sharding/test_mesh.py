"""The mesh, and sizes that do not fit it."""

from dataclasses import dataclass

import jax
import pytest

from instar.errors import UserError
from instar.sharding.mesh import AXES, MeshConfig, in_slices, make_mesh


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), {"fsdp": 8}),
        (MeshConfig(data=-1, fsdp=2, tensor=2), {"data": 2, "fsdp": 2, "tensor": 2}),
        (MeshConfig(data=2, fsdp=1, tensor=4), {"data": 2, "tensor": 4}),
        (MeshConfig(fsdp=1, tensor=-1), {"tensor": 8}),
        (MeshConfig(fsdp=2, context=2, expert=2), {"fsdp": 2, "context": 2, "expert": 2}),
        (MeshConfig(slice=2, fsdp=-1), {"slice": 2, "fsdp": 4}),
    ],
)
def test_shape(config, sizes):
    config.check()
    mesh = make_mesh(config)
    assert dict(mesh.shape) == dict.fromkeys(AXES, 1) | sizes
    assert {d.id for d in mesh.devices.flat} == {d.id for d in jax.devices()}


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(data=2, fsdp=1, context=4), {"data": 8}),
        (MeshConfig(context=2, tensor=2), {"data": 2, "fsdp": 2, "tensor": 2}),
        (MeshConfig(data=-1, fsdp=2, context=2), {"data": 4, "fsdp": 2}),
        (MeshConfig(data=2, fsdp=2, context=-1), {"data": 4, "fsdp": 2}),
        (MeshConfig(fsdp=4, tensor=2), {"fsdp": 4, "tensor": 2}),
    ],
)
def test_where_rows_are_whole_the_devices_of_context_have_some_each(config, sizes):
    whole = config.of_whole_rows()
    whole.check()
    assert dict(make_mesh(whole).shape) == dict.fromkeys(AXES, 1) | sizes


def test_fewer_devices():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert dict(mesh.shape) == dict.fromkeys(AXES, 1)


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=3),
        MeshConfig(data=2, fsdp=2, tensor=1),
        MeshConfig(data=1, fsdp=16, tensor=1),
        MeshConfig(data=16, fsdp=-1),
    ],
)
def test_sizes_must_multiply_to_the_devices(config):
    with pytest.raises(UserError, match="does not fit 8 devices"):
        make_mesh(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=-1, fsdp=-1), "only one axis of mesh may be -1"),
        (MeshConfig(data=0), "mesh.data must be at least 1, or -1"),
        (MeshConfig(tensor=-2), "mesh.tensor must be at least 1, or -1"),
    ],
)
def test_impossible_configs(config, message):
    with pytest.raises(UserError, match=message):
        config.check()


@dataclass(frozen=True)
class Device:
    """What `in_slices` looks at."""

    id: int
    slice_index: int = 0
    platform: str = "tpu"


@pytest.mark.parametrize("count", [2, 4])
def test_slices_of_the_machine_are_kept_apart(count):
    """Also where the devices come in another order."""
    devices = [Device(id, slice_index=id % 2) for id in range(8)]
    groups = in_slices(devices, count)
    assert [len(group) for group in groups] == [8 // count] * count
    assert [{d.slice_index for d in group} for group in groups] == (
        [{0}] * (count // 2) + [{1}] * (count // 2)
    )
    assert {d.id for group in groups for d in group} == set(range(8))


def test_devices_of_one_slice_stay_in_their_order():
    groups = in_slices([Device(id) for id in range(8)], 2)
    assert [[d.id for d in group] for group in groups] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_an_axis_across_the_slices_of_a_tpu_is_refused_and_across_nodes_of_gpus_is_not():
    devices = [Device(id, slice_index=id // 2) for id in range(8)]
    with pytest.raises(UserError, match=r"in 4 slices, and mesh\.slice is 2: make"):
        in_slices(devices, 2)
    nodes = [Device(id, slice_index=id // 2, platform="gpu") for id in range(8)]
    assert [[d.slice_index for d in group] for group in in_slices(nodes, 2)] == [
        [0, 0, 1, 1],
        [2, 2, 3, 3],
    ]
