"""Rows that travel between devices by expert, in both forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from instar.models.experts import route
from instar.models.spec import Experts, Mlp
from instar.sharding import experts
from instar.sharding.mesh import MeshConfig, make_mesh
from instar.sharding.rules import batch_sharding

PARTS, ROWS, CAPACITY = 4, 7, 11
MESH = MeshConfig(fsdp=1, expert=PARTS)
SENT = np.asarray([[1, 0, 2, 3], [0, 0, 7, 0], [2, 2, 1, 1], [0, 0, 0, 0]], np.int32)


def ragged_all_to_all(rows, out, input_offsets, sizes, output_offsets, received, *, axis_name):
    """What jax.lax's documentation says of it, by loops over gathered arrays."""
    here = jax.lax.axis_index(axis_name)
    everything = jax.lax.all_gather((rows, input_offsets, sizes, output_offsets), axis_name)
    for source in range(PARTS):
        theirs, *places = (x[source] for x in everything)
        start, size, to = (x[here] for x in places)
        for row in range(len(rows)):
            target = jnp.where(row < size, to + row, len(out))
            out = out.at[target].set(theirs[start + row], mode="drop")
    return out


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_every_row_comes_to_where_it_is_sent(platform, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    mesh = make_mesh(MESH, jax.devices()[:PARTS])
    rows = np.random.default_rng(0).standard_normal((PARTS, ROWS, 3)).astype("f4")
    spec = PartitionSpec("expert")

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=spec, out_specs=(spec, spec), check_vma=False
    )
    def there_and_back(rows):
        came = experts._exchange(rows[0], jnp.asarray(SENT), CAPACITY, platform=platform)
        back = experts._exchange(came, jnp.asarray(SENT.T), ROWS, platform=platform)
        return came[None], back[None]

    came, back = there_and_back(rows)
    for here in range(PARTS):
        expected = []
        for source in range(PARTS):
            start = SENT[source, :here].sum()
            expected += list(rows[source, start : start + SENT[source, here]])
        found = np.asarray(came[here])
        np.testing.assert_array_equal(found[: len(expected)], np.reshape(expected, (-1, 3)))
        assert not found[len(expected) :].any()
        sent = SENT[here].sum()
        np.testing.assert_array_equal(back[here, :sent], rows[here, :sent])
        assert not np.any(back[here, sent:])


def test_a_tpu_sends_rows_and_no_more_and_learns_through_it():
    """The program for a TPU, which is only lowered here, forward and backward."""
    mesh = make_mesh(MESH, jax.devices()[:PARTS])
    spec = Experts(Mlp(6, "silu", gated=True), 8, 2)
    dispatch = experts.make_dispatch(mesh, platform="tpu")
    kernels = {"up": (8, 5, 6), "gate": (8, 5, 6), "down": (8, 6, 5)}

    def loss(x, weights, kernels, chosen):
        return jnp.sum(dispatch(x, chosen, weights, kernels, spec))

    shapes = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        ((4, 3, 5), (4, 3, 2), kernels),
        is_leaf=lambda x: isinstance(x, tuple) and isinstance(x[0], int),
    )
    differentiate = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    chosen = jax.ShapeDtypeStruct((4, 3, 2), jnp.int32)
    traced = differentiate.trace(*shapes, chosen)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    # There and back, and the same for the gradients.
    assert text.count("@ragged_all_to_all") == 4
    assert "ragged_dot" in text


def test_the_choice_is_made_where_the_tokens_are():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    spec, rows = Experts(Mlp(4, "silu"), 8, 2), batch_sharding(mesh)
    logits = jax.ShapeDtypeStruct((16, 4, 8), jnp.float32, sharding=rows)
    real = jax.ShapeDtypeStruct((16, 4), jnp.bool_, sharding=rows)
    run = jax.jit(lambda logits, real: route(logits, None, spec, real))
    compiled = run.lower(logits, real).compile()
    assert "all-gather" not in compiled.as_text()
    assert "all-reduce" in compiled.as_text()  # of the loads
    assert compiled.output_shardings[0].is_equivalent_to(rows, 3)
