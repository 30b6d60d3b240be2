"""One of several processes: joins them, and checks what its own devices hold on every mesh."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import numpy as np
from jax.sharding import Mesh

from instar.sharding.inputs import BatchLayout, fetch, place_rows, zigzag
from instar.sharding.mesh import AXES, MeshConfig, make_mesh
from instar.sharding.processes import join_processes

LENGTH = 16


def rows(offsets: np.ndarray) -> dict[str, np.ndarray]:
    return {"tokens": (100 * offsets[:, None] + np.arange(LENGTH)).astype(np.int32)}


def check(mesh: Mesh) -> None:
    """Two of three microbatches of eight rows, of which each process reads its own."""
    layout = BatchLayout(mesh, 3, 8)
    offsets = layout.local_offsets(16)
    expected = np.zeros((3, 8, LENGTH), np.int32)
    expected[:2] = rows(np.arange(16))["tokens"].reshape(2, 8, LENGTH)
    placed = layout.place(rows(offsets), 16)["tokens"]
    assert placed.shape == expected.shape
    order = zigzag(LENGTH, mesh.shape["context"])
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(shard.data, expected[:, :, order][shard.index])
    split = mesh.shape["data"] * mesh.shape["fsdp"] > 1
    assert len(offsets) == (8 if split else 16), "a process reads what it holds and no more"

    everywhere = place_rows(mesh, rows(np.arange(8)))
    for shard in everywhere["tokens"].addressable_shards:
        np.testing.assert_array_equal(shard.data, expected[0][shard.index])
    np.testing.assert_array_equal(fetch(everywhere)["tokens"], expected[0])


def main() -> None:
    join_processes()
    assert jax.process_count() == 2 and jax.device_count() == 8
    for sizes in (
        (2, 2, 2),
        (1, 8, 1),
        (1, 1, 8),
        (2, 1, 4),
        (4, 1, 2),
        (1, 1, 1, 8),
        (1, 2, 1, 4),
    ):
        check(make_mesh(MeshConfig(*sizes)))
    # Devices that alternate between the processes: the rows of each are not in one piece.
    devices = np.array(jax.devices()).reshape(2, 4).T.reshape(1, 8, 1, 1, 1, 1)
    check(Mesh(devices, AXES))
    print("whole")


if __name__ == "__main__":
    main()
