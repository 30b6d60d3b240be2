"""Metrics from the device to files: late enough never to wait, early enough to survive a kill.

`MetricsQueue` holds what the device has not finished yet; `MetricsWriter` appends what it has to
`metrics.jsonl` and `samples.jsonl` of the run, and to TensorBoard and Weights & Biases.

A line of `metrics.jsonl` is one JSON object: `{"step": 7, "time": 1767225600.0, "loss": 3.2, ...}`
with `time` in Unix seconds. Numbers that are not finite are the strings "nan", "inf" and "-inf",
which `read_metrics` turns back.
"""

import hashlib
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import jax
from etils import epath

from instar.errors import UserError
from instar.training.logs import AppendLog, RewriteLog, open_log, read_records

METRICS, SAMPLES, TENSORBOARD = "metrics.jsonl", "samples.jsonl", "tensorboard"


@dataclass(frozen=True)
class LoggingConfig:
    """Which steps are logged, and where to besides the run's own files.

    Every `every`-th step is written. `tensorboard` writes event files under tensorboard/.
    `wandb_project` names a project of Weights & Biases, where that package is installed.
    """

    every: int = 1
    tensorboard: bool = True
    wandb_project: str | None = None

    def check(self) -> None:
        if self.every < 1:
            raise UserError(f"logging.every must be at least 1, not {self.every}")


class MetricsQueue:
    """Metrics of the last few steps, still on the device.

    A step is dispatched long before it is done; reading its loss at once would make the host wait
    and leave the device idle afterwards. So metrics are released when they are ready, or, so that
    the host cannot run ahead without bound, when `lag` later steps have been put.
    """

    def __init__(self, lag: int = 2):
        if lag < 0:
            raise ValueError(f"lag must not be negative, not {lag}")
        self._lag = lag
        self._waiting: deque[tuple[int, dict[str, jax.Array]]] = deque()

    def put(self, step: int, metrics: Any) -> None:
        """Takes a step's metrics: a pytree of scalar arrays; nested keys are joined by "/"."""
        flat = dict(_flatten(metrics))
        for value in flat.values():
            if hasattr(value, "copy_to_host_async"):
                value.copy_to_host_async()
        self._waiting.append((step, flat))

    def ready(self) -> list[tuple[int, dict[str, float]]]:
        """Releases, in order, the steps that are done or more than `lag` steps old."""
        released = []
        while self._waiting and (len(self._waiting) > self._lag or _is_ready(self._waiting[0][1])):
            released.append(self._release())
        return released

    def drain(self) -> list[tuple[int, dict[str, float]]]:
        """Waits for all steps and releases them, as before a checkpoint or at the end."""
        return [self._release() for _ in range(len(self._waiting))]

    def _release(self) -> tuple[int, dict[str, float]]:
        step, metrics = self._waiting.popleft()
        return step, {name: float(value) for name, value in jax.device_get(metrics).items()}


