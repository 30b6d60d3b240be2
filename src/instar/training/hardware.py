"""What a run runs on: peaks of known chips, a measured peak for the others, and a description."""

import functools
import importlib.metadata
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

_GB, _GIB = 10**9, 2**30


@dataclass(frozen=True)
class Chip:
    """What a chip's maker promises.

    Attributes:
      flops: dense (not 2:4 sparse) bf16 FLOP/s of matrix products, accumulated in float32.
      memory: bytes of its HBM or GDDR.
      devices: how many JAX devices it shows itself as; both figures are of the whole chip.
    """

    flops: float
    memory: int
    devices: int = 1


# By `jax.Device.device_kind`. NVIDIA's data sheets print most tensor figures with sparsity: half of
# that is meant here. GPUs of one kind but another memory size have the same peak.
CHIPS: dict[str, Chip] = {
    # NVIDIA V100 data sheet (2020): 125 (SXM2) and 112 (PCIe) TFLOP/s in fp16; it has no bf16.
    "Tesla V100-SXM2-16GB": Chip(125e12, 16 * _GIB),
    "Tesla V100-SXM2-32GB": Chip(125e12, 32 * _GIB),
    "Tesla V100-SXM3-32GB": Chip(125e12, 32 * _GIB),
    "Tesla V100-PCIE-16GB": Chip(112e12, 16 * _GIB),
    "Tesla V100-PCIE-32GB": Chip(112e12, 32 * _GIB),
    # NVIDIA A100 data sheet (2021): 312 TFLOP/s, 624 with sparsity.
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40 * _GIB),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80 * _GIB),
    "NVIDIA A100-PCIE-40GB": Chip(312e12, 40 * _GIB),
    "NVIDIA A100 80GB PCIe": Chip(312e12, 80 * _GIB),
    # NVIDIA A10 data sheet (2021): 125 TFLOP/s, 250 with sparsity; A10G (AWS g5): 70 and 140.
    "NVIDIA A10": Chip(125e12, 24 * _GIB),
    "NVIDIA A10G": Chip(70e12, 24 * _GIB),
    # NVIDIA L4 data sheet (2023): 242 TFLOP/s with sparsity.
    "NVIDIA L4": Chip(121e12, 24 * _GIB),
    # NVIDIA Ada architecture white paper (2022), appendix A: 165.2 with float32 accumulation.
    "NVIDIA GeForce RTX 4090": Chip(165.2e12, 24 * _GIB),
    # NVIDIA H100 data sheet (2023), with sparsity: SXM 1,979, PCIe 1,513, NVL 1,671 TFLOP/s.
    "NVIDIA H100 80GB HBM3": Chip(989.4e12, 80 * _GIB),
    "NVIDIA H100 PCIe": Chip(756e12, 80 * _GIB),
    "NVIDIA H100 NVL": Chip(835e12, 94 * _GIB),
    # NVIDIA H200 data sheet (2024), with sparsity: SXM 1,979, NVL 1,671 TFLOP/s.
    "NVIDIA H200": Chip(989.4e12, 141 * _GB),
    "NVIDIA H200 NVL": Chip(835e12, 141 * _GB),
    # NVIDIA GH200 data sheet (2023): the H100 SXM's tensor cores, 96 GB.
    "NVIDIA GH200 480GB": Chip(989.4e12, 96 * _GB),
    # NVIDIA HGX B200 (Blackwell architecture brief, 2024): 4.5 PFLOP/s with sparsity; DGX B200 data
    # sheet: 1,440 GB on 8.
    "NVIDIA B200": Chip(2.25e15, 180 * _GB),
    # AMD Instinct MI300X data sheet (2023): 1,307.4 TFLOP/s without sparsity.
    "AMD Instinct MI300X": Chip(1307.4e12, 192 * _GB),
    # Cloud TPU documentation, "System architecture", one page for each generation. v2, v3 and 7x
    # show each of their two TensorCores as a device of its own.
    "TPU v2": Chip(46e12, 16 * _GIB, devices=2),
    "TPU v3": Chip(123e12, 32 * _GIB, devices=2),
    "TPU v4": Chip(275e12, 32 * _GIB),
    "TPU v5 lite": Chip(197e12, 16 * _GIB),
    "TPU v5e": Chip(197e12, 16 * _GIB),
    "TPU v5": Chip(459e12, 95 * _GIB),
    "TPU v5p": Chip(459e12, 95 * _GIB),
    "TPU v6 lite": Chip(918e12, 32 * _GIB),
    "TPU v6e": Chip(918e12, 32 * _GIB),
    "TPU7x": Chip(2307e12, 192 * _GIB, devices=2),
}

