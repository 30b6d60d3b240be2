"""What starts several processes, on one machine or on many."""

import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tomllib

import pytest
import yaml
from launch_files import read_jobset

from instar.errors import RestartError, RunError, UserError
from instar.sharding.places import VARIABLES

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", ROOT / "tests" / "slurm_local.sh"]
STOP_CODES = sorted((UserError.code, RunError.code))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts(script):
    subprocess.run(["bash", "-n", script], check=True)
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run([shellcheck, script], check=True)


# --- launch/processes.py ------------------------------------------------------------------------


def command(processes: int, restarts: int, script: str) -> list[str]:
    launcher = str(LAUNCH / "processes.py")
    return [sys.executable, launcher, str(processes), str(restarts), "bash", "-c", script]


def launch(processes: int, restarts: int, script: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(processes, restarts, script), capture_output=True, text=True, check=False
    )


def test_each_process_knows_its_place_and_its_lines_are_marked():
    script = f"echo ${VARIABLES[2]} of ${VARIABLES[1]}; echo ${VARIABLES[0]} >&2"
    done = launch(3, 0, script)
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == [f"[{n}] {n} of 3" for n in range(3)]
    addresses = {line.split("] ")[1] for line in done.stderr.splitlines()}
    assert len(addresses) == 1 and addresses.pop().startswith("127.0.0.1:")


def test_the_code_is_that_of_the_first_failure():
    done = launch(3, 2, "[[ $JAX_PROCESS_ID == 1 ]] && exit 3; sleep 2; exit 4")
    assert done.returncode == 3 and "started again" not in done.stderr
    assert launch(1, 0, "kill -KILL $$").returncode == 128 + signal.SIGKILL


def test_what_a_new_start_mends_is_started_again(tmp_path):
    script = f"echo x >> {tmp_path}/$JAX_PROCESS_ID; [[ $(wc -l < {tmp_path}/0) -ge 3 ]] || exit 75"
    assert launch(1, 0, script.replace("$JAX_PROCESS_ID", "0")).returncode == RestartError.code
    done = launch(2, 5, script)
    assert done.returncode == 0 and done.stderr.count("started again") >= 1


def test_a_signal_reaches_all_and_ends_the_restarts():
    script = "trap 'exit 75' TERM; echo ready; while :; do sleep 0.1; done"
    with subprocess.Popen(command(2, 5, script), stdout=subprocess.PIPE, text=True) as group:
        assert [group.stdout.readline()[4:] for _ in range(2)] == ["ready\n"] * 2
        group.send_signal(signal.SIGTERM)
        assert group.wait(timeout=60) == RestartError.code


# --- Slurm and Cloud TPU, with programs of the test in the place of theirs ----------------------


