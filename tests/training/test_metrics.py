"""Metrics: the queue never waits for the newest step, and the files survive kills and resumes."""

import json
import math
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from tensorboardX.proto.event_pb2 import Event

from instar.errors import RunError, UserError
from instar.training.logs import RewriteLog, read_records
from instar.training.metrics import LoggingConfig, MetricsQueue, MetricsWriter, read_metrics

FILES_ONLY = LoggingConfig(tensorboard=False)


@jax.jit
def slow(x: jax.Array) -> jax.Array:
    """A few tenths of a second of work, dispatched asynchronously."""
    return jax.lax.fori_loop(0, 20, lambda _, y: y @ x / 768.0, x).sum()


# ---------------------------------------------------------------------------------------------
# The queue
# ---------------------------------------------------------------------------------------------


def test_queue_does_not_wait_for_a_step_under_way():
    x = jnp.ones((768, 768))
    slow(x).block_until_ready()
    queue = MetricsQueue(lag=2)
    loss = slow(x)
    queue.put(1, {"loss": loss})
    released, under_way = queue.ready(), not loss.is_ready()
    assert under_way, "the work was too short for this test"
    assert released == []
    assert queue.drain() == [(1, {"loss": pytest.approx(768.0**2)})]
    assert queue.ready() == queue.drain() == []


def test_queue_holds_no_more_than_its_lag_and_keeps_the_order():
    x = jnp.ones((768, 768))
    queue = MetricsQueue(lag=2)
    for step in (1, 2, 3):
        queue.put(step, {"loss": slow(x)})
    assert [step for step, _ in queue.ready()][:1] == [1]
    assert [step for step, _ in queue.drain()][-1] == 3


def test_queue_releases_what_is_ready_at_once_as_host_floats():
    queue = MetricsQueue(lag=10)
    queue.put(5, {"loss": jnp.float32(2.5), "router": {"load": [jnp.int32(3), np.float64(0.5)]}})
    jax.effects_barrier()
    while not (released := queue.ready()):
        time.sleep(0.001)
    assert released == [(5, {"loss": 2.5, "router/load/0": 3.0, "router/load/1": 0.5})]
    assert all(type(value) is float for value in released[0][1].values())


# ---------------------------------------------------------------------------------------------
# The files
# ---------------------------------------------------------------------------------------------


def write_steps(workdir: Path, first: int, last: int, **options: object) -> None:
    writer = MetricsWriter(workdir, resume_step=first - 1, config=FILES_ONLY, **options)
    for step in range(first, last + 1):
        writer.write(step, {"loss": 1 / step})
        if step % 2 == 0:
            writer.samples(step, [{"prompt": "雨", "completion": f"{step}"}])
    writer.close()


