"""What goes wrong in a run and what is done about it: signals, non-finite steps, loss spikes."""

import collections
import math
import signal
import statistics
from dataclasses import dataclass
from types import FrameType
from typing import Literal, Self

import jax
from jax.experimental import multihost_utils

from instar.errors import UserError


@dataclass(frozen=True)
class FailureConfig:
    """What to do about a step whose loss or gradient is not finite.

    The device drops such a step in any case. `raise` then ends the run; `skip` goes on with the
    next batch; `rollback` goes back to the newest checkpoint and on with the batches *after* the
    one that failed, at most `max_rollbacks` times in a run. A loss more than `spike_deviations`
    standard deviations above the mean of the last `spike_window` is flagged.

    `hang_minutes` is how long to wait for a step; one that does not come ends all processes with
    exit code 75, so that a scheduler starts them again (see `instar.training.watchdog`). What is no
    step (the first with its compilation, an evaluation, a save) may take ten times as long.
    """

    non_finite: Literal["raise", "skip", "rollback"] = "raise"
    max_rollbacks: int = 3
    spike_deviations: float = 6.0
    spike_window: int = 100
    hang_minutes: float | None = 30.0

    def check(self) -> None:
        if self.spike_window < 2:
            raise UserError(f"failure.spike_window must be at least 2, not {self.spike_window}")
        if not self.spike_deviations > 0:
            raise UserError(
                f"failure.spike_deviations must be positive, not {self.spike_deviations}"
            )
        if self.max_rollbacks < 1:
            raise UserError(f"failure.max_rollbacks must be at least 1, not {self.max_rollbacks}")
        if self.hang_minutes is not None and not self.hang_minutes > 0:
            raise UserError(
                f"failure.hang_minutes must be positive or None, not {self.hang_minutes}"
            )


class SpikeDetector:
    """Flags losses that stand out from those before them."""

    def __init__(self, config: FailureConfig):
        self._deviations = config.spike_deviations
        self._recent: collections.deque[float] = collections.deque(maxlen=config.spike_window)
        self._in_a_row = 0

    def is_spike(self, loss: float) -> bool:
        """Whether `loss` is a spike; it joins the window where it is none.

        The trend of a falling loss widens the window's deviation, so early training is not flagged.
        What is not finite is a spike: in the window it would make every comparison false. As many
        spikes in a row as the window holds are a new level, which a new window then learns.
        """
        if not math.isfinite(loss):
            return True
        window = self._recent
        if len(window) == window.maxlen:
            mean, deviation = statistics.fmean(window), statistics.stdev(window)
            if loss > mean + self._deviations * max(deviation, 1e-12):
                self._in_a_row += 1
                if self._in_a_row < window.maxlen:
                    return True
                window.clear()
        self._in_a_row = 0
        window.append(loss)
        return False


class StopRequest:
    """Turns SIGTERM and Ctrl-C into a question that the loop asks between steps.

    A second Ctrl-C interrupts at once. With several processes JAX's preemption service, which
    watches SIGTERM itself, makes all of them stop after the same step.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def asked(self, step: int) -> bool:
        """Whether to stop after `step`."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal = signal.SIGTERM
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as a shell reports it: 143 for SIGTERM."""
        return 128 + int(self.signal or 0)