@pytest.fixture
def stubs(tmp_path):
    """A folder for PATH with programs that write down how they were called; gives the calls."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def add(name: str, code: int = 0) -> None:
        line = f'echo "{name} $*" >> {tmp_path}/calls; exit {code}'
        (folder / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (folder / name).chmod(0o755)

    def calls() -> list[str]:
        return (tmp_path / "calls").read_text().splitlines()

    add.path = f"{folder}:/usr/bin:/bin"
    add.calls = calls
    return add


@pytest.mark.parametrize(
    ("code", "before", "again"),
    [
        (RestartError.code, 0, True),
        (128 + signal.SIGABRT, 0, True),
        (128 + signal.SIGTERM, 3, True),
        (RestartError.code, 20, False),
        (UserError.code, 0, False),
        (0, 0, False),
    ],
)
def test_slurm_queues_a_job_again_where_that_helps(code, before, again, stubs, tmp_path):
    stubs("srun", code)
    for name in ("scontrol", "sleep"):
        stubs(name)
    (tmp_path / "launch").mkdir()
    local = tmp_path / "launch" / "local.sh"
    local.write_text("#!/usr/bin/env bash\n")
    local.chmod(0o755)
    env = {
        "PATH": stubs.path,
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "12",
        "SLURM_RESTART_COUNT": str(before),
    }
    words = ("bash", LAUNCH / "slurm.sbatch", "pretrain", "--config", "c.py")
    done = subprocess.run(words, env=env, check=False, capture_output=True)
    assert done.returncode == code
    assert stubs.calls()[0].endswith("launch/local.sh instar pretrain --config c.py")
    assert ("scontrol requeue 12" in stubs.calls()) == again


def test_a_tpu_pod_runs_the_words_as_they_are(stubs):
    stubs("gcloud")
    words = ("pretrain", "--config.sources.0.path=a b")
    env = {"PATH": stubs.path, "NAME": "pod", "ZONE": "z"}
    subprocess.run([LAUNCH / "tpu_pod.sh", "run", *words], env=env, check=True)
    started, shown = stubs.calls()
    assert started.startswith("gcloud compute tpus tpu-vm ssh pod --zone=z --worker=all --command=")
    assert r"instar pretrain --config.sources.0.path=a\ b" in started
    assert "--worker=0" in shown


# --- What is read by others ---------------------------------------------------------------------


def test_jobset():
    jobset = read_jobset()
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    name, spec = jobset["metadata"]["name"], jobset["spec"]
    assert set(spec) == {"failurePolicy", "network", "replicatedJobs"}
    (group,) = spec["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    env = {each["name"]: each for each in container["env"]}

    # Who each process is, and where the first one listens.
    assert job["completionMode"] == "Indexed" and group["replicas"] == 1
    assert set(env) == set(VARIABLES)
    assert job["completions"] == job["parallelism"] == int(env["JAX_NUM_PROCESSES"]["value"])
    host, port = env["JAX_COORDINATOR_ADDRESS"]["value"].split(":")
    assert host == f"{name}-{group['name']}-0-0.{name}"
    assert int(port) == container["ports"][0]["containerPort"]
    assert "job-completion-index" in env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]

    # All start again where one ends, unless by a code that a new start does not mend.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "In"
    assert rule["onExitCodes"]["values"] == STOP_CODES
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert spec["failurePolicy"]["maxRestarts"] > 0
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert [volume["name"] for volume in pod["volumes"]] == [
        mount["name"] for mount in container["volumeMounts"]
    ]


def test_skypilot():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert set(task) == {"name", "num_nodes", "resources", "envs", "workdir", "setup", "run"}
    codes = task["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert RestartError.code in codes and not set(codes) & {*STOP_CODES, 0}
    assert all(f"{name}=" in task["run"] for name in VARIABLES)
    script = f"exec() {{ printf '%s\\n' \"$@\"; env | grep ^JAX_; }}\n{task['run']}"
    env = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "PATH": "/usr/bin:/bin",
        **task["envs"],
    }
    done = subprocess.run(
        ["bash", "-eu", "-c", script], env=env, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "./launch/local.sh"
    assert {"JAX_COORDINATOR_ADDRESS=10.0.0.1:8476", "JAX_PROCESS_ID=1"} < set(lines)


def test_the_container_is_made_as_any_environment():
    text = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if re.match(r"[A-Z]+ ", line)]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for default in re.findall(r"EXTRAS=([a-z0-9,]+)", text):
        assert set(default.split(",")) <= set(extras)
    for words in (rest.split() for kind, rest in steps if kind == "COPY"):
        for source in [word for word in words if not word.startswith("--")][:-1]:
            assert (ROOT / source).exists(), source
    runs = [rest for kind, rest in steps if kind == "RUN"]
    assert runs[-1] == 'INSTAR_EXTRAS="${EXTRAS}" ./launch/local.sh setup'
    users = [rest for kind, rest in steps if kind == "USER"]
    assert users and users[-1] not in ("root", "0")
    (entry,) = [json.loads(rest) for kind, rest in steps if kind == "ENTRYPOINT"]
    assert entry == ["./launch/local.sh"]
