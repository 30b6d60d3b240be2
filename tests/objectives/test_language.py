"""Next-token sums, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instar.objectives.language import by_chunks, entropy, next_token_sums, token_log_probs

BATCH, LENGTH, WIDTH, VOCAB = 3, 12, 7, 11


def draw(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "hidden": rng.standard_normal((BATCH, LENGTH, WIDTH)),
        "kernel": 2 * rng.standard_normal((WIDTH, VOCAB)),
        "targets": rng.integers(0, VOCAB, (BATCH, LENGTH)),
        "weights": rng.uniform(0.1, 3.0, (BATCH, LENGTH)) * rng.integers(0, 2, (BATCH, LENGTH)),
    }


def by_numpy(x: dict[str, np.ndarray]) -> dict[str, float]:
    sums = {"nats": 0.0, "log_z_squared": 0.0, "max_logit_squared": 0.0, "weight": 0.0}
    for row, position in np.ndindex(BATCH, LENGTH):
        logits = x["hidden"][row, position] @ x["kernel"]
        normaliser, weight = np.exp(logits).sum(), x["weights"][row, position]
        chosen = np.exp(logits[x["targets"][row, position]]) / normaliser
        sums["nats"] -= weight * np.log(chosen)
        sums["log_z_squared"] += weight * np.log(normaliser) ** 2
        sums["max_logit_squared"] += weight * max(logits) ** 2
        sums["weight"] += weight
    return sums


def sums(x: dict, chunk: int = 0) -> dict:
    def head(hidden):
        return hidden @ x["kernel"]

    return next_token_sums(x["hidden"], head, x["targets"], x["weights"], chunk)


@pytest.mark.parametrize("chunk", [0, 1, 4, 12, 100])
def test_sums_equal_numpy(chunk):
    x = draw(0)
    with jax.enable_x64(True):
        found = sums(x, chunk)
        assert found == pytest.approx(by_numpy(x), rel=1e-12)
    single = jax.tree.map(lambda a: a.astype(np.float32) if a.dtype == float else a, x)
    assert sums(single, chunk) == pytest.approx(by_numpy(x), rel=1e-5)


def test_chunks_change_no_gradient():
    """Both z-losses are in it, so that all sums are differentiated."""

    def loss(floats: dict, integers: dict, chunk: int):
        found = sums(floats | integers, chunk)
        return found["nats"] + 0.3 * found["log_z_squared"] + 0.2 * found["max_logit_squared"]

    x = draw(1)
    integers = {"targets": x.pop("targets"), "weights": x.pop("weights")}
    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(loss), static_argnums=2)
        whole = gradient(x, integers, 0)
        for chunk in (3, 6):
            close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11)
            jax.tree.map(close, gradient(x, integers, chunk), whole)


def test_what_has_no_weight_has_no_effect():
    x = draw(2)
    hidden = x["weights"] == 0
    assert hidden.any()
    other = x | {"targets": np.where(hidden, (x["targets"] + 1) % VOCAB, x["targets"])}
    other["hidden"] = np.where(hidden[..., None], 50 * x["hidden"], x["hidden"])
    with jax.enable_x64(True):
        assert sums(other, 4) == pytest.approx(by_numpy(x), rel=1e-12)
        gradient = jax.grad(lambda h: sums(other | {"hidden": h}, 4)["nats"])(other["hidden"])
    assert not np.any(np.asarray(gradient)[hidden])
    assert np.all(np.any(np.asarray(gradient)[~hidden], axis=-1))


def test_full_logits_never_exist_in_chunks():
    """Neither forward nor backward holds an array of all positions by the vocabulary."""

    def loss(hidden):
        return sums(jax.tree.map(jnp.asarray, x) | {"hidden": hidden}, 4)["nats"]

    x = draw(3)
    text = str(jax.make_jaxpr(jax.value_and_grad(loss))(x["hidden"].astype(np.float32)))
    assert f"f32[{BATCH},4,{VOCAB}]" in text
    assert f"{LENGTH},{VOCAB}]" not in text and f"[3,{BATCH},4,{VOCAB}]" not in text


def test_chunk_must_divide_the_row():
    with pytest.raises(ValueError, match="chunk 5 does not divide the 12 positions"):
        sums(draw(4), 5)


@pytest.mark.parametrize("chunk", [1, 3, 4, 12, 100])
def test_chunks_of_positions_are_put_together_in_their_order(chunk):
    """Outputs of several shapes, of positions that differ, and the gradient of all."""

    def of_each(hidden: jax.Array, targets: jax.Array) -> dict:
        return {"wide": jnp.sin(hidden) * targets[..., None], "one": jnp.sum(hidden, -1) ** 2}

    def weighed(hidden: np.ndarray, chunk: int):
        found = by_chunks(of_each, chunk, hidden, x["targets"])
        return jnp.sum(found["wide"] * places[..., None]) + jnp.sum(found["one"] * places)

    x = draw(9)
    places = np.arange(BATCH * LENGTH).reshape(BATCH, LENGTH)
    with jax.enable_x64(True):
        found = jax.jit(by_chunks, static_argnums=(0, 1))(of_each, chunk, x["hidden"], x["targets"])
        np.testing.assert_allclose(
            found["wide"], np.sin(x["hidden"]) * x["targets"][..., None], rtol=1e-12
        )
        np.testing.assert_allclose(found["one"], x["hidden"].sum(-1) ** 2, rtol=1e-12)
        slope = np.cos(x["hidden"]) * x["targets"][..., None]
        slope = places[..., None] * (slope + 2 * x["hidden"].sum(-1, keepdims=True))
        found = jax.jit(jax.grad(weighed), static_argnums=1)(x["hidden"], chunk)
        np.testing.assert_allclose(found, slope, rtol=1e-11, atol=1e-11)


def test_token_log_probs():
    x = draw(5)
    logits = x["hidden"] @ x["kernel"]
    expected = np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(expected, x["targets"][..., None], -1)[..., 0]
    found = token_log_probs(logits.astype(np.float32), x["targets"])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_entropy():
    logits = draw(7)["hidden"]
    expected = np.zeros((BATCH, LENGTH))
    for place in np.ndindex(BATCH, LENGTH):
        p = np.exp(logits[place]) / np.exp(logits[place]).sum()
        expected[place] = -sum(p * np.log(p))
    with jax.enable_x64(True):
        np.testing.assert_allclose(jax.jit(entropy)(logits), expected, rtol=1e-12)
        gradient = jax.grad(lambda x: jnp.sum(entropy(x)))(logits)
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        slope = -p * (np.log(p) + expected[..., None])
        np.testing.assert_allclose(gradient, slope, rtol=1e-10, atol=1e-12)


def test_entropy_of_extreme_logits():
    """Impossible tokens and a certain one: no 0 x infinity, neither forward nor backward."""
    logits = jnp.array([[0.0, 0.0, -jnp.inf], [1e4, -1e4, -jnp.inf]])
    value, slope = entropy(logits), jax.grad(lambda x: jnp.sum(entropy(x)))(logits)
    np.testing.assert_allclose(value, [np.log(2), 0.0], rtol=1e-6)
    np.testing.assert_allclose(slope, np.zeros((2, 3)), atol=1e-6)


def test_bfloat16_logits_are_normalised_in_float32():
    logits = draw(8)["hidden"].astype(jnp.bfloat16)
    single, tokens = logits.astype(np.float32), np.zeros((BATCH, LENGTH), int)
    np.testing.assert_array_equal(entropy(logits), entropy(single))
    np.testing.assert_array_equal(token_log_probs(logits, tokens), token_log_probs(single, tokens))


def test_large_logits_do_not_overflow():
    x = draw(6) | {"kernel": 1e4 * draw(6)["kernel"]}
    assert all(np.isfinite(value) for value in sums(x).values())
