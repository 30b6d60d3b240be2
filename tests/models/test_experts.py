"""The choice of experts and their grouped products, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import EXPERTS, packed_batch, random_params
from models import numpy_transformer

from instar.errors import UserError
from instar.models import experts
from instar.models.language_model import LanguageModel
from instar.models.spec import Experts, Mlp
from instar.models.transformer import Execution

WIDTH, INNER, COUNT = 6, 5, 4
# Groups of very different sizes, empty ones, rows of nobody, and fewer rows than experts.
SIZES = {
    24: [[3, 0, 7, 2], [0, 0, 24, 0], [1, 1, 1, 1], [0, 0, 0, 0], [21, 1, 1, 1], [6, 6, 6, 6]],
    3: [[0, 1, 0, 0], [0, 0, 3, 0], [1, 0, 1, 1]],
}


def by_hand(rows: np.ndarray, sizes: list[int], kernels: dict) -> np.ndarray:
    out, row, spec = np.zeros(rows.shape), 0, Mlp(INNER, "silu", gated=True)
    for expert, size in enumerate(sizes):
        matrices = {name: {"kernel": kernel[expert]} for name, kernel in kernels.items()}
        for _ in range(size):
            out[row] = numpy_transformer.mlp(rows[row], spec, matrices)
            row += 1
    return out


@pytest.mark.parametrize("count", SIZES)
def test_both_forms_of_the_grouped_products_are_what_numpy_says(count):
    rng = np.random.default_rng(count)
    rows = rng.standard_normal((count, WIDTH))
    shapes = {"up": (WIDTH, INNER), "gate": (WIDTH, INNER), "down": (INNER, WIDTH)}
    kernels = {name: rng.standard_normal((COUNT, *shape)) for name, shape in shapes.items()}

    @functools.partial(jax.jit, static_argnums=3)
    @functools.partial(jax.grad, argnums=(0, 2), has_aux=True)
    def run(rows, sizes, kernels, platform):
        done = experts.expert_mlp(rows, sizes, kernels, "silu", platform)
        return jnp.sum(jnp.sin(done)), done

    close = functools.partial(np.testing.assert_allclose, atol=1e-12)
    with jax.enable_x64(True):
        for sizes in SIZES[count]:
            given = rows, np.asarray(sizes), kernels
            ragged, found = run(*given, "tpu")
            blocks, same = run(*given, "cpu")
            expected = by_hand(rows, sizes, kernels)
            close(found, expected)
            close(same, expected)
            jax.tree.map(close, ragged, blocks)
            assert sum(sizes) == 0 or all(np.any(g) for g in jax.tree.leaves(blocks))


def test_a_few_rows_copy_only_the_matrices_of_their_experts():
    """As in decoding: two rows and eight experts must not copy eight matrices."""
    rows, kernels = jnp.ones((2, WIDTH)), jax.ShapeDtypeStruct((8, WIDTH, INNER), jnp.float32)

    def one(rows, kernel):
        return experts.by_blocks(rows, jnp.ones(8, jnp.int32), lambda x, dot: dot(x, kernel))

    text = str(jax.make_jaxpr(one)(rows, kernels))
    assert f"f32[2,{WIDTH},{INNER}]" in text and f"f32[9,{WIDTH}" not in text


def test_padding_is_no_load_and_a_bias_only_chooses():
    spec = Experts(Mlp(INNER, "silu"), COUNT, 2, choice_bias=True)
    rng = np.random.default_rng(0)
    logits, bias = rng.standard_normal((3, 5, COUNT)), np.asarray([0.0, 9.0, -9.0, 0.0])
    real = rng.random((3, 5)) < 0.6
    with jax.enable_x64(True):
        chosen, weights, found = experts.route(jnp.asarray(logits), bias, spec, real)
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    load, probability = np.zeros(COUNT), np.zeros(COUNT)
    for token in zip(*np.nonzero(real), strict=True):
        best = 0 if scores[token][0] > scores[token][3] else 3
        assert chosen[token].tolist() == [1, best]
        expected = scores[token][[1, best]] / scores[token][[1, best]].sum()
        np.testing.assert_allclose(weights[token], expected, rtol=1e-12)
        load[[1, best]] += 1
        probability += scores[token]
    assert (np.asarray(chosen)[~real] == COUNT).all()
    np.testing.assert_array_equal(found["load"], load)
    np.testing.assert_allclose(found["probability"], probability, rtol=1e-12)
    squares = np.log(np.exp(logits).sum(-1)) ** 2
    np.testing.assert_allclose(found["log_z_squared"], squares[real].sum(), rtol=1e-12)
    assert found["tokens"] == real.sum()


def test_a_token_chooses_in_the_groups_with_the_best_two_and_its_weights_are_scaled():
    spec = Experts(Mlp(INNER, "silu"), 6, 2, "sigmoid", groups=3, top_groups=1, scale=2.5)
    # The best expert is in the first group, the best two are in the second.
    scores = np.asarray([0.9, 0.1, 0.6, 0.7, 0.5, 0.2])
    # With the bias the best two are in the third; the weights are those of the scores alone.
    bias = np.asarray([0, 0, -0.3, -0.3, 0.4, 0.3])
    logits = jnp.asarray(np.log(scores / (1 - scores)))[None, None]
    with jax.enable_x64(True):
        for given, expected in ((None, [3, 2]), (bias, [4, 5])):
            chosen, weights, _ = experts.route(logits, given, spec, np.ones((1, 1), bool))
            assert chosen[0, 0].tolist() == expected
            shares = 2.5 * scores[expected] / scores[expected].sum()
            np.testing.assert_allclose(weights[0, 0], shares, rtol=1e-6)


def test_scores_that_are_all_nothing_weigh_nothing():
    spec = Experts(Mlp(INNER, "silu"), COUNT, 2, "sigmoid")
    logits = jnp.full((1, 1, COUNT), -1e5)
    _, weights, _ = experts.route(logits, None, spec, np.ones((1, 1), bool))
    np.testing.assert_array_equal(weights, 0)


def test_what_the_routers_did_is_told_for_each_layer():
    model = LanguageModel(EXPERTS, Execution(remat="full"))
    batch = packed_batch(2, [[4, 6], [13], []], 13, EXPERTS.vocab_size)
    names = ("positions", "segment_ids")

    @jax.jit
    def run(params, batch):
        return model.apply(params, batch["tokens"], **{name: batch[name] for name in names})[1]

    routing = run(random_params(model, 1), batch)["routing"]
    first, last = routing["group_0"]["layer_0"], routing["group_1"]["layer_0"]
    assert first["load"].shape == (2, 5) and last["load"].shape == (1, 4)
    assert first["load"].sum(-1).tolist() == [2 * 23] * 2 and last["load"].sum() == 3 * 23
    np.testing.assert_allclose(last["probability"].sum(), 23, rtol=1e-5)
    assert "layer_1" not in routing["group_0"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Experts(Mlp(4, "silu"), 4, 5), r"top_k \(5\) must be .* count of experts \(4\)"),
        (Experts(Mlp(4, "silu"), 4, 0), r"top_k \(0\) must be at least 1"),
        (Experts(Mlp(4, "silu", bias=True), 4, 2), "experts are matrices without biases"),
        (Experts(Mlp(0, "silu"), 4, 2), "mlp width must be at least 1"),
    ],
)
def test_impossible_experts_are_refused(spec, message):
    with pytest.raises(UserError, match=message):
        spec.check()
