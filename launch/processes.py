"""Runs a command as several processes of one program on this machine, and again where that helps.

    python launch/processes.py PROCESSES RESTARTS COMMAND [ARGUMENT ...]

`launch/local.sh --processes N --restarts M COMMAND` is this, inside the environment. The processes
find one another by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; GPUs, where there
are some, are shared out evenly. What process 2 prints gets "[2] " before each line. SIGTERM and a
first Ctrl-C ask all of them to save and stop, a second Ctrl-C ends them.

The exit code is that of the first process that failed. Where a process was killed or another one
missed it (75, 134, 137; see README.md), all are started again, at most RESTARTS times. A single
process is left to find the others, on other machines, by itself.
"""

import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import BinaryIO

# 75: another process is missing, gone or hangs. 134 and 137: ended by SIGABRT, by SIGKILL.
RESTART_CODES = (75, 134, 137)
# Seconds that the others get to end by themselves when one has failed.
GRACE = 60.0


def main() -> int:
    """Runs what the command line says and returns the exit code."""
    processes, restarts, *command = sys.argv[1:]
    group = Group(int(processes), command)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, group.stop)
    for left in range(int(restarts), -1, -1):
        code = group.run()
        if code not in RESTART_CODES or group.stopping or not left:
            break
        print(f"launch: ended with exit code {code}; started again", file=sys.stderr)
    return code


class Group:
    """The processes of a command.

    Attributes:
      stopping: whether somebody asked for their end.
    """

    def __init__(self, count: int, command: Sequence[str]):
        self._count, self._command = count, command
        self._running: list[subprocess.Popen] = []
        self.stopping = False

    def run(self) -> int:
        """Starts all of them and returns when the last has ended."""
        if self._count == 1:
            self._running = [self._start({}, None)]
            return self._wait()
        address = f"127.0.0.1:{free_port()}"
        several = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(self._count)}
        self._running = [
            self._start(
                several | {"JAX_PROCESS_ID": str(number)} | share_of_gpus(number, self._count),
                subprocess.PIPE,
            )
            for number in range(self._count)
        ]
        readers = [
            threading.Thread(target=pass_on, args=(f"[{number}] ".encode(), stream, out))
            for number, process in enumerate(self._running)
            for stream, out in (
                (process.stdout, sys.stdout.buffer),
                (process.stderr, sys.stderr.buffer),
            )
        ]
        for reader in readers:
            reader.start()
        code = self._wait()
        for reader in readers:
            reader.join()
        return code

    def stop(self, number: int, _: FrameType | None) -> None:
        """A signal: all are to save and stop; at the second Ctrl-C, to end."""
        now = self.stopping and number == signal.SIGINT
        self.stopping = True
        self._signal(signal.SIGKILL if now else signal.SIGTERM)

    def _start(self, variables: dict[str, str], out: int | None) -> subprocess.Popen:
        # In a group of its own, so that Ctrl-C in a terminal reaches it by way of here.
        return subprocess.Popen(
            self._command,
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            process_group=0,
        )

    def _wait(self) -> int:
        """Waits for all, and returns the code of the first that failed, as a shell reports it."""
        ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        for process in self._running:
            threading.Thread(target=lambda process=process: ended.put(process.wait())).start()
        first, left = 0, len(self._running)
        while left:
            try:
                code = ended.get(timeout=GRACE if first else None)
            except queue.Empty:
                self._signal(signal.SIGKILL)
                continue
            first, left = first or (code if code >= 0 else 128 - code), left - 1
        return first

    def _signal(self, number: int) -> None:
        for process in self._running:
            if process.poll() is None:
                process.send_signal(number)


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def share_of_gpus(number: int, count: int) -> dict[str, str]:
    """The variable that shows a process its share of this machine's GPUs; {} where it has none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        if shutil.which("nvidia-smi") is None:
            return {}
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        visible = ",".join(str(index) for index, _ in enumerate(listed.stdout.splitlines()))
    gpus = [gpu for gpu in visible.split(",") if gpu]
    if not gpus:
        return {}
    if len(gpus) % count:
        sys.exit(f"launch: error: {len(gpus)} GPUs cannot be shared by {count} processes evenly")
    each = len(gpus) // count
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[number * each : (number + 1) * each])}


def pass_on(mark: bytes, stream: BinaryIO, out: BinaryIO) -> None:
    """Copies lines to `out`, each behind `mark`."""
    for line in stream:
        out.write(mark + line)
        out.flush()


if __name__ == "__main__":
    sys.exit(main())
