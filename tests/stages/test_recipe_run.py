"""A published recipe by the real command, at a size that a CPU trains in seconds."""

import json
import pathlib

import pytest
from etils import epath
from runs import instar

from instar.config import load
from instar.errors import UserError
from instar.stages.pretrain import PretrainConfig
from instar.workdir import claim

RECIPE = pathlib.Path(__file__).parents[2] / "configs/pretrain/gpt3.py"
SMALL = (
    *("--config.model.depth=2", "--config.model.width=16", "--config.model.heads=2"),
    *("--config.model.vocab_size=None", "--config.data.sequence_length=16"),
    "--config.execution.loss_chunk=8",
)
# 6 steps of 4, 4, 8, 12, 12, 12 rows: after the first 6 rows there are 8, after 12 as many.
GROWING = (
    *("--config.batch.size=12", "--config.batch.microbatch=4", "--config.steps=6"),
    *("--config.batch.ramp.start=4", "--config.batch.ramp.increment=4"),
    *("--config.batch.ramp.rows=12", "--config.schedule.warmup_rows=16"),
    "--config.schedule.decay_rows=40",
    *("--config.evaluation.rows=16", "--config.logging.tensorboard=false"),
)


def test_gpt3_in_small_grows_its_batch_in_one_program(tiny_data, tmp_path):
    words = (*SMALL, *GROWING, f"--config.data.path={tiny_data}")
    start = ("pretrain", "--config", f"{RECIPE}:125m", "--workdir", tmp_path / "run")
    done = instar(*start, *words, env={"JAX_LOG_COMPILES": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Finished XLA compilation of jit(step)") == 1
    # By rows read: of 16 of the warm-up 4, 8 and 16; then the cosine at 0, 1/2 and 1 of 24.
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert rates == pytest.approx([6e-4 * x for x in (0.25, 0.5, 1.0, 1.0, 0.55, 0.1)])
    lineage = json.loads((tmp_path / "run/checkpoints/6/lineage/lineage.json").read_text())
    assert lineage["tokens"] == (4 + 4 + 8 + 12 + 12 + 12) * 16
    # The folder belongs to the recipe of this size, and no other would go on there.
    overrides = [word.removeprefix("--config.").split("=") for word in words if "=" in word]
    same, other = (load(f"{RECIPE}:{size}", overrides, PretrainConfig) for size in ("125m", "350m"))
    folder = epath.Path(tmp_path / "run")
    claim(folder, same)
    with pytest.raises(UserError, match=r"model.size .was '125m', is '350m'."):
        claim(folder, other)


def test_an_argument_is_asked_for_by_the_command(tmp_path):
    done = instar("pretrain", "--config", RECIPE, "--workdir", tmp_path / "run")
    assert done.returncode == 2
    assert "needs its size behind a colon: one of 125m, 350m, 760m, 1.3b" in done.stderr
    assert not (tmp_path / "run").exists()
