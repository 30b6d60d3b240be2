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
from instar.errors import UserError
from instar.evaluation.report import write_report
from instar.sharding.places import find_place
from instar.stages.steps import (
    RECORD_SECONDS,
    Records,
    Step,
    dotted,
    duration,
    text_of,
    trained,
)

RECORD = "pipeline.json"
# How often a process looks for the first one's word.
LOOK_SECONDS = 1.0


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
    records = Records(folder / RECORD, primary=place is None or place.number == 0)
    for step in steps:
        records.check(step)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    children = Children()
    with children.handing_on():
        for step in config.stages:
            # Once more: a config file may have changed since, and what runs is what is recorded.
            _take(plan(step, workdir, config.home), records, children, console)
    if records.primary:
        console.print(_table({step.name: records.seconds(step.name) for step in steps}), end="")
        console.print(f"report: {write_report(folder)}", markup=False)


# --- A step -------------------------------------------------------------------------------------


def plan(config: StepConfig, workdir: str, home: str | None = None) -> Step:
    """Reads and checks what a step is told; see `PipelineConfig` for `home`.

    Raises:
      UserError: it does not fit its command; the sentence names the step.
    """
    command = COMMANDS[config.command]
    try:
        if command.config is None:
            words = _option_words(_filled(config.options, workdir), resolve(command.options))
            told = from_words(words, resolve(command.options))
            return Step(
                config.name,
                config.command,
                (config.command, *words),
                schemas.to_dict(told),
                folder=None,
                together=command.together,
            )
        folder, path = os.path.join(workdir, config.name), _filled(config.config, workdir)
        overrides = dotted(_filled(config.overrides, workdir))
        step = trained(config.name, config.command, path, folder, overrides)
        if home is None:
            return step
        overrides += _moved(step.told, home, workdir)
        return trained(config.name, config.command, path, folder, overrides)
    except UserError as error:
        raise UserError(f"step {config.name}: {error}") from None


def _filled(value: Any, workdir: str) -> Any:
    """`value` with ``{workdir}`` replaced in all of its texts."""
    if isinstance(value, str):
        return value.replace("{workdir}", workdir)
    if isinstance(value, Mapping):
        return {key: _filled(item, workdir) for key, item in value.items()}
    return tuple(_filled(item, workdir) for item in value) if isinstance(value, tuple) else value


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


def _option_words(options: Mapping[str, Any], schema: type) -> list[str]:
    """The options as words: one for each entry of a tuple, those that have no option last."""
    positional = positional_field(schema)
    words, others = [], []
    for name, value in options.items():
        values = [text_of(item) for item in (value if isinstance(value, tuple) else (value,))]
        if name == positional:
            others = values
        else:
            words += [f"{flag(name)}={text}" for text in values]
    return [*words, *(["--", *others] if others else [])]


def _take(step: Step, records: "Records", children: Children, console: Console) -> None:
    """Runs one step to its end; raises SystemExit where that is not its own."""
    if records.done(step):
        if records.primary:
            console.print(f"{step.name}: done before ({duration(records.seconds(step.name))})")
        return
    if not (records.primary or step.together):
        _wait(step, records, children)
        return
    if records.primary:
        console.print(f"{step.name}: instar {shlex.join(step.words)}", markup=False)
    running = records.start(step)
    code = children.run(step.words, running.tick, RECORD_SECONDS)
    running.end(code)
    if code:
        console.print(
            f"{step.name}: ended with exit code {code} after "
            f"{duration(records.seconds(step.name))}; the same command goes on from here"
        )
        raise SystemExit(code)
    if records.primary:
        console.print(f"{step.name}: done in {duration(records.seconds(step.name))}")


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


def _table(times: Mapping[str, float]) -> str:
    rows = [*times.items(), ("together", sum(times.values()))]
    width = max(len(name) for name, _ in rows)
    return "".join(f"{name:{width}}  {duration(seconds):>14}\n" for name, seconds in rows)