_PACKAGES = ("instar", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclass(frozen=True)
class Peak:
    """The matrix-product FLOP/s that a run's MFU is a share of.

    Attributes:
      flops: FLOP/s of all devices of the run together.
      source: "table": a chip's dense bf16 peak. "measured": what a matrix product reached at start
        in `dtype`, which is lower than a maker's figure, so that MFU comes out higher.
      dtype: the type that the figure holds for.
      device_kind: as JAX prints it.
      devices: how many JAX devices `flops` is the sum of.
    """

    flops: float
    source: Literal["table", "measured"]
    dtype: str
    device_kind: str
    devices: int

    @property
    def measured(self) -> bool:
        return self.source == "measured"


def peak_of_devices(devices: Sequence[jax.Device] | None = None) -> Peak:
    """The peak of `devices` (all of the run's by default), from the table or else measured.

    Where it must be measured, this process measures one of its own devices; the devices of a
    CPU share its cores, so that the figure is that of a process and not of a device.
    """
    devices = list(devices or jax.devices())
    kind = devices[0].device_kind
    chip = CHIPS.get(kind)
    if chip is not None:
        flops = chip.flops / chip.devices * len(devices)
        return Peak(flops, "table", "bfloat16", kind, len(devices))
    dtype = jnp.float32 if devices[0].platform == "cpu" else jnp.bfloat16
    own = [device for device in devices if device.process_index == jax.process_index()]
    measured = measure_matmul_peak(dtype, device=own[0])
    sharers = {d.process_index for d in devices} if devices[0].platform == "cpu" else devices
    return Peak(measured * len(sharers), "measured", jnp.dtype(dtype).name, kind, len(devices))


def measure_matmul_peak(
    dtype: jnp.dtype = jnp.float32, *, device: jax.Device | None = None, seconds: float = 0.8
) -> float:
    """FLOP/s of the fastest square matrix product on one device.

    Sizes double from 512 while they fit into `seconds`, which bounds the whole measurement; each
    runs several times, and the best run of the best size counts.
    """
    device = device or jax.local_devices()[0]
    started = time.perf_counter()
    best, size = 0.0, 512
    while True:
        duration = _time_matmul(size, dtype, device, until=started + seconds)
        best = max(best, 2 * size**3 / duration)
        size *= 2
        # The next size costs eight times as much, and runs at least three times, once to warm up.
        if time.perf_counter() - started + 3 * 8 * duration > seconds or size > 16384:
            return best


def _time_matmul(size: int, dtype: jnp.dtype, device: jax.Device, until: float) -> float:
    """Seconds of the fastest of 2 to 8 products, stopping at the time `until`."""
    with jax.default_device(device):
        # Ordinary values: chips clock higher on constants.
        values = jnp.cos(jnp.arange(size * size, dtype=jnp.float32))
        x = values.reshape(size, size).astype(dtype)
        product = jax.jit(functools.partial(jnp.matmul, precision="default"))
        product(x, x).block_until_ready()
        best = float("inf")
        for repeat in range(8):
            if repeat >= 2 and time.perf_counter() > until:
                break
            started = time.perf_counter()
            product(x, x).block_until_ready()
            best = min(best, time.perf_counter() - started)
    return best


def describe_hardware() -> dict[str, Any]:
    """The machine and the versions as JSON-ready facts; names no host and no user."""
    device = jax.devices()[0]
    chip = CHIPS.get(device.device_kind)
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "local_devices": jax.local_device_count(),
        "processes": jax.process_count(),
        "device_memory_bytes": chip.memory // chip.devices if chip else None,
        "cpu": _cpu_model(),
        "cpu_count": _usable_cpus(),
        "host_memory_bytes": _host_memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _usable_cpus() -> int:
    """The cores that this process may use, which a container can make fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _host_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
