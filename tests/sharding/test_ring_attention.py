"""Attention round a ring of devices, against the reference on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import packed_batch

from instar.errors import UserError
from instar.models.attention import alibi_slopes, attend, visible
from instar.models.tiled_attention import Beside, Form, Places, cut_places, sees
from instar.sharding.inputs import zigzag
from instar.sharding.mesh import MeshConfig, make_mesh
from instar.sharding.ring_attention import ring_attention
from instar.sharding.rules import row_sharding

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 2, 24, 6, 2, 5, 4
MESH = MeshConfig(fsdp=1, context=4, tensor=2)
PREFIX = np.array([2, 5], np.int32)
OPTIONS = {
    "causal": {},
    "window and softcap": {"window": 3, "softcap": 1.5, "scale": 0.31},
    "prefix, window and slopes": {
        "prefix_length": PREFIX,
        "window": 4,
        "bias_slopes": alibi_slopes(HEADS),
    },
    "rounded slopes": {"scale": 0.31, "bias_slopes": alibi_slopes(HEADS), "bias_rounded": True},
}


def draw(seed: int, length: int = LENGTH) -> tuple[dict, dict]:
    """Random places in no order at all, so that nothing but the contract is relied on."""
    rng = np.random.default_rng(seed)

    def floats(heads: int, size: int = HEAD_DIM) -> np.ndarray:
        return rng.standard_normal((BATCH, length, heads, size))

    positions = rng.integers(0, 10, (BATCH, length)).astype(np.int32)
    segments = rng.integers(0, 3, (BATCH, length)).astype(np.int32)
    places = {"positions": positions, "kv_positions": positions}
    places |= {"segment_ids": segments, "kv_segment_ids": segments}
    return {"q": floats(HEADS), "k": floats(KV_HEADS), "v": floats(KV_HEADS, VALUE_DIM)}, places


@pytest.mark.parametrize("name", OPTIONS)
def test_a_ring_computes_what_the_reference_does(name):
    with jax.enable_x64(True):
        floats, places = draw(1)
        real = (places["segment_ids"] > 0)[..., None, None]
        shape = (BATCH, LENGTH, HEADS, VALUE_DIM)
        to_out = np.random.default_rng(2).standard_normal(shape)

        def run(way):
            def loss(floats):
                out = jnp.where(real, way(**floats, **places, **OPTIONS[name]), 0)
                return jnp.sum(out * to_out), out

            return jax.jit(jax.value_and_grad(loss, has_aux=True))(floats)

        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12),
            run(ring_attention(make_mesh(MESH))),
            run(attend),
        )


def test_padding_is_zero_and_bfloat16_stays_close():
    """Sums are in float32, and the result is in the dtype of the queries."""
    floats, places = draw(3)
    cast = {name: jnp.asarray(x, jnp.bfloat16) for name, x in floats.items()}
    out = jax.jit(lambda floats: ring_attention(make_mesh(MESH))(**floats, **places))(cast)
    assert out.dtype == jnp.bfloat16
    expected = attend(**{n: jnp.asarray(x, jnp.float32) for n, x in floats.items()}, **places)
    real = places["segment_ids"] > 0
    assert np.abs(np.asarray(out, np.float32) - expected)[real].max() < 0.03
    assert not np.asarray(out, np.float32)[~real].any()


@pytest.mark.parametrize(
    ("length", "mesh", "message"),
    [
        (10, MESH, r"10 tokens of a row cannot be split evenly over mesh.context = 4"),
        (24, MeshConfig(fsdp=4, context=2), r"2 rows cannot be split evenly over mesh.fsdp = 4"),
        (24, MeshConfig(fsdp=1, context=2, tensor=4), "6 heads cannot be .* mesh.tensor = 4"),
    ],
)
def test_what_does_not_divide_is_refused(length, mesh, message):
    floats, places = draw(4, length)
    with pytest.raises(UserError, match=message):
        ring_attention(make_mesh(mesh))(**floats, **places)


def test_no_device_holds_the_logits_of_its_part_of_a_row():
    """They would be of 2,048 queries and 2,048 keys at a time; only those of a tile exist."""
    mesh, part = make_mesh(MeshConfig(fsdp=1, context=8)), 2048
    tokens = jax.ShapeDtypeStruct((1, 8 * part), jnp.int32, sharding=row_sharding(mesh))
    heads = jax.ShapeDtypeStruct((1, 8 * part, 1, 8), jnp.float32, sharding=row_sharding(mesh))

    def loss(floats: tuple, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        places = {"positions": positions, "kv_positions": positions}
        places |= {"segment_ids": segment_ids, "kv_segment_ids": segment_ids}
        return ring_attention(mesh)(*floats, **places).sum()

    compiled = jax.jit(jax.grad(loss)).lower((heads,) * 3, tokens, tokens).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * part**2


# --- What is computed, and by whom --------------------------------------------------------------


def tiles(places: Places, parts: int) -> Places:
    """The tiles of all devices, one after the other, two for each: int [tiles, B, n]."""
    pieces = [Places(*(x[:, i] for x in places)) for i in np.split(np.arange(LENGTH), parts)]
    return Places(*map(jnp.concatenate, zip(*map(cut_places, pieces), strict=True)))


def of_pairs(function, places: Places) -> np.ndarray:
    """`function` of each tile of queries and each tile of keys: [tiles, tiles]."""
    return np.asarray(jax.vmap(jax.vmap(function, (None, 0)), (0, None))(places, places))


def seen(places: Places, window=None, prefix_length=None) -> np.ndarray:
    """Which tiles of queries are computed with which of keys."""
    form, beside = Form(window, 1.0, None), Beside(prefix_length, None)
    return of_pairs(lambda at, kv_at: sees(form, at, kv_at, beside), places)


def by_pairs(places: Places, window=None, prefix_length=None) -> np.ndarray:
    """Which have a query that sees a key, by looking at all of them."""

    def any_pair(at: Places, kv_at: Places) -> jax.Array:
        pair = (at.positions, kv_at.positions, at.segment_ids, kv_at.segment_ids)
        return visible(*pair, window, prefix_length).any()

    return of_pairs(any_pair, places)


def in_zigzag(documents: list[list[int]], parts: int) -> Places:
    batch = packed_batch(0, documents, LENGTH, 7)
    order = zigzag(LENGTH, parts)
    return Places(*(jnp.asarray(batch[name][:, order]) for name in ("positions", "segment_ids")))


def test_each_device_computes_as_many_tiles_and_none_in_vain():
    whole = seen(tiles(in_zigzag([[LENGTH]], 4), 4)).reshape(4, 2 * 8)
    assert set(whole.sum(1)) == {2 * 4 + 1}
    in_order = packed_batch(0, [[LENGTH]], LENGTH, 7)
    plain = Places(*(jnp.asarray(in_order[name]) for name in ("positions", "segment_ids")))
    assert list(seen(tiles(plain, 4)).reshape(4, 16).sum(1)) == [3, 7, 11, 15]


@pytest.mark.parametrize("options", [{}, {"window": 4}, {"prefix_length": np.array([7])}])
@pytest.mark.parametrize("documents", [[LENGTH], [5, 9, 7], [2, 1, 17], [13, 11]])
def test_no_tile_of_a_packed_row_is_computed_in_vain(documents, options):
    places = tiles(in_zigzag([documents], 4), 4)
    np.testing.assert_array_equal(seen(places, **options), by_pairs(places, **options))


@pytest.mark.parametrize("seed", range(3))
def test_what_is_visible_is_computed_whatever_the_order(seed):
    _, drawn = draw(seed)
    places = tiles(Places(jnp.asarray(drawn["positions"]), jnp.asarray(drawn["segment_ids"])), 4)
    for options in ({}, {"window": 2}, {"prefix_length": PREFIX}):
        assert (seen(places, **options) >= by_pairs(places, **options)).all()