class Sink(Protocol):
    """Somewhere that scalars go."""

    def write(self, step: int, scalars: Mapping[str, float], now: float) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """The run's log on disk, written by one process.

    On resume, lines of steps after `resume_step` and torn lines are dropped, so that the files of a
    resumed run read like those of an uninterrupted one; where nothing was restored (`resume_step`
    0) they begin anew. Local files are flushed at every write: a kill loses at most the line that
    is being written. Object stores cannot append: there the files are rewritten every half minute
    and at `flush`.

    Args:
      workdir: the run's folder, local or remote; made if missing.
      resume_step: the step of the checkpoint that the run goes on from, 0 for a fresh start.
      primary: whether this process writes at all; process 0 alone should.
      config: where else to write.
      clock: Unix time in seconds.

    Raises:
      UserError: Weights & Biases is asked for and not installed, or a file cannot be opened.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        resume_step: int,
        primary: bool = True,
        config: LoggingConfig | None = None,
        clock: Callable[[], float] = time.time,
    ):
        config, workdir = config or LoggingConfig(), epath.Path(workdir)
        self._clock, self._sinks, self._samples = clock, [], None
        if not primary:
            return
        # Refused before a file is touched.
        wandb = _import_wandb() if config.wandb_project is not None else None
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            self._sinks.append(_JsonSink(open_log(workdir / METRICS, resume_step)))
            self._samples = open_log(workdir / SAMPLES, resume_step)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"the log of {workdir} cannot be written ({reason})") from None
        if config.tensorboard:
            self._sinks.append(_TensorBoardSink(workdir / TENSORBOARD, resume_step))
        if wandb is not None:
            self._sinks.append(_WandbSink(wandb, workdir, config.wandb_project))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds one line of a step.

        Raises:
          RunError: it cannot be written (the disk is full).
        """
        now = self._clock()
        values = {name: float(value) for name, value in scalars.items()}
        for sink in self._sinks:
            sink.write(step, values, now)

    def samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Adds JSON-ready samples ("prompt", "completion", ...) of a step, one line each."""
        if self._samples is not None:
            for sample in samples:
                self._samples.add({"step": step, **sample})

    def flush(self) -> None:
        """Brings remote files up to date; to be called before a checkpoint is saved."""
        for log in self._logs():
            log.flush()

    def close(self) -> None:
        """Writes what is left. Safe to call twice."""
        for closing in (*self._sinks, *([self._samples] if self._samples else [])):
            closing.close()
        self._sinks, self._samples = [], None

    def _logs(self) -> Iterator["AppendLog | RewriteLog"]:
        yield from (sink.log for sink in self._sinks if isinstance(sink, _JsonSink))
        if self._samples is not None:
            yield self._samples


def read_metrics(workdir: epath.PathLike) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl in order, non-finite numbers restored; [] where none."""
    return [
        {name: float(value) for name, value in record.items()}
        for record in read_records(epath.Path(workdir) / METRICS)
    ]


# ---------------------------------------------------------------------------------------------
# Sinks
# ---------------------------------------------------------------------------------------------


class _JsonSink:
    def __init__(self, log: AppendLog | RewriteLog):
        self.log = log

    def write(self, step: int, scalars: Mapping[str, float], now: float) -> None:
        self.log.add({"step": step, "time": round(now, 3), **scalars})

    def close(self) -> None:
        self.log.close()


class _TensorBoardSink:
    """TensorBoard event files; one event holds all scalars of a step, which is ten times cheaper.

    `purge_step` makes TensorBoard forget what an earlier start wrote from that step on. Numbers
    that are not finite are left out: they have no place on a curve.
    """

    def __init__(self, path: epath.Path, resume_step: int):
        from tensorboardX import SummaryWriter
        from tensorboardX.proto.summary_pb2 import Summary

        self._summary = Summary
        try:
            # The time in a file's name is in seconds, which two starts can share.
            suffix = f".{len(list(path.glob('events.*')))}"
            self._writer = SummaryWriter(
                os.fspath(path),
                purge_step=resume_step + 1,
                flush_secs=10,
                filename_suffix=suffix,
            )
        except ImportError as error:
            raise UserError(
                f"TensorBoard files cannot be written to {path} ({error}): install that package, "
                "or set logging.tensorboard = False"
            ) from None

    def write(self, step: int, scalars: Mapping[str, float], now: float) -> None:
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in scalars.items()
            if math.isfinite(value)
        ]
        self._writer.file_writer.add_summary(self._summary(value=values), step, now)

    def close(self) -> None:
        self._writer.close()


class _WandbSink:
    """Weights & Biases; a resumed run goes on under the same id.

    Its own step counter only rises, so that steps repeated after a resume would be refused: the
    step is a metric instead, and the x axis of all others.
    """

    def __init__(self, wandb: ModuleType, workdir: epath.Path, project: str):
        identity = hashlib.sha256(os.fspath(workdir.absolute()).encode()).hexdigest()[:16]
        folder = None if "://" in os.fspath(workdir) else os.fspath(workdir)
        self._run = wandb.init(
            project=project, name=workdir.name, id=identity, resume="allow", dir=folder
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: Mapping[str, float], now: float) -> None:
        self._run.log({"step": step, **scalars})

    def close(self) -> None:
        self._run.finish()


def _import_wandb() -> ModuleType:
    try:
        import wandb
    except ImportError:
        raise UserError(
            "logging.wandb_project is set, but wandb is not installed: install it with "
            "`pip install wandb`, or set logging.wandb_project = None"
        ) from None
    return wandb


def _flatten(tree: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def _is_ready(metrics: Mapping[str, Any]) -> bool:
    return all(value.is_ready() for value in metrics.values() if hasattr(value, "is_ready"))
