"""What hangs ends, and what takes its time does not."""

import queue
import threading
import time

import pytest

from instar.errors import RestartError, UserError
from instar.training import watchdog
from instar.training.failure import FailureConfig
from instar.training.watchdog import Watchdog

MINUTES, TICK = 0.2 / 60, 0.02


@pytest.fixture
def ends():
    """Collects how the watchdog would end the process."""
    return queue.SimpleQueue()


def test_a_step_that_does_not_come(ends):
    with Watchdog(MINUTES, lambda *said: ends.put(said), TICK) as dog:
        dog.expect("step 7")
        code, why = ends.get(timeout=30)
    assert code == RestartError.code
    assert why.startswith("step 7 has been waited for since") and "failure.hang_minutes" in why


def test_steps_that_come_and_what_is_no_step_are_let_be(ends, monkeypatch):
    # A machine that pauses delays the steps here, and the looks of the watchdog as well.
    looked, limit = threading.Semaphore(0), MINUTES * 60
    monkeypatch.setattr(watchdog, "PATIENCE", 1e6)
    with Watchdog(MINUTES, lambda *said: ends.put(said), TICK) as dog:
        wait = dog._stopped.wait

        def look(seconds):
            looked.release()
            return wait(seconds)

        dog._stopped.wait = look
        for step in range(1, 5):
            for _ in range(int(0.5 * limit / TICK)):
                looked.acquire()
            dog.expect(f"step {step}")
        dog.expect("an evaluation", slow=True)
        time.sleep(3 * limit)
    assert ends.empty()


def test_none_waits_for_ever(ends):
    with Watchdog(None, lambda *said: ends.put(said), TICK) as dog:
        dog.expect("step 1")
        time.sleep(3 * TICK)
    assert ends.empty() and not [t for t in threading.enumerate() if t.name == "watchdog"]


def test_the_limit_is_positive():
    with pytest.raises(UserError, match=r"failure\.hang_minutes must be positive"):
        FailureConfig(hang_minutes=0).check()
