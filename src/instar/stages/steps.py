"""Commands as they are run in processes of their own, and the record of what is done.

`instar pipeline` and `instar sweep` share it.
"""

import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from instar import schema as schemas
from instar.commands import COMMANDS, resolve
from instar.config import load
from instar.errors import RestartError, UserError
from instar.workdir import CHANGEABLE, changes, completed, read_json, write_json

# How often a step under way writes down its time.
RECORD_SECONDS = 30.0


@dataclass(frozen=True)
class Step:
    """A command as it is run.

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

    @property
    def schema(self) -> type:
        """That of the config, or of the options."""
        command = COMMANDS[self.command]
        return resolve(command.options if command.config is None else command.config)


def trained(
    name: str, command: str, path: str, folder: str, overrides: Sequence[tuple[str, str]]
) -> Step:
    """A command that takes a config file, changed by `overrides`, and a workdir.

    Raises:
      UserError: they do not fit the command.
    """
    told = load(path, overrides, resolve(COMMANDS[command].config))
    words = [command, "--config", path, "--workdir", folder]
    words += [f"--config.{key}={text}" for key, text in overrides]
    return Step(
        name, command, tuple(words), schemas.to_dict(told), folder, COMMANDS[command].together
    )


def dotted(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The leaves of nested mappings as overrides: (dotted name, text)."""
    found = []
    for key, value in values.items():
        name = schemas.join(prefix, key)
        if isinstance(value, Mapping) and value:
            found += dotted(value, name)
        else:
            found.append((name, text_of(value)))
    return found


def text_of(value: Any) -> str:
    """A value as it is typed behind an option."""
    return value if isinstance(value, str) else repr(schemas.jsonable(value))


class Records:
    """A JSON file with, of each step, what it was told, its status, and its time over all starts.

    Threads may share it.

    Args:
      primary: whether this process writes it; the others only read.
    """

    def __init__(self, path: epath.Path, primary: bool = True):
        self._path, self.primary = path, primary
        self._lock = threading.Lock()

    @property
    def folder(self) -> epath.Path:
        """Where the file lies."""
        return self._path.parent

    def read(self) -> dict[str, dict[str, Any]]:
        """What is known of each step that ever began or was noted, by name."""
        return read_json(self._path) if self._path.exists() else {}

    def note(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        """Adds to what is known of the steps of these names. Raises UserError."""
        if not self.primary:
            return
        try:
            with self._lock:
                self.folder.mkdir(parents=True, exist_ok=True)
                known = self.read()
                changed = {name: known.get(name, {}) | new for name, new in entries.items()}
                write_json(self._path, known | changed)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(
                f"workdir {self.folder} cannot be written ({reason}): choose another --workdir, "
                "or change its owner or mode"
            ) from None

    def changed(self, step: Step, record: Mapping[str, Any]) -> str:
        """In what a step differs from its record, in words; "" where nothing that counts does."""
        if record["command"] != step.command:
            return f"command (was {record['command']!r}, is {step.command!r})"
        # Options have no sections, though one may be called as a section is.
        changeable: Collection[str] = CHANGEABLE if step.folder is not None else ()
        return changes(completed(record["told"], step.schema), step.told, changeable)

    def check(self, step: Step) -> None:
        """Raises UserError where a step is done and was told something else."""
        if not self.done(step):
            return
        if changed := self.changed(step, self.read()[step.name]):
            raise UserError(
                f"step {step.name} of {self.folder} is done with another config: {changed}; "
                "choose a new --workdir, or undo the change"
            )

    def status(self, name: str) -> str | None:
        """ "running", "done", "failed" or "stopped"; None for a step that never began."""
        return self.read().get(name, {}).get("status")

    def done(self, step: Step) -> bool:
        """Whether a step need not be run: it is done, and its folder is still there."""
        there = step.folder is None or epath.Path(step.folder).exists()
        return there and self.status(step.name) == "done"

    def seconds(self, name: str) -> float:
        """What a step has taken so far, over all its starts."""
        return self.read().get(name, {}).get("seconds", 0.0)

    def start(self, step: Step) -> "Running":
        """Notes that a step begins, or begins again."""
        record = self.read().get(step.name, {})
        entry = {
            "command": step.command,
            "told": step.told,
            "started": record.get("started", time.time()),
            "starts": record.get("starts", 0) + 1,
            "status": "running",
        }
        self.note({step.name: entry})
        return Running(self, step.name, record.get("seconds", 0.0))


class Running:
    """A step under way, whose time is kept.

    Args:
      before: seconds that its earlier starts took.
    """

    def __init__(self, records: Records, name: str, before: float):
        self._records, self._name, self._before = records, name, before
        self._since = time.monotonic()

    def tick(self) -> None:
        """Notes the time so far, lest a kill take it along."""
        self._note()

    def end(self, code: int, **entry: Any) -> None:
        """Notes how the step ended, by its exit code, and what else there is to say of it."""
        stopped = code > 128 or code == RestartError.code
        status = "done" if code == 0 else "stopped" if stopped else "failed"
        self._note(status=status, **entry)

    def _note(self, **entry: Any) -> None:
        seconds = round(self._before + time.monotonic() - self._since, 3)
        self._records.note({self._name: {"seconds": seconds, **entry}})


def duration(seconds: float) -> str:
    """9.1 s, 4 min 12 s, 3 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
