"""The fingerprint sees every bit, and no sharding."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from instar.sharding.mesh import MeshConfig, make_mesh
from instar.training.fingerprint import fingerprint

# One tree of fixed shapes, so that Hypothesis moves values and nothing compiles twice.
DTYPES = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "int32": np.int32,
    "uint32": np.uint32,
    "int8": np.int8,
}
SHAPES = [(3, 5), (), (7,), (2, 1, 4)]
PATHS = [(name, i) for name in DTYPES for i in range(len(SHAPES))]


def draw(seed: int) -> dict:
    """Random bits: NaNs of every payload, infinities, subnormals and negative zeros with them."""
    rng = np.random.default_rng(seed)
    return {
        name: [
            rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
            .view(dtype)
            .reshape(shape)
            for shape in SHAPES
        ]
        for name, dtype in DTYPES.items()
    }


def flipped(tree: dict, path: tuple[str, int], bit: int) -> dict:
    """A copy of the tree with one bit of one of its arrays flipped."""
    name, index = path
    data = bytearray(tree[name][index].tobytes())
    bit %= 8 * len(data)
    data[bit // 8] ^= 1 << bit % 8
    array = np.frombuffer(bytes(data), DTYPES[name]).reshape(SHAPES[index])
    return tree | {name: [*tree[name][:index], array, *tree[name][index + 1 :]]}


@given(st.integers(0, 2**32), st.sampled_from(PATHS), st.integers(0, 2**20))
def test_one_flipped_bit_shows(seed, path, bit):
    tree = draw(seed)
    assert fingerprint(tree) == fingerprint(draw(seed))
    assert fingerprint(flipped(tree, path, bit)) != fingerprint(tree)


@given(
    st.integers(0, 2**32),
    st.sampled_from(PATHS),
    st.sampled_from(PATHS),
    st.lists(st.integers(0, 2**20), min_size=2, max_size=2),
)
def test_two_flipped_bits_do_not_hide_each_other(seed, first, second, bits):
    """The same bit of two elements is what a plain sum or exclusive or would lose."""
    tree = draw(seed)
    twice = flipped(flipped(tree, first, bits[0]), second, bits[1])
    same = all(
        a.tobytes() == b.tobytes()
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(twice), strict=True)
    )
    assert (fingerprint(twice) == fingerprint(tree)) == same


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.integers(0, 14), st.integers(0, 14))
def test_swapped_elements_show(seed, i, j):
    tree = draw(seed)
    array = tree["float32"][0].copy()
    flat = array.reshape(-1).view(np.uint32)
    flat[i], flat[j] = flat[j], flat[i]
    swapped = tree | {"float32": [array, *tree["float32"][1:]]}
    same = array.tobytes() == tree["float32"][0].tobytes()
    assert (fingerprint(swapped) == fingerprint(tree)) == same


def test_path_shape_and_type_are_part_of_it():
    zeros = jnp.zeros((2, 6), jnp.float32)
    ones = jnp.ones((2, 6), jnp.float32)
    trees = [
        {"a": zeros, "b": ones},
        {"b": zeros, "a": ones},
        {"a": zeros, "c": ones},
        {"x": {"a": zeros, "b": ones}},
        [zeros, ones],
        (ones, zeros),
        {"a": zeros.reshape(6, 2), "b": ones},
        {"a": zeros.reshape(12), "b": ones},
        {"a": zeros.astype(jnp.int32), "b": ones},
        {"a": zeros.astype(jnp.uint32), "b": ones},
        {"a": zeros.astype(jnp.bfloat16), "b": ones},
        {"a": zeros.astype(bool), "b": ones},
        {"a": ~zeros.astype(bool), "b": ones},
        {"a": -zeros, "b": ones},
        {"a": zeros},
        {"a": zeros, "b": ones, "c": jnp.zeros((0, 3))},
    ]
    assert len({fingerprint(tree) for tree in trees}) == len(trees)
    assert all(len(fingerprint(tree)) == 64 for tree in trees)


def test_eight_byte_numbers_are_seen_whole():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((3, 4))
        base = fingerprint({"x": jnp.asarray(x)})
        for bit in range(64):
            other = x.copy()
            other.view(np.uint64)[1, 2] ^= np.uint64(1) << np.uint64(bit)
            assert fingerprint({"x": jnp.asarray(other)}) != base


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_sharding_gives_the_same(dtype):
    rng = np.random.default_rng(0)
    tree = {
        "kernel": jnp.asarray(rng.standard_normal((16, 8, 4)), dtype),
        "step": jnp.int32(7),
    }
    expected = fingerprint(tree)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    specs = [
        PartitionSpec(),
        PartitionSpec("fsdp", "tensor"),
        PartitionSpec(None, ("data", "tensor"), "fsdp"),
        PartitionSpec(("data", "fsdp", "tensor")),
    ]
    for spec in specs:
        placed = {
            "kernel": jax.device_put(tree["kernel"], NamedSharding(mesh, spec)),
            "step": jax.device_put(tree["step"], NamedSharding(mesh, PartitionSpec())),
        }
        assert fingerprint(placed) == expected
        changed = placed | {"kernel": placed["kernel"].at[9, 3, 1].set(0)}
        assert fingerprint(changed) != expected
