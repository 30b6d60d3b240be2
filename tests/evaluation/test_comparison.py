"""Comparisons of models: closed forms, and what a reader of the JSON relies on."""

import json

import numpy as np
import pytest

from instar.evaluation.comparison import Completions, compare, mean_interval, win_rate
from instar.evaluation.diversity import distinct_n, self_bleu


def example():
    models = {
        "sft": Completions(["a b", "a b c", ""], [3, 4, 1], [True, True, False]),
        "ppo": Completions(["d d d d d", "e", "f g"], [5, 2, 2], [False, True, False]),
        "other": Completions(["x", "y", "z"], [1, 1, 1], [True] * 3),
    }
    scores = {
        "vader": {
            "sft": np.array([0.0, 1.0, 2.0]),
            "ppo": np.array([1.0, 1.0, 3.0]),
            "other": np.array([-1.0, -1.0, 9.0]),
        }
    }
    return models, scores


def test_all_figures_are_in_the_json():
    models, scores = example()
    found = json.loads(json.dumps(compare(models, scores), allow_nan=False))
    assert found["prompts"] == 3
    assert list(found["models"]) == ["sft", "ppo", "other"]
    sft = found["models"]["sft"]
    assert sft["judges"]["vader"]["value"] == 1
    assert sft["length"] == pytest.approx(8 / 3)
    assert sft["ended"] == pytest.approx(2 / 3)
    assert sft["distinct_1"] == distinct_n(["a b", "a b c"], 1) == 3 / 5
    assert sft["distinct_2"] == 2 / 3
    assert sft["self_bleu"] == self_bleu(models["sft"].texts)
    assert found["models"]["ppo"]["repetition"] == 1 / 2
    wins = {(each["model"], each["against"]): each["value"] for each in found["wins"]}
    assert wins == pytest.approx(
        {("ppo", "sft"): 2.5 / 3, ("other", "sft"): 1 / 3, ("other", "ppo"): 1 / 3}
    )


def test_win_rates_are_paired_and_their_sides_add_up():
    rng = np.random.default_rng(0)
    prompts = rng.normal(0, 10, 50)  # some prompts are easier than others, for both models
    first, second = np.round(prompts + 1), np.round(prompts)
    found = win_rate(first, second)
    assert (found.value, found.low, found.high) == (1, 1, 1)
    first, second = rng.integers(0, 3, (2, 41))
    there, back = win_rate(first, second), win_rate(second, first)
    assert there.value == pytest.approx(1 - back.value)
    assert (there.low, there.high) == pytest.approx((1 - back.high, 1 - back.low))
    expected = np.mean(
        [1.0 if a > b else 0.5 * (a == b) for a, b in zip(first, second, strict=True)]
    )
    assert there.value == pytest.approx(expected)


def test_the_interval_is_that_of_the_normal_approximation():
    values = np.random.default_rng(1).standard_normal(400) * 3 + 5
    found = mean_interval(values)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert mean_interval(values) == found != mean_interval(values, seed=1)


def test_unequal_numbers_are_refused():
    models, scores = example()
    scores["vader"]["ppo"] = np.zeros(2)
    with pytest.raises(ValueError, match="scores of ppo by vader"):
        compare(models, scores)
    with pytest.raises(ValueError, match="one or more"):
        compare({"sft": Completions([], [], [])}, {})