def test_resumed_files_read_like_uninterrupted_ones(tmp_path: Path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write_steps(whole, 1, 8, clock=lambda: 0.0)
    write_steps(broken, 1, 6, clock=lambda: 0.0)
    with (broken / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "lo\xe9')  # torn, inside a character
    write_steps(broken, 5, 8, clock=lambda: 0.0)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


def test_a_start_from_nothing_begins_anew(tmp_path: Path):
    write_steps(tmp_path, 1, 3)
    MetricsWriter(tmp_path, resume_step=0, config=FILES_ONLY).close()
    assert (
        read_metrics(tmp_path) == [] and read_records(epath.Path(tmp_path / "samples.jsonl")) == []
    )


def test_lines_are_on_disk_before_a_kill(tmp_path: Path):
    """SIGKILL right after `write` returns: every line is there and whole."""
    script = (
        "import os, signal, sys\n"
        "from instar.training.metrics import MetricsWriter\n"
        "writer = MetricsWriter(sys.argv[1], resume_step=0)\n"
        "for step in range(1, 101): writer.write(step, {'loss': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 101))


def test_numbers_that_are_not_finite_are_valid_json_and_come_back(tmp_path: Path):
    writer = MetricsWriter(tmp_path, resume_step=0, config=FILES_ONLY)
    writer.write(1, {"loss": math.nan, "grad_norm": math.inf, "low": np.float32(-np.inf)})
    writer.samples(1, [{"prompt": "", "completion": "half a pair: \ud83d", "score": math.nan}])
    writer.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for name in ("metrics.jsonl", "samples.jsonl"):
        json.loads((tmp_path / name).read_text(), parse_constant=refuse)
    (line,) = read_metrics(tmp_path)
    assert math.isnan(line["loss"]) and line["grad_norm"] == math.inf and line["low"] == -math.inf


def test_only_the_primary_process_writes(tmp_path: Path):
    writer = MetricsWriter(tmp_path / "run", resume_step=0, primary=False)
    writer.write(1, {"loss": 1.0})
    writer.samples(1, [{"prompt": "", "completion": ""}])
    writer.flush()
    writer.close()
    assert not (tmp_path / "run").exists()


def test_full_disk_is_a_clear_end(tmp_path: Path):
    """A limit on the size of files stands in for a full disk: the same errors reach us."""
    writer = MetricsWriter(tmp_path, resume_step=0, config=FILES_ONLY)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(RunError, match=r"metrics\.jsonl cannot be written \(File too large\)"):
            for step in range(1, 100):
                writer.write(step, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    whole = [line["step"] for line in read_metrics(tmp_path)]
    assert whole == list(range(1, len(whole) + 1)) and whole


def test_unwritable_workdir_and_missing_wandb_are_refused_first(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        MetricsWriter(tmp_path / "file", resume_step=0)
    if "wandb" not in sys.modules:
        sys.modules["wandb"] = None  # what Python itself records for a package that is not there
        try:
            with pytest.raises(UserError, match="wandb_project"):
                config = LoggingConfig(wandb_project="film")
                MetricsWriter(tmp_path / "run", resume_step=0, config=config)
        finally:
            del sys.modules["wandb"]
        assert not (tmp_path / "run").exists()


def test_stores_that_cannot_append_are_rewritten_now_and_then(tmp_path: Path):
    path, now = epath.Path(tmp_path / "metrics.jsonl"), [0.0]
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')

    def steps() -> list[int]:
        return [record["step"] for record in read_records(path)]

    log = RewriteLog(path, resume_step=1, interval=30, clock=lambda: now[0])
    assert steps() == [1]
    log.add({"step": 2})
    assert steps() == [1], "rewritten too early"
    now[0] = 31.0
    log.add({"step": 3})
    assert steps() == [1, 2, 3]
    log.add({"step": 4})
    log.flush()
    assert steps() == [1, 2, 3, 4]
    log.add({"step": 5})
    log.close()
    assert steps() == [1, 2, 3, 4, 5]


# ---------------------------------------------------------------------------------------------
# TensorBoard
# ---------------------------------------------------------------------------------------------


def events(folder: Path) -> list[Event]:
    """The events of all files in the order in which TensorBoard reads them."""
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_tensorboard_forgets_the_steps_that_are_run_again(tmp_path: Path):
    for first, last in [(1, 6), (5, 8)]:
        writer = MetricsWriter(tmp_path, resume_step=first - 1)
        for step in range(first, last + 1):
            writer.write(step, {"loss": first + step / 10, "grad_norm": math.nan})
        writer.close()
    curve: dict[int, float] = {}
    for event in events(tmp_path / "tensorboard"):
        if event.HasField("session_log"):  # TensorBoard drops what it has from this step on
            curve = {step: value for step, value in curve.items() if step < event.step}
        for value in event.summary.value:
            assert value.tag == "loss"
            curve[event.step] = value.simple_value
    expected = {step: 1 + step / 10 for step in range(1, 5)}
    expected |= {step: 5 + step / 10 for step in range(5, 9)}
    assert curve == pytest.approx(expected)
