"""Files under launch/ against the published schemas of what reads them.

Where Kubeflow's and SkyPilot's packages are, which tests/launch_schemas.sh sees to.
"""

import pytest
import yaml
from launch_files import LAUNCH, read_jobset


def unknown(value, schema, path="") -> list[str]:
    """The fields of `value` that a model of the schema did not take, or took for something else."""
    if isinstance(value, dict):
        return [
            field
            for key, inner in value.items()
            for field in (
                unknown(inner, schema[key], f"{path}.{key}")
                if isinstance(schema, dict) and key in schema
                else [f"{path}.{key}"]
            )
        ]
    if isinstance(value, list):
        pairs = enumerate(zip(value, schema, strict=True))
        return [field for i, (a, b) in pairs for field in unknown(a, b, f"{path}[{i}]")]
    return [] if value == schema else [path]


def test_the_jobset_follows_the_published_schema():
    """The models that Kubeflow generates from the OpenAPI schemas of JobSet and of Kubernetes."""
    models = pytest.importorskip("kubeflow_trainer_api.models")

    def problems(jobset: dict) -> list[str]:
        return unknown(jobset, models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict())

    jobset = read_jobset()
    assert problems(jobset) == []
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["backofLimit"] = job.pop("backoffLimit")
    assert problems(jobset) == [".spec.replicatedJobs[0].template.spec.backofLimit"]
    job["completions"] = "two"
    with pytest.raises(ValueError, match="completions"):
        problems(jobset)


def test_the_skypilot_task_follows_its_schema(tmp_path):
    sky = pytest.importorskip("sky")
    found = sky.Task.from_yaml(str(LAUNCH / "skypilot.yaml"))
    assert found.num_nodes == 2 and found.run
    (resources,) = found.resources
    assert resources.job_recovery["recover_on_exit_codes"] == [75, 134]
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    task["resources"]["use_spots"] = task["resources"].pop("use_spot")
    path = tmp_path / "misspelled.yaml"
    path.write_text(yaml.safe_dump(task))
    with pytest.raises(ValueError, match="use_spots"):
        sky.Task.from_yaml(str(path))
