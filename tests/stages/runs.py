"""Runs of the real command, in processes of their own, on a data set that is quick to train on."""

import json
import os
import pathlib
import random
import subprocess
import sys

from compilation import xla_flags

WORDS = "the film was a quiet story about people who never said what they meant and why".split()

DATA_CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict(dict(
        sources=(dict(name="tales", kind="jsonl", path={path!r}),),
        tokenizer=dict(vocab_size=320),
        sequence_lengths=(16,),
        held_out=0.1,
    ))
"""

RUN_CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict(dict(
        data=dict(path={path!r}, sequence_length=16),
        model=dict(family="llama", depth=2, width=16, heads=2, mlp_width=32, tied=True),
        batch=dict(size=8),
        steps=12,
        optimizer=dict(name="muon", learning_rate=1e-2),
        schedule=dict(kind="linear", warmup_steps=2),
        checkpoint=dict(minutes=None, keep_steps=4),
        evaluation=dict(every=6, rows=16, prompts=("the film",), sampling=dict(max_new_tokens=4)),
    ))
"""

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({settings!r})
"""


def environment(devices: int = 1) -> dict[str, str]:
    """That of a fresh process with `devices` CPU devices."""
    return os.environ | {"XLA_FLAGS": xla_flags(devices), "JAX_PLATFORMS": "cpu"}


def instar(*arguments: object, devices: int = 1, **options) -> subprocess.CompletedProcess:
    """Runs `instar ARGUMENTS` to its end."""
    command = [sys.executable, "-m", "instar", *map(str, arguments)]
    return run(command, devices=devices, **options)


def run(command: list[str], devices: int = 1, **options) -> subprocess.CompletedProcess:
    """Runs a command to its end, and keeps what it prints."""
    env = environment(devices) | options.pop("env", {})
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=300, check=False, **options
    )


def write_config(path: pathlib.Path, settings: dict) -> pathlib.Path:
    """Writes a config file that says `settings`."""
    path.write_text(CONFIG.format(settings=settings))
    return path


def logged(workdir: pathlib.Path, key: str) -> list[dict]:
    """The metrics of each step at which there is one of that name."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if key in line]


def losses(workdir: pathlib.Path) -> dict[int, float]:
    """The training loss of each step, as the run wrote it; no step may stand there twice."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    steps = [line["step"] for line in trained]
    assert len(set(steps)) == len(steps)
    return {line["step"]: line["loss"] for line in trained}


def final_fingerprint(workdir: pathlib.Path, step: int = 12) -> str:
    """The fingerprint of a run's last state: equal iff all its arrays are, bit for bit."""
    path = workdir / "checkpoints" / str(step) / "lineage" / "lineage.json"
    return json.loads(path.read_text())["fingerprint"]


def prepare_tiny_data(folder: pathlib.Path) -> pathlib.Path:
    """400 short documents, prepared by `instar prepare` for rows of 16 tokens."""
    rng = random.Random(0)
    with (folder / "tales.jsonl").open("w") as file:
        for number in range(400):
            text = " ".join(rng.choices(WORDS, k=rng.randint(3, 30)))
            file.write(json.dumps({"text": f"{number}. {text}"}) + "\n")
    config = folder / "data.py"
    config.write_text(DATA_CONFIG.format(path=str(folder / "tales.jsonl")))
    done = instar("prepare", "--config", config, "--workdir", folder / "data")
    assert done.returncode == 0, done.stderr
    return folder / "data"


def write_run_config(data: pathlib.Path) -> pathlib.Path:
    """The config file of a run of 12 steps on prepared data."""
    path = data.parent / "run.py"
    path.write_text(RUN_CONFIG.format(path=str(data)))
    return path
