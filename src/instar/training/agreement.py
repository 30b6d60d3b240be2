"""What several processes must decide alike, since what follows needs all of them."""

import contextlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

# With several processes the clock is asked about this often in the time between two saves.
ASKED_PER_SAVE = 10


class SaveTimer:
    """Whether `minutes` have passed since the last save, by the clock of process 0.

    Clocks differ, and a save needs every process: process 0 decides for all. Its answer is a
    collective operation that waits for the devices, so with several processes it is asked for only
    every few steps: as many as process 0 said with its answer before.

    Args:
      minutes: None is never.
      clock: seconds.
    """

    def __init__(self, minutes: float | None, clock: Callable[[], float]):
        self._minutes, self._clock = minutes, clock
        self._saved = self._asked = clock()
        self._asked_step: int | None = None
        self._next_step = 0

    def due(self, step: int) -> bool:
        """Whether to save after `step`; every process must ask after every step."""
        if self._minutes is None or step < self._next_step:
            return False
        due = self._clock() - self._saved >= 60 * self._minutes
        if jax.process_count() > 1:
            answer = np.asarray([due, self._pause(step)], np.int32)
            due, pause = map(int, multihost_utils.broadcast_one_to_all(answer))
            self._next_step = step + pause
        return bool(due)

    def _pause(self, step: int) -> int:
        """The steps that fit into a tenth of the time between saves, as fast as they now are."""
        now, pause = self._clock(), 1
        if self._asked_step is not None and now > self._asked:
            rate = (step - self._asked_step) / (now - self._asked)
            pause = max(1, min(int(60 * self._minutes / ASKED_PER_SAVE * rate), 1_000_000))
        self._asked, self._asked_step = now, step
        return pause

    def restart(self) -> None:
        """Counts from now: something was saved."""
        self._saved = self._clock()


def first_before_others(action: Callable[[], None]) -> None:
    """Does it on process 0 and then on the others, where it changes what they would change too."""
    if jax.process_index() == 0:
        action()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("first_before_others")
    if jax.process_index() != 0:
        action()


@contextlib.contextmanager
def every_process_or_none() -> Iterator[None]:
    """Makes the body fail on every process where it fails on one.

    Raises:
      ValueError: the body succeeded here and raised an exception on another process.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    if jax.process_count() > 1:
        succeeded = multihost_utils.process_allgather(np.asarray(failure is None))
        if failure is None and not succeeded.all():
            raise ValueError(f"process {int(np.argmin(succeeded))} could not read it")
    if failure is not None:
        raise failure
