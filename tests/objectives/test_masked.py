"""Sums, means and whitening under masks, against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loops import assert_close, assert_gradient, draw_mask, spoil

from instar.objectives import masked

BATCH, LENGTH = 5, 7


def draw(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return 3 * rng.standard_normal((BATCH, LENGTH)) + 2, draw_mask(rng, BATCH, LENGTH)


def kept(x: np.ndarray, mask: np.ndarray) -> list[float]:
    return [x[place] for place in np.ndindex(x.shape) if mask[place]]


def whitened(x: np.ndarray, mask: np.ndarray, shift_mean: bool) -> np.ndarray:
    values = kept(x, mask)
    mean = sum(values) / len(values)
    deviation = (sum((v - mean) ** 2 for v in values) / len(values) + 1e-8) ** 0.5
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        if mask[place]:
            out[place] = (x[place] - mean) / deviation + (0 if shift_mean else mean)
    return out


@pytest.mark.parametrize("dtype", [bool, int, np.float32])
def test_reductions_equal_loops(dtype):
    x, mask = draw(0)
    with jax.enable_x64(True):
        marked = mask.astype(dtype)
        values = kept(x, mask)
        assert_close(masked.total(spoil(x, mask), marked), sum(values))
        assert_close(masked.mean(spoil(x, mask), marked), sum(values) / len(values))
        assert_close(masked.variance(spoil(x, mask), marked), np.var(values))
        positive = sum(v > 0 for v in values) / len(values)
        assert_close(masked.fraction(x > 0, marked), positive)
        rows = [kept(row, on) for row, on in zip(x, mask, strict=True)]
        means = [sum(row) / len(row) if row else 0 for row in rows]
        assert_close(masked.mean(spoil(x, mask), marked, axis=1), means)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_equals_loops(shift_mean):
    x, mask = draw(1)
    with jax.enable_x64(True):
        found = jax.jit(masked.whiten, static_argnums=2)(spoil(x, mask), mask, shift_mean)
        assert_close(found, whitened(x, mask, shift_mean))
        assert_gradient(lambda x: jnp.sum(masked.whiten(x, mask, shift_mean) ** 3), x)


def test_a_single_value_whitens_to_zero():
    """1e-8 is under the root: a variance of 0 divides nothing by 0."""
    x, mask = np.array([[3.0, 5.0]]), np.array([[1, 0]])
    assert_close(masked.whiten(x, mask), [[0.0, 0.0]])
    assert_close(masked.whiten(x, mask, shift_mean=False), [[3.0, 0.0]])


def test_an_empty_mask_gives_zeros():
    x = np.full((BATCH, LENGTH), np.nan, np.float32)
    mask = np.zeros((BATCH, LENGTH))
    for function in (masked.total, masked.mean, masked.variance, masked.whiten):
        value, gradient = jax.value_and_grad(lambda x, f=function: jnp.sum(f(x, mask)))(x)
        assert value == 0
        assert not np.any(gradient)


def test_bfloat16_is_summed_in_float32():
    x, mask = draw(2)
    x = x.astype(jnp.bfloat16)
    same = x.astype(np.float64)
    mean, white = masked.mean(x, mask), masked.whiten(x, mask)
    assert mean.dtype == white.dtype == jnp.float32
    assert_close(mean, np.mean(kept(same, mask)), 1e-6)
    assert_close(white, whitened(same, mask, True), 1e-5)
