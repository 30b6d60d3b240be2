"""The alarms on histories of runs: healthy, collapsing, over-optimising, and noise alone."""

import dataclasses
import math

import numpy as np
import pytest

from instar import schema
from instar.errors import UserError
from instar.evaluation.alarms import AlarmConfig, Alarms

# What a sound run and one without a KL penalty were seen to go from and to.
START = {
    "score": 0.0,
    "gold/vader": 0.21,
    "gold/ridge": 0.1,
    "kl": 0.0,
    "entropy": 3.7,
    "distinct_2": 0.887,
    "self_bleu": 0.15,
    "perplexity": 40.0,
}
HEALTHY = {
    "score": 2.5,
    "gold/vader": 0.68,
    "gold/ridge": 1.8,
    "kl": 13.0,
    "entropy": 3.0,
    "distinct_2": 0.789,
    "self_bleu": 0.25,
    "perplexity": 25.0,
}
COLLAPSED = {
    "score": 6.0,
    "gold/vader": 0.98,
    "gold/ridge": 3.2,
    "kl": 90.0,
    "entropy": 0.28,
    "distinct_2": 0.105,
    "self_bleu": 0.9,
    "perplexity": 5.0,
}
NOISE = {
    "score": 0.1,
    "gold/vader": 0.05,
    "gold/ridge": 0.1,
    "kl": 0.5,
    "entropy": 0.1,
    "distinct_2": 0.02,
    "self_bleu": 0.02,
    "perplexity": 1.0,
}


def history(end, count, seed=0, start=START, noise=1.0):
    """Scalars that go from `start` to `end` in a straight line, with noise."""
    rng = np.random.default_rng(seed)
    return [
        {
            name: start[name]
            + (end[name] - start[name]) * i / max(count - 1, 1)
            + noise * NOISE[name] * rng.standard_normal()
            for name in end
        }
        for i in range(count)
    ]


def rung(lines, config=None):
    alarms = Alarms(config or AlarmConfig())
    return [alarm for step, line in enumerate(lines, 1) for alarm in alarms.update(step, line)]


@pytest.mark.parametrize("seed", range(10))
def test_a_healthy_run_rings_nothing(seed):
    assert rung(history(HEALTHY, 80, seed)) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_collapse_rings_though_the_judges_like_it(seed):
    alarms = rung(history(COLLAPSED, 60, seed))
    assert sorted(alarm.name for alarm in alarms) == (
        ["distinct_2", "entropy", "kl", "perplexity_fall", "self_bleu"]
    )
    steps = {alarm.name: alarm.step for alarm in alarms}
    # On the line, the mean of five crosses half the entropy at the start behind step 34.
    assert 34 <= steps["entropy"] <= 40
    assert steps["kl"] == pytest.approx(1 + 59 * 40 / 90 + 2, abs=3)


def test_gibberish_rings():
    (alarm,) = rung(history(HEALTHY | {"perplexity": 160.0}, 40))
    assert alarm.name == "perplexity_rise"
    assert "gibberish" in alarm.sentence


@pytest.mark.parametrize("seed", range(10))
def test_overoptimisation_rings_only_once_the_gold_measure_falls(seed):
    top = history(HEALTHY, 60, seed)
    falling = HEALTHY | {"score": 4.0, "gold/vader": 0.3}
    down = history(falling, 40, seed + 100, start=HEALTHY)
    (alarm,) = rung(top + down)
    assert alarm.name == "overoptimised/vader"
    assert 60 + 5 < alarm.step < 60 + 30
    score = history(HEALTHY | {"score": 4.0}, 40, seed + 100, start=HEALTHY)
    assert rung(top + score) == []


def test_a_gold_measure_that_falls_with_the_score_is_no_overoptimisation():
    both = HEALTHY | {"score": 0.0, "gold/vader": 0.2}
    assert rung(history(HEALTHY, 40) + history(both, 40, 1, start=HEALTHY)) == []


