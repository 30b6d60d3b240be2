"""The mesh, and sizes that do not fit it."""

import jax
import pytest

from instar.errors import UserError
from instar.sharding.mesh import AXES, MeshConfig, make_mesh


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
