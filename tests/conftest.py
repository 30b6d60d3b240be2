"""What every test runs under: the CPU as eight devices, and Hypothesis without the clock."""

import os

# Before anything imports jax, which reads both when it makes its backend.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

from hypothesis import settings  # noqa: E402

# A shared machine pauses now and then; what a test checks does not depend on how long it takes.
settings.register_profile("instar", deadline=None)
settings.load_profile("instar")
