"""The forward pass, against one written by hand in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import (
    EXPERTS,
    GPT,
    LATENT,
    LLAMA,
    SPECS,
    packed_batch,
    random_params,
    telling,
    with_mixer,
)
from models import numpy_transformer

from instar.models.language_model import LanguageModel
from instar.models.rotary import Rotary
from instar.models.transformer import Execution


def with_experts(spec, number, **changes):
    """One layer of experts of an example, alone and changed."""
    layer = spec.each_layer()[number]
    layer = dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, **changes))
    return spec.replace(layers=((1, (layer,)),))


CASES = SPECS | {
    # The families with every option that is off by default in them.
    "gpt-gqa-untied": with_mixer(GPT, heads=4, kv_heads=2, window=4).replace(tied=False),
    "llama-partial": LLAMA.replace(tied=True),
    "llama-normed-head": LLAMA.replace(head_normed=True),
    "experts-biased": with_experts(EXPERTS, 0, score="sigmoid", choice_bias=True),
    "latent-biased": with_experts(LATENT, 2, choice_bias=True, normalise=False),
    "latent-plain": with_mixer(
        LATENT.replace(layers=LATENT.layers[:1]),
        bias=False,
        query_rank=None,
        rotary=Rotary(theta=50.0),
    ),
}
LENGTHS = [[4, 6, 3], [13], [5, 1, 5]]


def example(spec, dtype):
    model = LanguageModel(spec, Execution(dtype=jnp.dtype(dtype)))
    return model, random_params(model, 1, dtype), packed_batch(2, LENGTHS, 13, spec.vocab_size)


def compare(spec, dtype, tolerance):
    model, params, batch = example(spec, dtype)
    found = jax.jit(model.logits)(
        params, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"]
    )
    assert found.dtype == dtype
    expected = numpy_transformer.logits(
        spec, params, batch["tokens"], batch["positions"], batch["segment_ids"]
    )
    real = batch["segment_ids"] > 0
    assert expected[real].std() > 0.1
    np.testing.assert_allclose(np.asarray(found)[real], expected[real], rtol=0, atol=tolerance)
    assert np.isfinite(np.asarray(found)).all()


@pytest.mark.parametrize("name", CASES)
def test_float64_logits_equal_numpy(name):
    with jax.enable_x64(True):
        compare(CASES[name], np.float64, 1e-10)


@pytest.mark.parametrize("name", SPECS)
def test_float32_logits_equal_numpy(name):
    # Rounding grows with the depth, and this one has eight layers.
    compare(SPECS[name], np.float32, 5e-4 if name == "wired" else 1e-4)


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_positions_and_segments_default_to_one_document(name):
    model, params, batch = example(SPECS[name], np.float32)
    found = jax.jit(model.logits)(params, batch["tokens"])
    expected = numpy_transformer.logits(SPECS[name], params, batch["tokens"])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_bfloat16_computes_from_float32_masters_and_gives_float32_logits():
    model, params, batch = example(GPT, np.float32)
    expected = model.logits(params, batch["tokens"])
    half = model.with_execution(Execution(dtype=jnp.dtype(jnp.bfloat16)))
    hidden, _ = jax.jit(half.apply)(params, batch["tokens"])
    logits = half.head(params)(hidden)
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    # Eight bits of mantissa through three layers: a few per cent of the logits' spread.
    error = np.asarray(logits - expected)
    assert 0 < error.std() < 0.05 * np.asarray(expected).std()


@pytest.mark.parametrize("name", telling(SPECS))
def test_gradients_equal_differences_of_the_numpy_forward(name):
    """The derivative along one random direction in the space of all parameters."""
    spec = SPECS[name]
    with jax.enable_x64(True):
        model, params, batch = example(spec, np.float64)
        gradient = jax.jit(jax.grad(functools.partial(surrogate, model)))(params, batch)
    direction = random_params(model, 3, np.float64)

    def along(step):
        moved = jax.tree.map(lambda x, d: x + step * d, params, direction)
        logits = numpy_transformer.logits(
            spec, moved, batch["tokens"], batch["positions"], batch["segment_ids"]
        )
        return np.sum(np.sin(logits) * (batch["segment_ids"] > 0)[..., None])

    h = 1e-5
    expected = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
    products = jax.tree.map(lambda g, d: np.sum(np.asarray(g) * d), gradient, direction)
    assert sum(jax.tree.leaves(products)) == pytest.approx(expected, rel=1e-6)


def surrogate(model, params, batch):
    """A scalar that depends on all real logits and cannot overflow."""
    logits = model.logits(
        params, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"]
    )
    return jnp.sum(jnp.sin(logits) * (batch["segment_ids"] > 0)[..., None])


def test_bfloat16_gradients_are_float32_and_point_the_same_way():
    model, params, batch = example(LLAMA, np.float32)
    half = model.with_execution(Execution(dtype=jnp.dtype(jnp.bfloat16)))
    expected, found = (
        jax.jit(jax.grad(functools.partial(surrogate, m)))(params, batch) for m in (model, half)
    )
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert b.dtype == jnp.float32
        a, b = np.ravel(a), np.ravel(b)
        assert a @ b > 0.97 * np.linalg.norm(a) * np.linalg.norm(b)
        assert np.linalg.norm(b) == pytest.approx(np.linalg.norm(a), rel=0.1)


def test_remat_and_unrolling_change_neither_values_nor_gradients():
    with jax.enable_x64(True):
        model, params, batch = example(LLAMA, np.float64)

        def run(execution):
            loss = functools.partial(surrogate, model.with_execution(execution))
            return jax.jit(jax.value_and_grad(loss))(params, batch)

        double = jnp.dtype(np.float64)
        expected = run(Execution(dtype=double))
        for options in ({"remat": "full"}, {"remat": "dots", "unroll": 0}, {"remat": "attention"}):
            found = run(Execution(dtype=double, **options))
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10), found, expected)
