"""The safetensors format, against its own library, and what is said of damaged files."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from instar.errors import UserError
from instar.interchange.safetensors import INDEX, SINGLE, FolderWriter, open_file, open_folder

SHAPES = {"a.weight": (3, 5), "b": (7,), "scalar": (), "empty": (0, 4), "c.bias": (2, 3, 4)}


def arrays(dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def write(folder, dtype: type = np.float32, **options) -> None:
    writer = FolderWriter(folder, SHAPES, np.dtype(dtype), **options)
    for name, array in reversed(arrays().items()):  # in any order
        writer.write(name, array)
    writer.close()


def test_what_we_write_the_library_reads(tmp_path):
    write(tmp_path)
    for name, array in load_file(tmp_path / SINGLE).items():
        np.testing.assert_array_equal(array, arrays()[name])


def test_what_the_library_writes_we_read(tmp_path):
    mixed = arrays() | {"half": np.float16([1, 2]), "ids": np.int64([[3]]), "on": np.array([True])}
    save_file(mixed, tmp_path / SINGLE, metadata={"format": "pt"})
    found = open_folder(tmp_path)
    assert found.keys() == mixed.keys()
    for name, array in mixed.items():
        read = found[name].read()
        assert (read.dtype, found[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(read, array)


def test_bfloat16_goes_round(tmp_path):
    write(tmp_path, ml_dtypes.bfloat16)
    for name, stored in open_folder(tmp_path).items():
        expected = arrays(ml_dtypes.bfloat16)[name]
        assert stored.read().tobytes() == expected.tobytes()


def test_several_files_have_an_index(tmp_path):
    write(tmp_path, largest_file=64)
    index = json.loads((tmp_path / INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == 4 * sum(map(math.prod, SHAPES.values()))
    found = open_folder(tmp_path)
    for name, array in arrays().items():
        np.testing.assert_array_equal(found[name].read(), array)
    assert not list(tmp_path.glob("*.partial"))


def test_a_file_appears_when_it_is_whole(tmp_path):
    writer = FolderWriter(tmp_path, SHAPES, np.dtype(np.float32))
    writer.write("b", arrays()["b"])
    with pytest.raises(UserError, match="neither"):
        open_folder(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    write(tmp_path)
    content = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(content[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors is (truncated|no safetensors)"):
        open_folder(tmp_path)


def header(entries: dict) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04" + bytes(100), "no safetensors file"),
        (header({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}), "a is of type F4"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}), "a has 4 bytes"),
        (header({"a": {"dtype": "F32", "data_offsets": [0, 4]}}), "entry of a is not valid"),
        (header({"a": {"dtype": "F32", "shape": [99], "data_offsets": [0, 396]}}), "a ends at"),
        (
            header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}),
            "of a is not valid",
        ),
        (header({"a": 3}), "entry of a is not valid"),
        (header([]), "its header is no mapping"),
    ],
    ids=range(8),
)
def test_a_header_that_is_wrong_is_a_sentence(tmp_path, content, message):
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_file(tmp_path / SINGLE)


def test_a_folder_of_pickles_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(UserError, match=r"pytorch_model\.bin.*can run any code.*safetensors"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not an index"),
        ('{"weight_map": []}', "is not an index"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', "not a file beside it"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "names gone.safetensors, which is not there"),
        ('{"weight_map": {"zz": "one.safetensors"}}', "names the tensor zz"),
    ],
)
def test_an_index_that_is_wrong_is_a_sentence(tmp_path, index, message):
    save_file(arrays(), tmp_path / "one.safetensors")
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(UserError, match=message):
        open_folder(tmp_path)
