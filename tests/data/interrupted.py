"""Prepares a data set again and again, each time in a process that dies at another moment.

    python interrupted.py FOLDER

FOLDER/config.json holds a `PrepareConfig`. For the n-th change that a preparation makes to files
(by Python: a file opened for writing, a rename, a new folder) a process is killed right before it,
in FOLDER/change-n; others are killed by the clock, in FOLDER/clock-n, wherever they are then. Each
is started a second time and must get to the end. The processes are forked, so that the imports are
paid for once; nothing of the project knows about this.
"""

import json
import os
import pathlib
import signal
import sys
import time
import traceback
from collections.abc import Callable

from instar.config import build
from instar.data.prepare import PrepareConfig, prepare

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}


def in_child(function: Callable[[], object]) -> int:
    """Runs `function` in a forked process; returns the signal that ended it, 0 for none."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    assert os.WEXITSTATUS(status) == 0, "a preparation failed"
    return 0


def kill_at_change(number: int, workdir: pathlib.Path) -> None:
    """Kills this process right before the `number`-th change below `workdir`."""
    left = number

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        writes = event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]
        if (writes or event in CHANGES) and str(workdir) in str(arguments[0]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main(folder: pathlib.Path) -> None:
    config = build(json.loads((folder / "config.json").read_text()), PrepareConfig)
    start = time.monotonic()
    in_child(lambda: prepare(config, folder / "whole"))
    seconds = time.monotonic() - start

    def try_twice(workdir: pathlib.Path, arm: Callable[[], object]) -> bool:
        """Whether the first try was killed."""

        def first_try() -> None:
            arm()
            prepare(config, workdir)

        killed = in_child(first_try) != 0
        assert not (killed and (workdir / "manifest.json").exists())
        in_child(lambda: prepare(config, workdir))
        return killed

    number = 1
    while True:
        workdir = folder / f"change-{number}"
        if not try_twice(workdir, lambda n=number, w=workdir: kill_at_change(n, w)):
            break
        number += 1
    for number in range(8):
        after = seconds * (number + 0.5) / 8
        workdir = folder / f"clock-{number}"
        try_twice(workdir, lambda t=after: signal.setitimer(signal.ITIMER_REAL, t))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
