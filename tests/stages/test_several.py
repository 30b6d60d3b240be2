"""Runs of several processes: one dies or hangs, all end, and another number of them goes on."""

import json
import pathlib
import re
import signal

import numpy as np
import pytest
from one_of_several import hash_of
from runs import environment, losses
from several import run_several

from instar.data.dataset import TokenDataset
from instar.data.rows import TrainingRows
from instar.errors import RestartError

SCRIPT = pathlib.Path(__file__).with_name("one_of_several.py")
ABORTED = -signal.SIGABRT
STEPS, ROWS = 12, 8  # of the run, and of a step
SILENT = "--config.evaluation.prompts=[]"
SELDOM = ("--config.evaluation.every=100", SILENT)


def read_stream(folder: pathlib.Path) -> list[tuple[int, str]]:
    """The rows that the processes of one start have read, in order, each with its hash."""
    lines = [line.split() for path in folder.iterdir() for line in path.read_text().splitlines()]
    return sorted((int(number), content) for number, content in lines)


def expected_stream(data: pathlib.Path, first: int, last: int) -> list[tuple[int, str]]:
    """Rows `first` to `last` of the run, each once, from the data set itself."""
    rows = TrainingRows(TokenDataset.open(str(data)), sequence_length=16, weights={}, seed=0)
    arrays = rows.rows(np.arange(first, last))
    hashes = [hash_of({n: v[index] for n, v in arrays.items()}) for index in range(last - first)]
    return list(zip(range(first, last), hashes, strict=True))


def check_stream(folder: pathlib.Path, data: pathlib.Path, first: int, last: int) -> None:
    """Steps `first` + 1 to `last` were read, each row once; and of later ones nothing else.

    Before a process knows that another is gone, it may have gone a few steps ahead.
    """
    read = read_stream(folder)
    expected = expected_stream(data, ROWS * first, ROWS * STEPS)
    certain = ROWS * (last - first)
    assert read[:certain] == expected[:certain]
    assert len(set(read)) == len(read) and set(read) <= set(expected)


def evaluated(workdir: pathlib.Path) -> float:
    """The loss of the evaluation after step 6, of which one process writes."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    (loss,) = [line["eval/loss"] for line in lines if line["step"] == 6 and "eval/loss" in line]
    return loss


@pytest.mark.exhaustive
def test_four_processes_then_two_then_one(run_config, finished_run, tiny_data, tmp_path):
    workdir = tmp_path / "run"

    def start(processes: int, fate: str, mesh: str) -> tuple[list[int], str]:
        stream = tmp_path / f"stream-{processes}"
        arguments = ("pretrain", "--config", run_config, "--workdir", workdir, mesh, SILENT)
        ended = run_several(range(processes), SCRIPT, stream, fate, *arguments, env=environment())
        return [code for code, _ in ended], "".join(output for _, output in ended)

    # Four: one is killed in the sixth step, after the checkpoint of the fourth.
    codes, said = start(4, "2:killed:6:4", "--config.mesh.fsdp=4")
    assert codes[2] == -signal.SIGKILL, said
    assert codes[:2] + codes[3:] == [RestartError.code] * 3, said
    assert said.count("process 2 on ") == 3 and said.count("is gone") == 3
    check_stream(tmp_path / "stream-4", tiny_data, 0, 4)

    # Two go on, and evaluate; the first, which all others depend on, is killed in step 10.
    codes, said = start(2, "0:killed:6:8", "--config.mesh.data=2")
    assert "resumed from the checkpoint of step 4" in said
    # Where jax is the first to see that the first process is gone, it aborts.
    assert codes[0] == -signal.SIGKILL and codes[1] in (RestartError.code, ABORTED), said
    check_stream(tmp_path / "stream-2", tiny_data, 4, 8)
    assert evaluated(workdir) == pytest.approx(evaluated(finished_run), rel=1e-5)

    # One ends what they began.
    codes, said = start(1, "lives", "--config.mesh.data=1")
    assert codes == [0], said
    assert "resumed from the checkpoint of step 8" in said
    check_stream(tmp_path / "stream-1", tiny_data, 8, STEPS)
    assert losses(workdir) == pytest.approx(losses(finished_run), rel=1e-5)


@pytest.mark.exhaustive
def test_a_process_that_hangs_ends_all(run_config, tmp_path):
    arguments = ("pretrain", "--config", run_config, "--workdir", tmp_path / "run")
    options = ("--config.mesh.data=2", "--config.failure.hang_minutes=0.3", *SELDOM)
    words = (SCRIPT, tmp_path / "stream", "1:hangs:3", *arguments, *options)
    for code, output in run_several(range(2), *words, env=environment()):
        assert code == RestartError.code, output
        # What a step gives is looked at a step or two after it.
        assert re.search(r"step [234] has been waited for .*failure\.hang_minutes", output), output
