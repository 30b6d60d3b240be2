"""Sampling, against the full forward pass and against rules written in NumPy."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import SPECS, quick_compilation, random_params

from instar.errors import UserError
from instar.generation.sampling import SamplingConfig, choose, make_sampler, pad_prompts
from instar.models.language_model import LanguageModel

PROMPTS = [[5, 9, 2, 30], [7], [1, 1, 1, 12, 3, 25], [11, 4]]
NEW = 8


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with quick_compilation():
        yield


@functools.cache
def model_and_params(name: str):
    model = LanguageModel(SPECS[name])
    return model, random_params(model, 1)


@functools.cache
def whole_logits(name: str):
    model, params = model_and_params(name)
    return functools.partial(jax.jit(model.logits), params)


def full_forward_greedy(name: str, prompt: list[int], count: int) -> list[int]:
    """Argmax of the whole sequence's logits, read anew for each token."""
    tokens, width = list(prompt), max(map(len, PROMPTS)) + NEW
    for _ in range(count):
        padded = np.zeros((1, width), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(np.argmax(whole_logits(name)(padded)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@functools.cache
def sampler_of(name: str, config: SamplingConfig, end_id: int):
    return make_sampler(model_and_params(name)[0], config, end_id)


def sample(name: str, config: SamplingConfig, end_id: int, seed: int = 0, prompts=PROMPTS):
    tokens, lengths = pad_prompts(prompts)
    sampler, params = sampler_of(name, config, end_id), model_and_params(name)[1]
    return map(np.asarray, sampler(params, tokens, lengths, jax.random.key(seed)))


@pytest.mark.parametrize("name", ["gpt", "llama", "mixed"])
def test_greedy_is_the_argmax_of_the_full_forward(name):
    """Prompts of unequal lengths, each as if it were alone, until its own end."""
    expected = [full_forward_greedy(name, prompt, NEW) for prompt in PROMPTS]
    greedy = SamplingConfig(NEW, temperature=0.0)
    tokens, counts = sample(name, greedy, end_id=-1)
    assert tokens.tolist() == expected and counts.tolist() == [NEW] * len(PROMPTS)

    end_id = expected[0][3]  # Some row ends early, and the others must not care.
    tokens, counts = sample(name, greedy, end_id)
    for row, count, full in zip(tokens, counts, expected, strict=True):
        stop = full.index(end_id) + 1 if end_id in full else NEW
        assert count == stop
        assert row.tolist() == full[:stop] + [0] * (NEW - stop)
    assert counts.min() < NEW


def test_seeds_reproduce_and_differ():
    config = SamplingConfig(NEW)
    (first, _), (again, _), (other, _) = (sample("llama", config, -1, seed) for seed in (0, 0, 1))
    assert first.tolist() == again.tolist() != other.tolist()
    # Each step and each row draws for itself: equal prompts go different ways.
    (rows, _) = sample("llama", config, -1, 2, prompts=[PROMPTS[2]] * 4)
    assert len({tuple(row) for row in rows.tolist()}) == 4


def test_more_tokens_than_learned_positions_are_refused():
    limit = SPECS["gpt"].max_positions
    with pytest.raises(UserError, match="exceed the 29 learned positions"):
        sample("gpt", SamplingConfig(limit), -1)


# --- One choice ---------------------------------------------------------------------------------

LOGITS = np.random.default_rng(4).standard_normal(12) * 1.5


def probabilities(config: SamplingConfig) -> np.ndarray:
    """Temperature, then the k most probable, then the fewest that sum to p; renormalised."""
    scaled = LOGITS / config.temperature
    order = np.argsort(-scaled)
    kept = order[: config.top_k] if config.top_k else order
    p = np.exp(scaled[kept]) / np.exp(scaled[kept]).sum()
    if config.top_p < 1:
        count = 1 + int(np.searchsorted(np.cumsum(p), config.top_p))
        kept, p = kept[:count], p[:count] / p[:count].sum()
    found = np.zeros(len(LOGITS))
    found[kept] = p
    return found


CASES = [
    SamplingConfig(),
    SamplingConfig(temperature=0.5),
    SamplingConfig(temperature=2.0, top_k=5),
    SamplingConfig(top_k=1),
    SamplingConfig(top_k=100),
    SamplingConfig(top_p=0.6),
    SamplingConfig(top_p=0.05),
    SamplingConfig(temperature=1.5, top_p=0.95),
    SamplingConfig(temperature=1.3, top_k=6, top_p=0.7),
]


@pytest.mark.parametrize("config", CASES, ids=str)
def test_frequencies_follow_the_rule(config):
    """Pearson's chi-square below its 99.99 % quantile, and nothing outside the kept set."""
    draws = 20_000
    expected = draws * probabilities(config)
    logits = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (draws, len(LOGITS)))
    tokens = jax.jit(functools.partial(choose, config=config))(logits, jax.random.key(1))
    assert tokens.dtype == jnp.int32
    observed = np.bincount(tokens, minlength=len(LOGITS))
    kept = expected > 0
    assert not observed[~kept].any()
    statistic = np.sum((observed[kept] - expected[kept]) ** 2 / expected[kept])
    freedom = kept.sum() - 1
    # Wilson & Hilferty's cube approximation of the quantile; 3.72 is that of the normal.
    share = 2 / (9 * max(freedom, 1))
    assert statistic <= freedom * (1 - share + 3.72 * share**0.5) ** 3


def test_the_kept_sets_differ_between_the_cases():
    """So that the test above tests what it says."""
    sizes = [int((probabilities(config) > 0).sum()) for config in CASES]
    assert sizes[:5] == [12, 12, 5, 1, 12] and sizes[6] == 1
    assert 1 < sizes[8] < 6 and 1 < sizes[5] < sizes[7] < 12


def test_temperature_zero_is_the_limit_of_small_temperatures():
    logits = jnp.asarray(np.random.default_rng(5).standard_normal((50, 9)), jnp.float32)
    key = jax.random.key(0)
    zero = choose(logits, key, SamplingConfig(temperature=0.0))
    assert zero.dtype == jnp.int32
    np.testing.assert_array_equal(zero, np.argmax(logits, -1))
    np.testing.assert_array_equal(zero, choose(logits, key, SamplingConfig(temperature=1e-4)))


def test_pad_prompts():
    tokens, lengths = pad_prompts(PROMPTS)
    assert tokens.dtype == lengths.dtype == np.int32
    assert lengths.tolist() == [4, 1, 6, 2] and tokens.shape == (4, 6)
    for row, prompt in zip(tokens.tolist(), PROMPTS, strict=True):
        assert row == prompt + [0] * (6 - len(prompt))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SamplingConfig(max_new_tokens=0), "max_new_tokens must be at least 1"),
        (SamplingConfig(temperature=-1.0), "temperature must not be negative"),
        (SamplingConfig(top_k=-1), "top_k must not be negative"),
        (SamplingConfig(top_p=0.0), "top_p must be in"),
        (SamplingConfig(top_p=1.1), "top_p must be in"),
    ],
)
def test_values_that_make_no_sense(config, message):
    with pytest.raises(UserError, match=message):
        config.check()
