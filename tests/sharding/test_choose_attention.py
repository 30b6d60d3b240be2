"""Which way of computing attention a mesh gets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import packed_batch

from instar.errors import UserError
from instar.models.attention import alibi_slopes, attend
from instar.models.fused_attention import Kernel
from instar.sharding import attention
from instar.sharding.attention import choose_attention
from instar.sharding.mesh import MeshConfig, make_mesh

ROWS, LENGTH, HEADS = 4, 12, 4
SPLIT = MeshConfig(data=2, fsdp=2, tensor=2)
CONTEXT = MeshConfig(fsdp=2, context=4)


def draw(rows: int = ROWS) -> dict:
    batch = packed_batch(0, [[5, 4], [12], [2, 9], [7]][:rows], LENGTH, 7)
    rng = np.random.default_rng(1)
    q, k, v = (
        jnp.asarray(rng.standard_normal((rows, LENGTH, heads, 5)), jnp.float32)
        for heads in (HEADS, 2, 2)
    )
    positions, segments = jnp.asarray(batch["positions"]), jnp.asarray(batch["segment_ids"])
    places = {"positions": positions, "kv_positions": positions}
    places |= {"segment_ids": segments, "kv_segment_ids": segments}
    return {"q": q, "k": k, "v": v} | places


@pytest.fixture
def kernel(monkeypatch) -> list[tuple]:
    """A kernel for this machine, in place of that for TPUs; the shapes that it is called with."""
    called = []

    def compute(q: jax.Array, k: jax.Array, v: jax.Array, **asked: object) -> jax.Array:
        called.append((q.shape, k.shape))
        return attend(q, k, v, **asked)

    here = Kernel("splash", "cpu", compute, ("window",), lambda q, v: None)
    monkeypatch.setitem(attention.KERNELS, "splash", here)
    return called


def test_without_a_kernel_it_is_the_reference():
    for name in ("auto", "xla"):
        assert choose_attention(make_mesh(SPLIT), name) is attend
    assert choose_attention(make_mesh(CONTEXT), "xla") is attend


@pytest.mark.parametrize("name", ["auto", "splash"])
def test_a_kernel_has_the_rows_and_heads_of_one_device(name, kernel):
    inputs, way = draw(), choose_attention(make_mesh(SPLIT), name)
    found = jax.jit(lambda: way(**inputs, window=4, softcap=None))()
    assert kernel == [((1, LENGTH, 2, 5), (1, LENGTH, 1, 5))]
    real = np.asarray(inputs["segment_ids"]) > 0
    expected = attend(**inputs, window=4)
    np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "rows", "named"),
    [
        ({"bias_slopes": alibi_slopes(HEADS)}, ROWS, "cannot honour bias_slopes"),
        ({"softcap": 2.0}, ROWS, "cannot honour softcap"),
        ({}, 3, "cannot honour 3 rows cannot be split evenly over mesh.data x mesh.fsdp = 4"),
    ],
)
def test_what_a_kernel_cannot_honour(options, rows, named, kernel):
    """Asked for by name it refuses; else the reference computes it."""
    inputs, mesh = draw(rows), make_mesh(SPLIT)
    found = choose_attention(mesh)(**inputs, **options)
    np.testing.assert_array_equal(found, attend(**inputs, **options))
    with pytest.raises(UserError, match=f"execution.attention: splash {named}"):
        choose_attention(mesh, "splash")(**inputs, **options)
    assert not kernel


@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        (SPLIT, "cudnn", "cudnn is for devices of NVIDIA, and this is cpu"),
        (SPLIT, "splash", "splash is for devices of TPU, and this is cpu"),
        (CONTEXT, "splash", "splash cannot split rows over mesh.context = 4"),
    ],
)
def test_a_kernel_that_does_not_fit_the_mesh_is_refused(config, name, message):
    with pytest.raises(UserError, match=message):
        choose_attention(make_mesh(config), name)
