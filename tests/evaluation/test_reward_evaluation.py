"""What `reward.json` says of a set, from scores that are known, and how it is shown."""

import numpy as np
import pytest

from instar.evaluation.reward_evaluation import measure
from instar.evaluation.reward_plots import drawn
from instar.evaluation.reward_report import table


def test_members_are_measured_alone_and_together():
    # Each member has one pair of three wrong; their mean has none.
    ratings = np.asarray([0.0, 1.0, 2.0])
    members = np.asarray([[1.0, 0.0, 3.0], [0.0, 3.0, 2.0]])
    found = measure(members, ratings, baseline=-ratings)
    assert found["members"] == pytest.approx([2 / 3, 2 / 3])
    assert found["accuracy"]["value"] == 1
    assert found["baseline"] == 0
    assert (found["mean"], found["std"]) == pytest.approx((1.5, np.std([0.5, 1.5, 2.5])))
    assert sum(each["pairs"] for each in found["by_gap"]) == 3
    assert found["person"] is found["alpha"] is None
    # The mean's gaps are 1, 1 and 2, all of them right.
    sure = 1 / (1 + np.exp(-np.asarray([1, 1, 2])))
    assert found["calibration"]["error"] == pytest.approx(np.mean(1 - sure))


def test_the_report_shows_each_set_and_escapes_its_name():
    found = measure(np.asarray([[0.0, 1.0]]), np.asarray([0.0, 1.0]))
    html = table({"<b>": found})
    assert "&lt;b&gt;" in html and "<b>" not in html
    assert [wide for svg, wide in drawn({"<b>": found}) if "<svg" in svg] == [True, False, False]
