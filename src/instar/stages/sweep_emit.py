"""A sweep as jobs for a cluster: a SLURM array, or one Kubernetes JobSet a trial.

Each job runs the command that the sweep would have run here, in a folder that all nodes share.
"""

import hashlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from etils import epath

from instar.errors import UserError
from instar.stages.sweep_trials import Trial

SCRIPT, FOLDER = "sweep.sbatch", "jobsets"
# Where the first process of a trial is found by its others, beside those of other trials.
_PORT = 12355
# A resource of Kubernetes for the accelerators of a node.
_GPU = "nvidia.com/gpu"

_HEADER = """\
#!/usr/bin/env bash
# The {count} trials of a sweep, as an array: submit it with sbatch from the folder in which
# `instar sweep` wrote it. Submitted again, it goes on with what is not done.
#SBATCH --job-name={name}
#SBATCH --array=0-{last}{at_a_time}
{directives}
#SBATCH --output={workdir}/slurm-%A_%a.txt
# So that a trial saves its state before its time is over.
#SBATCH --signal=TERM@120
set -euo pipefail

case "${{SLURM_ARRAY_TASK_ID:?is set by sbatch}}" in
"""
_FOOTER = """\
*)
  printf 'there is no trial %s\\n' "$SLURM_ARRAY_TASK_ID" >&2
  exit 2
  ;;
esac
"""
_RUN = """
# Several processes find one another by what Slurm tells them.
exec srun instar "$@"
"""


@dataclass(frozen=True)
class Cluster:
    """What a job asks for.

    Attributes:
      image: the container of a JobSet, in which `instar` is installed.
      partition: that of SLURM; None: its default.
      nodes: of each trial, with one process on each.
      gpus: of each node; None asks for none.
      at_a_time: trials that a SLURM array runs at once; None: as many as there is room for.
    """

    image: str | None = None
    partition: str | None = None
    nodes: int = 1
    gpus: int | None = None
    at_a_time: int | None = None


def slurm_script(trials: Sequence[Trial], name: str, workdir: str, cluster: Cluster) -> str:
    """A script for sbatch, of which the array index I is the I-th trial."""
    directives = [f"--nodes={cluster.nodes}", "--ntasks-per-node=1"]
    if cluster.partition is not None:
        directives.append(f"--partition={cluster.partition}")
    if cluster.gpus is not None:
        directives.append(f"--gpus-per-node={cluster.gpus}")
    header = _HEADER.format(
        count=len(trials),
        name=job_name(name),
        last=len(trials) - 1,
        at_a_time=f"%{cluster.at_a_time}" if cluster.at_a_time else "",
        directives="\n".join(f"#SBATCH {each}" for each in directives),
        workdir=workdir.rstrip("/"),
    )
    cases = (
        f"{index}) set -- {shlex.join(trial.step.words)} ;;\n" for index, trial in enumerate(trials)
    )
    return "".join([header, *cases, _FOOTER, _RUN])


def jobset(trial: Trial, index: int, name: str, cluster: Cluster) -> dict[str, Any]:
    """The JobSet of a trial, whose name is among its annotations.

    Where it has several nodes they find the first by the name that JobSet gives to its pod,
    ``JOBSET-JOB-0-0.JOBSET``.
    """
    label = f"{job_name(name)}-{index:03d}"
    container: dict[str, Any] = {
        "name": "instar",
        "image": cluster.image,
        "command": ["instar"],
        "args": list(trial.step.words),
    }
    if cluster.gpus is not None:
        container["resources"] = {"limits": {_GPU: cluster.gpus}}
    if cluster.nodes > 1:
        number = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        container["ports"] = [{"containerPort": _PORT}]
        container["env"] = [
            {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{label}-trial-0-0.{label}:{_PORT}"},
            {"name": "JAX_NUM_PROCESSES", "value": str(cluster.nodes)},
            {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": number}}},
        ]
    job = {
        "completionMode": "Indexed",
        "completions": cluster.nodes,
        "parallelism": cluster.nodes,
        "backoffLimit": 0,  # one process lost is all lost: the JobSet starts them again
        "template": {"spec": {"restartPolicy": "Never", "containers": [container]}},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": label,
            "labels": {"instar-sweep": job_name(name)},
            "annotations": {"instar/trial": trial.step.name},
        },
        "spec": {
            "failurePolicy": {"maxRestarts": 3},
            "replicatedJobs": [{"name": "trial", "replicas": 1, "template": {"spec": job}}],
        },
    }


def emit(
    kind: str, trials: Sequence[Trial], name: str, workdir: epath.Path, cluster: Cluster
) -> epath.Path:
    """Writes the jobs of a sweep into its folder and returns the file, or the folder of them.

    Raises:
      UserError: something is missing, or cannot be written.
    """
    if kind == "slurm":
        path = workdir / SCRIPT
        texts = {path: slurm_script(trials, name, str(workdir), cluster)}
    else:
        path = workdir / FOLDER
        sets = [jobset(trial, index, name, cluster) for index, trial in enumerate(trials)]
        texts = {
            path / f"{each['metadata']['name']}.yaml": yaml.safe_dump(each, sort_keys=False)
            for each in sets
        }
    try:
        for file, text in texts.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error})") from None
    return path


def job_name(text: str) -> str:
    """A text as Kubernetes takes names: short, of lower-case letters, digits and "-"."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    return plain if 0 < len(plain) <= 40 else f"sweep-{plain[:26].strip('-')}-{digest}"
