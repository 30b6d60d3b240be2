"""The trials of a sweep: read from its file, named, and checked before the first one runs."""

import functools
import hashlib
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from instar import schema as schemas
from instar.arguments import nearest
from instar.commands import COMMANDS
from instar.config import run_file, split_argument
from instar.errors import UserError
from instar.evaluation.sweep_results import short_names
from instar.stages.steps import Records, Step, dotted, text_of, trained

# Names of folders are cut to so many characters; file systems take 255 bytes.
_LONGEST = 120


@dataclass(frozen=True)
class Trial:
    """A trial as it is run.

    Attributes:
      overrides: what makes it differ from the others, by dotted key.
      again: reads its config anew.
    """

    step: Step
    overrides: dict[str, Any]
    again: Callable[[], Step]


def command_of(config: str, given: str | None) -> str:
    """The command that trials run: the one given, else that of the config file's folder.

    Raises:
      UserError: it is none that trains.
    """
    known = [name for name, command in COMMANDS.items() if command.config and command.together]
    if given is None:
        folder = pathlib.Path(split_argument(config)[0]).absolute().parent.name
        if folder not in known:
            raise UserError(
                f"--command is missing: the folder of config file {config} is none of "
                f"{', '.join(known)}, of which a trial runs one"
            )
        return folder
    if given not in known:
        raise UserError(
            f"--command: a trial cannot run {given!r}; {nearest(given, known, 'the commands')}"
        )
    return given


def read_trials(path: str) -> list[dict[str, Any]]:
    """The overrides of each trial, as ``get_sweep()`` of a file gives them.

    Raises:
      UserError: the file is not valid, or gives no trials.
    """
    found = run_file(path, "get_sweep", "sweep")
    given = list(found) if isinstance(found, Iterable) and not isinstance(found, Mapping) else None
    if given is None or not all(isinstance(each, Mapping) for each in given):
        raise UserError(
            f"get_sweep() in {path} must give dicts from keys of the config to values, one a "
            f"trial, not {schemas.value_text(found)}"
        )
    if not given:
        raise UserError(f"get_sweep() in {path} gives no trials")
    return [_leaves(each) for each in given]


def plan_trials(
    trials: Sequence[Mapping[str, Any]],
    command: str,
    config: str,
    workdir: str,
    common: Sequence[tuple[str, str]] = (),
) -> list[Trial]:
    """Checks each trial's config.

    Args:
      common: overrides of all trials, as (dotted key, text).

    Raises:
      UserError: a trial does not fit the command's config, sets what `common` sets, or is there
        twice; the sentence names the trial.
    """
    names = name_trials(trials)
    planned = []
    for name, overrides in zip(names, trials, strict=True):
        texts = dotted(overrides)
        for key, _ in common:
            if key in dict(texts):
                raise UserError(f"trial {name} sets {key} itself: leave --config.{key} out")
        folder = f"{workdir.rstrip('/')}/{name}"
        plan = functools.partial(trained, name, command, config, folder, [*common, *texts])
        try:
            planned.append(Trial(plan(), dict(overrides), again=plan))
        except UserError as error:
            raise UserError(f"trial {name}: {error}") from None
    return planned


def check_records(trials: Sequence[Trial], records: Records) -> None:
    """Sees that a sweep goes on as it began; it may have more trials than it had.

    Raises:
      UserError: a trial is gone, or its config has changed.
    """
    here = {trial.step.name: trial.step for trial in trials}
    for name, record in records.read().items():
        if name not in here:
            raise UserError(
                f"trial {name} of {records.folder} is no longer in the sweep, which may get more "
                "trials but not lose any: put it back, or choose a new --workdir"
            )
        if changed := records.changed(here[name], record):
            raise UserError(
                f"trial {name} of {records.folder} has another config: {changed}; choose a new "
                "--workdir, or undo the change"
            )


# --- Names --------------------------------------------------------------------------------------


def name_trials(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each trial that says what it sets, fit for a folder: "learning_rate=0.01,depth=4".

    Raises:
      UserError: two trials are the same.
    """
    labels = short_names(key for trial in trials for key in trial)
    names = [_name(trial, labels) for trial in trials]
    seen: dict[str, Mapping[str, Any]] = {}
    for index, (name, trial) in enumerate(zip(names, trials, strict=True)):
        if name in seen and seen[name] != trial:  # they differ only in what a name leaves out
            name = names[index] = f"{name}-{_digest(trial)}"
        if name in seen:
            raise UserError(f"trial {name} is in the sweep twice")
        seen[name] = trial
    return names


def _name(trial: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    parts = [f"{labels[key]}={_in_a_name(value)}" for key, value in trial.items()]
    name = ",".join(parts) or "base"
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 9]}-{_digest(trial)}"


def _in_a_name(value: Any) -> str:
    text = re.sub(r"[^A-Za-z0-9_.+-]+", "-", text_of(value)).strip("-.")
    return f"-{text}" if isinstance(value, int | float) and value < 0 else text


def _digest(trial: Mapping[str, Any]) -> str:
    return hashlib.sha256(repr(sorted(dotted(trial))).encode()).hexdigest()[:8]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What nested values set, by dotted key."""
    found = {}
    for key, value in values.items():
        name = schemas.join(prefix, key)
        below = isinstance(value, Mapping) and value
        found |= _leaves(value, name) if below else {name: _plain(value)}
    return found


def _plain(value: Any) -> Any:
    """A value as Python's own: NumPy's are written otherwise, and tuples become lists in JSON."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
