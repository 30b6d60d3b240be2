"""Programs that take turns, each in a process of its own that waits in between."""

import json
import os
import pathlib
import subprocess
import sys

MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "1000000000000",
}


class Worker:
    """A process of `script`, told its `job` and then, order by order, what to do.

    It answers each with a line of JSON, the first of which holds what it has `ready`.
    """

    def __init__(self, script: str, job: dict):
        path = pathlib.Path(__file__).parent / script
        self._process = subprocess.Popen(
            [sys.executable, str(path), json.dumps(job)],
            env=os.environ
            | MEMORY
            | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(job["threads"])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.ready = self._answer()["ready"]

    def ask(self, **order: object) -> dict:
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"a worker ended with code {self._process.wait()}: run it by hand to see why")
        return json.loads(line)
