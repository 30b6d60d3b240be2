"""The report of a sweep: which trial is best, what is drawn, and over which axis."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

from instar.evaluation import plots
from instar.evaluation.report import ReportOptions, report
from instar.evaluation.sweep_plots import drawn, log_spaced
from instar.evaluation.sweep_results import (
    SweepResults,
    TrialResult,
    collect,
    finished,
    free_keys,
    short_names,
    swept_keys,
    write_results,
)

RATES, WIDTHS = (0.001, 0.01, 0.1), (32, 64)


def write_trial(
    folder: Path, name: str, metrics: dict[str, Any], steps: int = 8, saved: int = 8
) -> None:
    """A run that is complete where `saved` is `steps`."""
    place = folder / name
    lineage = place / "checkpoints" / str(saved) / "lineage" / "lineage.json"
    lineage.parent.mkdir(parents=True)
    lineage.write_text(json.dumps({"step": saved}))
    (place / "config.json").write_text(json.dumps({"steps": steps}))
    early = {key: 9.0 for key in metrics}
    lines = [{"step": 4, "time": 1.0, "loss": 5.0}, {"step": 4, "time": 1.0} | early]
    lines += [{"step": saved, "time": 2.0, "loss": 4.0}, {"step": saved, "time": 2.0} | metrics]
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (place / "report.html").write_text("<p>")


def write_sweep(folder: Path, records: dict[str, dict[str, Any]], command: str) -> None:
    folder.mkdir(exist_ok=True)
    full = {name: {"command": command, "told": {}} | record for name, record in records.items()}
    (folder / "trials.json").write_text(json.dumps(full))


def loss(width: int, rate: float) -> float:
    """The best rate is the middle one; the wider model is better."""
    return 3.0 - 0.01 * width + abs(math.log10(rate) + 2) * 0.1


@pytest.fixture
def grid(tmp_path) -> Path:
    """Three rates by two widths: one trial failed, one diverged, one not begun, three done."""
    records, folder = {}, tmp_path / "grid"
    for width in WIDTHS:
        for rate in RATES:
            name = f"width={width},rate={rate}"
            keys = {"model.width": width, "model.heads": width // 32, "optimizer.rate": rate}
            records[name] = {"overrides": keys | {"steps": 8}, "status": "done", "seconds": 90.0}
            write_trial(folder, name, {"eval/loss": loss(width, rate), "eval/bits": -rate})
    records["width=32,rate=0.1"] |= {"status": "failed", "reason": "exit code 1: <too> hot"}
    (folder / "width=32,rate=0.1" / "report.html").unlink()
    write_trial(folder / "nan", "n", {"eval/loss": "nan"})
    (folder / "width=64,rate=0.1" / "metrics.jsonl").write_text(
        (folder / "nan/n/metrics.jsonl").read_text()
    )
    del records["width=64,rate=0.001"]["seconds"]
    records["width=64,rate=0.001"]["status"] = "waiting"
    for path in (folder / "width=64,rate=0.001").rglob("*.*"):
        path.unlink()
    write_sweep(folder, records, "pretrain")
    return folder


def test_the_best_is_first_and_those_without_a_value_are_last(grid, capsys):
    results = collect(epath.Path(grid))
    assert (results.metric, results.goal) == ("eval/loss", "minimise")
    assert [(trial.name, trial.status) for trial in results.trials] == [
        ("width=64,rate=0.01", "done"),
        ("width=32,rate=0.01", "done"),
        ("width=32,rate=0.001", "done"),
        ("width=32,rate=0.1", "failed"),
        ("width=64,rate=0.001", "waiting"),
        ("width=64,rate=0.1", "done"),
    ]
    assert results.best.value == loss(64, 0.01) and results.best.step == 8
    assert results.trials[-1].value is None  # not finite
    assert collect(epath.Path(grid), goal="maximise").best.name == "width=32,rate=0.001"
    assert collect(epath.Path(grid), "eval/bits").best.value == -0.01  # that of 0.1 has none

    report(ReportOptions(str(grid)))
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["width", "heads", "rate", "eval/loss", "step", "time", "status"]
    assert out[1].split() == ["1", "64", "2", "0.01", "2.3600", "8", "1", "min", "30", "s", "done"]
    assert out[4].split() == ["32", "1", "0.1", "2.7800", "8", "1", "min", "30", "s", "failed"]
    assert out[7] == "width=32,rate=0.1: exit code 1: <too> hot"
    assert out[8] == str(grid / "report.html")
    kept = json.loads((grid / "sweep.json").read_text())
    assert [trial["name"] for trial in kept["trials"]] == [trial.name for trial in results.trials]


def test_the_page_shows_lines_over_a_logarithmic_axis(grid):
    report(ReportOptions(str(grid)))
    page = (grid / "report.html").read_text()
    figures = re.findall(r'<svg class="plot"[^>]*aria-label="([^"]*)"', page)
    assert figures == ["eval/loss over rate by width"]
    words = re.findall(r">([^<>\n]+)</text>", page)
    for word in ("0.001", "0.01", "0.1", "32", "64", "width", "rate", "eval/loss", "no result"):
        assert word in words
    assert "exit code 1: &lt;too&gt; hot" in page and "<too>" not in page
    assert 'href="width%3D64%2Crate%3D0.01/report.html"' in page
    assert page.count('report.html"') == 4  # of those that have one
    assert "4 of 6" in page and "1 failed" in page
    assert not re.search("#0[1-6]0[1-6]0[1-6]", page)  # each colour is the page's


def test_what_was_asked_for_is_remembered(grid):
    folder = epath.Path(grid)
    write_results(folder, collect(folder, "eval/bits", "maximise"))
    again = collect(folder)
    assert (again.metric, again.goal) == ("eval/bits", "maximise")
    write_results(folder, again)
    assert collect(folder, "eval/loss").goal == "minimise"
    assert collect(folder).metric == "eval/bits"


@pytest.mark.parametrize(
    ("command", "metrics", "found"),
    [
        ("pretrain", {"eval/loss": 1.0}, ("eval/loss", "minimise")),
        ("sft", {"samples": 1.0}, ("loss", "minimise")),
        (
            "reward",
            {"eval/a/disagreement": 1.0, "eval/b/accuracy": 0.5, "eval/c/accuracy": 0.6},
            ("eval/b/accuracy", "maximise"),
        ),
        ("ppo", {"score": 1.0, "held_out/score": 2.0}, ("held_out/score", "maximise")),
        ("ppo", {"score": 1.0}, ("score", "maximise")),
    ],
)
def test_each_stage_has_a_metric_that_suits_it(tmp_path, command, metrics, found):
    write_trial(tmp_path, "a", metrics)
    write_sweep(tmp_path, {"a": {"overrides": {}, "status": "running"}}, command)
    results = collect(epath.Path(tmp_path))
    assert (results.metric, results.goal) == found
    assert results.trials[0].status == "done"  # somebody else went on with it


def test_a_run_is_finished_when_its_last_step_is_saved_and_its_report_written(tmp_path):
    folder = epath.Path(tmp_path)
    assert not finished(folder / "a")
    write_trial(tmp_path, "a", {"eval/loss": 1.0})
    write_trial(tmp_path, "b", {"eval/loss": 1.0}, saved=7)
    assert finished(folder / "a") and not finished(folder / "b")
    (folder / "a/report.html").unlink()
    assert not finished(folder / "a")


@pytest.mark.parametrize(
    ("values", "logarithmic"),
    [
        ((1e-4, 1e-3, 1e-2), True),
        ((1, 2, 4), True),
        ((0.0025, 0.005, 0.01, 0.02), True),
        ((1e-3, 3e-3, 1e-2, 3e-2), True),
        ((16, 32, 48), False),
        ((0.1, 0.2, 0.3, 0.4), False),
        ((0.0, 0.1, 1.0), False),
        ((0.01, 0.1), True),
        ((32, 64), False),
        ((5,), False),
        (tuple(np.random.default_rng(0).uniform(-4, -1, 40)), False),
        (tuple(10 ** np.random.default_rng(0).uniform(-4, -1, 40)), True),
    ],
)
def test_an_axis_is_logarithmic_where_values_are_spaced_by_factors(values, logarithmic):
    assert log_spaced(values) == logarithmic


def results_of(overrides: list[dict[str, Any]]) -> SweepResults:
    trials = [TrialResult(f"t{i}", keys, "done", 1.0 + i) for i, keys in enumerate(overrides)]
    return SweepResults("pretrain", "eval/loss", "minimise", {}, ("eval/loss",), tuple(trials))


@pytest.mark.parametrize(
    ("trials", "swept", "free", "figures"),
    [
        # Heads follow the width.
        (
            [{"w": w, "h": w // 16, "r": r, "s": 5} for w in (16, 32) for r in (1, 10, 100)],
            ["w", "h", "r"],
            ["w", "r"],
            ["eval/loss over r by w"],
        ),
        ([{"w": w, "h": w // 16} for w in (16, 32, 64)], ["w", "h"], ["w"], ["eval/loss over w"]),
        # Drawn at random, no value is there twice and none follows another.
        (
            [{"w": w, "r": r} for w, r in ((1, 3), (2, 9), (3, 1), (4, 4))],
            ["w", "r"],
            ["w", "r"],
            ["eval/loss over w", "eval/loss over r"],
        ),
        # Names, and a trial that leaves the key as it is.
        ([{"o.kind": "b"}, {"o.kind": "a"}, {}], ["o.kind"], ["o.kind"], ["eval/loss over kind"]),
        (
            [{"k": k, "r": r} for k in ("b", "a") for r in (1, 2)],
            ["k", "r"],
            ["k", "r"],
            ["eval/loss over r by k"],
        ),
        ([{"a": 1}], [], [], []),
    ],
)
def test_figures_are_of_the_keys_that_were_swept(trials, swept, free, figures):
    results = results_of(trials)
    assert swept_keys(results.trials) == swept
    assert free_keys(results.trials) == free
    drawings = [svg for svg, _ in drawn(results)]
    assert [re.search('aria-label="([^"]*)"', svg).group(1) for svg in drawings] == figures
    for svg in drawings:
        assert not any(colour in svg for colour in plots.COLOURS.values())


def test_short_names_are_ends_that_no_other_key_has():
    keys = ("a.b.size", "c.b.size", "c.rate", "rate", "x")
    assert short_names(keys) == {
        "a.b.size": "a.b.size",
        "c.b.size": "c.b.size",
        "c.rate": "c.rate",
        "rate": "rate",
        "x": "x",
    }
    assert short_names(("model.width", "optimizer.rate")) == {
        "model.width": "width",
        "optimizer.rate": "rate",
    }
