"""The choice of a token, against rules written in NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instar.errors import UserError
from instar.generation import filters
from instar.generation.sampling import Mode, RowSettings, SamplingConfig, choose

RNG = np.random.default_rng(4)
# Two pairs of ties, one of them of the most probable tokens.
LOGITS = np.concatenate([RNG.standard_normal(9) * 1.5, [2.5, 0.5, 2.5, 0.5]]).astype(np.float32)
SEEN = np.arange(len(LOGITS)) % 3 == 0


def probabilities(config: SamplingConfig, logits=LOGITS, seen=SEEN) -> np.ndarray:
    """Penalty, temperature, top-k, top-p, min-p: each as its paper says, on sorted tokens."""
    logits, penalty = logits.astype(np.float64), config.repetition_penalty
    penalised = np.where(logits > 0, logits / penalty, logits * penalty)
    logits = np.where(seen, penalised, logits)
    found = np.zeros(len(logits))
    if config.temperature == 0:
        found[np.argmax(logits)] = 1
        return found
    scaled = logits / config.temperature
    kept = np.argsort(-scaled, kind="stable")
    if config.top_k:
        kept = kept[: config.top_k]
    p = np.exp(scaled[kept] - scaled.max())
    p /= p.sum()
    if config.top_p < 1:
        count = next(n for n in range(1, len(p) + 1) if p[:n].sum() >= config.top_p)
        kept, p = kept[:count], p[:count]
    p = np.where(p >= config.min_p * p[0], p, 0)
    found[kept] = p / p.sum()
    return found


CASES = {
    "plain": SamplingConfig(),
    "cold": SamplingConfig(temperature=0.5),
    "greedy among ties": SamplingConfig(temperature=0.0, top_k=3),
    "hot and k": SamplingConfig(temperature=2.0, top_k=5),
    "k cuts a tie": SamplingConfig(top_k=1),
    "k of all": SamplingConfig(top_k=len(LOGITS)),
    "k beyond all": SamplingConfig(top_k=100),
    "p": SamplingConfig(top_p=0.6),
    "tiny p cuts a tie": SamplingConfig(top_p=1e-6),
    "hot and p": SamplingConfig(temperature=1.5, top_p=0.95),
    "min-p": SamplingConfig(min_p=0.1),
    "min-p of 1 keeps a tie": SamplingConfig(min_p=1.0),
    "penalty": SamplingConfig(repetition_penalty=1.7),
    "reward": SamplingConfig(repetition_penalty=0.6, top_k=4),
    "all": SamplingConfig(temperature=1.3, top_k=8, top_p=0.9, min_p=0.15, repetition_penalty=1.2),
}


def test_the_kept_sets_differ_between_the_cases():
    """So that the tests below test what they say."""
    kept = {name: int((probabilities(config) > 0).sum()) for name, config in CASES.items()}
    size = len(LOGITS)
    assert kept["plain"] == kept["cold"] == kept["k of all"] == kept["penalty"] == size
    assert kept["greedy among ties"] == kept["k cuts a tie"] == kept["tiny p cuts a tie"] == 1
    assert kept["hot and k"] == 5 and kept["min-p of 1 keeps a tie"] == 2
    assert 1 < kept["all"] < 8 and 1 < kept["p"] < kept["hot and p"] < size


@functools.cache
def choice(mode: Mode):
    return jax.jit(functools.partial(choose, mode=mode))


def chosen(configs: list[SamplingConfig], logits: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """A choice for each config in turn, row by row, at index 7."""
    rows = len(seeds)
    settings = RowSettings.of([configs[row % len(configs)] for row in range(rows)], seeds)
    index, seen = np.full(rows, 7, np.int32), np.broadcast_to(SEEN, (rows, len(SEEN)))
    logits = jnp.broadcast_to(logits, (rows, logits.shape[-1]))
    return np.asarray(choice(Mode.of(configs))(logits, settings, index, seen))


def chi_square(tokens: np.ndarray, expected: np.ndarray) -> None:
    """Pearson's statistic below its 99.99 % quantile, and nothing outside the kept set."""
    observed = np.bincount(tokens, minlength=len(expected))
    kept = expected > 0
    assert not observed[~kept].any()
    expected = expected[kept] * len(tokens)
    statistic = np.sum((observed[kept] - expected) ** 2 / expected)
    freedom = max(kept.sum() - 1, 1)
    # Wilson & Hilferty's cube approximation of the quantile; 3.72 is that of the normal.
    share = 2 / (9 * freedom)
    assert statistic <= freedom * (1 - share + 3.72 * share**0.5) ** 3


@pytest.mark.parametrize("name", CASES)
def test_frequencies_follow_the_rule(name):
    tokens = chosen([CASES[name]], LOGITS, np.arange(10_000))
    assert tokens.dtype == np.int32
    chi_square(tokens, probabilities(CASES[name]))


