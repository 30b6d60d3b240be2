"""What `reward.json` says of a set, from scores that are known, and how it is shown."""

import json
import pathlib

import numpy as np
import pytest
from etils import epath

from instar.evaluation import reward_report
from instar.evaluation.report import write_report
from instar.evaluation.reward_evaluation import measure
from instar.evaluation.reward_plots import drawn
from instar.evaluation.reward_report import table
from instar.evaluation.run_files import load_run
from instar.workdir import write_json


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


@pytest.mark.parametrize("texts", [1, 3])
def test_a_set_without_pairs_has_nulls_in_its_file_and_dashes_in_the_report(tmp_path, texts):
    """One text, or ties alone: no accuracy, no interval, no calibration."""
    members = np.arange(2.0 * texts).reshape(2, texts)
    tied = measure(members, np.ones(texts), [[1.0]] * texts, baseline=np.zeros(texts))
    sets = {"tied": tied, "told": measure(np.asarray([[0.0, 1.0]]), np.asarray([0.0, 1.0]))}
    write_json(epath.Path(tmp_path / "reward.json"), {"step": 1, "sets": sets})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    written = (tmp_path / "reward.json").read_text()
    found = json.loads(written, parse_constant=refuse)["sets"]
    assert found["tied"]["accuracy"] == {"value": None, "low": None, "high": None}
    assert found["tied"]["members"] == [None, None] and found["told"]["accuracy"]["value"] == 1
    (tmp_path / "config.json").write_text(json.dumps({"members": 2}))
    page = pathlib.Path(write_report(tmp_path)).read_text()
    assert "<td>– to –</td><td>–, –</td>" in page and "nan" not in page.lower().split("<style")[0]
    assert "accuracy in pairs: tied –, told 1.000" in reward_report.key_result(load_run(tmp_path))
