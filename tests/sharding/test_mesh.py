"""The mesh, and sizes that do not fit it."""

import jax
import pytest

from instar.errors import UserError
from instar.sharding.mesh import AXES, MeshConfig, make_mesh


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (1, 8, 1)),
        (MeshConfig(data=-1, fsdp=2, tensor=2), (2, 2, 2)),
        (MeshConfig(data=2, fsdp=1, tensor=4), (2, 1, 4)),
        (MeshConfig(data=1, fsdp=1, tensor=-1), (1, 1, 8)),
        (MeshConfig(data=4, fsdp=-1, tensor=2), (4, 1, 2)),
    ],
)
def test_shape(config, shape):
    config.check()
    mesh = make_mesh(config)
    assert tuple(mesh.shape[axis] for axis in AXES) == shape
    assert {d.id for d in mesh.devices.flat} == {d.id for d in jax.devices()}


def test_fewer_devices():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}


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
