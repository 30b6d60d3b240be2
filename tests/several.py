"""Several processes that run as one program."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from compilation import xla_flags


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_pair(*words: object, env: dict[str, str] | None = None) -> list[tuple[int, str]]:
    """Runs `python WORDS` as two processes; returns the exit code and the output of each."""
    return run_several(range(2), *words, env=env)


def run_several(
    numbers: Sequence[int],
    *words: object,
    env: dict[str, str] | None = None,
    count: int | None = None,
) -> list[tuple[int, str]]:
    """Runs `python WORDS` as the processes `numbers` of `count`, which are all where it is None."""
    shared = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(1),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": str(count or len(numbers)),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, words)],
            env=shared | (env or {}) | {"JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in numbers
    ]
    try:
        # All at once: one whose output nobody reads waits, and the others for it.
        with ThreadPoolExecutor(len(processes)) as readers:
            read = readers.map(lambda process: process.communicate(timeout=900)[0], processes)
            outputs = list(read)
        return [(process.returncode, out) for process, out in zip(processes, outputs, strict=True)]
    finally:
        for process in processes:
            process.kill()