def test_the_window_that_overoptimisation_is_measured_against_is_the_best():
    config = AlarmConfig(overoptimisation_window=2, overoptimisation=1e-9)
    gold = [0.0, 0.0, 5.0, 7.0, 1.0, 1.0]
    lines = [{"score": float(i), "gold/g": value} for i, value in enumerate(gold)]
    (alarm,) = rung(lines, config)
    assert alarm.step == 6  # [1, 1] against [5, 7]; at step 5, [7, 1] overlaps with it
    assert "rose from 2.500 to 4.500 while g fell from its best 6.000 to 1.000" in alarm.sentence


def test_overoptimisation_is_measured_in_standard_errors():
    rng = np.random.default_rng(0)
    pairs = np.stack([np.arange(12.0), rng.standard_normal(12)], axis=1)
    pairs[-4:, 1] -= 3
    lines = [{"score": score, "gold/g": gold} for score, gold in pairs]
    sigma = math.sqrt(np.mean([(pairs[i, 1] - pairs[i - 1, 1]) ** 2 / 2 for i in range(1, 12)]))
    best = max(pairs[i : i + 4, 1].mean() for i in range(5))
    fall = (best - pairs[-4:, 1].mean()) / (sigma * math.sqrt(2 / 4))
    for factor, count in ((0.99, 1), (1.01, 0)):
        config = AlarmConfig(overoptimisation_window=4, overoptimisation=factor * fall)
        found = [alarm for alarm in rung(lines, config) if alarm.step == 12]
        earlier = [alarm for alarm in rung(lines, config) if alarm.step < 12]
        assert (len(found), len(earlier)) == (count, 0)


def test_noise_alone_rings_nothing():
    for seed in range(25):
        rng = np.random.default_rng(seed)
        gold = rng.standard_normal(200)
        score = np.linspace(0, 5, 200) + rng.standard_normal(200)
        lines = [{"score": s, "gold/g": g} for s, g in zip(score, gold, strict=True)]
        assert rung(lines) == []
        flat = history(START, 100, seed)
        assert rung(flat) == []


def test_an_alarm_rings_once_until_it_has_cleared():
    config = AlarmConfig(window=1, kl=10.0)
    values = [5, 11, 12, 9.5, 11, 8.9, 11]  # 9.5 is not yet clear of 10
    alarms = rung([{"kl": value} for value in values], config)
    assert [(alarm.step, alarm.name) for alarm in alarms] == [(2, "kl"), (7, "kl")]


def test_a_resumed_run_rings_as_one_that_never_stopped():
    lines = history(COLLAPSED, 60)
    whole = rung(lines)
    for cut in (10, 40, 55):
        alarms = Alarms(AlarmConfig())
        for step, line in enumerate(lines[:cut], 1):
            alarms.update(step, line)
        after = [
            a for step, line in enumerate(lines[cut:], cut + 1) for a in alarms.update(step, line)
        ]
        assert after == [alarm for alarm in whole if alarm.step > cut]


def test_absent_and_non_finite_scalars_are_passed_over():
    assert rung([{}] * 20) == []
    lines = history(COLLAPSED, 60)
    torn = [each for line in lines for each in (line, dict.fromkeys(line, math.nan), {"kl": None})]
    assert [alarm.name for alarm in rung(torn)] == [alarm.name for alarm in rung(lines)]


def test_nothing_left_at_all_rings():
    end = HEALTHY | {"entropy": 0.0, "distinct_2": 0.0, "self_bleu": 1.0}
    lines = history(START, 5, noise=0) + [end] * 6
    assert {alarm.name for alarm in rung(lines)} == {"entropy", "distinct_2", "self_bleu"}


def test_what_is_not_watched_does_not_ring():
    names = "entropy diversity kl perplexity_rise perplexity_fall overoptimisation".split()
    assert rung(history(COLLAPSED, 60), AlarmConfig(**dict.fromkeys(names))) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("window", 0), ("entropy", 1.0), ("kl", 0.0), ("perplexity_rise", 1.0), ("baseline", 0)],
)
def test_impossible_thresholds_are_refused(name, value):
    values = dataclasses.asdict(AlarmConfig()) | {name: value}
    with pytest.raises(UserError, match=f"alarms.{name} must be"):
        schema.build(values, AlarmConfig)