def test_rows_with_settings_of_their_own_choose_as_if_alone():
    """Though alone, most of them run a program without the parts that the others need."""
    configs, seeds = list(CASES.values()), np.arange(15 * 40)
    together = chosen(configs, LOGITS, seeds)
    for place, config in enumerate(configs):
        alone = chosen([config], LOGITS, seeds[place :: len(configs)])
        np.testing.assert_array_equal(together[place :: len(configs)], alone)


def test_a_large_vocabulary_with_ties_everywhere():
    """More tokens than the candidates, of few different scores: thresholds by bisection."""
    logits = np.random.default_rng(6).integers(-3, 4, (6, 3001)).astype(np.float32)
    logits[:, 17] = -0.0  # equal to 0.0, and must not come after it
    unseen = np.zeros(3001, bool)
    cases = [dict(top_k=k) for k in (1, 255, 256, 257, 1400, 2999)]
    cases += [dict(top_p=p) for p in (1e-3, 0.3, 0.7, 0.99)]

    @jax.jit
    def kept(logits, top_k, top_p):
        by_k = filters.top_k(logits, top_k)
        return by_k & filters.top_p(jnp.where(by_k, logits, -jnp.inf), top_p)

    for case in cases:
        config = SamplingConfig(**case)
        found = kept(logits, np.full(6, config.top_k), np.full(6, config.top_p, np.float32))
        for row, mask in zip(logits, np.asarray(found), strict=True):
            expected = probabilities(config, row, unseen) > 0
            if config.top_k:
                np.testing.assert_array_equal(mask, expected)
                continue
            # Sums in float32 may cross p a token or two earlier or later.
            order = np.argsort(-row, kind="stable")
            assert mask[order[: mask.sum()]].all()
            assert abs(int(mask.sum()) - int(expected.sum())) <= 2


def test_draws_cover_a_distribution_to_its_ends():
    """By the inverse of the distribution function, whatever blocks the vocabulary is cut into."""
    scores = np.full(1000, -np.inf, np.float32)
    kept = [3, 255, 256, 700, 998]
    scores[kept] = np.log([1, 2, 3, 2, 2])
    uniform = np.asarray([0, 0.0999, 0.1001, 0.2999, 0.3001, 0.59, 0.61, 0.79, 0.81, 1 - 2**-23])
    found = jax.jit(filters.draw)(np.tile(scores, (10, 1)), uniform.astype(np.float32))
    assert found.tolist() == [3, 3, 255, 255, 256, 256, 700, 700, 998, 998]


def test_a_penalty_is_a_factor_on_positive_and_on_negative_logits():
    """Keskar et al. 2019: a token that was seen is never made more probable by a penalty."""
    logits, seen = np.asarray([[2.0, -2.0, 2.0, -2.0]]), np.asarray([[True, True, False, False]])
    assert filters.penalize(logits, seen, jnp.asarray([2.0])).tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_temperature_zero_is_the_limit_of_small_temperatures():
    logits = np.random.default_rng(5).standard_normal((50, len(SEEN))).astype(np.float32)
    zero = chosen([SamplingConfig(temperature=0.0)], logits, np.arange(50))
    np.testing.assert_array_equal(zero, np.argmax(logits, -1))
    for temperature in (1e-4, 1e-30):
        config = SamplingConfig(temperature=temperature)
        np.testing.assert_array_equal(zero, chosen([config], logits, np.arange(50)))


def test_a_row_draws_anew_at_each_index_and_for_each_seed():
    settings = RowSettings.of([SamplingConfig()] * 2, [1, 2**32 - 1])
    run = jax.jit(functools.partial(choose, mode=Mode(True, False, False)))
    flat = jnp.zeros((2, 10_000))
    draws = [np.asarray(run(flat, settings, np.full(2, i, np.int32), None)) for i in range(8)]
    assert len(set(np.concatenate(draws).tolist())) == 16


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SamplingConfig(max_new_tokens=0), "max_new_tokens must be at least 1"),
        (SamplingConfig(temperature=-1.0), "temperature must not be negative"),
        (SamplingConfig(temperature=math.nan), "temperature must not be"),
        (SamplingConfig(top_k=-1), "top_k must not be negative"),
        (SamplingConfig(top_p=0.0), "top_p must be in"),
        (SamplingConfig(top_p=1.1), "top_p must be in"),
        (SamplingConfig(min_p=-0.1), "min_p must be in"),
        (SamplingConfig(min_p=1.1), "min_p must be in"),
        (SamplingConfig(repetition_penalty=0.0), "repetition_penalty must be positive"),
    ],
)
def test_values_that_make_no_sense(config, message):
    with pytest.raises(UserError, match=message):
        config.check()
