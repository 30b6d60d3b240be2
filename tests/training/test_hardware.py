"""Peaks: from the table for known chips, measured otherwise."""

import json
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from instar.training.hardware import CHIPS, describe_hardware, measure_matmul_peak, peak_of_devices


def devices(kind: str, count: int, platform: str = "gpu") -> list[SimpleNamespace]:
    """What `peak_of_devices` reads of a device, for kinds that this machine lacks."""
    return [SimpleNamespace(device_kind=kind, platform=platform, process_index=0)] * count


@pytest.mark.parametrize(
    ("kind", "count", "petaflops"),
    [
        ("NVIDIA H100 80GB HBM3", 8, 7.915),  # dense: the data sheet's 1,979 is with sparsity
        ("TPU v5 lite", 256, 50.43),
        ("TPU v4", 4096, 1126.4),  # a v4 pod: "1.1 exaflop/s"
        ("TPU v3", 8, 0.492),  # four chips, two devices each
        ("TPU7x", 8, 9.228),  # four chips, two devices each
    ],
)
def test_table_peak_is_of_all_devices_dense(kind: str, count: int, petaflops: float):
    peak = peak_of_devices(devices(kind, count))
    assert peak.flops == pytest.approx(petaflops * 1e15, rel=1e-3)
    assert not peak.measured and peak.dtype == "bfloat16"


def test_every_chip_is_one_that_could_exist():
    """Peaks and memories in FLOP/s and bytes: a slip of a unit is a factor of 1000."""
    for kind, chip in CHIPS.items():
        assert 4e13 <= chip.flops <= 5e15, kind
        assert 15e9 <= chip.memory <= 210e9, kind


def test_unknown_kind_is_measured_and_says_so():
    started = time.perf_counter()
    peak = peak_of_devices()
    assert time.perf_counter() - started < 5  # 0.8 s and a compilation or two, on a busy machine
    assert peak.measured and peak.dtype == "float32" and peak.device_kind == "cpu"
    assert peak.devices == jax.device_count()
    # An independent product must not beat it by more than noise, nor fall far below.
    x = jnp.ones((1024, 1024))
    product = jax.jit(jnp.matmul).lower(x, x).compile()
    durations = []
    for _ in range(5):
        started = time.perf_counter()
        product(x, x).block_until_ready()
        durations.append(time.perf_counter() - started)
    assert 0.3 < (2 * 1024**3 / min(durations)) / peak.flops < 3


def test_measurement_keeps_to_its_time():
    """A budget that is spent at once still yields a figure, from the smallest size."""
    assert measure_matmul_peak(seconds=0.0) > 1e8


def test_description_is_json_and_names_the_versions():
    facts = json.loads(json.dumps(describe_hardware()))
    assert facts["platform"] == "cpu" and facts["devices"] == jax.device_count()
    assert facts["versions"]["jax"] == jax.__version__
    assert facts["cpu_count"] >= 1 and facts["host_memory_bytes"] > 2**28
