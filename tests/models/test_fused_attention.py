"""Kernels of attention, against the reference; and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import PREFIX, packed_batch

from instar.models import fused_attention
from instar.models.attention import alibi_slopes, attend
from instar.models.fused_attention import CUDNN, SPLASH, in_order, splash_attend
from instar.models.language_model import LanguageModel
from instar.models.transformer import Execution

LENGTH, HEADS, KV_HEADS, HEAD_DIM = 256, 4, 2, 16
# A text longer than a block of 128, one that ends in it, and padding; then texts of every length.
DOCUMENTS = [[150, 60], [3, 70, 128, 40]]


def draw(
    dtype: type, head_dim: int = HEAD_DIM, length: int = LENGTH, value_dim: int | None = None
) -> tuple[dict, dict]:
    """Random queries, keys and values, and the places of packed rows."""
    rng = np.random.default_rng(1)
    batch = packed_batch(2, DOCUMENTS, LENGTH, 7)
    positions, segments = (
        jnp.asarray(batch[name][:, :length]) for name in ("positions", "segment_ids")
    )

    def floats(heads: int, size: int = head_dim) -> jax.Array:
        return jnp.asarray(rng.standard_normal((2, length, heads, size)), dtype)

    places = {"positions": positions, "kv_positions": positions}
    places |= {"segment_ids": segments, "kv_segment_ids": segments}
    values = floats(KV_HEADS, value_dim or head_dim)
    return {"q": floats(HEADS), "k": floats(KV_HEADS), "v": values}, places


def outcomes(way, floats: dict, places: dict, **options: object) -> tuple:
    """The result where there is text, and the gradients of queries, keys and values."""
    real = (places["segment_ids"] > 0)[..., None, None]
    shape = (*floats["q"].shape[:3], floats["v"].shape[3])
    to_out = jnp.asarray(np.random.default_rng(3).standard_normal(shape), jnp.float32)

    def loss(floats):
        out = jnp.where(real, way(**floats, **places, **options), 0)
        return jnp.sum(out.astype(jnp.float32) * to_out), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(floats)


def assert_close(found: tuple, expected: tuple, tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("options", [{"softcap": 1.5}, {"window": 70, "scale": 0.4}], ids=str)
def test_splash_computes_what_the_reference_does(options, monkeypatch):
    monkeypatch.setattr(fused_attention, "BLOCK", 128)  # so that a row has several
    floats, places = draw(jnp.float32, value_dim=24 if "softcap" in options else None)
    assert SPLASH.refuses(floats["q"], floats["v"], places | options) is None
    way = functools.partial(splash_attend, interpret=True)
    found = outcomes(way, floats, places, **options)
    assert_close(found, outcomes(attend, floats, places, **options), 1e-5)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU of NVIDIA")
@pytest.mark.parametrize("options", [{}, {"window": 70}, {"scale": 0.4}], ids=str)
def test_cudnn_computes_what_the_reference_does(options):
    floats, places = draw(jnp.bfloat16)
    assert CUDNN.refuses(floats["q"], floats["v"], places | options) is None
    found = outcomes(CUDNN.attend, floats, places, **options)
    wide = {name: x.astype(jnp.float32) for name, x in floats.items()}
    assert_close(found, outcomes(attend, wide, places, **options), 0.03)


@pytest.fixture
def without_cudnn(monkeypatch) -> dict:
    """Computes calls of cuDNN by XLA; the options of the last one."""
    own, asked = jax.nn.dot_product_attention, {}

    def instead(*inputs, implementation, **options):
        asked.update(options, implementation=implementation)
        return own(*inputs, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    return asked


@pytest.mark.parametrize("options", [{}, {"window": 70, "scale": 0.4}], ids=str)
def test_cudnn_is_asked_for_what_the_contract_says(options, without_cudnn):
    floats, places = draw(jnp.float32)
    found = outcomes(CUDNN.attend, floats, places, **options)
    assert_close(found, outcomes(attend, floats, places, **options), 1e-5)
    assert without_cudnn["implementation"] == "cudnn" and without_cudnn["is_causal"]


def test_rows_that_are_not_in_order_give_nothing(without_cudnn):
    rows = {
        "whole": ([0, 1, 2, 3, 4], [1, 1, 1, 1, 1], True),
        "packed and padded": ([0, 1, 0, 9, 0], [1, 1, 2, 0, 0], True),
        "padded before and between": ([5, 0, 1, 0, 0], [0, 1, 1, 0, 2], True),
        "not from 0 on": ([7, 8, 9, 0, 1], [2, 2, 2, 5, 5], True),
        "a step left out": ([0, 1, 3, 4, 5], [1, 1, 1, 1, 1], False),
        "backwards": ([4, 3, 2, 1, 0], [1, 1, 1, 1, 1], False),
        "a segment in two pieces": ([0, 1, 0, 2, 3], [1, 1, 2, 1, 1], False),
        "a segment with padding in it": ([0, 1, 0, 2, 3], [1, 1, 0, 1, 1], False),
        "segments that fall": ([0, 1, 0, 1, 2], [2, 2, 1, 1, 1], False),
    }
    positions, segments, expected = (np.array(x) for x in zip(*rows.values(), strict=True))
    np.testing.assert_array_equal(jax.jit(in_order)(positions, segments), expected)

    floats, places = draw(jnp.float32)
    turned = jnp.flip(places["positions"][1:], axis=1)
    positions = jnp.concatenate([places["positions"][:1], turned])
    places |= {"positions": positions, "kv_positions": positions}
    out = jax.jit(lambda: CUDNN.attend(**floats, **places))()
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()


@pytest.mark.parametrize("kernel", [CUDNN, SPLASH])
def test_a_model_whose_prefix_sees_what_comes_later_asks_for_more(kernel):
    refused = []

    def asked(q, k, v, **arguments):
        refused.append(kernel.refuses(q, v, arguments))
        return attend(q, k, v, **arguments)

    model = LanguageModel(PREFIX, Execution(dtype=jnp.bfloat16, attend=asked))
    jax.eval_shape(model.apply, model.shapes, jnp.zeros((2, 128), jnp.int32))
    assert refused and set(refused) == {"prefix_length"}


@pytest.mark.parametrize(
    ("kernel", "dtype", "options", "message"),
    [
        (CUDNN, jnp.bfloat16, {"softcap": 1.5}, "softcap"),
        (CUDNN, jnp.bfloat16, {"bias_slopes": alibi_slopes(HEADS)}, "bias_slopes"),
        (CUDNN, jnp.bfloat16, {"prefix_length": jnp.zeros(2, jnp.int32)}, "prefix_length"),
        (CUDNN, jnp.bfloat16, {"tomorrow": 1}, "tomorrow"),
        (CUDNN, jnp.float32, {}, "q of float32"),
        (CUDNN, jnp.bfloat16, {"head_dim": 12}, "q with heads of 12"),
        (CUDNN, jnp.bfloat16, {"value_dim": 24}, "v with heads of 24 beside q with heads of 16"),
        (CUDNN, jnp.bfloat16, {"length": 77}, "q with 77 tokens a row"),
        (SPLASH, jnp.bfloat16, {"bias_slopes": alibi_slopes(HEADS)}, "bias_slopes"),
        (SPLASH, jnp.bfloat16, {"prefix_length": jnp.zeros(2, jnp.int32)}, "prefix_length"),
        (SPLASH, jnp.float16, {}, "q of float16"),
        (SPLASH, jnp.bfloat16, {"length": 130}, "q with 130 tokens a row"),
    ],
)
def test_what_a_kernel_cannot_honour_is_named(kernel, dtype, options, message):
    sizes = {name: options[name] for name in ("head_dim", "length", "value_dim") if name in options}
    floats, places = draw(dtype, **sizes)
    options = {name: value for name, value in options.items() if name not in sizes}
    assert kernel.refuses(floats["q"], floats["v"], places | options).startswith(message)


@pytest.mark.parametrize("kernel", [CUDNN, SPLASH])
@pytest.mark.parametrize("name", ["positions", "segment_ids"])
def test_the_keys_of_a_cache_are_refused(kernel, name):
    floats, places = draw(jnp.bfloat16)
    others = places | {f"kv_{name}": places[name] + 1}
    assert kernel.refuses(floats["q"], floats["v"], others).startswith(f"kv_{name}")
    assert kernel.refuses(floats["q"], floats["v"], places | {"softcap": None, "window": 3}) is None
