"""What a run shows while it runs: one live line on a terminal, a line now and then in a log."""

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Task, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

from instar.training.flops import mfu
from instar.training.hardware import Peak

_PLAIN_EVERY = 10.0


class Throughput:
    """Tokens and steps a second over the last `window` seconds of training.

    The clock starts when the first step is done, so that compilation is left out; what `pause`
    reports (an evaluation) is left out too. At least the last two steps count, however slow.
    """

    def __init__(self, window: float = 20.0, clock: Callable[[], float] = time.monotonic):
        self._window, self._clock = window, clock
        self._paused, self._tokens = 0.0, 0.0
        self._marks: deque[tuple[float, int, float]] = deque()

    def update(self, step: int, tokens: float) -> None:
        """Says that `step`, of `tokens` tokens, is done."""
        now = self._clock() - self._paused
        self._tokens += tokens
        self._marks.append((now, step, self._tokens))
        while len(self._marks) > 3 and now - self._marks[0][0] > self._window:
            self._marks.popleft()

    def pause(self) -> None:
        """Leaves the time since the last update out."""
        if self._marks:
            self._paused = self._clock() - self._marks[-1][0]

    @property
    def tokens_per_second(self) -> float | None:
        """None until two steps are done."""
        return self._rate(2)

    @property
    def steps_per_second(self) -> float | None:
        """None until two steps are done."""
        return self._rate(1)

    def _rate(self, field: int) -> float | None:
        if len(self._marks) < 2:
            return None
        first, last = self._marks[0], self._marks[-1]
        return (last[field] - first[field]) / max(last[0] - first[0], 1e-9)


class Progress:
    """The progress of a run: step, loss, tokens a second, MFU and the time that is left.

    On a terminal a line that is redrawn in place; elsewhere (a log file) a plain line for the first
    step, for the last, and at most every ten seconds between. MFU against a measured peak, which is
    lower than a maker's and so flatters, is marked with "~".

    Args:
      total_steps: the step at which the run ends; `start_step`, the one that it goes on from.
      flops_per_token: model FLOP of a training token.
      peak: of all devices; None leaves MFU out.
      primary: whether this process shows anything; rates are kept everywhere.
      console: where to; standard error by default, so that a command's output stays its own.
      clock: seconds, from any origin.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        flops_per_token: float,
        peak: Peak | None,
        primary: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._peak, self._clock = total_steps, peak, clock
        self._flops_per_token = flops_per_token
        self._console = console or Console(stderr=True)
        self._rates = Throughput(clock=clock)
        self._plain_due = clock()
        self._primary, self._bar = primary, None
        if primary and self._console.is_terminal:
            self._bar = _live_bar(self._console)
            self._task = self._bar.add_task(
                "", total=total_steps, completed=start_step, line="compiling"
            )

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, loss: float, tokens: float) -> None:
        """Shows that `step` is done, with its loss (nats a token) and its number of tokens."""
        self._rates.update(step, tokens)
        if not self._primary:
            return
        line = self._line(step, loss)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, line=line)
        elif self._clock() >= self._plain_due or step == self._total:
            self._plain_due = self._clock() + _PLAIN_EVERY
            self._print(f"step {step:,}/{self._total:,}  {line}")

    def message(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._primary:
            self._print(text)

    def pause_clock(self) -> None:
        """Leaves the time since the last update, an evaluation's, out of the rates."""
        self._rates.pause()

    def throughput(self) -> dict[str, float]:
        """`tokens_per_second` and `mfu` as metrics; empty until two steps are done."""
        rate = self._rates.tokens_per_second
        if rate is None:
            return {}
        values = {"tokens_per_second": rate}
        if self._peak is not None:
            values["mfu"] = mfu(self._flops_per_token, rate, self._peak.flops)
        return values

    def _line(self, step: int, loss: float) -> str:
        parts = [f"loss {loss:.4f}"]
        values = self.throughput()
        if values:
            parts.append(f"{values['tokens_per_second']:,.0f} tok/s")
        if "mfu" in values:
            parts.append(f"MFU {'~' if self._peak.measured else ''}{100 * values['mfu']:.1f} %")
        if steps := self._rates.steps_per_second:
            parts.append(f"{_duration((self._total - step) / steps)} left")
        return "  ".join(parts)

    def _print(self, text: str) -> None:
        # The text of samples and paths is shown as it is: no markup, no colours, no wrapping.
        self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


def _live_bar(console: Console) -> RichProgress:
    """step 120/2,000 ━━━━━━━━ loss 4.1  16,228 tok/s  MFU ~41.2 %  3:12 left"""
    return RichProgress(
        _StepColumn(table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=8)),
        TextColumn("{task.fields[line]}", markup=False, table_column=Column(no_wrap=True)),
        console=console,
        refresh_per_second=4,
        expand=True,
    )


class _StepColumn(TextColumn):
    """`step 120/2,000`."""

    def __init__(self, table_column: Column):
        super().__init__("", table_column=table_column)

    def render(self, task: Task) -> str:
        return f"step {int(task.completed):,}/{int(task.total):,}"


def _duration(seconds: float) -> str:
    """0:07, 3:12, 1:03:12, 2 d 03:12."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02d}:{minute:02d}"
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"
