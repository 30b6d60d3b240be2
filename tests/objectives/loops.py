"""What the references of these tests share: masks, gradients by differences, closeness."""

from collections.abc import Callable

import jax
import numpy as np


def draw_mask(rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
    """int [batch, length], 1 on a prefix of each row; the first row is empty, the second full."""
    lengths = rng.integers(0, length + 1, batch)
    lengths[:2] = 0, length
    return (np.arange(length) < lengths[:, None]).astype(int)


def spoil(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """x with NaN outside the mask, as padding may hold."""
    return np.where(mask, x, np.nan)


def assert_close(found, expected, tolerance: float = 1e-10) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        found,
        expected,
    )


def assert_gradient(f: Callable, x: np.ndarray, step: float = 1e-6) -> None:
    """The gradient of the scalar f at x is that of central differences, and is not 0."""
    f = jax.jit(f)
    expected = np.zeros_like(x)
    for place in np.ndindex(*x.shape):
        nudge = np.zeros_like(x)
        nudge[place] = step
        expected[place] = (f(x + nudge) - f(x - nudge)) / (2 * step)
    assert np.any(expected)
    assert_close(jax.grad(f)(x), expected, tolerance=1e-7)
