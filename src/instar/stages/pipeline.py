"""`instar pipeline`: a chain of commands, from the text to the last model, as one command.

Each step is a process of its own (`instar.children`), told what one would type. What is done is
written down in the workdir, and is not done again.
"""

import os
import re
import shlex
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from etils import epath
from rich.console import Console

from instar import schema as schemas
from instar.arguments import flag, from_words, nearest, positional_field
from instar.children import Children
from instar.commands import COMMANDS, resolve
from instar.config import load
from instar.errors import RestartError, UserError
from instar.evaluation.report import write_report
from instar.sharding.places import find_place
from instar.workdir import CHANGEABLE, changes, read_json, write_json

RECORD = "pipeline.json"
# How often a step under way writes down its time, and how often one looks for another's word.
RECORD_SECONDS, LOOK_SECONDS = 30.0, 1.0


@dataclass(frozen=True)
class StepConfig:
    """One command of a chain, in any text of which ``{workdir}`` is the pipeline's workdir.

    Attributes:
      name: of the step, and of its folder in the workdir.
      command: that of the command line.
      config: the path of its config file, where the command takes one.
      overrides: what of that config is changed: ``dict(steps=10, optimizer=dict(clip_norm=0.5))``;
        an entry of a list goes by its index, ``dict(sources={"0": dict(path="a.csv")})``.
      options: what the command is told, where it takes options: ``dict(to="{workdir}/model")``.
    """

    name: str
    command: str
    config: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        known = [name for name in COMMANDS if name != "pipeline"]
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name) or self.name == RECORD:
            raise UserError(
                "a step's name becomes a folder: stages.name must be of letters, digits, "
                f'"_", "-" and ".", and not "{RECORD}"; it is {self.name!r}'
            )
        if self.command not in known:
            raise UserError(
                f"step {self.name}: there is no command {self.command!r}; "
                f"{nearest(self.command, known, 'the commands')}"
            )
        takes_config = COMMANDS[self.command].config is not None
        if takes_config and not self.config:
            raise UserError(f"step {self.name}: stages.config must name a config file")
        if takes_config and self.options:
            raise UserError(
                f"step {self.name}: {self.command} takes a config: stages.overrides, not "
                "stages.options, changes it"
            )
        if not takes_config and (self.config or self.overrides):
            raise UserError(
                f"step {self.name}: {self.command} takes no config: stages.options says all of it"
            )


@dataclass(frozen=True)
class PipelineConfig:
    """Everything that `instar pipeline` is told: the steps, in their order.

    Paths in the steps' config files that begin with `home` mean the pipeline's workdir: the files
    work by themselves where the workdir is that folder, and in a pipeline anywhere.
    """

    stages: tuple[StepConfig, ...]
    home: str | None = None

    def check(self) -> None:
        names = [step.name for step in self.stages]
        if not names:
            raise UserError("stages must name at least one step")
        if len(set(names)) < len(names):
            raise UserError(f"stages must have different names, not {', '.join(names)}")


def pipeline(config: PipelineConfig, workdir: str) -> None:
    """Runs the steps that are not done yet, and writes a report of them all.

    Stopped at any moment, it goes on when called again.

    Of several processes that run as one program (`find_place`), each runs the steps in which they
    work together; the others are the first one's alone, and the rest wait for them.

    Raises:
      UserError: a step's config or options do not fit (before the first one runs), or those of one
        that is done have changed.
      SystemExit: a step failed or was stopped; with its exit code.
    """
    folder = epath.Path(workdir)
    steps = [plan(step, workdir, config.home) for step in config.stages]
    place = find_place()
    records = Records(folder, primary=place is None or place.number == 0)
    for step in steps:
        records.check(step)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    children = Children()
    with children.handing_on():
        for step in config.stages:
            # Once more: a config file may have changed since, and what runs is what is recorded.
            _take(plan(step, workdir, config.home), records, children, console)
    if records.primary:
        console.print(_table(records.times([step.name for step in steps])), end="")
        console.print(f"report: {write_report(folder)}", markup=False)


