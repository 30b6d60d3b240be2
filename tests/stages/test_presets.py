"""What the name of the hardware sets, and what it leaves to the config and to the user."""

import math
import os
import pathlib
import subprocess
import sys

import pytest

from instar import cli
from instar.config import build, to_dict
from instar.errors import UserError
from instar.sharding.flags import FLAGS, set_flags
from instar.sharding.mesh import MeshConfig
from instar.stages.config import RunConfig
from instar.stages.presets import PRESETS

STARTS = """
import instar.stages.pretrain, instar.stages.ppo, jax
from instar.stages.presets import start_hardware
start_hardware("h100-8")
print(jax.device_count())
"""


def config(**values: object) -> RunConfig:
    return build({"batch": {"size": 256}, "steps": 1, **values}, RunConfig)


@pytest.mark.parametrize("name", PRESETS)
def test_each_is_of_the_size_that_its_name_says(name):
    found = config(hardware=name, batch={"size": 512})
    kind, _, count = name.partition("-")
    halved = kind in ("v4", "v5p")  # two cores to a device
    expected = -1 if name == "cpu" else int(count) // (2 if halved else 1)
    assert math.prod(to_dict(found.mesh).values()) == expected
    assert (found.batch.microbatch or 0) % expected == 0


def test_the_config_has_the_last_word():
    plain = config(hardware="h100-8")
    assert plain.mesh == MeshConfig(fsdp=8) and plain.compute_dtype == "bfloat16"
    assert plain.execution.remat == "attention" and plain.batch.microbatch == 8
    changed = config(
        hardware="h100-8",
        mesh={"fsdp": 4, "tensor": 2},
        batch={"size": 256, "microbatch": None},
        execution={"unroll": 2},
        compute_dtype="float32",
    )
    assert changed.mesh == MeshConfig(fsdp=4, tensor=2) and changed.compute_dtype == "float32"
    assert changed.batch.microbatch is None
    assert changed.execution.remat == "attention" and changed.execution.unroll == 2
    assert build(to_dict(changed), RunConfig) == changed


def test_a_name_that_is_not_there():
    with pytest.raises(UserError, match="none named 'h100-08'; did you mean 'h100-8'"):
        config(hardware="h100-08")
    with pytest.raises(UserError, match="hardware: expected str or None, got 8"):
        config(hardware=8)


def test_what_the_user_set_stays():
    name = FLAGS["gpu"][0].name
    environment = {"XLA_FLAGS": f"--{name}=false --xla_other=3"}
    set_flags("gpu", environment)
    words = environment["XLA_FLAGS"].split()
    assert f"--{name}=false" in words and f"--{name}=true" not in words and "--xla_other=3" in words
    assert len(words) == len(FLAGS["gpu"]) + 1
    set_flags("gpu", environment)
    assert environment["XLA_FLAGS"].split() == words
    set_flags("cpu", environment)
    assert environment["XLA_FLAGS"].split() == words
    set_flags("tpu", environment)
    assert environment["XLA_FLAGS"].split() == words
    assert len(environment["LIBTPU_INIT_ARGS"].split()) == len(FLAGS["tpu"])


def test_the_command_sets_them_before_it_runs(monkeypatch):
    seen = []

    def run(config: RunConfig, workdir: str) -> None:
        seen.append((config.mesh, os.environ["XLA_FLAGS"]))

    monkeypatch.setattr("instar.stages.pretrain.pretrain", run)
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    file = pathlib.Path(__file__).parents[2] / "configs/pretrain/quickstart.py"
    words = ["pretrain", f"--config={file}", "--workdir=there", "--config.hardware=h100-8"]
    assert cli.main(words) == 0
    ((mesh, flags),) = seen
    assert mesh == MeshConfig(fsdp=8) and FLAGS["gpu"][0].name in flags


def test_this_xla_knows_the_flags_and_reads_them_late():
    """It would end the process at one that it does not know. Importing the stages starts no JAX."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    run = subprocess.run(
        [sys.executable, "-c", STARTS], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0 and run.stdout.strip() == "3", run.stderr
