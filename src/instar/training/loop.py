"""The one loop of all stages.

A stage says what a step is and where its inputs come from; the loop resumes, runs the steps, shows
and stores metrics without waiting for the device, evaluates, saves, and reacts to failures.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
from etils import epath

from instar.errors import RunError
from instar.training.checkpoint import CheckpointConfig, Checkpointer, Restored
from instar.training.failure import FailureConfig, SpikeDetector, StopRequest
from instar.training.hardware import Peak
from instar.training.metrics import LoggingConfig, MetricsQueue, MetricsWriter
from instar.training.progress import Progress
from instar.training.state import TrainState
from instar.training.step import Step
from instar.training.watchdog import Watchdog

Position = dict[str, int]
Scalars = dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Something to measure every `every` steps and after the last one.

    `run(state)` returns scalars, which are logged as `name/key`, and samples (JSON-ready dicts).
    """

    name: str
    every: int
    run: Callable[[TrainState], tuple[Scalars, list[dict]]]


@dataclass(frozen=True)
class Stage:
    """What a stage gives to the loop.

    Attributes:
      name: "pretrain", "sft", ...
      initialize: makes the state of step 0; `template` is its shapes and shardings.
      step: (state, frozen, inputs) -> (state, metrics): one compiled program or several.
      frozen: what the step reads and never changes; not saved.
      inputs: (step, position) -> the inputs from there on, each with the position after it.
      start: the position of step 0.
      lineage: what a checkpoint says of its origin, given the input position.
      card: what a checkpoint says of the model that its parameters are of, ready for JSON.
      observe: scalars that the host knows of an input position (epochs of each source).
      flops_per_token: model FLOP of a training token; `peak`: those of all devices a second.
      on_start: called once with the step at which the run starts or resumes.
      finish: what becomes of the state after the last step, before it is evaluated and saved.
      watch: reads the scalars of each logged step, may add to them, and says what is alarming.
    """

    name: str
    initialize: Callable[[], TrainState]
    template: TrainState
    step: Step
    frozen: Any
    inputs: Callable[[int, Position], Iterator[tuple[dict, Position]]]
    start: Position
    lineage: Callable[[Position], dict]
    observe: Callable[[Position], Scalars]
    flops_per_token: float
    peak: Peak
    on_start: Callable[[int], None]
    evaluations: tuple[Evaluation, ...] = ()
    finish: Callable[[TrainState], TrainState] = lambda state: state
    watch: Callable[[int, Scalars], list[str]] = lambda step, scalars: []
    card: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LoopConfig:
    """What the loop itself is told."""

    steps: int
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    failure: FailureConfig = field(default_factory=FailureConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


class _Rollback(Exception):
    """A non-finite step under the policy `rollback`; carries the position to go on from."""

    def __init__(self, step: int, position: Position):
        self.step, self.position = step, position


def train(stage: Stage, config: LoopConfig, workdir: epath.Path, run_config: dict) -> TrainState:
    """Runs `stage` to `config.steps`, from its newest checkpoint where there is one.

    Returns the final state. SIGTERM finishes the step, saves, and exits with code 143.

    Raises:
      RunError: a step is not finite and the policy is `raise`, or something cannot be written.
    """
    with contextlib.ExitStack() as resources:
        checkpointer = Checkpointer(workdir, config.checkpoint)
        resources.callback(checkpointer.close)
        stop = resources.enter_context(StopRequest())
        watchdog = resources.enter_context(Watchdog(config.failure.hang_minutes))
        run = _Run(stage, config, workdir, run_config, checkpointer, stop, watchdog)
        restored = checkpointer.restore(stage.template)
        position = None
        for _ in range(config.failure.max_rollbacks + 1):
            try:
                return run.run_from(restored, position)
            except _Rollback as rollback:
                watchdog.expect("the checkpoint before it", slow=True)
                checkpointer.wait()
                restored, position = checkpointer.restore(stage.template), rollback.position
                failed = rollback.step
        raise RunError(
            f"step {failed} is not finite after {config.failure.max_rollbacks} rollbacks: lower "
            "the learning rate, or look at the data near input position "
            f"{position}"
        )


@dataclass
class _Run:
    """One start of the loop: from a state and a position to the end, or to a rollback."""

    stage: Stage
    config: LoopConfig
    workdir: epath.Path
    run_config: dict
    checkpointer: Checkpointer
    stop: StopRequest
    watchdog: Watchdog

    def run_from(self, restored: Restored | None, position: Position | None) -> TrainState:
        stage, steps = self.stage, self.config.steps
        if restored is None:
            state, start, position = stage.initialize(), 0, position or stage.start
        else:
            state, start = restored.state, restored.step
            position = position or restored.input
        self.queue, self.spikes = MetricsQueue(), SpikeDetector(self.config.failure)
        self.positions: dict[int, Position] = {}
        with contextlib.ExitStack() as resources:
            self.writer = MetricsWriter(
                self.workdir,
                resume_step=start,
                primary=jax.process_index() == 0,
                config=self.config.logging,
            )
            resources.callback(self.writer.close)
            self.progress = resources.enter_context(
                Progress(
                    total_steps=steps,
                    start_step=start,
                    flops_per_token=stage.flops_per_token,
                    peak=stage.peak,
                    primary=jax.process_index() == 0,
                )
            )
            self._announce(restored, start)
            self.watchdog.expect(f"step {start + 1}, the first of this start,", slow=True)
            inputs = stage.inputs(start, position) if start < steps else iter(())
            for step in range(start + 1, steps + 1):
                batch, position = next(inputs)
                state, metrics = stage.step(state, stage.frozen, batch)
                self.positions[step] = position
                self.queue.put(step, metrics)
                for ready in self.queue.ready():
                    self._record(*ready)
                if step == steps:
                    self._wait_long("the end of the stage")
                    state = stage.finish(state)
                self._evaluate(step, state)
                if self.checkpointer.due(step) or step == steps:
                    self._save(step, state, position)
                if self.stop.asked(step) and step < steps:
                    self._exit(step, state, position)
            self._wait_long("the last checkpoint")
            self.checkpointer.wait()
        return state

    def _announce(self, restored: Restored | None, start: int) -> None:
        if jax.process_index() == 0:
            self.stage.on_start(start)
        for reason in restored.damaged if restored else ():
            self.progress.message(
                f"checkpoint damaged and moved to {self.workdir / 'damaged'}: {reason}"
            )
        if restored is not None:
            self.progress.message(f"resumed from the checkpoint of step {start}")

    def _record(self, step: int, scalars: Scalars) -> None:
        """Takes the metrics of a step, which arrive a few steps after it."""
        stage, position = self.stage, self.positions.pop(step)
        loss, skipped = scalars["loss"], scalars["skipped"] > 0
        scalars["spike"] = float(not skipped and self.spikes.is_spike(loss))
        self.progress.update(step, loss, scalars["tokens"])
        self.watchdog.expect(f"step {step + 1}")
        scalars |= stage.observe(position) | self.progress.throughput()
        logged = step % self.config.logging.every == 0 or skipped or scalars["spike"] > 0
        # Those of a step that is not logged would be unknown to a resumed run.
        alarms = stage.watch(step, scalars) if logged else []
        if logged:
            self.writer.write(step, scalars)
        for alarm in alarms:
            self.progress.message(f"step {step}: ALARM: {alarm}")
        if scalars["spike"]:
            self.progress.message(f"step {step}: loss spike ({loss:.4f})")
        if skipped:
            self._non_finite(step, scalars, position)

    def _non_finite(self, step: int, scalars: Scalars, position: Position) -> None:
        what = f"step {step}: loss {scalars['loss']:g}, gradient norm {scalars['grad_norm']:g}"
        policy = self.config.failure.non_finite
        self.progress.message(f"{what}: not finite, dropped (failure.non_finite = {policy})")
        if policy == "rollback":
            raise _Rollback(step, position)
        if policy == "raise":
            raise RunError(
                f"{what}: not finite; the step was dropped and the checkpoints are as they were: "
                "lower optimizer.learning_rate, or set failure.non_finite to skip or rollback"
            )

    def _drain(self) -> None:
        for step, scalars in self.queue.drain():
            self._record(step, scalars)

    def _wait_long(self, what: str) -> None:
        """Lets `what` take its time once all steps before it are done."""
        self._drain()
        self.watchdog.expect(what, slow=True)

    def _evaluate(self, step: int, state: TrainState) -> None:
        for evaluation in self.stage.evaluations:
            if step % evaluation.every and step != self.config.steps:
                continue
            self._wait_long(f"evaluation {evaluation.name} after step {step}")
            scalars, samples = evaluation.run(state)
            if scalars:
                named = {f"{evaluation.name}/{key}": value for key, value in scalars.items()}
                self.writer.write(step, named)
                shown = ", ".join(f"{key} {value:.4g}" for key, value in scalars.items())
                self.progress.message(f"step {step}: {evaluation.name}: {shown}")
            if samples:
                self.writer.samples(step, samples)
            self.progress.pause_clock()
            self.watchdog.expect(f"step {step + 1}")

    def _save(self, step: int, state: TrainState, position: Position) -> None:
        """Saves after all metrics up to `step` are written, so that a resumed log has no gap."""
        self._wait_long(f"the checkpoint of step {step}")
        self.writer.flush()
        lineage = self.stage.lineage(position) | {"stage": self.stage.name}
        self.checkpointer.save(
            step,
            state,
            input=position,
            config=self.run_config,
            lineage=lineage,
            model=self.stage.card,
        )
        self.watchdog.expect(f"step {step + 1}")

    def _exit(self, step: int, state: TrainState, position: Position) -> None:
        started = time.monotonic()
        self._save(step, state, position)
        self._wait_long(f"the checkpoint of step {step}")
        self.checkpointer.wait()
        self.progress.message(
            f"stopped by signal {self.stop.signal}: step {step} saved in "
            f"{time.monotonic() - started:.2f} s; the same command goes on from there"
        )
        raise SystemExit(self.stop.exit_code)