# --- A step -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A step as it is run.

    Attributes:
      words: what follows ``instar`` on the command line.
      told: the resolved config, or the options.
      folder: its workdir; None for a command that has options.
      together: whether several processes take it as one program.
    """

    name: str
    command: str
    words: tuple[str, ...]
    told: dict[str, Any]
    folder: str | None
    together: bool


def plan(config: StepConfig, workdir: str, home: str | None = None) -> Step:
    """Reads and checks what a step is told; see `PipelineConfig` for `home`.

    Raises:
      UserError: it does not fit its command; the sentence names the step.
    """
    command = COMMANDS[config.command]
    try:
        if command.config is not None:
            folder, path = os.path.join(workdir, config.name), _filled(config.config, workdir)
            overrides = _dotted(_filled(config.overrides, workdir))
            schema = resolve(command.config)
            told = load(path, overrides, schema)
            if home is not None:
                overrides += _moved(schemas.to_dict(told), home, workdir)
                told = load(path, overrides, schema)
            words = ["--config", path, "--workdir", folder]
            words += [f"--config.{name}={text}" for name, text in overrides]
        else:
            folder, schema = None, resolve(command.options)
            words = _option_words(_filled(config.options, workdir), schema)
            told = from_words(words, schema)
    except UserError as error:
        raise UserError(f"step {config.name}: {error}") from None
    return Step(
        config.name,
        config.command,
        (config.command, *words),
        schemas.to_dict(told),
        folder,
        command.together,
    )


def _filled(value: Any, workdir: str) -> Any:
    """`value` with ``{workdir}`` replaced in all of its texts."""
    if isinstance(value, str):
        return value.replace("{workdir}", workdir)
    if isinstance(value, Mapping):
        return {key: _filled(item, workdir) for key, item in value.items()}
    return tuple(_filled(item, workdir) for item in value) if isinstance(value, tuple) else value


def _dotted(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The leaves of nested mappings as overrides: (dotted name, text)."""
    found = []
    for key, value in values.items():
        name = schemas.join(prefix, key)
        if isinstance(value, Mapping) and value:
            found += _dotted(value, name)
        else:
            found.append((name, _text(value)))
    return found


def _moved(value: Any, home: str, workdir: str, path: str = "") -> list[tuple[str, str]]:
    """The overrides that put `workdir` in the place of `home` where a text begins with it."""
    if isinstance(value, str):
        below = value == home or value.startswith(f"{home}/")
        return [(path, workdir + value.removeprefix(home))] if below else []
    pairs: Iterable = ()
    if isinstance(value, Mapping):
        pairs = value.items()
    elif isinstance(value, list | tuple):
        pairs = enumerate(value)
    return [
        moved
        for key, item in pairs
        for moved in _moved(item, home, workdir, schemas.join(path, key))
    ]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(schemas.jsonable(value))


def _option_words(options: Mapping[str, Any], schema: type) -> list[str]:
    """The options as words: one for each entry of a tuple, those that have no option last."""
    positional = positional_field(schema)
    words, others = [], []
    for name, value in options.items():
        values = [_text(item) for item in (value if isinstance(value, tuple) else (value,))]
        if name == positional:
            others = values
        else:
            words += [f"{flag(name)}={text}" for text in values]
    return [*words, *(["--", *others] if others else [])]


def _take(step: Step, records: "Records", children: Children, console: Console) -> None:
    """Runs one step to its end; raises SystemExit where that is not its own."""
    if records.done(step):
        if records.primary:
            console.print(f"{step.name}: done before ({_duration(records.seconds(step.name))})")
        return
    if not (records.primary or step.together):
        _wait(step, records, children)
        return
    if records.primary:
        console.print(f"{step.name}: instar {shlex.join(step.words)}", markup=False)
    records.start(step)
    code = children.run(step.words, records.tick, RECORD_SECONDS)
    records.end(code)
    if code:
        console.print(
            f"{step.name}: ended with exit code {code} after "
            f"{_duration(records.seconds(step.name))}; the same command goes on from here"
        )
        raise SystemExit(code)
    if records.primary:
        console.print(f"{step.name}: done in {_duration(records.seconds(step.name))}")


