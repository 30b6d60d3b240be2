"""Runs the command line in a process that kills itself, with SIGKILL, at a named point of a run.

    python dying.py POINT NUMBER COMMAND [ARGUMENTS ...]

kills at the NUMBER-th time that POINT is reached. Nothing of the project knows about this: the
points are wrapped from outside, and a point that is never reached leaves the run alive, which the
tests take for a failure.
"""

import os
import pathlib
import signal
import sys

from orbax.checkpoint._src.handlers import json_checkpoint_handler
from orbax.checkpoint._src.path import atomicity, deleter
from orbax.checkpoint._src.serialization import serialization

from instar import cli
from instar.training import loop


class Countdown:
    """Kills the process at the n-th call."""

    def __init__(self, number: int):
        self.left = number

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def in_a_step(reached: Countdown) -> None:
    """After a step was given to the device, before its metrics are back."""
    original = loop.MetricsQueue.put

    def put(self, step, metrics):
        reached()
        original(self, step, metrics)

    loop.MetricsQueue.put = put


def while_arrays_are_written(reached: Countdown) -> None:
    """After some arrays of a checkpoint are on disk, before the rest."""
    original = serialization.async_serialize_from_host

    async def serialize(*args, **kwargs):
        await original(*args, **kwargs)
        reached()

    serialization.async_serialize_from_host = serialize


def while_the_input_position_is_written(reached: Countdown) -> None:
    """With half of input.json on disk."""
    original = json_checkpoint_handler.JsonCheckpointHandler._save_fn

    async def save(self, item, directory):
        if self._filename == "input.json":
            pathlib.Path(directory / self._filename).write_text('{"ro')
            reached()
        await original(self, item, directory)

    json_checkpoint_handler.JsonCheckpointHandler._save_fn = save


def _around_the_commit(reached: Countdown, *, after: bool) -> None:
    original = atomicity.AtomicRenameTemporaryPath.finalize

    async def finalize(self):
        whole = self._final_path.name.isdigit()
        if whole and not after:
            reached()
        await original(self)
        if whole and after:
            reached()

    atomicity.AtomicRenameTemporaryPath.finalize = finalize


def before_the_commit(reached: Countdown) -> None:
    """With every file of a checkpoint on disk, under its temporary name."""
    _around_the_commit(reached, after=False)


def after_the_commit(reached: Countdown) -> None:
    """With the checkpoint renamed, and nothing done after that."""
    _around_the_commit(reached, after=True)


def before_the_deletion(reached: Countdown) -> None:
    """When the first checkpoint that is no longer needed is about to be deleted."""
    for kind in (deleter.StandardCheckpointDeleter, deleter.ThreadedCheckpointDeleter):
        for name in ("delete", "delete_steps"):
            original = getattr(kind, name)

            def delete(self, argument, original=original):
                if argument != []:
                    reached()
                original(self, argument)

            setattr(kind, name, delete)


POINTS = {
    function.__name__: function
    for function in (
        in_a_step,
        while_arrays_are_written,
        while_the_input_position_is_written,
        before_the_commit,
        after_the_commit,
        before_the_deletion,
    )
}

if __name__ == "__main__":
    point, number, *arguments = sys.argv[1:]
    POINTS[point](Countdown(int(number)))
    sys.exit(cli.main(arguments))
