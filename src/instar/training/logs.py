"""Logs of JSON lines that survive kills and resumes, on disks and in object stores.

JSON has no name for numbers that are not finite, so they are written as the strings "nan", "inf"
and "-inf", which Python's `float` turns back.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from instar.errors import RunError
from instar.workdir import json_ready


def read_records(path: epath.Path) -> list[dict[str, Any]]:
    """The whole JSON objects of a log whose last line may be torn; [] where there is no file."""
    return [record for _, record in _records(path)] if path.exists() else []


class AppendLog:
    """JSON lines at the end of a local file, each handed to the operating system at once."""

    def __init__(self, path: epath.Path, resume_step: int):
        self._path = path
        _truncate(path, resume_step)
        self._file = path.open("a")

    def add(self, record: Mapping[str, Any]) -> None:
        with _disk_errors(self._path):
            self._file.write(_encode(record))
            self._file.flush()

    def flush(self) -> None:
        """Nothing waits here."""

    def close(self) -> None:
        with _disk_errors(self._path):
            self._file.close()


class RewriteLog:
    """JSON lines in a store that can only replace whole files.

    The lines are kept in memory, and the file is rewritten at most every `interval` seconds, or
    less often where that would take more than a twentieth of the time.
    """

    def __init__(
        self,
        path: epath.Path,
        resume_step: int,
        *,
        interval: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._path, self._clock = path, clock
        self._lines = list(_kept(path, resume_step)) if path.exists() else []
        self._interval, self._pending = interval, True
        self.flush()

    def add(self, record: Mapping[str, Any]) -> None:
        self._lines.append(_encode(record))
        self._pending = True
        if self._clock() >= self._due:
            self.flush()

    def flush(self) -> None:
        started = self._clock()
        if self._pending:
            with _disk_errors(self._path):
                self._path.write_text("".join(self._lines))
        self._pending = False
        took = self._clock() - started
        self._due = started + max(self._interval, 20 * took)

    def close(self) -> None:
        self.flush()


def open_log(path: epath.Path, resume_step: int) -> AppendLog | RewriteLog:
    """The log at `path`, without its lines after `resume_step`."""
    remote = "://" in os.fspath(path)
    return RewriteLog(path, resume_step) if remote else AppendLog(path, resume_step)


def _encode(record: Mapping[str, Any]) -> str:
    text = json.dumps(json_ready(record, instead=str), ensure_ascii=False, allow_nan=False)
    # Half a surrogate pair, which UTF-8 refuses, becomes its JSON escape.
    return text.encode("utf-8", "backslashreplace").decode() + "\n"


def _records(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(line, object) for each line that is a whole JSON object."""
    with path.open("rb") as file:
        for raw in file:
            # A kill can tear the last line anywhere, inside a character too.
            with contextlib.suppress(ValueError):
                line = raw.decode()
                record = json.loads(line)
                if isinstance(record, dict):
                    yield line.rstrip("\n") + "\n", record


def _kept(path: epath.Path, resume_step: int) -> Iterator[str]:
    """The lines that a run resumed at `resume_step` will not write again."""
    if resume_step > 0:
        for line, record in _records(path):
            if record.get("step", 0) <= resume_step:
                yield line


def _truncate(path: epath.Path, resume_step: int) -> None:
    """Rewrites a local log without what comes after `resume_step`, by way of a rename."""
    if not path.exists():
        return
    partial = path.parent / f"{path.name}.partial"
    with partial.open("w") as file:
        file.writelines(_kept(path, resume_step))
    partial.replace(path)


@contextlib.contextmanager
def _disk_errors(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror or error})") from None
