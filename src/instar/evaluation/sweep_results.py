"""What the trials of a sweep came to: `trials.json`, and what each trial left behind.

`instar sweep` writes that file: of each trial, by name, its `overrides`, the `command` it runs,
what that was `told`, its `status` ("waiting" before it ever began), its `seconds`, and the `reason`
where it failed. A trial's run lies in the folder of its name. The results are kept in `sweep.json`.
"""

import collections
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from etils import epath

from instar.evaluation.run_files import Run, holds_run, load_run, read_optional
from instar.workdir import read_json, write_json

RECORD, RESULTS = "trials.json", "sweep.json"
Goal = Literal["minimise", "maximise"]

# The metrics by which a stage is judged, and which way; the first that its trials have. A name
# that ends in "/" stands for the accuracy of the first set below it.
_LANGUAGE: tuple[tuple[str, Goal], ...] = (("eval/loss", "minimise"), ("loss", "minimise"))
_JUDGED_BY: dict[str, tuple[tuple[str, Goal], ...]] = {
    "reward": (("eval/", "maximise"), ("accuracy", "maximise")),
    "ppo": (("held_out/score", "maximise"), ("score", "maximise")),
}
# The metrics of which more is better, by the last part of their names.
_RISING = {"accuracy", "score", "reward", "win_rate", "tokens_per_second", "mfu"}


@dataclass(frozen=True)
class TrialResult:
    """What is known of a trial.

    Attributes:
      overrides: what it sets, by dotted key.
      status: "waiting", "running", "stopped", "failed" or "done".
      value: the last one of the sweep's metric; None where there is none or it is not finite.
      step: the one at which it was measured.
      seconds: what it took over all of its starts; None where that was not recorded.
      reason: why it failed.
    """

    name: str
    overrides: dict[str, Any]
    status: str
    value: float | None = None
    step: int | None = None
    seconds: float | None = None
    reason: str = ""

    @property
    def ranked(self) -> bool:
        """Whether it is compared with others: it is done, and has a value."""
        return self.status == "done" and self.value is not None


@dataclass(frozen=True)
class SweepResults:
    """What is known of a sweep.

    Attributes:
      command: what the trials run.
      metric: by which they are sorted; None where no trial has logged anything.
      asked: the `metric` and the `goal` that somebody chose; None for those that nobody did.
      logged: the names of the metrics that there are.
      trials: the best one first; behind those that are done, the others.
    """

    command: str
    metric: str | None
    goal: Goal
    asked: dict[str, Any]
    logged: tuple[str, ...]
    trials: tuple[TrialResult, ...]

    @property
    def best(self) -> TrialResult | None:
        """The first trial, where it is done."""
        first = self.trials[0] if self.trials else None
        return first if first is not None and first.ranked else None


def collect(
    folder: epath.Path, metric: str | None = None, goal: Goal | None = None
) -> SweepResults:
    """What the files of a sweep and of its trials say.

    Args:
      metric, goal: None: those of the last time, or what suits the trials' stage.

    Raises:
      UserError: a file is damaged, or there is no `trials.json`.
    """
    records = read_json(folder / RECORD)
    runs = {name: load_run(folder / name) for name in records if holds_run(folder / name)}
    command = next((record["command"] for record in records.values()), "")
    asked = {"metric": metric, "goal": goal}
    if metric is None:
        before = read_optional(folder / RESULTS).get("asked", asked)
        asked = before | {"goal": goal or before["goal"]}
    metric, suited = asked["metric"], "minimise"
    if metric is None:
        metric, suited = _judged_by(command, list(runs.values()))
    elif metric.split("/")[-1] in _RISING:
        suited = "maximise"
    goal = asked["goal"] or suited
    found = [
        _result(folder / name, name, record, runs.get(name), metric)
        for name, record in records.items()
    ]
    logged = dict.fromkeys(key for run in runs.values() for key in run.names(""))
    return SweepResults(command, metric, goal, asked, tuple(logged), tuple(_sorted(found, goal)))


def write_results(folder: epath.Path, results: SweepResults) -> None:
    """Keeps what a sweep came to in its `sweep.json`."""
    write_json(
        folder / RESULTS,
        {
            "command": results.command,
            "metric": results.metric,
            "goal": results.goal,
            "asked": results.asked,
            "trials": [asdict(trial) for trial in results.trials],
        },
    )


