"""Which of how many processes this is, by the variables that each scheduler sets."""

import os

import pytest
from jax._src.clusters import cloud_tpu_cluster

from instar.errors import UserError
from instar.sharding.places import VARIABLES, Place, find_place

SLURM = {
    "SLURM_JOB_ID": "4096",
    "SLURM_STEP_NODELIST": "node[007-008],other",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
SHARED = SLURM | {"SLURM_STEP_NUM_TASKS": "6", "SLURM_NTASKS": "6", "SLURM_LOCALID": "1"}
TPU = {
    "TPU_WORKER_HOSTNAMES": "a,b",
    "TPU_WORKER_ID": "1",
    "TPU_SKIP_MDS_QUERY": "true",
    "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}


@pytest.fixture
def variables(monkeypatch):
    """Sets variables in an environment that names no scheduler."""
    schedulers = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_", "JAX_", "CUDA_")
    for name in [name for name in os.environ if name.startswith(schedulers)]:
        if name != "JAX_PLATFORMS":
            monkeypatch.delenv(name)

    def fill(values: dict[str, str]) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return fill


@pytest.mark.parametrize(
    ("values", "devices"),
    [
        pytest.param(SLURM, None, id="one task on each node takes all of its devices"),
        pytest.param(SHARED, (1,), id="of several on a node each takes one"),
        pytest.param(SHARED | {"CUDA_VISIBLE_DEVICES": "0,1"}, (1,), id="of those it sees"),
        pytest.param(SHARED | {"CUDA_VISIBLE_DEVICES": "1"}, None, id="the one that it sees"),
        pytest.param(SHARED | {"JAX_LOCAL_DEVICE_IDS": "3"}, None, id="those that it is told"),
    ],
)
def test_slurm(values, devices, variables):
    variables(values)
    assert find_place() == Place("Slurm", "node007:61440", int(values["SLURM_NTASKS"]), 2, devices)


def test_a_tpu_slice_of_kubernetes(variables, monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    variables(TPU)
    assert find_place(1) == Place("Google Kubernetes Engine (TPU)", "127.0.0.1:8482", 4, 3)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({}, id="no scheduler"),
        pytest.param(
            SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"},
            id="a shell in an allocation of three",
        ),
        pytest.param(
            {k: v for k, v in SLURM.items() if "STEP" not in k}, id="a script without srun"
        ),
        pytest.param({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, id="a pod by itself"),
        pytest.param(dict(zip(VARIABLES, ("host:1", "1", "0"), strict=True)), id="one of one"),
    ],
)
def test_alone(values, variables):
    variables(values)
    assert find_place() is None


def test_the_variables_come_before_a_scheduler(variables):
    variables(SLURM | dict(zip(VARIABLES, ("host:1", "2", "1"), strict=True)))
    assert find_place() == Place("JAX_COORDINATOR_ADDRESS", "host:1", 2, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("host:1", None, None), "JAX_NUM_PROCESSES and JAX_PROCESS_ID must be set too"),
        ((None, "2", "0"), "JAX_COORDINATOR_ADDRESS must be set too"),
        (("host:1", "two", "0"), "must be numbers"),
        (("host:1", "2", "-1"), "must be numbers"),
        (("host:1", "2", "2"), "no process 2 among 2"),
        (("host", "2", "0"), "must be HOST:PORT"),
    ],
)
def test_variables_that_name_no_place(values, message, variables):
    variables({k: v for k, v in zip(VARIABLES, values, strict=True) if v is not None})
    with pytest.raises(UserError, match=message):
        find_place()


def test_a_numbered_pod_that_cannot_find_the_others_does_not_start_alone(variables):
    variables({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"})
    with pytest.raises(UserError, match="set JAX_COORDINATOR_ADDRESS"):
        find_place(1)
