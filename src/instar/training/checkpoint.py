"""The checkpoints of a run: asynchronous, atomic, verified.

A checkpoint is a folder `checkpoints/STEP` that appears by one rename once it is whole;
`instar.training.checkpoint_files` says what lies in it.
"""

import contextlib
import dataclasses
import errno
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from instar.errors import RunError, UserError
from instar.models.language_model import Params
from instar.training.agreement import SaveTimer, every_process_or_none
from instar.training.checkpoint_files import (
    ARRAY_ITEMS,
    CHECKPOINTS,
    JSON_ITEMS,
    absolute,
    read_arrays,
    read_item,
)
from instar.training.fingerprint import fingerprint
from instar.training.said_once import quiet_orbax
from instar.training.state import TrainState

quiet_orbax()


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save: every `minutes`, replaced by the next; every `keep_steps` steps, kept.

    The newest two are always there, so that one damaged checkpoint costs no more than the time
    between two. Either policy may be None.
    """

    minutes: float | None = 10.0
    keep_steps: int | None = None

    def check(self) -> None:
        if self.minutes is not None and not self.minutes > 0:
            raise UserError(f"checkpoint.minutes must be positive or None, not {self.minutes}")
        if self.keep_steps is not None and self.keep_steps < 1:
            raise UserError(f"checkpoint.keep_steps must be at least 1, not {self.keep_steps}")


@dataclass(frozen=True)
class Restored:
    """What a checkpoint held, and the newer ones that were set aside because they are damaged."""

    state: TrainState
    input: dict
    lineage: dict
    step: int
    damaged: tuple[str, ...] = ()


class Checkpointer:
    """Saves and restores the checkpoints of one run.

    Args:
      workdir: the run's folder; checkpoints lie in its `checkpoints/`.
      clock: seconds, for the policy by time.
    """

    def __init__(
        self,
        workdir: epath.Path,
        config: CheckpointConfig,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._directory = absolute(workdir) / CHECKPOINTS
        self._config, self._last_step = config, -1
        self._timer = SaveTimer(config.minutes, clock)
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        policies: list[keep.PreservationPolicy] = [keep.LatestN(2)]
        if self._config.keep_steps is not None:
            policies.append(keep.EveryNSteps(self._config.keep_steps))
        handlers = {name: ocp.StandardCheckpointHandler() for name in ARRAY_ITEMS}
        handlers |= {name: ocp.JsonCheckpointHandler(f"{name}.json") for name in JSON_ITEMS}
        return ocp.CheckpointManager(
            self._directory,
            item_handlers=handlers,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
                save_root_metadata=False,
            ),
        )

    def due(self, step: int) -> bool:
        """Whether either policy asks for a checkpoint after `step` steps."""
        keep_steps = self._config.keep_steps
        return (keep_steps is not None and step % keep_steps == 0) or self._timer.due(step)

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        input: dict,
        config: dict,
        lineage: dict,
        model: dict | None = None,
    ) -> None:
        """Starts a save and returns once the arrays are copied, so that they may be donated.

        Raises:
          RunError: this save, or the one before it, could not be written.
        """
        if step == self._last_step:
            return
        params, rest = split_state(state)
        lineage = lineage | {
            "step": step,
            "input": input,
            "fingerprint": fingerprint(state),
            "params": fingerprint(params),
        }
        arrays = {
            name: ocp.args.StandardSave(tree)
            for name, tree in zip(ARRAY_ITEMS, (params, rest), strict=True)
        }
        items = {"model": model or {}, "input": input, "config": config, "lineage": lineage}
        json_items = {name: ocp.args.JsonSave(value) for name, value in items.items()}
        with self._write_errors(step):
            self._probe(step)
            self._manager.save(step, args=ocp.args.Composite(**arrays, **json_items), force=True)
        self._timer.restart()
        self._last_step = step

    def wait(self) -> None:
        """Returns when what was saved is on disk.

        Raises:
          RunError: it could not be written.
        """
        with self._write_errors(self._last_step):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the folder."""
        self.wait()
        self._manager.close()

    def _probe(self, step: int) -> None:
        """Fails at once where no folder can be made.

        Orbax finds out after it has started threads that wait for that folder, and they keep the
        process from ending for minutes.
        """
        if jax.process_index() == 0:
            probe = self._directory / f"{step}.probe"
            probe.mkdir(exist_ok=True)
            probe.rmdir()

    @contextlib.contextmanager
    def _write_errors(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            full = getattr(error, "errno", None) == errno.ENOSPC or "space" in str(error)
            remedy = "free some space" if full else "see that the folder can be written to"
            reason = str(error).strip().splitlines()[0]
            raise RunError(
                f"the checkpoint of step {step} in {self._directory} could not be written "
                f"({reason}): {remedy} and start again; the run goes on from the one before"
            ) from error

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint; None where there is none."""
        return self._manager.latest_step()

    def restore(self, template: TrainState) -> Restored | None:
        """The newest whole checkpoint, laid out as `template` is; None where there is none yet.

        A checkpoint that cannot be read, or whose state or input is not what its lineage says, is
        moved to `damaged/` once an older one proves whole, which is then taken. Where none is, the
        fault may lie elsewhere (memory, the store, the model), and all stay where they are.

        Raises:
          UserError: there are checkpoints and none of them can be read.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._restore(step, template)
            except Exception as error:  # whatever a damaged file makes its reader raise
                lines = str(error).strip().splitlines() or [type(error).__name__]
                damaged[step] = f"step {step}: {lines[0][:200]}"
                continue
            for worse in damaged:
                self._set_aside(worse)
            self._last_step = step
            return Restored(*restored, step, tuple(damaged.values()))
        if damaged:
            raise UserError(
                f"no checkpoint in {self._directory} can be read ({'; '.join(damaged.values())}): "
                "restore the folder from a copy, or start with a new workdir"
            )
        return None

    def _restore(self, step: int, template: TrainState) -> tuple[TrainState, dict, dict]:
        with every_process_or_none():
            state, input, lineage = self._read(step, template)
        if fingerprint(state) != lineage["fingerprint"]:
            raise ValueError("the state's fingerprint is not the one that was saved with it")
        return state, input, lineage

    def _read(self, step: int, template: TrainState) -> tuple[TrainState, dict, dict]:
        # Not by the manager, in which the processes that can read wait for one that cannot.
        folder = self._directory / str(step)
        input, lineage = read_item(folder, "input"), read_item(folder, "lineage")
        if input != lineage["input"]:
            raise ValueError("the input position is not the one that was saved with it")
        params_template, rest_template = split_state(template)
        params = read_arrays(folder, "params", params_template)
        rest = read_arrays(folder, "state", rest_template)
        return dataclasses.replace(rest, params=params), input, lineage

    def _set_aside(self, step: int) -> None:
        """Moves a damaged checkpoint out of the way; nothing is deleted."""
        if jax.process_index() == 0:
            aside = self._directory.parent / "damaged"
            aside.mkdir(parents=True, exist_ok=True)
            target = aside / f"{step}-{int(time.time())}"
            (self._directory / str(step)).rename(target)
        self._manager.reload()


def split_state(state: TrainState) -> tuple[Params, TrainState]:
    """The parameters, which the next stage takes over, and the rest, which it does not."""
    return state.params, dataclasses.replace(state, params={})
