"""The attention contract, against a triple loop in float64."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.numpy_transformer import alibi_slope, bfloat16

from instar.models.attention import alibi_slopes, attend, visible

pytestmark = pytest.mark.smoke

BATCH, QUERIES, KEYS, HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM = 3, 7, 11, 6, 2, 5, 4
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.31},
    "window": {"window": 3},
    "window-of-one": {"window": 1},
    "prefix": {"prefix": [0, 4, 9]},
    "softcap": {"softcap": 1.5},
    "slopes": {"slopes": True},
    "rounded slopes": {"slopes": True, "rounded": True, "scale": 0.3, "window": 7},
    "all": {"window": 4, "prefix": [2, 0, 3], "scale": 0.5, "softcap": 2.0, "slopes": True},
}


def draw(seed: int, queries: int = QUERIES, keys: int = KEYS, heads: int = HEADS) -> dict:
    """Random positions and segments in no order at all, with padding among queries and keys."""
    rng = np.random.default_rng(seed)
    return {
        "q": rng.standard_normal((BATCH, queries, heads, HEAD_DIM)),
        "k": rng.standard_normal((BATCH, keys, KV_HEADS, HEAD_DIM)),
        "v": rng.standard_normal((BATCH, keys, KV_HEADS, VALUE_DIM)),
        "positions": rng.integers(0, 10, (BATCH, queries)),
        "kv_positions": rng.integers(0, 10, (BATCH, keys)),
        "segment_ids": rng.integers(0, 3, (BATCH, queries)),
        "kv_segment_ids": rng.integers(0, 3, (BATCH, keys)),
    }


def by_loops(
    inputs: dict,
    window=None,
    prefix=None,
    scale=None,
    softcap=None,
    slopes=None,
    rounded=None,
):
    """The contract word for word; and which queries see anything at all, bool [B, S]."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    heads, shared = q.shape[2], q.shape[2] // k.shape[2]
    out, sees = np.zeros((*q.shape[:3], VALUE_DIM)), np.zeros(q.shape[:2], bool)
    for b, i, h in itertools.product(*map(range, q.shape[:3])):
        logits, values = [], []
        for j in range(k.shape[1]):
            distance = inputs["positions"][b, i] - inputs["kv_positions"][b, j]
            segment = inputs["kv_segment_ids"][b, j]
            if segment == 0 or segment != inputs["segment_ids"][b, i]:
                continue
            in_prefix = prefix is not None and inputs["kv_positions"][b, j] < prefix[b]
            in_window = distance >= 0 and (window is None or distance < window)
            if not (in_prefix or in_window):
                continue
            logit = q[b, i, h] @ k[b, j, h // shared]
            logit *= 1 / math.sqrt(HEAD_DIM) if scale is None else scale
            if softcap is not None:
                logit = softcap * math.tanh(logit / softcap)
            if rounded:
                slope = bfloat16(alibi_slope(h, heads))
                logit += scale * bfloat16(slope * bfloat16(inputs["kv_positions"][b, j]))
            elif slopes:
                logit -= alibi_slope(h, heads) * distance
            logits.append(logit)
            values.append(v[b, j, h // shared])
        if logits:
            weights = np.exp(np.array(logits) - max(logits))
            out[b, i, h] = weights / weights.sum() @ np.array(values)
            sees[b, i] = True
    return out, sees


def by_attend(
    inputs: dict,
    window=None,
    prefix=None,
    scale=None,
    softcap=None,
    slopes=None,
    rounded=None,
):
    return attend(
        **inputs,
        window=window,
        prefix_length=None if prefix is None else jnp.asarray(prefix),
        scale=scale,
        softcap=softcap,
        bias_slopes=alibi_slopes(inputs["q"].shape[2]) if slopes else None,
        bias_rounded=rounded,
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_attend_is_the_contract(name):
    options = OPTIONS[name]
    with jax.enable_x64(True):
        found = jax.jit(lambda inputs: by_attend(inputs, **options))
        for seed in range(3):
            inputs = draw(seed)
            expected, sees = by_loops(inputs, **options)
            out = np.asarray(found(inputs))
            assert sees.any() and not sees.all()
            np.testing.assert_allclose(out[sees], expected[sees], rtol=0, atol=1e-12)
            assert np.isfinite(out).all()


@pytest.mark.parametrize(("window", "prefix"), [(None, None), (3, None), (3, [0, 4, 9])])
def test_visible_is_the_contract(window, prefix):
    """Padding sees nothing either, which the outputs of attention cannot show."""
    inputs = draw(4)
    names = ("positions", "kv_positions", "segment_ids", "kv_segment_ids")
    found = visible(
        *(jnp.asarray(inputs[name]) for name in names),
        window,
        None if prefix is None else jnp.asarray(prefix),
    )
    positions, kv_positions, segments, kv_segments = (inputs[name] for name in names)
    for b, i, j in np.ndindex(found.shape):
        distance = positions[b, i] - kv_positions[b, j]
        expected = distance >= 0 and (window is None or distance < window)
        expected |= prefix is not None and kv_positions[b, j] < prefix[b]
        expected &= segments[b, i] == kv_segments[b, j] and kv_segments[b, j] != 0
        assert bool(found[b, i, j]) == expected


@pytest.mark.parametrize("heads", [KV_HEADS, HEADS])
def test_float32_and_bfloat16_stay_close(heads):
    inputs = draw(5, heads=heads)
    expected, sees = by_loops(inputs)
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.03)):
        cast = {n: jnp.asarray(x, dtype) if n in "qkv" else x for n, x in inputs.items()}
        out = by_attend(cast)
        assert out.dtype == dtype
        error = np.asarray(out, np.float64)[sees] - expected[sees]
        assert np.abs(error).max() < tolerance


def test_gradients_are_finite_and_nothing_flows_to_what_is_not_seen():
    """Rows without a key are the place where a masked softmax turns to NaN."""
    inputs = draw(7) | {"segment_ids": np.zeros((BATCH, QUERIES), int)}
    inputs["segment_ids"][1:] = 1
    inputs["kv_segment_ids"][1] = 2  # The second row's queries see nothing, the third's some:
    inputs["kv_segment_ids"][2, 0], inputs["kv_positions"][2, 0] = 1, 0
    floats = {name: jnp.asarray(inputs[name], jnp.float32) for name in "qkv"}
    real = jnp.asarray(inputs["segment_ids"] > 0)[..., None, None]

    def loss(floats):
        out = by_attend(inputs | floats, softcap=2.0, slopes=True)
        return jnp.sum(jnp.where(real, out, 0) ** 2)

    gradients = jax.grad(loss)(floats)
    assert all(np.isfinite(x).all() for x in gradients.values())
    assert not np.any(gradients["q"][:2])
    hidden = inputs["kv_segment_ids"] != 1
    hidden[1] = False  # What a query that sees nothing averages over is nobody's business.
    for name in "kv":
        assert not np.any(np.asarray(gradients[name])[hidden])
    assert all(np.any(gradients[name][2]) for name in "qkv")


def test_large_logits_do_not_overflow():
    inputs = draw(8)
    large = inputs | {"q": 1e4 * inputs["q"], "k": 1e4 * inputs["k"]}
    expected, sees = by_loops(large)
    cast = {n: jnp.asarray(x, jnp.float32) if n in "qkv" else x for n, x in large.items()}
    out = np.asarray(by_attend(cast))
    np.testing.assert_allclose(out[sees], expected[sees], rtol=0, atol=1e-3)


@pytest.mark.parametrize("heads", range(1, 41))
def test_alibi_slopes(heads):
    expected = [alibi_slope(head, heads) for head in range(heads)]
    np.testing.assert_allclose(alibi_slopes(heads), expected, rtol=1e-14)
