"""`instar sweep`: trials that are checked, run, killed, gone on with, and emitted as jobs."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from runs import environment

from instar import cli, sweep
from instar.commands import COMMANDS, Command
from instar.errors import UserError
from instar.stages.sweep_emit import job_name
from instar.stages.sweep_trials import command_of, name_trials, plan_trials, read_trials

ROOT = pathlib.Path(__file__).parents[2]

# Four trials, of which the last one finds no data.
SWEEP = """
from instar import sweep

def get_sweep():
    trials = sweep.product({"seed": (0, 1)}, {"optimizer.learning_rate": (1e-2, 2e-2)})
    trials[3]["data.path"] = "gone"
    yield from trials
"""
NAMES = [f"seed={seed},learning_rate={rate}" for seed in (0, 1) for rate in (0.01, 0.02)]
NAMES[3] += ",path=gone"

# What stands for `instar pretrain` where only the sweep matters: it leaves the files of a run, in
# no time. The second trial hangs when it is first begun; the last one fails for want of its data.
STAND_IN = """
import json, os, pathlib, time
from dataclasses import dataclass

from instar.config import to_dict
from instar.errors import RunError

@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 0.0

@dataclass(frozen=True)
class Data:
    path: str = "."

@dataclass(frozen=True)
class Config:
    seed: int = 0
    steps: int = 4
    optimizer: Optimizer = Optimizer()
    data: Data = Data()

