"""Which of how many processes this is: told by variables, or found as jax finds it."""

import os
import warnings
from dataclasses import dataclass

from jax._src import clusters

from instar.errors import UserError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

# What the schedulers that jax detects are called; another one goes by the name of its class.
SCHEDULERS = {
    clusters.OmpiCluster: "Open MPI",
    clusters.SlurmCluster: "Slurm",
    clusters.GkeTpuCluster: "Google Kubernetes Engine (TPU)",
    clusters.GceTpuCluster: "Cloud TPU",
    clusters.K8sCluster: "Kubernetes",
}


@dataclass(frozen=True)
class Place:
    """The place of a process among others.

    Attributes:
      source: what told it, in words.
      address: HOST:PORT, at which process 0 listens.
      count: how many processes there are; `number` is which of them this is, from 0 on.
      devices: which of the devices of its host it uses; None for all.
    """

    source: str
    address: str
    count: int
    number: int
    devices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdecimal():
            raise UserError(
                f"the coordinator's address ({self.source}) must be HOST:PORT, not {self.address!r}"
            )
        if not 0 <= self.number < self.count:
            raise UserError(
                f"there is no process {self.number} among {self.count} ({self.source}): they are "
                "numbered from 0 on"
            )


def find_place(timeout: float = 300) -> Place | None:
    """The place of this process; None where it is alone.

    The variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID come first. Without
    them the schedulers that `jax.distributed` detects are asked, in its order: Open MPI, Slurm,
    Cloud TPU, TPUs of Google Kubernetes Engine, an indexed Job or JobSet of Kubernetes.

    Args:
      timeout: seconds for which a scheduler is asked for the address of process 0.

    Raises:
      UserError: only some of the variables are set, or one is not a number, or a scheduler is there
        that cannot be asked.
    """
    place = _told() or _detected(timeout)
    return None if place is None or place.count == 1 else place


def _told() -> Place | None:
    """What the variables say."""
    values = {name: os.environ.get(name) for name in VARIABLES}
    missing = [name for name, value in values.items() if value is None]
    if len(missing) == len(VARIABLES):
        return None
    if missing:
        raise UserError(f"{' and '.join(missing)} must be set too, or none of {VARIABLES}")
    address, *numbers = values.values()
    if not all(number.isdigit() for number in numbers):
        raise UserError(f"JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers, not {numbers}")
    # jax itself reads JAX_LOCAL_DEVICE_IDS.
    return Place("JAX_COORDINATOR_ADDRESS", address, int(numbers[0]), int(numbers[1]))


def _detected(timeout: float) -> Place | None:
    """What the first scheduler says that is there."""
    kinds = [kind for kind in clusters.ClusterEnv._cluster_types if not kind.opt_in_only_method]
    for kind in kinds:
        name = SCHEDULERS.get(kind, kind.__name__)
        try:
            if _present(kind):
                return Place(
                    name,
                    kind.get_coordinator_address(
                        timeout_secs=timeout,
                        override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT"),
                    ),
                    kind.get_process_count(),
                    kind.get_process_id(),
                    _devices(kind),
                )
        except UserError:
            raise
        except Exception as error:  # whatever a service or a client of it makes of its troubles
            raise UserError(
                f"{name} is there and does not say which of its processes this is ({error}): set "
                f"{', '.join(VARIABLES)}"
            ) from None
    return None


def _present(kind: type[clusters.ClusterEnv]) -> bool:
    """Whether this process is one of several of a scheduler of that kind."""
    if kind is clusters.SlurmCluster and os.environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        # A shell in an allocation of several tasks is a step of one.
        return False
    if kind is not clusters.K8sCluster:
        return kind.is_env_present()
    # A pod by itself is alone, and so is one of a Job that does not number them.
    index = os.environ.get("JOB_COMPLETION_INDEX")
    if index is None:
        return False
    with warnings.catch_warnings():  # that its package is not installed
        warnings.simplefilter("ignore")
        present = kind.is_env_present()
    if not present and index != "0":
        raise UserError(
            f"this is pod {index} of an indexed Job, and it does not know the others: set "
            f"{', '.join(VARIABLES)} (launch/gke_jobset.yaml shows how), or install the package "
            "kubernetes"
        )
    return present


def _devices(kind: type[clusters.ClusterEnv]) -> tuple[int, ...] | None:
    """The devices of this process: one by its number on the host, where it shares the host."""
    local = kind.get_local_process_id()
    one_each = os.environ.get("SLURM_STEP_NUM_NODES") == os.environ.get("SLURM_STEP_NUM_TASKS")
    if (
        local is None
        or "JAX_LOCAL_DEVICE_IDS" in os.environ
        or (kind is clusters.SlurmCluster and one_each)
    ):
        return None
    # Where the scheduler shows each process its own device only, that is its first.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return None if visible and "," not in visible else (local,)
