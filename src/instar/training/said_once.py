"""An error in a checkpoint is said once, by the exception that reaches who saves or restores.

Orbax works on many arrays at once. Of those that fail with the same disk it raises the first; the
others turn up as tracebacks on standard error, from threads and loops that nobody asks.
"""

import logging
import sys
import traceback
from types import TracebackType
from typing import Any


def quiet_orbax() -> None:
    """Keeps those tracebacks from standard error; all else is printed as before."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_news)
    previous = sys.unraisablehook
    sys.unraisablehook = lambda event: None if _is_leftover(event) else previous(event)


def _is_news(record: logging.LogRecord) -> bool:
    """False for the logged traceback of an error of Orbax, or one that its loop was left with."""
    if record.name == "asyncio":
        return "never retrieved" not in record.getMessage()
    return not (record.exc_info and _is_of_orbax(record.exc_info[2]))


def _is_leftover(event: Any) -> bool:
    """True for an array whose result nobody waits for since another array has failed."""
    closed = event.object is None and str(event.exc_value) == "Event loop is closed"
    return closed or _is_of_orbax(event.exc_traceback)


def _is_of_orbax(trace: TracebackType | None) -> bool:
    return any("orbax" in frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace))
