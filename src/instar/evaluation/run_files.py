"""What the files of a run say, for those who only look at it.

A run's folder holds, all of it optional but for one of the first two:

- `metrics.jsonl`: lines of `instar.training.metrics`. Known keys: `loss`,
  `learning_rate`, `grad_norm`, `tokens`, `tokens_per_second`, `mfu`, `skipped` and `spike` (0 or
  1), `epoch/SOURCE`, `alarm/NAME` (1 where it rings), `eval/loss`, `eval/perplexity`,
  `eval/bits_per_byte`, and those of the stages `reward` and `ppo`, see their reports;
- `config.json`: the resolved config;
- `run.json`: `hardware`, `mesh`, `peak` (an `instar.training.hardware.Peak` as a dict),
  `parameters`, `flops_per_token`, and `starts`, a list of {"step", "time"};
- `reward.json`: see `instar.evaluation.reward_evaluation`;
- `samples.jsonl`: `step`, `prompt`, `completion`, and what the stage adds;
- `checkpoints/STEP/lineage/lineage.json` of the newest checkpoint.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from etils import epath

from instar.errors import UserError
from instar.training.logs import read_records
from instar.training.metrics import METRICS, SAMPLES, read_metrics
from instar.workdir import read_json


@dataclass(frozen=True)
class Series:
    """Values over steps, in order of the steps; values may be NaN or infinite."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def finite(self) -> "Series":
        """The part with finite values."""
        keep = np.isfinite(self.values)
        return Series(self.steps[keep], self.values[keep])


@dataclass(frozen=True)
class Run:
    """What the files of a run say.

    `lines` are those of metrics.jsonl that hold a training loss, `evaluations` those of held-out
    text, `others` all the rest; of lines of one step the last one counts.
    """

    name: str
    config: dict[str, Any]
    facts: dict[str, Any]
    lines: list[dict[str, float]]
    evaluations: list[dict[str, float]]
    samples: list[dict[str, Any]]
    lineage: dict[str, Any]
    others: list[dict[str, float]] = field(default_factory=list)
    reward: dict[str, Any] = field(default_factory=dict)

    @property
    def stage(self) -> str:
        """Which stage it is of, by its newest checkpoint; before that, by what its config has."""
        if "stage" in self.lineage:
            return self.lineage["stage"]
        marks = {"update": "ppo", "members": "reward"}
        return next((name for mark, name in marks.items() if mark in self.config), "training")

    def series(self, key: str) -> Series:
        """The values of `key` over the steps that have it, training or evaluation."""
        everything = (*self.others, *self.evaluations, *self.lines)
        pairs = sorted({line["step"]: line[key] for line in everything if key in line}.items())
        steps, values = zip(*pairs, strict=True) if pairs else ((), ())
        return Series(np.asarray(steps, float), np.asarray(values, float))

    def flagged(self, key: str) -> list[int]:
        """The steps at which `key` is 1."""
        return [int(line["step"]) for line in self.lines if line.get(key, 0.0) > 0]

    def names(self, prefix: str) -> list[str]:
        """What follows `prefix` in the keys that begin with it, in their order."""
        everything = (*self.lines, *self.evaluations, *self.others)
        found = {key: None for line in everything for key in line if key.startswith(prefix)}
        return [key.removeprefix(prefix) for key in found]

    @property
    def last_step(self) -> int:
        return int(self.lines[-1]["step"]) if self.lines else 0

    @property
    def starts(self) -> list[dict[str, float]]:
        return list(self.facts.get("starts", []))


def holds_run(workdir: epath.Path) -> bool:
    """Whether a folder has what a run leaves."""
    return any((workdir / name).exists() for name in ("config.json", METRICS))


def load_run(workdir: epath.Path) -> Run:
    """Reads the files of a run.

    Raises:
      UserError: the folder holds no run, or one of its JSON files is damaged.
    """
    if not holds_run(workdir):
        raise UserError(
            f"{workdir} holds no run (neither config.json nor {METRICS}): name the --workdir of one"
        )
    lines = read_metrics(workdir)
    return Run(
        name=workdir.resolve().name,
        config=read_optional(workdir / "config.json"),
        facts=read_optional(workdir / "run.json"),
        lines=_last_of_each_step(line for line in lines if "loss" in line),
        evaluations=_last_of_each_step(line for line in lines if "eval/loss" in line),
        others=[line for line in lines if not {"loss", "eval/loss"} & line.keys()],
        samples=[record for record in read_records(workdir / SAMPLES) if "step" in record],
        lineage=_newest_lineage(workdir / "checkpoints"),
        reward=read_optional(workdir / "reward.json"),
    )


def read_optional(path: epath.Path) -> dict[str, Any]:
    """The content of a JSON file; {} where there is none. Raises UserError for a damaged one."""
    return read_json(path) if path.exists() else {}


def _newest_lineage(checkpoints: epath.Path) -> dict[str, Any]:
    """That of the highest step; a checkpoint under way has no folder of that name yet."""
    if not checkpoints.exists():
        return {}
    steps = [folder for folder in checkpoints.iterdir() if folder.name.isdigit()]
    for folder in sorted(steps, key=lambda folder: int(folder.name), reverse=True):
        for path in (folder / "lineage" / "lineage.json", folder / "lineage.json"):
            if path.exists():
                return read_json(path)
    return {}


def _last_of_each_step(lines: Iterable[dict[str, float]]) -> list[dict[str, float]]:
    by_step = {line["step"]: line for line in lines if "step" in line}
    return [by_step[step] for step in sorted(by_step)]
