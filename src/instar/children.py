"""Commands in processes of their own, which do not outlive the one that started them.

What a command held, on the host and on devices, is then given back when it is over, and a crash is
its own. Signals are handed on, so that a command stops as it would alone; and a command whose
parent is gone, killed perhaps by what cannot be caught, ends at once: nobody else must find a
folder in use that looks abandoned.
"""

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import IO


class Children:
    """Runs commands; a context, in which SIGTERM and Ctrl-C go to those under way.

    Attributes:
      signal: the number of the last of these signals; None before any.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._children: set[subprocess.Popen] = set()

    @contextlib.contextmanager
    def handing_on(self) -> Iterator[None]:
        """While it lasts, the signals are handed on; only in a main thread."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        previous = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        for child in tuple(self._children):
            child.send_signal(number)

    def run(
        self,
        words: Sequence[str],
        tick: Callable[[], None],
        seconds: float = 30.0,
        output: IO[bytes] | None = None,
    ) -> int:
        """Runs `instar WORDS` to its end and returns its exit code, as a shell reports it.

        Several threads may do so at a time.

        Args:
          tick: called every `seconds` meanwhile.
          output: what the command writes to its standard output and error goes there; None: to
            those of this process.
        """
        if self.signal is not None:
            return 128 + self.signal
        held, kept = os.pipe()
        child = None
        try:
            # Its own group, so that Ctrl-C in a terminal reaches it once, by way of here.
            child = subprocess.Popen(
                [sys.executable, "-m", __name__, str(held), *words],
                pass_fds=(held,),
                process_group=0,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
            )
            os.close(held)
            self._children.add(child)
            if self.signal is not None:  # it came while the process was made
                child.send_signal(self.signal)
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = child.wait(seconds)
                    return code if code >= 0 else 128 - code
                tick()
        finally:
            self._children.discard(child)
            os.close(kept)


def _end_with_parent(held: int) -> None:
    """Waits for the end of a pipe that the parent holds open, and then ends this process."""
    os.read(held, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """``python -m instar.children PIPE COMMAND ...``: `instar COMMAND ...`, as long as PIPE."""
    held = int(sys.argv.pop(1))
    os.set_inheritable(held, False)
    threading.Thread(target=_end_with_parent, args=(held,), daemon=True).start()
    runpy.run_module("instar", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
