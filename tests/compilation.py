"""How the tests and the processes that they start compile: fast, and what is new only.

Most of a test's time goes into compiling small programs that then run for milliseconds. Imported
before jax, which reads these variables when it makes its backend.
"""

import os
import pathlib

QUICK = "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"


def xla_flags(devices: int) -> str:
    """For a CPU that passes for so many devices."""
    return f"--xla_force_host_platform_device_count={devices} {QUICK}"


def share_what_is_compiled(folder: pathlib.Path) -> None:
    """Tests and their processes take from `folder` what another one compiled."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def keep_to_one_core() -> None:
    """For each worker of the suite: programs that both use all cores wait for one another."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker) % len(cores)]})
