"""From rows to arrays on the mesh."""

import jax
import numpy as np
import pytest

from instar.errors import UserError
from instar.sharding.inputs import BatchLayout, check_row_length, place_rows, zigzag
from instar.sharding.mesh import MeshConfig, make_mesh

MESHES = [MeshConfig(), MeshConfig(2, 1, 4), MeshConfig(2, 2, 2), MeshConfig(1, 1, 8)]
LENGTH = 5


def layout(mesh: MeshConfig, microbatches: int = 3, microbatch: int = 8) -> BatchLayout:
    found = BatchLayout(make_mesh(mesh), microbatches, microbatch)
    found.check()
    return found


def rows(offsets: np.ndarray) -> dict[str, np.ndarray]:
    """Rows whose every number says which row of the step it is of."""
    tokens = offsets[:, None] * 100 + np.arange(LENGTH)
    return {"tokens": tokens.astype(np.int32), "weights": tokens.astype(np.float32) + 0.5}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_one_process_reads_every_row_and_places_it_by_a_plain_reshape(mesh):
    lay = layout(mesh)
    offsets = lay.local_offsets(24)
    np.testing.assert_array_equal(np.sort(offsets), np.arange(24))
    placed = lay.place(rows(offsets), 24)
    whole = rows(np.arange(24))
    for name in whole:
        np.testing.assert_array_equal(placed[name], whole[name].reshape(3, 8, LENGTH))
        assert placed[name].dtype == whole[name].dtype
    assert placed["microbatches"] == 3 and placed["microbatches"].dtype == np.int32
    assert placed["microbatches"].sharding.is_fully_replicated


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_each_device_holds_its_share_of_every_microbatch(mesh):
    config, placed = mesh, layout(mesh).place(rows(np.arange(24)), 24)["tokens"]
    shards = 8 // config.tensor if config.fsdp != -1 else 8
    assert {s.data.shape for s in placed.addressable_shards} == {(3, 8 // shards, LENGTH)}
    sources = {s.index[1].start or 0 for s in placed.addressable_shards}
    assert len(sources) == shards


def test_a_smaller_batch_fills_the_first_microbatches():
    lay = layout(MeshConfig(2, 2, 2))
    for count in (8, 16, 24):
        placed = lay.place(rows(lay.local_offsets(count)), count)
        tokens = np.asarray(placed["tokens"])
        assert tokens.shape == (3, 8, LENGTH)
        np.testing.assert_array_equal(
            tokens.reshape(24, LENGTH)[:count], rows(np.arange(count))["tokens"]
        )
        assert not tokens.reshape(24, LENGTH)[count:].any()
        assert not np.asarray(placed["weights"])[count // 8 :].any()
        assert placed["microbatches"] == count // 8


def test_a_microbatch_must_divide_over_the_mesh():
    with pytest.raises(UserError, match=r"12 rows cannot be split .* mesh.fsdp = 8"):
        layout(MeshConfig(), microbatch=12)
    layout(MeshConfig(2, 1, 4), microbatch=12)


def test_zigzag_gives_each_device_a_piece_of_either_end():
    order = [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    np.testing.assert_array_equal(zigzag(12, 3), order)
    np.testing.assert_array_equal(zigzag(4, 1), range(4))


def test_rows_that_are_split_lie_in_zigzag():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, context=2))
    batch = {"tokens": np.arange(16 * 8, dtype=np.int32).reshape(16, 8)}
    placed = BatchLayout(mesh, 3, 8).place(batch, 16)["tokens"]
    expected = batch["tokens"].reshape(2, 8, 8)[:, :, zigzag(8, 2)]
    np.testing.assert_array_equal(placed[:2], expected)
    assert not np.any(placed[2])
    assert {s.data.shape for s in placed.addressable_shards} == {(3, 2, 4)}

    whole = place_rows(mesh, batch | {"lengths": np.arange(16)})
    np.testing.assert_array_equal(whole["tokens"], batch["tokens"])
    assert {s.data.shape for s in whole["tokens"].addressable_shards} == {(4, 4)}
    assert {s.data.shape for s in whole["lengths"].addressable_shards} == {(4,)}


def test_rows_must_divide_into_twice_as_many_pieces_as_devices():
    mesh = make_mesh(MeshConfig(fsdp=2, context=4))
    check_row_length(mesh, 24, "length")
    with pytest.raises(
        UserError, match=r"length \(20\) must be a multiple of 2 \* mesh.context = 8"
    ):
        check_row_length(mesh, 20, "length")
    check_row_length(make_mesh(MeshConfig()), 7, "length")


def test_place_rows():
    batch = rows(np.arange(16))
    placed = place_rows(make_mesh(MeshConfig(2, 2, 2)), batch)
    for name in batch:
        np.testing.assert_array_equal(placed[name], batch[name])
        assert {s.data.shape for s in placed[name].addressable_shards} == {(4, LENGTH)}
        assert isinstance(placed[name], jax.Array)
