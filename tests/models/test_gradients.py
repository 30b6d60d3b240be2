"""The derivatives that are written by hand are those that JAX finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instar.models.attention import MASKED, weighted_mean
from instar.models.matmul import matmul


def gradients(function, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of a sum with uneven weights, with respect to every input."""

    def loss(*inputs):
        out = function(*inputs)
        return jnp.sum(out * jnp.sin(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    return jax.grad(loss, tuple(range(len(inputs))))(*inputs)


@pytest.mark.parametrize("leading", [(), (2,), (3, 2)])
def test_matmul(leading):
    rng = np.random.default_rng(len(leading))
    x, y = rng.standard_normal((*leading, 5, 4)), rng.standard_normal((*leading, 4, 3))
    with jax.enable_x64(True):
        np.testing.assert_allclose(matmul(x, y), x @ y, rtol=0, atol=1e-13)
        pairs = zip(gradients(matmul, x, y), gradients(jnp.matmul, x, y), strict=True)
        for found, expected in pairs:
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


def test_matmul_sums_in_the_type_that_is_asked_for_and_its_gradients_keep_their_own():
    x = jnp.ones((1, 512), jnp.bfloat16).at[0, 0].set(1 / 256)
    y = jnp.ones((512, 1), jnp.bfloat16)
    assert matmul(x, y).dtype == jnp.bfloat16
    assert matmul(x, y, jnp.float32) == 511 + 1 / 256
    found = gradients(lambda x, y: matmul(x, y, jnp.float32), x, y)
    assert [g.dtype for g in found] == [jnp.bfloat16, jnp.bfloat16]


def test_weighted_mean():
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((2, 3, 6, 5))
    logits[0, :, 1:, 2:] = MASKED
    logits[1, 0, 0] = MASKED  # Sees nothing.
    values = rng.standard_normal((2, 3, 5, 4))

    def plain(logits, values):
        return jax.nn.softmax(logits, axis=-1) @ values

    with jax.enable_x64(True):
        np.testing.assert_allclose(weighted_mean(logits, values), plain(logits, values), atol=1e-13)
        pairs = zip(
            gradients(weighted_mean, logits, values), gradients(plain, logits, values), strict=True
        )
        for found, expected in pairs:
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)
