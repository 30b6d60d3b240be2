"""`instar pipeline`: commands in a chain, checked before the first, killed and gone on with."""

import json
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from etils import epath
from runs import DATA_CONFIG, environment, final_fingerprint, losses

from instar import cli
from instar.config import load
from instar.errors import UserError
from instar.stages import pipeline
from instar.stages.pipeline import RECORD, PipelineConfig, StepConfig, plan
from instar.stages.steps import Records

ROOT = pathlib.Path(__file__).parents[2]

CHAIN = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(dict(stages=(
        dict(name="data", command="prepare", config={data!r}),
        dict(name="run", command="pretrain", config={run!r},
             overrides=dict(data=dict(path="{{workdir}}/data"), evaluation=dict(prompts=()),
                            logging=dict(tensorboard=False))),
    )))
"""
# The parent reads it twice before the child does, which asks the parent to stop.
STOPPING = """
import os, signal, time
from ml_collections import ConfigDict

def get_config():
    with open({count!r}, "a") as file:
        file.write("x")
    if os.path.getsize({count!r}) == 3:
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)
    return ConfigDict(dict(sources=(dict(name="a", kind="jsonl", path={path!r}),),
                           sequence_lengths=(8,), tokenizer=dict(vocab_size=300)))
"""


@pytest.fixture
def chain(tiny_data, run_config, tmp_path) -> pathlib.Path:
    """The config of a chain that prepares the small data set and trains on it."""
    (tmp_path / "data.py").write_text(
        DATA_CONFIG.format(path=str(tiny_data.parent / "tales.jsonl"))
    )
    path = tmp_path / "chain.py"
    path.write_text(CHAIN.format(data=str(tmp_path / "data.py"), run=str(run_config)))
    return path


@pytest.fixture
def instar(monkeypatch, capfd):
    """Runs a chain in this process, its steps in others; gives (exit code, what was said)."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)

    def run(config: pathlib.Path, workdir: pathlib.Path, *words: str) -> tuple[int, str]:
        try:
            code = cli.main(
                ["pipeline", "--config", str(config), "--workdir", str(workdir), *words]
            )
        except SystemExit as stopped:
            code = stopped.code
        return code, capfd.readouterr().err

    return run


def records(workdir: pathlib.Path) -> dict:
    return json.loads((workdir / "pipeline.json").read_text())


def test_killed_and_called_again_it_comes_to_what_the_commands_come_to(
    chain, finished_run, instar, tmp_path
):
    workdir = tmp_path / "all"
    words = ["pipeline", "--config", str(chain), "--workdir", str(workdir)]
    process = subprocess.Popen(
        [sys.executable, "-m", "instar", *words], env=environment(), stderr=subprocess.PIPE
    )
    log = workdir / "run/metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 2):
        time.sleep(0.002)
    process.kill()
    process.stderr.read()  # to the end, which comes when the step is gone as well
    assert process.wait() == -signal.SIGKILL
    killed = records(workdir)
    assert (killed["data"]["status"], killed["run"]["status"]) == ("done", "running")

    code, said = instar(chain, workdir)
    assert code == 0, said
    assert "data: done before" in said and "run: done in" in said and "together" in said
    assert (workdir / "report.html").exists()
    assert losses(workdir / "run") == losses(finished_run)
    assert final_fingerprint(workdir / "run") == final_fingerprint(finished_run)
    record = records(workdir)["run"]
    assert record["starts"] == 2 and record["started"] == killed["run"]["started"]
    assert record["seconds"] > killed["run"].get("seconds", 0) and record["status"] == "done"

    code, said = instar(chain, workdir)
    assert code == 0 and "run: done before" in said
    # What a restart may change does not matter; what is computed does.
    assert instar(chain, workdir, "--config.stages.1.overrides.checkpoint.keep_steps=5")[0] == 0
    code, said = instar(chain, workdir, "--config.stages.1.overrides.steps=13")
    assert code == 2 and "step run of" in said and "steps (was 12, is 13)" in said
    code, said = instar(chain, workdir, "--config.stages.0.command=pretrain")
    assert code == 2 and records(workdir)["run"] == record


def test_sigterm_is_handed_on_and_its_exit_code_too(instar, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a film"}\n' * 9)
    step = STOPPING.format(count=str(tmp_path / "count"), path=str(tmp_path / "a.jsonl"))
    (tmp_path / "step.py").write_text(step)
    config = tmp_path / "chain.py"
    stages = [{"name": "data", "command": "prepare", "config": str(tmp_path / "step.py")}]
    config.write_text(
        f"from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({{'stages': {stages!r}}})\n"
    )
    before = signal.getsignal(signal.SIGTERM)
    code, said = instar(config, tmp_path / "all")
    assert code == 143 and "goes on from here" in said
    assert records(tmp_path / "all")["data"]["status"] == "stopped"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("1.overrides.optimizer.learing_rate=1", "did you mean 'optimizer.learning_rate'?"),
        ("1.overrides.batch.size=0", "step run: batch.size (0) must be"),
        ("1.overrides.optimizer=1", "step run: optimizer: expected"),
        ("1.config=gone.py", "step run: config file gone.py does not exist"),
        ("1.config=None", "step run: stages.config must name a config file"),
        ("1.command=pretrian", "did you mean 'pretrain'?"),
        ("1.command=pipeline", "there is no command 'pipeline'"),
        ("1.command=report", "step run: report takes no config"),
        ("1.options.to=x", "step run: pretrain takes a config"),
        ("1.name=data", "different names"),
        ("1.name=../x", "a step's name becomes a folder"),
        ("1.overrides.data.path.x=1", "has nothing below it"),
    ],
)
def test_a_mistake_in_any_step_is_found_before_the_first_runs(
    chain, instar, tmp_path, change, message
):
    code, said = instar(chain, tmp_path / "all", f"--config.stages.{change}")
    assert code == 2 and message in said and said.count("\n") == 1
    assert not (tmp_path / "all").exists()