def train(config, workdir):
    folder, rate = pathlib.Path(workdir), config.optimizer.learning_rate
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    lines = [{"step": 2, "loss": 3.0}, {"step": 4, "eval/loss": 2 - rate - config.seed}]
    (folder / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\\n")
    (folder / "pid").write_text(str(os.getpid()))
    if not os.path.exists(config.data.path):
        raise RunError(f"{config.data.path} does not exist")
    if (config.seed, rate) == (0, 2e-2) and not os.path.exists("hung"):
        pathlib.Path("hung").touch()
        time.sleep(600)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
    lineage = folder / "checkpoints/4/lineage"
    lineage.mkdir(parents=True)
    (lineage / "lineage.json").write_text('{"step": 4}')
    (folder / "report.html").touch()
"""
PUT_IN = """
from instar.commands import COMMANDS, Command

COMMANDS["pretrain"] = Command(
    "stands in", "stand_in:train", config="stand_in:Config", together=True
)
"""
# In a trial's process, it asks the sweep to stop.
STOPPING = """
import os, signal, time

if str(os.getppid()) == os.environ["SWEEP"]:
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
"""
QUICK = (
    "--config.steps=4",
    "--config.model.depth=1",
    "--config.evaluation.every=4",
    "--config.evaluation.prompts=[]",
    "--config.checkpoint.keep_steps=None",
    "--config.logging.tensorboard=false",
)


@pytest.fixture
def folder(run_config, tmp_path, monkeypatch) -> pathlib.Path:
    """A folder with a sweep file and, below pretrain/, the config that it is for."""
    (tmp_path / "pretrain").mkdir()
    shutil.copy(run_config, tmp_path / "pretrain/run.py")
    (tmp_path / "trials.py").write_text(SWEEP)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words_of(folder: pathlib.Path, *more: str) -> list[str]:
    return [
        *("sweep", "--config", str(folder / "pretrain/run.py")),
        *("--sweep", str(folder / "trials.py"), "--workdir", str(folder / "all"), *QUICK, *more),
    ]


@pytest.fixture
def instar(folder, monkeypatch, capfd):
    """Runs the sweep in this process, its trials in others; gives (exit code, out, err)."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)

    def run(*more: str) -> tuple[int, str, str]:
        try:
            code = cli.main(words_of(folder, *more))
        except SystemExit as stopped:
            code = stopped.code
        return code, *capfd.readouterr()

    return run


def records(folder: pathlib.Path) -> dict:
    path = folder / "all/trials.json"
    return json.loads(path.read_text()) if path.exists() else {}


def fake_cluster(folder: pathlib.Path, instar: str) -> dict[str, str]:
    """An environment with an srun that runs one task here, and `instar` as a shell's words."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, body in (("srun", 'exec "$@"'), ("instar", instar)):
        (programs / name).write_text(f"#!{shutil.which('bash')}\n{body}\n")
        (programs / name).chmod(0o755)
    return environment() | {"PATH": f"{programs}:{os.environ['PATH']}"}


@pytest.fixture
def stand_in(folder, monkeypatch) -> list[str]:
    """Puts the quick command in, here and in every process; gives the words of its sweep."""
    (folder / "stand_in.py").write_text(STAND_IN)
    (folder / "sitecustomize.py").write_text(PUT_IN)
    (folder / "pretrain/run.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n"
    )
    known = [each for each in (os.environ.get("PYTHONPATH"),) if each]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *known]))
    monkeypatch.syspath_prepend(folder)
    command = Command("stands in", "stand_in:train", config="stand_in:Config", together=True)
    monkeypatch.setitem(COMMANDS, "pretrain", command)
    yield [word for word in words_of(folder) if not word.startswith("--config.")]
    sys.modules.pop("stand_in", None)


def test_killed_gone_on_with_failed_and_finished_elsewhere(folder, stand_in, capfd):
    words = [sys.executable, "-m", "instar", *stand_in]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
    while process.poll() is None and not (folder / "hung").exists():
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    killed = records(folder)
    assert [killed[name]["status"] for name in NAMES] == ["done", "running", "waiting", "waiting"]
    pid = (folder / "all" / NAMES[0] / "pid").read_text()

    assert cli.main([*stand_in, "--parallel=2"]) == 1
    out, err = capfd.readouterr()
    assert "1 of 4 trials failed" in err and f"[1/4] {NAMES[0]}: done before" in err
    known = records(folder)
    assert [known[name].get("starts") for name in NAMES] == [1, 2, 1, 1]
    assert [known[name]["status"] for name in NAMES] == ["done", "done", "done", "failed"]
    assert (folder / "all" / NAMES[0] / "pid").read_text() == pid
    reason = "exit code 1: instar: error: gone does not exist"
    assert known[NAMES[3]]["reason"] == reason and f"{NAMES[3]}: {reason}" in out
    assert reason in (folder / "all/report.html").read_text()
    found = json.loads((folder / "all/sweep.json").read_text())
    assert (found["metric"], found["goal"]) == ("eval/loss", "minimise")
    assert [(trial["name"], trial["value"]) for trial in found["trials"]] == [
        (NAMES[2], 2 - 0.01 - 1),
        (NAMES[1], 2 - 0.02 - 0),
        (NAMES[0], 2 - 0.01 - 0),
        (NAMES[3], None),
    ]

    # The failed one is done by the job of a cluster, by the same command.
    (folder / "gone").touch()
    assert cli.main([*stand_in, "--emit=slurm"]) == 0
    env = fake_cluster(folder, f'exec {shlex.quote(sys.executable)} -m instar "$@"')
    script = ["bash", str(folder / "all/sweep.sbatch")]
    job = subprocess.run(script, env=env | {"SLURM_ARRAY_TASK_ID": "3"}, check=False)
    capfd.readouterr()
    assert job.returncode == 0
    assert cli.main(["report", f"--workdir={folder / 'all'}"]) == 0
    assert capfd.readouterr().out.count("done") == 4
    assert cli.main(stand_in) == 0
    assert capfd.readouterr().err.count("done before") == 4
    assert [records(folder)[name]["starts"] for name in NAMES] == [1, 2, 1, 1]


def test_a_trial_is_a_run_like_any_other(folder, instar):
    (folder / "trials.py").write_text("def get_sweep():\n    yield {'seed': 3}\n")
    code, out, err = instar()
    assert code == 0, err
    workdir = folder / "all/seed=3"
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    (value,) = (line["eval/loss"] for line in lines if "eval/loss" in line)
    assert out.splitlines()[1].split()[:3] == ["1", f"{value:#.5g}", "4"]
    assert json.loads((workdir / "config.json").read_text())["seed"] == 3
    assert "step 4/4" in (workdir / "output.txt").read_text()
    # Its own files say that it is done, without the sweep's record.
    record = records(folder)
    record["seed=3"] |= {"status": "waiting"}
    (folder / "all/trials.json").write_text(json.dumps(record))
    code, _, err = instar()
    assert code == 0 and "[1/1] seed=3: done before" in err


def test_sigterm_goes_to_the_trial_under_way_and_no_other_begins(folder, instar, monkeypatch):
    monkeypatch.setenv("SWEEP", str(os.getpid()))
    config = folder / "pretrain/run.py"
    config.write_text(STOPPING + config.read_text())
    before = signal.getsignal(signal.SIGTERM)
    code, out, err = instar()
    assert code == 143 and "exit code 143" in err and out.count("waiting") == 3
    known = records(folder)
    assert [known[name]["status"] for name in NAMES] == ["stopped", *["waiting"] * 3]
    assert signal.getsignal(signal.SIGTERM) is before


def test_every_trial_is_checked_before_the_first(folder, instar):
    trials = folder / "trials.py"
    good = trials.read_text()
    for change, message in (
        (
            'trials[2]["optimizer.learing_rate"] = 1',
            f"trial {NAMES[2]},learing_rate=1: optimizer.learing_rate: there is no such field; "
            "did you mean 'optimizer.learning_rate'?",
        ),
        ('trials[2]["model.width"] = "x"', "model.width: expected int or None, got 'x' (str)"),
        ('trials[1]["steps"] = 5', "sets steps itself: leave --config.steps out"),
        ("trials.append(trials[0])", f"trial {NAMES[0]} is in the sweep twice"),
        ("trials = 1", "gives no trials"),
        ("trials[0] = 1", "must give dicts from keys of the config to values"),
        ("1 / 0", "trials.py, line 7: ZeroDivisionError"),
        ('sweep.product({"a": (1,)}, {"a": (1,)})', "two parts of the sweep set a"),
    ):
        text = good.replace("    yield", f"    {change}\n    yield")
        if message == "gives no trials":
            text = "def get_sweep():\n    return ()\n"
        trials.write_text(text)
        code, out, err = instar()
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    trials.write_text("def get_swep(): pass\n")
    assert "must define get_sweep()" in instar()[2]
    trials.unlink()
    assert "sweep file" in instar()[2]
    assert not (folder / "all").exists()


def test_a_sweep_may_grow_but_neither_change_nor_lose_trials(folder, instar, monkeypatch):
    assert instar("--emit=slurm")[0] == 0
    before = records(folder)
    assert list(before) == NAMES and {each["status"] for each in before.values()} == {"waiting"}

    code, _, err = instar("--emit=slurm", "--config.z_loss=1")
    assert code == 2 and f"trial {NAMES[0]} of " in err and "z_loss (was 0.0, is 1.0)" in err
    trials = folder / "trials.py"
    good = trials.read_text()
    trials.write_text(good.replace("    yield", "    del trials[1]\n    yield"))
    code, _, err = instar("--emit=slurm")
    assert code == 2 and f"trial {NAMES[1]} of " in err and "no longer in the sweep" in err
    assert records(folder) == before

    more = 'trials.insert(0, {"model.width": 64})'
    trials.write_text(good.replace("    yield", f"    {more}\n    yield"))
    assert instar("--emit=slurm")[0] == 0
    assert list(records(folder)) == [*NAMES, "width=64"]
    # What a restart may change does not matter.
    assert instar("--emit=slurm", "--config.checkpoint.minutes=9")[0] == 0

    (folder / "all/config.json").write_text("{}")
    assert "holds something else (config.json)" in instar("--emit=slurm")[2]
    (folder / "all/config.json").unlink()
    told = {"COORDINATOR_ADDRESS": "here:1", "NUM_PROCESSES": "2", "PROCESS_ID": "0"}
    for name, value in told.items():
        monkeypatch.setenv(f"JAX_{name}", value)
    assert "instar sweep is one process" in instar()[2]


@pytest.mark.parametrize("nodes", [1, 2])
def test_an_array_index_selects_its_trial(folder, instar, nodes):
    code, _, err = instar(
        *("--emit=slurm", f"--nodes={nodes}", "--gpus=8", "--partition=p", "--parallel=3")
    )
    path = folder / "all/sweep.sbatch"
    assert code == 0 and str(path) in err
    for check in (["bash", "-n"], [shutil.which("shellcheck", path=_path()) or "true"]):
        done = subprocess.run([*check, path], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    text = path.read_text()
    for directive in (
        *("array=0-3%3", f"nodes={nodes}", "partition=p", "gpus-per-node=8"),
        *("ntasks-per-node=1", "signal=TERM@120"),
    ):
        assert f"\n#SBATCH --{directive}\n" in text

    env = fake_cluster(folder, 'printf "%s\\n" "$@"')
    planned = plan_trials(
        read_trials(str(folder / "trials.py")),
        "pretrain",
        str(folder / "pretrain/run.py"),
        str(folder / "all"),
        [tuple(word.removeprefix("--config.").split("=", 1)) for word in QUICK],
    )
    for index, trial in enumerate(planned):
        done = subprocess.run(
            ["bash", path],
            env=env | {"SLURM_ARRAY_TASK_ID": str(index)},
            capture_output=True,
            text=True,
            check=True,
        )
        words = done.stdout.splitlines()
        assert tuple(words) == trial.step.words
        assert f"{folder}/all/{NAMES[index]}" in words
    env["SLURM_ARRAY_TASK_ID"] = "4"
    assert subprocess.run(["bash", path], env=env, capture_output=True, check=False).returncode == 2


def _path() -> str:
    """Where shellcheck may lie: beside this Python, too."""
    return f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.mark.parametrize("nodes", [1, 4])
def test_each_trial_has_a_jobset_that_names_it(folder, instar, nodes):
    assert "--image is missing" in instar("--emit=jobset")[2]
    assert not (folder / "all").exists()
    assert instar("--emit=jobset", "--image=instar:1", f"--nodes={nodes}", "--gpus=8")[0] == 0
    files = sorted((folder / "all/jobsets").iterdir())
    assert [file.name for file in files] == [f"trials-{index:03d}.yaml" for index in range(4)]
    for file, name in zip(files, NAMES, strict=True):
        found = yaml.safe_load(file.read_text())
        assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
        assert found["metadata"]["annotations"]["instar/trial"] == name
        (job,) = found["spec"]["replicatedJobs"]
        spec = job["template"]["spec"]
        assert (spec["completions"], spec["parallelism"]) == (nodes, nodes)
        (container,) = spec["template"]["spec"]["containers"]
        assert container["image"] == "instar:1" and container["command"] == ["instar"]
        assert container["args"][:2] == ["pretrain", "--config"]
        assert f"{folder}/all/{name}" in container["args"]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
        env = {each["name"]: each.get("value") for each in container.get("env", [])}
        if nodes == 1:
            assert env == {}
        else:
            host, port = env["JAX_COORDINATOR_ADDRESS"].split(":")
            label = found["metadata"]["name"]
            assert host == f"{label}-{job['name']}-0-0.{label}" and port.isdecimal()
            assert env["JAX_NUM_PROCESSES"] == "4" and "JAX_PROCESS_ID" in env


def test_names_say_what_a_trial_sets():
    trials = [
        {"a.size": 1, "b.size": 2.5, "optimizer.rate": 1e-5},
        {"a.size": 1, "b.size": -2.5, "optimizer.rate": 1e-5},
        {"path": "x/y z"},
        {"path": "x-y-z"},
        {},
        {"prompts": ["p" * 300]},
    ]
    names = name_trials(trials)
    assert names[:3] == [
        "a.size=1,b.size=2.5,rate=1e-05",
        "a.size=1,b.size=-2.5,rate=1e-05",
        "path=x-y-z",
    ]
    assert names[3].startswith("path=x-y-z-") and names[4] == "base"
    assert len(set(names)) == 6 and max(map(len, names)) <= 120
    with pytest.raises(UserError, match="trial a=1 is in the sweep twice"):
        name_trials([{"a": 1}, {"a": 1}])
    # So is one whose name a digest sets apart.
    with pytest.raises(UserError, match=f"trial {names[3]} is in the sweep twice"):
        name_trials([*trials[2:4], trials[3]])


def test_what_a_sweep_file_gives_becomes_plain(tmp_path):
    path = tmp_path / "trials.py"
    path.write_text(
        "import numpy as np\n"
        "def get_sweep():\n"
        "    return [{'optimizer': {'rate': np.float64(0.5), 'b': (1, 2)}, 'x.y': np.int32(3)}]\n"
    )
    assert read_trials(str(path)) == [{"optimizer.rate": 0.5, "optimizer.b": [1, 2], "x.y": 3}]
    assert type(read_trials(str(path))[0]["optimizer.rate"]) is float


def test_the_command_is_that_of_the_configs_folder_or_the_one_given():
    assert command_of("configs/sft/x.py", None) == "sft"
    assert command_of("configs/pretrain/x.py:a/b", None) == "pretrain"
    assert command_of("x.py", "pretrain") == "pretrain"
    with pytest.raises(UserError, match="--command is missing: the folder of config file"):
        command_of("configs/data/x.py", None)
    with pytest.raises(UserError, match="cannot run 'pretrian'; did you mean 'pretrain'"):
        command_of("x.py", "pretrian")


@pytest.mark.parametrize("text", ["Learning rate_by/width", "é", "", "x" * 90, "-a-"])
def test_jobs_have_names_that_kubernetes_takes(text):
    name = job_name(text)
    assert 0 < len(name) <= 40 and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert name.strip("-") == name and name != job_name(text + "z")


def test_the_sweep_that_is_shipped_fits_the_quickstart(monkeypatch):
    monkeypatch.chdir(ROOT)
    trials = read_trials("configs/sweep/learning_rate_by_width.py")
    planned = plan_trials(trials, "pretrain", "configs/pretrain/quickstart.py", "runs/x")
    assert len(planned) == len(trials) == len(sweep.product(trials))
    for trial in planned:
        model = trial.step.told["model"]
        assert model["width"] % model["heads"] == 0


def test_a_sweep_may_be_over_a_recipe_of_a_size(monkeypatch):
    monkeypatch.chdir(ROOT)
    path = "configs/pretrain/gpt3.py:125m"
    (trial,) = plan_trials([{"z_loss": 1e-4}], command_of(path, None), path, "runs/x")
    assert (trial.step.told["model"]["size"], trial.step.told["z_loss"]) == ("125m", 1e-4)
    assert trial.step.words[1:3] == ("--config", path)
