"""The combinators of sweep files: which trials they make, and in which order."""

import math
import statistics

import pytest

from instar import sweep
from instar.errors import UserError

pytestmark = pytest.mark.smoke


def test_product_takes_each_combination_and_the_last_changes_fastest():
    sizes = sweep.zip({"width": (1, 2), "heads": (3, 4)})
    assert sizes == [{"width": 1, "heads": 3}, {"width": 2, "heads": 4}]
    assert sweep.product(sizes, {"rate": (0.1, 0.2), "seed": (7,)}) == [
        {"width": 1, "heads": 3, "rate": 0.1, "seed": 7},
        {"width": 1, "heads": 3, "rate": 0.2, "seed": 7},
        {"width": 2, "heads": 4, "rate": 0.1, "seed": 7},
        {"width": 2, "heads": 4, "rate": 0.2, "seed": 7},
    ]
    assert sweep.product() == [{}]
    assert sweep.product({"a": ()}) == []


def test_parts_may_be_generators_and_trials_of_several_keys():
    drawn = sweep.random(2, {"a": sweep.uniform(0, 1)})
    together = sweep.zip(drawn, ({"b": value} for value in (1, 2)))
    assert together == [{**drawn[0], "b": 1}, {**drawn[1], "b": 2}]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sweep.product({"a": (1,)}, {"a": (2,)}), "two parts of the sweep set a"),
        (lambda: sweep.zip({"a": (1,)}, [{"a": 2}]), "two parts of the sweep set a"),
        (lambda: sweep.zip({"a": (1, 2), "b": (1,)}), "their numbers are a: 2, b: 1"),
        (lambda: sweep.log_uniform(0, 1), "log_uniform needs positive bounds, not 0 and 1"),
        (lambda: sweep.log_uniform(-2, -1), "log_uniform needs positive bounds"),
        (lambda: sweep.uniform(2, 1), "uniform needs a lower and a higher bound, not 2 and 1"),
        (lambda: sweep.choice(()), "choice needs at least one value"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_draws_are_the_same_for_a_seed_and_stay_when_the_sweep_grows():
    rate, decay = sweep.log_uniform(1e-4, 1e-1), sweep.uniform(0.0, 0.5)
    first = sweep.random(5, {"rate": rate, "decay": decay}, seed=3)
    assert first == sweep.random(5, {"rate": rate, "decay": decay}, seed=3)
    assert first == sweep.random(9, {"rate": rate, "decay": decay}, seed=3)[:5]
    kind = sweep.choice(("x", "y"))
    more = sweep.random(5, {"kind": kind, "decay": decay, "rate": rate}, seed=3)
    assert [(t["rate"], t["decay"]) for t in more] == [(t["rate"], t["decay"]) for t in first]
    others = sweep.random(5, {"rate": rate, "decay": decay}, seed=4)
    assert all(a["rate"] != b["rate"] for a, b in zip(first, others, strict=True))
    # On any machine and in any version of Python.
    assert first[0] == {"rate": 0.03255, "decay": 0.1314}


def test_draws_have_the_distributions_that_they_are_called_by():
    draws = {
        "log": sweep.log_uniform(1e-4, 1e-1),
        "flat": sweep.uniform(-3.0, 5.0),
        "one": sweep.choice("abc"),
    }
    trials = sweep.random(3000, draws)
    logs = [math.log10(trial["log"]) for trial in trials]
    flats = [trial["flat"] for trial in trials]
    # Mean and deviation of a uniform variable: the middle, and the width / sqrt(12).
    assert statistics.fmean(logs) == pytest.approx(-2.5, abs=0.05)
    assert statistics.stdev(logs) == pytest.approx(3 / math.sqrt(12), rel=0.05)
    assert statistics.fmean(flats) == pytest.approx(1.0, abs=0.15)
    assert statistics.stdev(flats) == pytest.approx(8 / math.sqrt(12), rel=0.05)
    assert min(logs) >= -4 and max(logs) <= -1 and min(flats) >= -3 and max(flats) <= 5
    for letter in "abc":
        assert sum(trial["one"] == letter for trial in trials) == pytest.approx(1000, rel=0.1)
    assert all(value == float(f"{value:.4g}") for value in flats)  # what a name can state
