"""Runs the command line as one of several processes, and writes down which rows it reads.

    python one_of_several.py STREAM FATE COMMAND [ARGUMENTS ...]

STREAM is a folder, in which PROCESS.txt gets a line for each row: its number in the run and a hash
of what is in it. FATE is `lives`, or what becomes of one process: `2:killed:6:4` kills process 2
with SIGKILL when it has given the sixth step of this start to its device and the checkpoint of step
4 is there, and `1:hangs:3` makes process 1 wait for ever before it reads the rows of the third.
"""

import hashlib
import os
import pathlib
import signal
import sys
import time

import numpy as np

from instar import cli
from instar.stages import language
from instar.training import loop


def hash_of(row: dict[str, np.ndarray]) -> str:
    """Of all arrays of a row, so that it stands for its content."""
    parts = [name.encode() + row[name].tobytes() for name in sorted(row)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def record_rows(folder: pathlib.Path, process: str) -> None:
    """Writes down each row when its step takes it."""
    folder.mkdir(exist_ok=True)
    file = (folder / f"{process}.txt").open("w")
    original = language.batches

    def batches(rows, counts, row, offsets, config):
        for batch, count, next_row in original(rows, counts, row, offsets, config):
            for index, offset in enumerate(offsets(count)):
                content = {name: values[index] for name, values in batch.items()}
                file.write(f"{next_row - count + offset} {hash_of(content)}\n")
            file.flush()
            yield batch, count, next_row

    language.batches = batches


def meet(what: str, number: int, checkpoint: pathlib.Path | None) -> None:
    """Lets this process be killed, or hang, at the step `number` of this start."""
    steps = 0

    def killed(self, step, metrics, original=loop.MetricsQueue.put):
        nonlocal steps
        steps += 1
        if steps == number:
            while not checkpoint.exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, step, metrics)

    def hangs(*args, original=language.batches):
        for index, found in enumerate(original(*args), 1):
            while index == number:
                time.sleep(1)
            yield found

    if what == "killed":
        loop.MetricsQueue.put = killed
    else:
        language.batches = hangs


if __name__ == "__main__":
    stream, fate, *arguments = sys.argv[1:]
    process = os.environ.get("JAX_PROCESS_ID", "0")
    record_rows(pathlib.Path(stream), process)
    if fate.startswith(f"{process}:"):
        _, what, number, *saved = fate.split(":")
        workdir = pathlib.Path(arguments[arguments.index("--workdir") + 1])
        meet(what, int(number), workdir / "checkpoints" / saved[0] if saved else None)
    sys.exit(cli.main(arguments))
