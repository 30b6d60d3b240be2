"""A run that hangs ends, so that whoever started it can start it again."""

import faulthandler
import sys
import threading
import time
from collections.abc import Callable
from typing import Self

from instar.errors import RestartError
from instar.sharding.processes import end_here

# How much longer may take what is no step: compiling it, reading a checkpoint, an evaluation.
PATIENCE = 10


class Watchdog:
    """Ends the process, and with it all others, when what it waits for does not come; a context.

    One process of several that stands still, in a read or in a collective operation of the devices,
    makes all others wait without end and without an error. Nothing here waits for the device: the
    loop says what is next, and a thread of its own looks at the clock.

    Args:
      minutes: for a step; None never ends anything.
      end: called with an exit code and a sentence where it does.
      tick: seconds between two looks; None for a tenth of the limit, ten at most.
    """

    def __init__(
        self,
        minutes: float | None,
        end: Callable[[int, str], None] = end_here,
        tick: float | None = None,
    ):
        self._minutes, self._end = minutes, end
        self._tick = tick or min(10.0, 6 * (minutes or 1))
        self._stopped, self._lock = threading.Event(), threading.Lock()
        self.expect("the start of the run", slow=True)

    def __enter__(self) -> Self:
        if self._minutes is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def expect(self, what: str, *, slow: bool = False) -> None:
        """Says that something came, and that `what` is next; `slow`, that it is no mere step."""
        with self._lock:
            self._what, self._since, self._ticks = what, time.time(), 0
            self._limit = (self._minutes or 0) * (PATIENCE if slow else 1)

    def _watch(self) -> None:
        # Looks are counted, not hours: a process that was stopped (Ctrl-Z) has not hung meanwhile.
        while not self._stopped.wait(self._tick):
            with self._lock:
                self._ticks += 1
                over = self._ticks * self._tick > 60 * self._limit
                what, since, limit = self._what, self._since, self._limit
            if over:
                break
        else:
            return
        # Where each thread stands, for whoever looks for the reason.
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        clock = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(since))
        self._end(
            RestartError.code,
            f"{what} has been waited for since {clock}, more than {limit:g} minutes: this process, "
            "or one that it waits for, hangs (above is where this one stands); started again, the "
            "run goes on from its last checkpoint; failure.hang_minutes sets the limit",
        )
