"""The real command on a tiny model: what it writes, how it stops, and how it goes on."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from runs import environment, final_fingerprint, instar, losses

from instar import cli
from instar import load as instar_load

ROOT = pathlib.Path(__file__).parents[2]


def start(*arguments: object, devices: int = 1, **variables: str) -> subprocess.Popen:
    """Starts `instar ARGUMENTS` and returns at once."""
    return subprocess.Popen(
        [sys.executable, "-m", "instar", *map(str, arguments)],
        env=environment(devices) | variables,
        stderr=subprocess.PIPE,
        text=True,
    )


def copy_run(source: pathlib.Path, target: pathlib.Path, *, without: tuple[int, ...] = ()) -> None:
    """Copies a run, with some of its checkpoints left out."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    for step in without:
        shutil.rmtree(target / "checkpoints" / str(step))


@pytest.mark.smoke
def test_a_run_leaves_its_log_its_checkpoints_and_a_report(finished_run, tiny_data):
    assert list(losses(finished_run)) == list(range(1, 13))
    lines = [json.loads(x) for x in (finished_run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "eval/bits_per_byte" in line]
    assert [line["step"] for line in evaluated] == [6, 12]
    assert evaluated[1]["eval/loss"] < evaluated[0]["eval/loss"]
    assert {"grad_norm", "learning_rate", "tokens", "epoch/tales"} <= lines[-2].keys()
    samples = [json.loads(x) for x in (finished_run / "samples.jsonl").read_text().splitlines()]
    assert [(s["step"], s["prompt"]) for s in samples] == [(6, "the film"), (12, "the film")]
    kept = sorted(int(p.name) for p in (finished_run / "checkpoints").iterdir())
    assert kept == [4, 8, 12]
    lineage = json.loads((finished_run / "checkpoints/12/lineage/lineage.json").read_text())
    assert lineage["stage"] == "pretrain" and lineage["tokens"] == 12 * 8 * 16
    manifest = json.loads((tiny_data / "manifest.json").read_text())
    assert lineage["tokenizer"] == manifest["tokenizer"] and len(lineage["data"]) == 64
    assert any((finished_run / "tensorboard").iterdir())
    report = (finished_run / "report.html").read_text()
    assert "<svg" in report and "the film" in report and "http://" not in report.split("<svg")[0]


def test_started_again_when_done_it_changes_nothing(run_config, finished_run, tmp_path):
    copy_run(finished_run, tmp_path)
    done = instar("pretrain", "--config", run_config, "--workdir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path) == losses(finished_run)


def test_sigterm_finishes_the_step_saves_and_exits_143(run_config, finished_run, tmp_path):
    arguments = ("pretrain", "--config", run_config, "--workdir", tmp_path)
    # Far more steps than it will do; the schedule's end is pinned to that of the short run.
    many = ("--config.checkpoint.keep_steps=None", "--config.failure.spike_window=50")
    process = start(*arguments, *many)
    log = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 3):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.fail("the run was over before the signal came")
    assert process.returncode == 143, stderr
    assert "saved in" in stderr
    stopped = max(losses(tmp_path))
    assert stopped < 12 and (tmp_path / "checkpoints" / str(stopped)).exists()
    done = instar(*arguments, *many)
    assert done.returncode == 0, done.stderr
    assert f"resumed from the checkpoint of step {stopped}" in done.stderr
    assert losses(tmp_path) == losses(finished_run)
    assert final_fingerprint(tmp_path) == final_fingerprint(finished_run)


def test_a_damaged_checkpoint_costs_no_more_than_itself(run_config, finished_run, tmp_path):
    copy_run(finished_run, tmp_path, without=(12,))
    # Of the files that hold numbers, and not names or shardings.
    files = (tmp_path / "checkpoints/8/params/ocdbt.process_0/d").iterdir()
    largest = max(files, key=lambda path: path.stat().st_size)
    damaged = bytearray(largest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    largest.write_bytes(damaged)
    done = instar("pretrain", "--config", run_config, "--workdir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "damaged" in done.stderr and "step 8" in done.stderr
    assert "resumed from the checkpoint of step 4" in done.stderr
    assert losses(tmp_path) == losses(finished_run)
    assert final_fingerprint(tmp_path) == final_fingerprint(finished_run)


def test_another_mesh_goes_on_from_the_same_checkpoint(run_config, finished_run, tmp_path):
    copy_run(finished_run, tmp_path, without=(8, 12))
    mesh = [f"--config.mesh.{axis}=2" for axis in ("fsdp", "tensor", "context")]
    done = instar("pretrain", "--config", run_config, "--workdir", tmp_path, *mesh, devices=8)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path) == pytest.approx(losses(finished_run), rel=1e-4)


@pytest.mark.exhaustive
def test_a_mixtral_trains_on_a_mesh_and_goes_on_bit_for_bit(run_config, tmp_path):
    """Its routers' biases, which no gradient moves, are in the checkpoint too."""
    arguments = ("pretrain", "--config", run_config, "--workdir", tmp_path, "--config.steps=8")
    model = {"family": "mixtral", "experts": 4, "router_bias": True}
    options = [f"--config.model.{name}={value}" for name, value in model.items()]
    options += ["--config.router.balance_loss=0.01", "--config.evaluation.prompts=[]"]
    options += ["--config.mesh.fsdp=1", "--config.mesh.expert=2"]
    done = instar(*arguments, *options, devices=2)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    assert all(line["max_load"] >= 1 >= line["min_load"] for line in trained)
    assert all(line["balance_loss"] > 0.9 for line in trained)
    whole, fingerprint = losses(tmp_path), final_fingerprint(tmp_path, 8)
    bias = instar_load(tmp_path).params["group_0"]["layer_0"]["mlp"]["choice_bias"]
    assert (abs(bias) > 1e-3).any()
    shutil.rmtree(tmp_path / "checkpoints/8")
    done = instar(*arguments, *options, devices=2)
    assert "resumed from the checkpoint of step 4" in done.stderr
    assert (losses(tmp_path), final_fingerprint(tmp_path, 8)) == (whole, fingerprint)


REFUSED = {
    "another config": ("--config.seed=1", "seed (was 0, is 1)"),
    "heads and width": ("--config.model.heads=3", "model.heads"),
    "sequence and positions": ("--config.model.max_positions=8", "model.max_positions"),
    "batch and microbatch": ("--config.batch.microbatch=3", "batch.microbatch"),
    "mesh and devices": ("--config.mesh.tensor=3", "mesh"),
    "attention and devices": ("--config.execution.attention=splash", "is for devices of TPU"),
    "prompts and positions": (
        "--config.evaluation.prompts.0=the film was a quiet story about people who never said why",
        "evaluation.prompts",
    ),
    "texts without a prefix": ("--config.model.family=chatglm1", "begin with a prefix"),
    "length that is not packed": ("--config.data.sequence_length=32", "sequence_lengths"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_and_nothing_is_overwritten(
    case, run_config, finished_run, tmp_path, capsys
):
    copy_run(finished_run, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    override, named = REFUSED[case]
    code = cli.main(["pretrain", "--config", str(run_config), "--workdir", str(tmp_path), override])
    stderr = capsys.readouterr().err
    assert code == 2
    assert stderr.startswith("instar: error: ") and stderr.count("\n") == 1
    assert named in stderr
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_workdir_that_cannot_be_written(run_config, tmp_path):
    (tmp_path / "file").write_text("")
    done = instar("pretrain", "--config", run_config, "--workdir", tmp_path / "file" / "run")
    assert done.returncode == 2 and "which is a file: name a folder" in done.stderr


def test_a_full_disk_ends_the_run_with_a_sentence(run_config, tmp_path):
    limited = (
        "import resource, signal, sys; from instar import cli; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); "
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    arguments = ["pretrain", "--config", str(run_config), "--workdir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", limited, *arguments],
        env=environment() | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "could not be written" in done.stderr and "Traceback" not in done.stderr
    assert os.listdir(tmp_path / "checkpoints") == [] or not any(
        p.name.isdigit() for p in (tmp_path / "checkpoints").iterdir()
    )


def test_a_finished_run_is_loaded_continued_and_exported(finished_run, tmp_path):
    """Its checkpoint says all of its model; no config and no data set is asked."""
    model = instar_load(finished_run)
    assert model.tokenizer is not None and model.spec.depth == 2
    done = instar("generate", "--model", finished_run, "--max_new_tokens=4", "the film")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt"] == "the film"
    done = instar("export", "--checkpoint", finished_run, "--to", tmp_path / "folder")
    assert done.returncode == 0, done.stderr
    again = instar_load(tmp_path / "folder")
    tokens = [model.encode("the film was")]
    assert (again(tokens) == model(tokens)).all()