def finished(folder: epath.Path) -> bool:
    """Whether a run came to its end, wherever it ran."""
    return holds_run(folder) and _finished(folder, load_run(folder))


def _finished(folder: epath.Path, run: Run) -> bool:
    """Whether the last step is saved and the report, which comes after all else, is written."""
    last = run.config.get("steps") or run.last_step
    return run.lineage.get("step") == last and (folder / "report.html").exists()


def _result(
    folder: epath.Path, name: str, record: Mapping[str, Any], run: Run | None, metric: str | None
) -> TrialResult:
    status, value, step = record["status"], None, None
    if run is not None:
        value, step = last_value(run, metric) if metric else (None, None)
        if _finished(folder, run):
            status = "done"
        elif status == "waiting":
            status = "running"
    reason = record.get("reason", "") if status == "failed" else ""
    return TrialResult(
        name, record["overrides"], status, value, step, record.get("seconds"), reason
    )


def last_value(run: Run, metric: str) -> tuple[float | None, int | None]:
    """(value, step) of the last line that has a metric; a value that is not finite is None."""
    series = run.series(metric)
    if not len(series):
        return None, None
    value = float(series.values[-1])
    return value if math.isfinite(value) else None, int(series.steps[-1])


def _judged_by(command: str, runs: Sequence[Run]) -> tuple[str | None, Goal]:
    """The metric that suits a stage's trials; None where they have logged none yet."""
    choices = _JUDGED_BY.get(command, _LANGUAGE)
    for (name, goal), run in itertools.product(choices, runs):
        if name.endswith("/"):
            sets = (name + each for each in run.names(name) if each.endswith("/accuracy"))
            name = next(sets, name)
        if len(run.series(name)):
            return name, goal
    return None, choices[0][1]


def _sorted(trials: Sequence[TrialResult], goal: Goal) -> list[TrialResult]:
    ranked = [trial for trial in trials if trial.ranked]
    ranked.sort(key=lambda trial: trial.value, reverse=goal == "maximise")
    return ranked + [trial for trial in trials if not trial.ranked]


# --- Keys ---------------------------------------------------------------------------------------


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Of each dotted key the shortest end that no other one has."""
    ends = {
        key: [key.split(".", skipped)[-1] for skipped in range(key.count(".") + 1)]
        for key in dict.fromkeys(keys)
    }
    owners = collections.Counter(end for each in ends.values() for end in each)
    return {
        key: next((end for end in reversed(each) if owners[end] == 1), key)
        for key, each in ends.items()
    }


def swept_keys(trials: Sequence[TrialResult]) -> list[str]:
    """The keys in which trials differ, in their order."""
    keys = dict.fromkeys(key for trial in trials for key in trial.overrides)
    return [key for key in keys if len(set(texts_of(trials, key))) > 1]


def free_keys(trials: Sequence[TrialResult]) -> list[str]:
    """The swept keys without those that only follow another one, as heads that go with a width."""
    kept: list[str] = []
    for key in swept_keys(trials):
        if not any(_follows(trials, key, other) for other in kept):
            kept.append(key)
    return kept


def texts_of(trials: Iterable[TrialResult], key: str) -> list[str]:
    """What each trial sets a key to, as text; "" where it leaves it as it is."""
    return [str(trial.overrides.get(key, "")) for trial in trials]


def _follows(trials: Sequence[TrialResult], key: str, other: str) -> bool:
    """Whether either of two keys tells the other.

    Where no value is there twice that is always so; then they must also rise or fall together.
    """
    a, b = texts_of(trials, key), texts_of(trials, other)
    pairs = set(zip(a, b, strict=True))
    if not len(pairs) == len(set(a)) == len(set(b)):
        return False
    if len(pairs) < len(trials):
        return True
    values = [(trial.overrides.get(key), trial.overrides.get(other)) for trial in trials]
    if not all(isinstance(value, int | float) for pair in values for value in pair):
        return True
    ordered = [value for value, _ in sorted(values, key=lambda pair: pair[1])]
    return ordered in (sorted(ordered), sorted(ordered, reverse=True))