def _wait(step: Step, records: "Records", children: Children) -> None:
    """Returns when the first process is done with a step; ends with it where it fails."""
    under_way = False
    while not records.done(step):
        status = records.status(step.name)
        if children.signal is not None:
            raise SystemExit(128 + children.signal)
        if under_way and status != "running":
            raise SystemExit(1)
        under_way = under_way or status == "running"
        time.sleep(LOOK_SECONDS)


# --- What is done -------------------------------------------------------------------------------


class Records:
    """pipeline.json: of each step what it was told, its status, and its time over all starts.

    Args:
      primary: whether this process writes it; the others only read.
    """

    def __init__(self, workdir: epath.Path, primary: bool):
        self._workdir, self.primary = workdir, primary
        self._name, self._since, self._before = "", 0.0, 0.0

    def _read(self) -> dict[str, dict[str, Any]]:
        path = self._workdir / RECORD
        return read_json(path) if path.exists() else {}

    def _write(self, name: str, **values: Any) -> None:
        if not self.primary:
            return
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            records = self._read()
            write_json(self._workdir / RECORD, records | {name: records.get(name, {}) | values})
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(
                f"workdir {self._workdir} cannot be written ({reason}): choose another --workdir, "
                "or change its owner or mode"
            ) from None

    def check(self, step: Step) -> None:
        """Raises UserError where a step is done and was told something else."""
        if not self.done(step):
            return
        record = self._read()[step.name]
        if record["command"] != step.command:
            changed = f"command (was {record['command']!r}, is {step.command!r})"
        else:
            # Options have no sections, though one may be called as a section is.
            changeable = CHANGEABLE if step.folder is not None else ()
            changed = changes(record["told"], step.told, changeable)
        if changed:
            raise UserError(
                f"step {step.name} of {self._workdir} is done with another config: {changed}; "
                "choose a new --workdir, or undo the change"
            )

    def status(self, name: str) -> str | None:
        """ "running", "done", "failed" or "stopped"; None for a step that never began."""
        return self._read().get(name, {}).get("status")

    def done(self, step: Step) -> bool:
        """Whether a step need not be run: it is done, and its folder is still there."""
        there = step.folder is None or epath.Path(step.folder).exists()
        return there and self.status(step.name) == "done"

    def seconds(self, name: str) -> float:
        """What a step has taken so far, over all its starts."""
        return self._read().get(name, {}).get("seconds", 0.0)

    def times(self, names: list[str]) -> dict[str, float]:
        """The seconds of each of these steps."""
        return {name: self.seconds(name) for name in names}

    def start(self, step: Step) -> None:
        """Notes that a step begins, or begins again."""
        record = self._read().get(step.name, {})
        self._name, self._since = step.name, time.monotonic()
        self._before = record.get("seconds", 0.0)
        self._write(
            step.name,
            command=step.command,
            told=step.told,
            started=record.get("started", time.time()),
            starts=record.get("starts", 0) + 1,
            status="running",
        )

    def tick(self) -> None:
        """Notes the time of the step under way, lest a kill take it along."""
        self._write(self._name, seconds=round(self._before + time.monotonic() - self._since, 3))

    def end(self, code: int) -> None:
        """Notes how the step under way ended, by its exit code."""
        self.tick()
        stopped = code > 128 or code == RestartError.code
        self._write(self._name, status="done" if code == 0 else "stopped" if stopped else "failed")


def _table(times: Mapping[str, float]) -> str:
    rows = [*times.items(), ("together", sum(times.values()))]
    width = max(len(name) for name, _ in rows)
    return "".join(f"{name:{width}}  {_duration(seconds):>14}\n" for name, seconds in rows)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