def test_a_step_that_an_earlier_release_did_is_done(chain, tmp_path):
    """Which knew less to be told."""
    step = plan(load(str(chain), [], PipelineConfig).stages[0], str(tmp_path / "all"))
    told = {key: value for key, value in step.told.items() if key != "record_tokens"}
    pathlib.Path(step.folder).mkdir(parents=True)
    records = Records(epath.Path(tmp_path) / "all" / RECORD)
    records.note({step.name: {"command": step.command, "told": told, "status": "done"}})
    records.check(step)
    records.note({step.name: {"told": told | {"seed": 7}}})
    with pytest.raises(UserError, match=r"another config: seed \(was 7, is 0\)"):
        records.check(step)


def test_a_command_with_options_is_told_them_as_words():
    options = {"from_": "{workdir}/a", "to": "{workdir}/b", "dtype": "bfloat16"}
    step = plan(StepConfig("model", "import", options=options), "runs/x")
    assert step.words == ("import", "--from=runs/x/a", "--to=runs/x/b", "--dtype=bfloat16")
    assert step.told == {"from_": "runs/x/a", "to": "runs/x/b", "dtype": "bfloat16"}
    options = {"model": "m", "prompts": ("--a", "b c"), "stop": ("x", "y"), "chat": True}
    step = plan(StepConfig("say", "generate", options=options), ".")
    assert step.words[1:] == (
        "--model=m",
        "--stop=x",
        "--stop=y",
        "--chat=True",
        "--",
        "--a",
        "b c",
    )
    assert step.told["prompts"] == ["--a", "b c"] and step.told["chat"] is True
    with pytest.raises(UserError, match="step model: --to is missing"):
        plan(StepConfig("model", "import", options={"from_": "a"}), ".")


def test_every_option_of_a_step_that_is_done_counts(tmp_path):
    kept = Records(epath.Path(tmp_path) / RECORD)
    steps = [
        plan(StepConfig("out", "export", options={"checkpoint": name, "to": "x"}), ".")
        for name in ("a", "b")
    ]
    running = kept.start(steps[0])
    kept.check(steps[1])  # it is not done
    running.end(0)
    kept.check(steps[0])
    with pytest.raises(UserError, match=r"step out of .* checkpoint .was 'a', is 'b'"):
        kept.check(steps[1])


@pytest.mark.parametrize(("code", "status"), [(0, "done"), (1, "failed"), (143, "stopped")])
def test_a_step_of_the_first_process_alone_is_waited_for(tmp_path, monkeypatch, code, status):
    monkeypatch.setattr(pipeline, "LOOK_SECONDS", 0.01)
    step = plan(StepConfig("model", "import", options={"from_": "a", "to": "b"}), ".")
    path = epath.Path(tmp_path) / RECORD
    first, second = (Records(path, primary) for primary in (True, False))
    ended = []

    def wait() -> None:
        try:
            pipeline._wait(step, second, pipeline.Children())
            ended.append("done")
        except SystemExit as error:
            ended.append(error.code)

    waiting = threading.Thread(target=wait)
    waiting.start()
    running = first.start(step)
    time.sleep(0.1)
    assert waiting.is_alive()
    running.end(code)
    waiting.join(5)
    assert ended == ["done" if code == 0 else 1]
    assert first.status("model") == status


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/pipeline").glob("*.py")), ids=lambda path: path.stem
)
def test_every_step_of_a_chain_that_is_shipped_fits_its_command(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for step in load(str(path), [], PipelineConfig).stages:
        plan(step, "runs/quickstart")


def test_a_step_takes_a_recipe_of_a_size(monkeypatch):
    monkeypatch.chdir(ROOT)
    step = StepConfig("base", "pretrain", "configs/pretrain/opt.py:125m")
    assert plan(step, "runs/x").told["model"]["size"] == "125m"
    assert plan(step, "runs/x").words[1:3] == ("--config", "configs/pretrain/opt.py:125m")
    with pytest.raises(UserError, match=r"step base: config file .* needs its size behind a colon"):
        plan(StepConfig("base", "pretrain", "configs/pretrain/opt.py"), "runs/x")


def test_paths_below_home_move_with_the_pipelines_workdir(tmp_path, run_config):
    config = StepConfig(
        "run",
        "pretrain",
        str(run_config),
        overrides=dict(data=dict(path="runs/here/data"), evaluation=dict(prompts=("runs/here",))),
    )
    step = plan(config, str(tmp_path), home="runs/here")
    assert step.told["data"]["path"] == f"{tmp_path}/data"
    assert step.told["evaluation"]["prompts"] == [str(tmp_path)]
    assert f"--config.data.path={tmp_path}/data" in step.words
    assert plan(config, str(tmp_path)).told["data"]["path"] == "runs/here/data"
